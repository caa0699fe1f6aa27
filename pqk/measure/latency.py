"""Statistics of raw timing samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pqk.errors import PqkError


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


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios of samples taken side by side: (median, lower, upper).

    Samples of one round see the same state of the machine, so their ratio is steadier than the ratio of medians.
    Raises PqkError when the lists differ in length, are empty, or a denominator is not positive.
    """
    a, b = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if a.size == 0 or a.shape != b.shape or (b <= 0).any():
        raise PqkError(f"paired timings need equally many positive samples, got {a.size} and {b.size}")
    low, middle, high = np.percentile(a / b, [25, 50, 75])
    return float(middle), float(low), float(high)
