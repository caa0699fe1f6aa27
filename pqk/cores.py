"""How many CPU cores this process may use."""

from __future__ import annotations

import os


def allowed_cores() -> int:
    """Cores of the affinity mask, as containers and taskset set it; all cores where the system has no such mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
