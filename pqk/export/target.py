"""Prepares the folder that `pqk export -o` writes: a new one, an empty one, or an earlier export, which is replaced.

A new folder appears whole, by a rename. An existing folder is written from the inside, as nothing can be renamed over a
mount point: all files are made in a folder `.pqk-export.PID.tmp` in it, and are then moved up, the manifest last. A
folder without a manifest is not an export, so no reader accepts a mixture. When the process is killed while it moves
files, the next export recognises them by the manifests in that folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pqk.errors import PqkError
from pqk.files import alive, check_writable, clear_write_errors, fsync_folder
from pqk.oserrors import cannot_read, printable, says_nothing

MANIFEST = "manifest.json"
_BEFORE = "before.json"  # the manifest of the export that is being replaced
_INSIDE = re.compile(r"\.pqk-export\.(\d+)\.tmp")
_DISK = "lost+found"  # at the top of every ext4 disk


def target_of(asked: Path) -> Path:
    """Returns the folder that `asked` means, links followed. Its parents are made.

    Raises PqkError when it is neither new, nor empty, nor an earlier export, or cannot be written.
    """
    out = asked.resolve()
    if out.is_symlink():  # resolve follows other links
        raise PqkError(f"-o {printable(asked)}: it is a loop of symbolic links")
    check_target(out)
    check_writable(out if out.exists() else out.parent)
    return out


def check_target(out: Path) -> None:
    """Raises PqkError when `out` exists and is neither an empty folder nor an earlier export."""
    if not out.exists():
        return
    if not out.is_dir():
        raise PqkError(f"-o {out}: it is a file, not a folder")
    present = [path for path in out.iterdir() if not _INSIDE.fullmatch(path.name) and path.name != _DISK]
    if not present:
        return
    known = _known(out)
    if not known:
        raise PqkError(f"-o {out}: the folder is not empty and holds no earlier export; choose another")
    # A plan of another name was built on the device by edge_eval.py, out of a graph that is here.
    strange = sorted(p.name for p in present if p.name not in known and not (p.suffix == ".plan" and p.is_file()))
    if strange:
        raise PqkError(f"-o {out}: beside an earlier export it holds {strange[0]!r}, which would be lost")


def _known(out: Path) -> set[str]:
    """Returns the files of an earlier export in a folder, also of one that was killed while it moved files."""
    inside = [path for path in out.iterdir() if _INSIDE.fullmatch(path.name)]
    known: set[str] = set()
    for manifest in (out / MANIFEST, *(folder / name for folder in inside for name in (MANIFEST, _BEFORE))):
        try:
            known |= {*json.loads(manifest.read_text(encoding="utf-8"))["files"], MANIFEST}
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, OSError) and says_nothing(error):
                raise PqkError(cannot_read(manifest, error)) from error
    return known


@contextmanager
def export_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder for the files of an export; at the end they are on disk, and are the contents of `out`.

    When the block fails, `out` is unchanged. Raises PqkError when other files have appeared there meanwhile.
    """
    with clear_write_errors(out):
        new = not out.exists()
        if new:
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        else:
            folder = out / f".pqk-export.{os.getpid()}.tmp"
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier process with this number
            folder.mkdir()
        try:
            yield folder
            for path in folder.iterdir():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
            fsync_folder(folder)
            check_target(out)  # another process may have come first
            if new and not out.exists():
                folder.chmod(0o755)
                folder.replace(out)
                fsync_folder(out.parent)
            elif new:
                raise PqkError(f"-o {out}: another process made this folder meanwhile; try again")
            else:
                _move_up(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _move_up(folder: Path, out: Path) -> None:
    """Replaces the export in `out` by the one in `folder`, which lies in it."""
    if (out / MANIFEST).exists():
        (out / MANIFEST).replace(folder / _BEFORE)
        fsync_folder(out)
    made = [path for path in folder.iterdir() if path.name not in (MANIFEST, _BEFORE)]
    for path in made:
        path.replace(out / path.name)
    stays = {folder.name, _DISK, *(path.name for path in made)}
    for old in [path for path in out.iterdir() if path.name not in stays]:
        another = _INSIDE.fullmatch(old.name)
        if another is None:
            old.unlink()
        elif not alive(int(another[1])):
            shutil.rmtree(old, ignore_errors=True)
    fsync_folder(out)
    (folder / MANIFEST).replace(out / MANIFEST)
    fsync_folder(out)
