"""What the operating system refuses, as sentences: permissions, disks, temporary folders, names that are not UTF-8."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

_READING = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "no such file",
    errno.EISDIR: "it is a folder",
    errno.ENOTDIR: "a parent of it is a file, not a folder",
    errno.ELOOP: "it is a loop of symbolic links",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the device reports an error",
    errno.ESTALE: "the network file system has lost it",
}
_WRITING = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.ENOTDIR: "a parent of it is a file, not a folder",
    errno.EISDIR: "it is a folder",
    errno.EEXIST: "something else is there under this name",
    errno.ENOTEMPTY: "something else is there under this name",
    errno.EBUSY: "it is in use, or another file system is mounted there",
    errno.ELOOP: "it is a loop of symbolic links",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EFBIG: "the file is larger than this system allows",
    errno.EIO: "the device reports an error",
    errno.ESTALE: "the network file system has lost it",
}
_EITHER = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ESTALE, errno.EBUSY)
_LIMITS = {
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "the memory of this machine is used up",
    errno.EAGAIN: "the system starts no more processes: raise the limit (ulimit -u, or the container's)",
}
_SAYS_NOTHING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


def cannot_read(path: Path | str, error: OSError) -> str:
    """Says in one sentence why a file or folder cannot be read."""
    return f"cannot read {printable(path)}: {_READING.get(error.errno or 0) or _strerror(error)}"


def cannot_write(path: Path | str, error: OSError) -> str | None:
    """Says in one sentence why a file or folder cannot be written; None when the error is another kind of fault."""
    reason = _WRITING.get(error.errno or 0)
    return f"cannot write {printable(path)}: {reason}" if reason else None


def says_nothing(error: BaseException) -> bool:
    """Tells whether an error of reading says nothing about what is in the file: it may be whole, yet not be read.

    Who takes an unreadable file for a damaged one must let these errors go on.
    """
    return isinstance(error, OSError) and error.errno in _SAYS_NOTHING


def refusal(error: BaseException) -> str | None:
    """Says in one sentence what the system refused; None when the error is none of the system's, but a defect.

    A missing file is a defect here, as who opens a user's file looks first; but not when the working directory or every
    folder for temporary files is missing.
    """
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return f"the name {_around(error)!r} is not UTF-8; rename the file or folder"
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if str(error) else "not enough memory"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from "):  # pathlib, before Python 3.13
        return f"cannot read {str(error).removeprefix('Symlink loop from ')}: {_READING[errno.ELOOP]}"
    if isinstance(error, RuntimeError) and str(error) == "Could not determine home directory.":
        return "this user has no home folder; name one in HOME"
    if not isinstance(error, OSError):
        return None
    if isinstance(error, FileNotFoundError):
        return _lacking(error)
    if error.errno in _LIMITS:
        return _LIMITS[error.errno]
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
    if error.errno in (errno.EACCES, errno.EPERM):
        if path is None:
            return "the system denies permission"
        return cannot_read(path, error) if _unreadable(path) else cannot_write(path, error)
    if error.errno in _EITHER:
        return None if path is None else cannot_read(path, error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return cannot_write(path or "a file", error)
    return None


def printable(path: Path | str) -> str:
    """Returns a path as text that every stream takes: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _strerror(error: OSError) -> str:
    text = error.strerror or str(error) or "unknown error"
    return text[:1].lower() + text[1:]


def _lacking(error: FileNotFoundError) -> str | None:
    """Tells the missing working directory, and the missing folder for temporary files, from a defect."""
    text = str(error.strerror or "")
    if text.startswith("No usable temporary directory found in "):
        tried = ", ".join(re.findall(r"'([^']*)'", text))
        return f"no usable temporary folder: none of {tried} can be written; name one that can in TMPDIR"
    try:
        Path.cwd()
    except OSError:
        name = error.filename
        if not isinstance(name, str | bytes) or not Path(os.fsdecode(name)).is_absolute():
            return "the working directory is gone; change into a folder that exists"
    return None


def _unreadable(path: str) -> bool:
    """Tells whether a path that was refused may not be read or not be looked up; else it may not be written."""
    if os.access(path, os.F_OK, effective_ids=os.access in os.supports_effective_ids):
        return not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)
    parent = Path(path).absolute().parent
    return not os.access(parent, os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _around(error: UnicodeEncodeError) -> str:
    """Returns the name around the bytes that are not UTF-8, out of a text that may be long."""
    text = error.object
    begin = max(text.rfind(mark, 0, error.start) for mark in '"\n\t') + 1
    ends = [found for mark in '"\n\t' if (found := text.find(mark, error.end)) >= 0]
    return printable(text[begin : min(ends, default=len(text))])
