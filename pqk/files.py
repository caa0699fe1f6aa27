"""Files that are either whole or absent: write beside the target, fsync, rename. Plus sha256 of files and folders."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pqk.errors import PqkError

_SENTENCES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.ENOTDIR: "a parent of it is a file, not a folder",
    errno.EISDIR: "it is a folder",
    errno.EEXIST: "something else is there under this name",
    errno.ENOTEMPTY: "something else is there under this name",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EFBIG: "the file is larger than this system allows",
}


@contextlib.contextmanager
def clear_write_errors(path: Path | str) -> Iterator[None]:
    """Turn the OSErrors of writing into one sentence that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in _SENTENCES:
            raise PqkError(f"cannot write {path}: {_SENTENCES[error.errno]}") from error
        raise


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success fsync it and rename it over the target.

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
    """Yield a temporary folder beside the target; on success it is on disk as a whole, and gets the target's name.

    On any failure there is no target and the temporary folder is removed; what a killed process left behind goes too.
    Raises PqkError when something has the target's name already, or the disk is full or not writable.
    """
    taken = f"{target} exists already; choose another name, or move it away"
    with clear_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            raise PqkError(taken)
        for old in target.parent.iterdir():
            maker = old.name.removeprefix(f".{target.name}.").removesuffix(".tmp")
            if old.name == f".{target.name}.{maker}.tmp" and maker.isdigit() and not _alive(int(maker)):
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


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def check_writable(folder: Path) -> None:
    """Make the folder if need be, and write and remove an empty file in it. Raises PqkError when that fails."""
    with clear_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically; NaN and infinities are refused (ValueError), they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
