"""The CPU: its name, and how many of its cores this process may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def allowed_cores() -> int:
    """Cores of the affinity mask, as containers and taskset set it; all cores where the system has no such mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model name as Linux tells it; elsewhere its architecture, such as 'arm64'."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in named if name), platform.processor() or platform.machine())
