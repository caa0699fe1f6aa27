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
class Sums:
    """What the mean errors of one output follow from, over any number of samples; memory does not grow."""

    count: int = 0
    absolute: float = 0.0
    square: float = 0.0
    dot: float = 0.0
    norm_a: float = 0.0
    norm_b: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, a: Array, b: Array) -> None:
        """Adds two arrays of one shape, float64; `a` is the reference."""
        difference = a - b
        self.count += a.size
        self.absolute += float(np.abs(difference).sum())
        self.square += float((difference**2).sum())
        self.dot += float((a * b).sum())
        self.norm_a += float((a * a).sum())
        self.norm_b += float((b * b).sum())
        self.low, self.high = min(self.low, float(a.min())), max(self.high, float(a.max()))

    @property
    def mse(self) -> float:
        return self.square / self.count

    @property
    def mean_abs(self) -> float:
        return self.absolute / self.count

    @property
    def cosine(self) -> float:
        """Returns that of both as one vector; of two zero vectors 1, of one 0."""
        norms = math.sqrt(self.norm_a) * math.sqrt(self.norm_b)
        return min(1.0, self.dot / norms) if norms else float(self.norm_a == self.norm_b)

    @property
    def psnr_db(self) -> float | None:
        """Returns 10 log10(range(a)^2 / mse); None when equal (infinite) or when `a` is constant."""
        span = self.high - self.low
        return 10 * math.log10(span * span / self.mse) if self.square > 0 and span > 0 else None


@dataclass
class _Head:
    sums: Sums = field(default_factory=Sums)
    reference: float = 0.0
    largest: float = 0.0
    moved: int = 0
    pixels: list[Array] = field(default_factory=list)  # float32 distances, one array per sample


class Agreement:
    """Collector of pairs of predictions; memory grows by one float32 per pixel and output.

    outputs: their kinds by name (`ScoringPart.OUTPUTS`).
    """

    def __init__(self, outputs: Mapping[str, str]) -> None:
        self._kinds = dict(outputs)
        self._heads = {head: _Head() for head in outputs}

    def add(self, a: Mapping[str, Array], b: Mapping[str, Array]) -> None:
        """Adds a sample: `a` is the reference. Raises PqkError for missing outputs, unlike shapes, NaN or infinity."""
        clouds = [head for head, kind in self._kinds.items() if kind == "points"]
        depth = float(np.median(np.abs(_array(a, clouds[0], "reference")[..., 2]))) if clouds else 0.0
        for head in self._kinds:
            x, y = _array(a, head, "reference"), _array(b, head, "prediction")
            if x.shape != y.shape:
                raise PqkError(f"{head}: the predictions have shapes {x.shape} and {y.shape}")
            kept, points = self._heads[head], self._kinds[head] == "points"
            kept.sums.add(x, y)
            kept.reference += float(np.abs(x).sum())
            absolute = np.abs(x - y)
            kept.largest = max(kept.largest, float(absolute.max()))
            distance = np.linalg.norm(x - y, axis=-1) if points else absolute
            if points:
                kept.moved += int((distance > MOVED * depth).sum())
            kept.pixels.append(distance.astype(np.float32).ravel())

    def result(self) -> dict[str, HeadAgreement]:
        """Returns the agreement of each output. Raises PqkError when no sample was added."""
        found = {}
        for head, kept in self._heads.items():
            sums = kept.sums
            if not sums.count:
                raise PqkError("nothing to compare: no sample was added")
            pixels = np.concatenate(kept.pixels)
            p50, p99 = (float(q) for q in np.percentile(pixels, [50, 99]))
            found[head] = HeadAgreement(
                max_abs=kept.largest,
                mean_abs=sums.mean_abs,
                relative=sums.absolute / kept.reference if kept.reference else (0.0 if sums.absolute == 0 else None),
                cosine=sums.cosine,
                psnr_db=sums.psnr_db,
                p50=p50,
                p99=p99,
                max=float(pixels.max()),
                moved=kept.moved / len(pixels) if self._kinds[head] == "points" else None,
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
