"""Stores artifacts, results named by the hash of all their inputs, so that a run can resume: `Store`.

    <root>/<stage>/<first 16 hex digits of the key>/   the files of one artifact, and manifest.json
    <root>/<stage>/.<16 digits>.<pid>.<random>.tmp/    one that is being made, or that a killed process left
    <root>/.scratch/<stage>-<16 digits>/               unfinished work that a later process resumes
    <root>/.locks/<stage>-<16 digits>.lock             held (flock) while an artifact is made or checked

An artifact is made in a temporary folder and renamed into place when every byte is on disk. So it is whole or absent
whenever the process is killed. The kernel releases the lock of a killed process; the next one removes its leftovers.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pqk.errors import PqkError
from pqk.files import below, clear_write_errors, fsync_folder, sha256_file, sha256_json, write_json
from pqk.locks import locked
from pqk.oserrors import says_nothing
from pqk.store.mirror import Mirror

MANIFEST = "manifest.json"
_STAGE = re.compile(r"[a-z][a-z0-9_-]{0,47}")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of <fcntl.h> and <linux/fs.h>
_TEMPORARY = re.compile(r"\.([0-9a-f]{16})\..*\.tmp")

OnEvent = Callable[[str, str, str, float], None]
"""Called as on_event(kind, stage, key, seconds). Kinds: 'wait' (another process is making it), 'damaged' (it will be
made again), 'make' (begins), 'failed' (it raised), 'done' (seconds it took), 'reuse' (seconds it took when it was
made). A long stage also calls it with 'progress': then the third argument is a text, and the fourth the share done."""


@dataclass(frozen=True)
class Artifact:
    """One finished artifact: its folder, and the manifest of its files and inputs.

    Manifest keys: stage, key, inputs, files ({relative name: {sha256, bytes}}), seconds, created (ISO 8601, UTC), and
    commit (of the code that made it; None outside a repository, absent in artifacts of older versions).
    """

    path: Path
    key: str
    stage: str
    reused: bool
    manifest: dict[str, Any]


class Store:
    """Artifacts under `root`. Safe for many processes and threads at once on one machine.

    A stored artifact is reused when the sha256 of every file is that of the manifest. fresh: make every artifact again
    the first time this store is asked for it. commit: written into the manifests of new artifacts, part of no key.
    mirror: where other machines find them, and this one theirs.
    """

    def __init__(
        self, root: Path, fresh: bool = False, commit: str | None = None, mirror: Mirror | None = None
    ) -> None:
        self.root = Path(root)
        self._mirror = mirror
        self.fresh = fresh
        self.commit = commit
        self._made: set[str] = set()
        self._begun: set[str] = set()  # scratch folders that this store has handed out

    def key(self, stage: str, inputs: Mapping[str, Any]) -> str:
        """Returns the sha256 of the canonical JSON of stage and inputs. The order of keys does not matter; tuples equal
        lists.

        Raises PqkError for a wrong stage name, TypeError for an input that is not plain data (texts, finite numbers,
        true/false, null, lists and mappings of them), ValueError for NaN and infinities.
        """
        if not _STAGE.fullmatch(stage):
            raise PqkError(f"stage {stage!r} must be a small letter, then up to 47 small letters, digits, '_' or '-'")
        return sha256_json({"stage": stage, "inputs": _plain(inputs, stage)})

    def get_or_make(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        make: Callable[[Path], None],
        on_event: OnEvent | None = None,
        stale: Callable[[Path], bool] = lambda folder: False,
    ) -> Artifact:
        """Returns the artifact of these inputs: the stored one when it is intact, else a new one from `make(folder)`.

        `make` gets an empty folder. When it raises, nothing is kept and its error is raised. When two callers ask for
        the same artifact at once, one makes it and the other one waits. `make` may ask for other artifacts, but not for
        its own. `stale` gets an intact artifact that this store has not made itself; True: it is made again.
        Raises PqkError when the disk is full or not writable.
        """
        key = self.key(stage, inputs)
        tell = on_event if on_event is not None else _say_nothing
        with self._lock(stage, key[:16], waiting=lambda: tell("wait", stage, key, 0.0)):
            self._sweep(stage, key[:16])
            target = self.root / stage / key[:16]
            manifest = _intact(target, stage, key)
            if manifest is None and self._mirror is not None and not self.fresh:
                manifest = self._fetch(self._mirror, target, stage, key)
            again = manifest is not None and key not in self._made and (self.fresh or stale(target))
            if manifest is not None and not again:
                tell("reuse", stage, key, float(manifest["seconds"]))
                return Artifact(target, key, stage, True, manifest)
            if os.path.lexists(target) and manifest is None:
                tell("damaged", stage, key, 0.0)
            tell("make", stage, key, 0.0)
            try:
                manifest = self._make(target, stage, key, _plain(inputs, stage), make)
            except BaseException:
                tell("failed", stage, key, 0.0)
                raise
            self._made.add(key)
            if self._mirror is not None:
                self._mirror.send(stage, key[:16], target)
            tell("done", stage, key, float(manifest["seconds"]))
            return Artifact(target, key, stage, False, manifest)

    @contextlib.contextmanager
    def scratch(self, stage: str, inputs: Mapping[str, Any]) -> Iterator[Path]:
        """Yields a folder for unfinished work on an artifact, such as the checkpoint of a training.

        It remains when the process is killed, so that the next one resumes there; it is removed when the block ends
        without an error. Use it inside the `make` of the artifact with these inputs, which holds the lock.
        """
        folder = self.root / ".scratch" / f"{stage}-{self.key(stage, inputs)[:16]}"
        with clear_write_errors(folder):
            if self.fresh and self.key(stage, inputs) not in self._begun:
                shutil.rmtree(folder, ignore_errors=True)
            self._begun.add(self.key(stage, inputs))
            folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)

    def trim(self, stage: str, limit: int, spare_s: float = 3600.0) -> None:
        """Removes the least recently used artifacts of a stage, until the others take at most `limit` bytes.

        The time of use is that of the artifact's folder, which a caller may set. Artifacts used within the last
        `spare_s` seconds stay, and so do those that another process is making or checking.
        """
        found = []
        for folder in _folders(self.root / stage):
            with contextlib.suppress(OSError):
                if not folder.name.startswith("."):
                    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                    found.append((folder.stat().st_mtime, size, folder))
        total = sum(size for _, size, _ in found)
        for used, size, folder in sorted(found):
            if total <= limit or time.time() - used < spare_s:
                return
            with self._lock(stage, folder.name, timeout=0) as free:
                if free:
                    with contextlib.suppress(OSError):
                        _delete(folder.rename(self._temporary(folder)))
                    total -= size

    def _make(self, target: Path, stage: str, key: str, inputs: Any, make: Callable[[Path], None]) -> dict[str, Any]:
        with clear_write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._temporary(target)
            temporary.mkdir()
        try:
            begin = time.perf_counter()
            _call(make, temporary)
            with clear_write_errors(target):
                manifest = {
                    "stage": stage,
                    "key": key,
                    "inputs": inputs,
                    "files": _contents(temporary, sync=True),
                    "seconds": round(time.perf_counter() - begin, 3),
                    "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                    "commit": self.commit,
                }
                write_json(temporary / MANIFEST, manifest | {"sha256": sha256_json(manifest)})
                old = self._put(temporary, target)
                fsync_folder(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if old is not None:
            with contextlib.suppress(
                OSError
            ):  # the new one is in place; the next sweep removes the rest of the old one
                _delete(old)
        return manifest

    def _fetch(self, mirror: Mirror, target: Path, stage: str, key: str) -> dict[str, Any] | None:
        """Returns the manifest of a fetched artifact; None where there is none, or not a whole one."""
        with clear_write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._temporary(target)
            temporary.mkdir()
        try:
            if not mirror.fetch(stage, key[:16], temporary):
                return None
            if _intact(temporary, stage, key) is None:
                mirror.drop(stage, key[:16])
                return None
            with clear_write_errors(target):
                old = self._put(temporary, target)
                fsync_folder(target.parent)
            if old is not None:
                with contextlib.suppress(OSError):
                    _delete(old)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return _intact(target, stage, key)

    def _put(self, new: Path, target: Path) -> Path | None:
        """Renames `new` to `target`; returns the new place of the old artifact, None when there was none.

        A reader finds the old or the new artifact at every moment where the file system can exchange two names.
        """
        if not os.path.lexists(target):
            new.rename(target)
            return None
        if _exchange(new, target):
            return new
        old = target.rename(self._temporary(target))
        new.rename(target)
        return old

    @staticmethod
    def _temporary(target: Path) -> Path:
        return target.parent / f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"

    def _sweep(self, stage: str, held: str | None = None) -> None:
        """Removes temporary folders of a stage whose process has ended: their lock is free, or `held` by the caller."""
        for folder in _folders(self.root / stage):
            match = _TEMPORARY.fullmatch(folder.name)
            if match is None:
                continue
            if match[1] == held:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            with self._lock(stage, match[1], timeout=0) as free:
                if free:
                    shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _lock(self, stage: str, short: str, **how: Any) -> Iterator[bool]:
        """Holds the lock of an artifact; `how` as in `locked`."""
        path = self.root / ".locks" / f"{stage}-{short}.lock"
        with clear_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, **how) as free:
            yield free


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step (renameat2 of Linux); False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _say_nothing(kind: str, stage: str, key: str, seconds: float) -> None:
    """Does nothing; the on_event for callers without one."""


def _plain(value: Any, where: str) -> Any:
    """Returns `value` as JSON data; with json.dumps alone {1: 'a'} and {'1': 'a'} would share a key."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"{where}: keys of inputs must be texts, got {list(value)[:5]}")
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{n}]") for n, item in enumerate(value)]
    raise TypeError(f"{where}: an input must be text, a number, a list or a mapping, got {type(value).__name__}")


