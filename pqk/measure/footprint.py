"""Memory and size of what ran."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_ram_bytes() -> int:
    """Largest resident set of this process so far, in bytes (VmHWM on Linux)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
