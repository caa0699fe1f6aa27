"""Statistics of raw timing samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pqk.errors import PqkError
from pqk.stats.intervals import Interval, median_interval

LEAST_FOR_P95 = 100
"""Below it fewer than five samples lie beyond the 95th percentile, which then says little but what the worst were."""


def percentile(samples_ms: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), linear between order statistics (Hyndman & Fan 1996, type 7), milliseconds.

    Raises PqkError without samples, or with one that is negative or not finite.
    """
    values = np.asarray(samples_ms, dtype=np.float64)
    if values.size == 0:
        raise PqkError("there are no timing samples")
    if not np.isfinite(values).all() or (values < 0).any():
        raise PqkError("timing samples must be finite and not negative")
    return float(np.percentile(values, q))


def p95(samples_ms: Sequence[float]) -> float | None:
    """Gives the 95th percentile, milliseconds; None below `LEAST_FOR_P95` samples. Raises PqkError as `percentile`."""
    return percentile(samples_ms, 95) if len(samples_ms) >= LEAST_FOR_P95 else None


def speedup(base_ms: Sequence[float], own_ms: Sequence[float]) -> Interval:
    """Gives how many times as fast as `base` something is: the median of the ratios base / own, round by round.

    Both ran once in every round of one timing, so what slows a whole round down cancels. The interval is that of the
    median (`pqk.stats.intervals.median_interval`). This is the one definition of a speedup in pqk. Raises PqkError
    for lists of unlike length, for none, and for times that are not finite and above 0.
    """
    base, own = np.asarray(base_ms, dtype=np.float64), np.asarray(own_ms, dtype=np.float64)
    if base.shape != own.shape or base.size == 0:
        raise PqkError(f"a speedup needs equally many rounds of both, got {base.size} and {own.size}")
    if not (np.isfinite(base).all() and np.isfinite(own).all() and (base > 0).all() and (own > 0).all()):
        raise PqkError("timing samples must be finite and above 0")
    return median_interval([float(ratio) for ratio in base / own])
