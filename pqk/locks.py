"""Locks on open files (flock): one process at a time; the kernel releases the lock of a process that ends."""

from __future__ import annotations

import contextlib
import fcntl
from pathlib import Path

from pqk.errors import PqkError
from pqk.oserrors import printable


def lock(handle: int, path: Path, *, shared: bool = False, wait: bool = True) -> bool:
    """Locks the open file `handle`, whose name is `path`; returns False when another process holds it (wait=False).

    Raises PqkError where the file system has no locks, as NFS without its lock service and Lustre without `-o flock`.
    """
    flags = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(handle, flags)
    except BlockingIOError:
        return False
    except OSError as error:
        raise PqkError(
            f"cannot lock {printable(path)}: the file system of {printable(path.parent)} gives no file locks "
            f"({error.strerror}); put the project on a local disk, or mount this one with locks"
        ) from error
    return True


def unlock(handle: int) -> None:
    """Releases the lock of an open file; does nothing where there is none."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