def _call(make: Callable[[Path], None], folder: Path) -> None:
    """Runs `make`; an error of writing into the folder becomes a PqkError, others are raised unchanged."""
    try:
        make(folder)
    except OSError as error:
        if error.filename is not None and not Path(str(error.filename)).is_relative_to(folder):
            raise
        with clear_write_errors(folder):
            raise


def _folders(parent: Path) -> list[Path]:
    try:
        return [p for p in parent.iterdir() if p.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _names(folder: Path) -> list[str]:
    """Returns the relative names of all files below the folder, sorted. Raises PqkError for links and special files."""
    names = []
    for path in below(folder):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise PqkError(f"{path}: an artifact holds only plain files and folders")
        if path.is_file():
            names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def _contents(folder: Path, sync: bool) -> dict[str, dict[str, Any]]:
    """Returns {relative name: {sha256, bytes}} of the files in a folder; with `sync`, they are on disk afterwards."""
    files = {}
    for name in _names(folder):
        if name == MANIFEST:
            raise PqkError(f"{folder / name}: this name is the store's own; the stage must choose another")
        path = folder / name
        if sync:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        files[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    if sync:
        for part in (folder, *(p for p in below(folder) if p.is_dir())):
            fsync_folder(part)
    return files


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest without its own hash, or None when it is missing, damaged or not a manifest.

    Raises PermissionError and similar errors: a file that may not be read is not damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        stated = manifest.pop("sha256")
        return manifest if stated == sha256_json(manifest) else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        if says_nothing(error):
            raise
        return None


def _intact(folder: Path, stage: str, key: str) -> dict[str, Any] | None:
    """Returns the manifest when the artifact agrees with it (no file missing, additional or changed), else None.

    Raises PermissionError and similar errors.
    """
    manifest = _read_manifest(folder)
    if folder.is_symlink() or manifest is None or manifest.get("stage") != stage or manifest.get("key") != key:
        return None
    try:
        names = [name for name in _names(folder) if name != MANIFEST]
        if names != sorted(manifest["files"]):
            return None
        for name in names:
            path, stated = folder / name, manifest["files"][name]
            if path.stat().st_size != stated["bytes"]:
                return None
            if sha256_file(path) != stated["sha256"]:
                return None
    except (OSError, PqkError) as error:
        if says_nothing(error):
            raise
        return None
    return manifest
