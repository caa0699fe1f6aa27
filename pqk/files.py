"""Writes files that are either whole or absent (beside the target, fsync, rename), and hashes files and JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pqk.errors import PqkError
from pqk.locks import lock
from pqk.oserrors import cannot_read, cannot_write

_OWNER = ".owner"
"""A file in a temporary folder, locked while its maker lives."""


@contextlib.contextmanager
def clear_write_errors(path: Path | str) -> Iterator[None]:
    """Turns the OSErrors of writing into one sentence that names the path."""
    try:
        yield
    except OSError as error:
        sentence = cannot_write(path, error)
        if sentence is not None:
            raise PqkError(sentence) from error
        raise


def check_readable(path: Path | str) -> None:
    """Raises PqkError when a file cannot be opened: libraries that read it would call it damaged."""
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise PqkError(cannot_read(path, error)) from error


def matching(folder: Path, pattern: str) -> list[Path]:
    """Returns the entries of `folder` that match a pattern such as '*.md', sorted; none when there is no such folder.

    Raises PermissionError for a folder that may not be read; `Path.glob` would find nothing there.
    """
    try:
        return sorted(path for path in folder.iterdir() if fnmatchcase(path.name, pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []


def below(folder: Path) -> list[Path]:
    """Returns all files and folders below `folder`, sorted; links to folders are not followed.

    Raises OSError for a folder that cannot be read; `Path.rglob` would leave it out.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = os.walk(folder, onerror=refuse)
    return sorted(Path(parent) / name for parent, folders, files in found for name in (*folders, *files))


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path in the target's folder; on success fsync it and rename it over the target.

    On any failure the target stays as it was and the temporary file is removed.
    Raises PqkError when the folder is not writable or the disk is full.
    """
    target = Path(path)
    with clear_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(target)
            fsync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder beside the target; on success it is on disk as a whole, and gets the target's name.

    On any failure there is no target and the temporary folder is removed. Folders of killed processes are removed too.
    Raises PqkError when something has the target's name already, or the disk is full or not writable.
    """
    taken = f"{target} exists already; choose another name, or move it away"
    with clear_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            raise PqkError(taken)
        for old in target.parent.iterdir():
            maker = old.name.removeprefix(f".{target.name}.").removesuffix(".tmp")
            if old.name == f".{target.name}.{maker}.tmp" and maker.isdigit() and not alive(int(maker)):
                shutil.rmtree(old, ignore_errors=True)
        temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
        temporary.mkdir()
        try:
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                if path.is_dir():
                    fsync_folder(path)
                else:
                    with path.open("rb") as written:
                        os.fsync(written.fileno())
            if os.path.lexists(target):  # a rename would replace an empty folder
                raise PqkError(taken)
            temporary.rename(target)
            fsync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """Yields a new folder `pqk-KIND-...` where the system keeps temporary files, and removes it at the end.

    What a killed process left behind is removed by the next caller, or by `sweep_temporary`.
    Raises PqkError when the disk is full, and FileNotFoundError when no folder for temporary files can be written.
    """
    parent = Path(tempfile.gettempdir())
    with clear_write_errors(parent):
        sweep_temporary(parent)
        folder = Path(tempfile.mkdtemp(prefix=f"pqk-{kind}-", dir=parent))
        try:
            handle = os.open(folder / f"{_OWNER}.new", os.O_RDWR | os.O_CREAT, 0o600)
            with contextlib.suppress(PqkError):  # no locks there: then it is not swept
                lock(handle, folder / _OWNER)
            (folder / f"{_OWNER}.new").rename(folder / _OWNER)  # locked before others can find it
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def sweep_temporary(parent: Path | None = None) -> None:
    """Removes this user's folders of `temporary_folder` whose maker is gone: nobody holds their lock.

    parent: where to look; default: where the system keeps temporary files. Process ids would not do, as containers
    share folders.
    """
    for folder in matching(parent or Path(tempfile.gettempdir()), "pqk-*-*"):
        with contextlib.suppress(OSError, PqkError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            handle = os.open(folder / _OWNER, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if lock(handle, folder / _OWNER, wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def alive(process: int) -> bool:
    """Tells whether a process of this number runs, whoever owns it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def check_writable(folder: Path) -> None:
    """Makes the folder if need be, and write and remove an empty file in it. Raises PqkError when that fails."""
    with clear_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def fsync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path | str, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Writes JSON atomically; NaN and infinities are refused (ValueError), they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
