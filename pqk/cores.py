"""Counts the CPU cores that this process may use."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path


def affinity_cores() -> int:
    """Returns the cores of the affinity mask, as taskset sets it; all cores where the system has no such mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allowed_cores() -> int:
    """Returns how many threads can run at once: the affinity mask, or less where a quota gives less (rounded up)."""
    quota = cpu_quota()
    return affinity_cores() if quota is None else max(1, min(affinity_cores(), math.ceil(quota)))


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float | None:
    """Returns how many cores' worth of time the container may use (docker --cpus, Kubernetes limits); None: no quota.

    The smallest of all groups that the process is in: `cpu.max` (cgroup v2, "quota period" in microseconds), or
    `cpu.cfs_quota_us` / `cpu.cfs_period_us` (v1, -1 for none), see the kernel's docs on cgroup-v2 and sched-bwc.
    cgroup: where the groups are mounted; process: the groups of the process, lines "number:controllers:/path".
    """
    found = []
    for line in _lines(process) or ["0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = (controllers, "cpu", "cpu,cpuacct") if controllers else ("", "unified")
        # Inside a container the path is often the host's, and its own group is mounted as the root.
        group = Path(path.lstrip("/"))
        for mount in dict.fromkeys(mounts):
            for folder in (group, *group.parents):
                found.append(_quota_v1(cgroup / mount / folder) if controllers else _quota_v2(cgroup / mount / folder))
    return min((quota for quota in found if quota is not None), default=None)


def _quota_v2(group: Path) -> float | None:
    return _share(" ".join(_lines(group / "cpu.max")))


def _quota_v1(group: Path) -> float | None:
    return _share(" ".join(_lines(group / "cpu.cfs_quota_us") + _lines(group / "cpu.cfs_period_us")))


def _share(text: str) -> float | None:
    """'150000 100000' as 1.5; None for 'max 100000', '-1 100000' and what is no quota."""
    with suppress(ValueError):
        quota, period = map(int, text.split())
        if quota > 0 and period > 0:
            return quota / period
    return None


def _lines(file: Path) -> list[str]:
    """The lines of a small file of the kernel; none when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
