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
