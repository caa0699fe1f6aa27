"""Measures the difference of two predictions of the same sample, per output and per pixel: `Agreement`.

A prediction is a dict of numpy arrays; an output of kind 'points' holds (..., 3) coordinates, z along the optical axis,
one of kind 'values' plain numbers. Nothing is aligned: the same model on two toolchains must return the same numbers,
in the same unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pqk.errors import PqkError
from pqk.families.metrics.geometry import Array

MOVED = 0.01  # a point that moved by more than this part of the scene's depth counts as moved


@dataclass(frozen=True)
class HeadAgreement:
    """Agreement of one output of two predictions, over all samples. `a` is the reference.

    max_abs, mean_abs: of |a - b| over all numbers. relative: mean |a - b| / mean |a|, None when a is 0 everywhere and b
    is not. cosine: of both as one vector, 1 at best. psnr_db: 10 log10(range(a)^2 / mean (a - b)^2), None when equal
    (infinite). p50, p99, max: quantiles over pixels of the distance between the two values there (Euclidean for
    points), in the model's unit.
    moved: share of pixels whose point moved by more than 1 % of the sample's median depth; None for plain values.
    """

    max_abs: float
    mean_abs: float
    relative: float | None
    cosine: float
    psnr_db: float | None
    p50: float
    p99: float
    max: float
    moved: float | None


@dataclass
class _Sums:
    count: int = 0
    absolute: float = 0.0
    square: float = 0.0
    reference: float = 0.0
    dot: float = 0.0
    norm_a: float = 0.0
    norm_b: float = 0.0
    largest: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    moved: int = 0
    pixels: list[Array] = field(default_factory=list)  # float32 distances, one array per sample


class Agreement:
    """Collector of pairs of predictions; memory grows by one float32 per pixel and output.

    outputs: their kinds by name (`ScoringPart.OUTPUTS`).
    """

    def __init__(self, outputs: Mapping[str, str]) -> None:
        self._kinds = dict(outputs)
        self._sums = {head: _Sums() for head in outputs}

    def add(self, a: Mapping[str, Array], b: Mapping[str, Array]) -> None:
        """Adds a sample: `a` is the reference. Raises PqkError for missing outputs, unlike shapes, NaN or infinity."""
        clouds = [head for head, kind in self._kinds.items() if kind == "points"]
        depth = float(np.median(np.abs(_array(a, clouds[0], "reference")[..., 2]))) if clouds else 0.0
        for head in self._kinds:
            x, y = _array(a, head, "reference"), _array(b, head, "prediction")
            if x.shape != y.shape:
                raise PqkError(f"{head}: the predictions have shapes {x.shape} and {y.shape}")
            difference = x - y
            sums = self._sums[head]
            absolute = np.abs(difference)
            sums.count += x.size
            sums.absolute += float(absolute.sum())
            sums.square += float((difference**2).sum())
            sums.reference += float(np.abs(x).sum())
            sums.dot += float((x * y).sum())
            sums.norm_a += float((x * x).sum())
            sums.norm_b += float((y * y).sum())
            sums.largest = max(sums.largest, float(absolute.max()))
            sums.low, sums.high = min(sums.low, float(x.min())), max(sums.high, float(x.max()))
            distance = np.linalg.norm(difference, axis=-1) if self._kinds[head] == "points" else absolute
            if self._kinds[head] == "points":
                sums.moved += int((distance > MOVED * depth).sum())
            sums.pixels.append(distance.astype(np.float32).ravel())

    def result(self) -> dict[str, HeadAgreement]:
        """Returns the agreement of each output. Raises PqkError when no sample was added."""
        found = {}
        for head, s in self._sums.items():
            if not s.count:
                raise PqkError("nothing to compare: no sample was added")
            pixels = np.concatenate(s.pixels)
            p50, p99 = (float(q) for q in np.percentile(pixels, [50, 99]))
            mse, span, norms = s.square / s.count, s.high - s.low, math.sqrt(s.norm_a) * math.sqrt(s.norm_b)
            found[head] = HeadAgreement(
                max_abs=s.largest,
                mean_abs=s.absolute / s.count,
                relative=s.absolute / s.reference if s.reference else (0.0 if s.absolute == 0 else None),
                cosine=min(1.0, s.dot / norms) if norms else float(s.norm_a == s.norm_b),
                psnr_db=10 * math.log10(span * span / mse) if mse > 0 and span > 0 else None,
                p50=p50,
                p99=p99,
                max=float(pixels.max()),
                moved=s.moved / len(pixels) if self._kinds[head] == "points" else None,
            )
        return found


def _array(prediction: Mapping[str, Array], head: str, name: str) -> Array:
    if head not in prediction:
        raise PqkError(f"the {name} has no {head}; it has {', '.join(prediction) or 'nothing'}")
    array = np.asarray(prediction[head], dtype=np.float64)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise PqkError(f"NaN refused: {head} of the {name} holds {bad} NaN or infinite of {array.size} numbers")
    return array
