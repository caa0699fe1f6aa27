"""Locks with `filelock`: one process at a time; the kernel releases the lock of a process that ends, however it ends.

`locked` is for lock files. `lock` is for what is open already: a log that is appended to, a folder, a file of another
process. All of them take the same kernel lock (flock), so they exclude each other on one file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pqk.errors import PqkError
from pqk.oserrors import cannot_write, printable

# filelock is imported where it is used: it takes 40 ms, and every command imports this module.
_POLL_S = 0.2  # between two looks at a lock that another process holds; it may be measuring times


@contextlib.contextmanager
def locked(path: Path, timeout: float = -1, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Holds the lock file `path` during the block; yields False, without the lock, when `timeout` seconds are over.

    timeout: 0 tries once, -1 waits as long as it takes. waiting: called once when another process holds the lock and
    this one begins to wait. The file is created where it is missing, and never deleted: two processes could then hold
    locks on two files of one name. Raises PqkError when it cannot be written, and where the file system has no locks.
    """
    from filelock import FileLock, Timeout

    held, got = FileLock(path, fallback_to_soft=False), True
    with _one_sentence(path):
        try:
            held.acquire(blocking=False)
        except Timeout:
            got = False
            if timeout:
                waiting()
                with contextlib.suppress(Timeout):
                    held.acquire(timeout=timeout, poll_interval=_POLL_S)
                    got = True
    try:
        yield got
    finally:
        held.release()


def lock(handle: int, path: Path, wait: bool = True) -> bool:
    """Locks the open file or folder `handle`, whose name is `path`, until it is closed.

    Returns False when another process holds it (wait=False). Raises PqkError where the file system has no locks.
    """
    from filelock import lock_descriptor

    with _one_sentence(path):
        return lock_descriptor(handle, blocking=wait)


def is_locked(path: Path) -> bool:
    """Tells whether another process holds the lock file `path`; needs no right to write. False when there is none."""
    try:
        handle = os.open(path, os.O_RDWR)  # NFS wants this for a lock
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        handle = os.open(path, os.O_RDONLY)
    try:
        if lock(handle, path, wait=False):
            return False
        time.sleep(_POLL_S)  # another process may have been looking too
        return not lock(handle, path, wait=False)
    finally:
        os.close(handle)


def machine_folder() -> Path:
    """Returns the folder of this user's locks on this machine, which shared disks and a job's own TMPDIR do not move.

    Raises PqkError where it belongs to somebody else.
    """
    path = Path("/tmp") / f"pqk-{os.getuid()}"
    with _one_sentence(path):
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PqkError(f"{path} is no folder of this user; remove it")
    return path


@contextlib.contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Turns an OSError into a PqkError; one of the lock itself, not of opening its file, names no file."""
    try:
        yield
    except TimeoutError:
        raise
    except OSError as error:
        if error.filename is not None:
            sentence = cannot_write(path, error)
            if sentence is None:
                raise
            raise PqkError(sentence) from error
        raise PqkError(
            f"cannot lock {printable(path)}: the file system of {printable(path.parent)} gives no file locks "
            f"({error.strerror}); put the project on a local disk, or mount this one with locks"
        ) from error
