"""Measures the memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_PROC = Path("/proc/self")


def peak_ram_bytes() -> int:
    """Returns the largest resident set of this process so far, or since `forget_peak`, in bytes (VmHWM on Linux)."""
    status = _PROC / "status"
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def forget_peak() -> bool:
    """Resets `peak_ram_bytes` to the current resident set; returns False where the system cannot (Linux 4.0 can)."""
    try:
        (_PROC / "clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def ram_bytes() -> int:
    """Returns the current resident set of this process, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)
