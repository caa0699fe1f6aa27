"""Returns memory that was freed to the system, `trim`."""

from __future__ import annotations

import ctypes
import gc


def trim() -> None:
    """Returns freed memory to the system; with a C library that has no such call, nothing is done.

    glibc keeps blocks of up to 32 MB that a network's weights leave behind, and a process that only waits for its
    workers would hold the size of the network all the while.
    """
    gc.collect()
    found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if found is not None:
        found(0)
