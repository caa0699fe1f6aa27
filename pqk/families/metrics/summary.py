"""Summarises the scores of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from pqk.errors import PqkError


def summarise(
    scores: Sequence[Mapping[str, float | None]], samples: str = "pairs", tail: str = "absrel"
) -> dict[str, float | None]:
    """Returns the mean over samples of each metric, and TAIL_p95, the 95th percentile (linear interpolation) of `tail`.

    samples: what they are, in the plural, for messages. A metric that is None for all of them stays None. Raises
    PqkError for an empty list, for metrics that only some of them have (their mean would be over other scenes) and for
    values that are not finite.
    """
    one = samples.removesuffix("s")
    if not scores:
        raise PqkError(f"nothing to summarise: no {one} was scored")
    summary: dict[str, float | None] = {}
    for key in scores[0]:
        values = [sample.get(key) for sample in scores]
        present = [value for value in values if value is not None]
        if len(present) not in (0, len(values)):
            raise PqkError(f"{key} is missing for {len(values) - len(present)} of {len(values)} {samples}")
        if not all(math.isfinite(value) for value in present):
            raise PqkError(f"NaN refused: {key} is not finite for every {one}")
        summary[key] = math.fsum(present) / len(present) if present else None
        if key == tail and present:
            summary[f"{tail}_p95"] = float(np.percentile(present, 95))
    extra = sorted(set().union(*scores) - set(scores[0]))
    if extra:
        raise PqkError(f"{', '.join(extra)} is missing for the first of {len(scores)} {samples}")
    return summary
