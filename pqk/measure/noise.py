"""Measures how quiet a machine is during a timing: cores that other processes use, and times that drift.

`pqk.measure.timing` reads the load before, during and after its rounds; `disturbances` lists the problems of a timing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW_S = 0.3
"""Window of a load measurement: 30 ticks of the kernel's accounting, so that one core is measured to about 3 %."""

_LEAST_FOR_DRIFT = 9  # rounds: three in each third


@dataclass(frozen=True)
class Clocks:
    """Seconds since some moment: wall time, busy time of the allowed cores (summed), and CPU time of this process."""

    wall: float
    busy: float
    own: float


def read_clocks() -> Clocks:
    """Reads the clocks. Time that a hypervisor gave to other machines (steal) counts as busy."""
    import psutil

    cores = psutil.cpu_times(percpu=True)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(cores))
    chosen = [cores[index] for index in allowed if index < len(cores)]
    # guest time is part of user time already
    idle = ("idle", "iowait", "guest", "guest_nice")
    busy = sum(sum(core) - sum(getattr(core, name, 0.0) for name in idle) for core in chosen)
    return Clocks(time.monotonic(), busy, time.process_time())


def load_between(begin: Clocks, end: Clocks) -> float:
    """Returns the cores that other processes used between two readings: 1.0 is one whole core of the allowed ones."""
    wall = end.wall - begin.wall
    others = (end.busy - begin.busy) - (end.own - begin.own)
    return max(0.0, others) / wall if wall > 0 else 0.0


def load_now(window_s: float = WINDOW_S, read: Callable[[], Clocks] = read_clocks) -> float:
    """Waits for `window_s` seconds and returns the cores that other processes used meanwhile."""
    begin = read()
    time.sleep(window_s)
    return load_between(begin, read())


def drift_pct(samples_ms: Sequence[float]) -> float | None:
    """Returns the change of the median from the first to the last third of the rounds, percent; None below 9 rounds."""
    third = len(samples_ms) // 3
    if len(samples_ms) < _LEAST_FOR_DRIFT:
        return None
    first, last = (float(np.median(part)) for part in (samples_ms[:third], samples_ms[-third:]))
    return 100 * (last / first - 1) if first > 0 else None


def disturbances(timing: Mapping[str, Any], max_load: float, max_drift_pct: float) -> list[str]:
    """Returns the disturbances of a timing, a clause each; empty when there was none.

    timing: `load_before`, `load_during` and `load_after` in cores, `drift_pct`; see `pqk.measure.timing`. max_load,
    max_drift_pct: section `efficiency` of eval.yaml.
    """
    found = []
    loads = {when: timing[f"load_{when}"] for when in ("before", "during", "after")}
    worst = max(loads, key=lambda when: loads[when])
    if loads[worst] > max_load:
        found.append(f"other processes used {loads[worst]:.1f} cores {worst} it (at most {max_load:g})")
    drift = timing["drift_pct"]
    if drift is not None and abs(drift) > max_drift_pct:
        found.append(f"times drifted by {drift:+.0f} % over its rounds (at most {max_drift_pct:g} %)")
    return found


def warning(disturbed: Sequence[str]) -> str:
    """Returns one line with the disturbances of a timing, and when it is measured again."""
    return (
        f"warning: the timing was disturbed: {'; '.join(disturbed)}. Do not quote its milliseconds; the next run on a "
        "quiet machine measures them again, --retime does so at any time"
    )
