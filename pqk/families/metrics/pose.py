"""Metrics of relative camera poses: errors of camera pairs in degrees, AUC, RRA and RTA, in numpy float64.

Cameras are world-to-camera matrices in OpenCV's axes (x right, y down, z forward). No alignment of any kind is made:
neither error changes when all cameras of the prediction, or of the truth, get another world frame or scale.

Sources: Wang, Rupprecht and Novotny, "PoseDiffusion", ICCV 2023 (RRA, RTA and the mean accuracy up to 30 degrees);
Wang et al., "VGGT", CVPR 2025, and its evaluation on CO3Dv2 (pair error, bins of 1 degree, means over categories).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pqk.data.scenes.colmap import rotation_to_quaternion
from pqk.errors import PqkError, nearest
from pqk.families.metrics.geometry import Array

VARIANTS = ("vggt", "pi3", "legacy")
"""Relative poses of the cameras i < j with matrices E. vggt: E_i inv(E_j), the pose of view i in the frame of view j.
pi3: E_j inv(E_i); the rotation error is the same, the translation error differs where the rotation is wrong. legacy:
inv(E_i) E_j, after E <- E inv(E_0); this is no relative pose of world-to-camera matrices, and it depends on view 0.
It exists to compare with tables that were made with it."""
THRESHOLDS = (3, 5, 15, 30)
"""Degrees at which AUC, RRA and RTA are reported."""
LOST = math.degrees(1e6) - 180.0
"""Translation error of a pair whose predicted translation is not finite: above every threshold (57295599.5)."""
CLAMP = 1e-15
"""Smallest value of 1 - cos^2 of an angle; it makes the errors of identical poses 3.6e-6 and 1.8e-6 degrees."""
NO_BASELINE = 1e-10
"""Two centres coincide when their distance is at most this share of their distances from the world's origin."""


@dataclass(frozen=True, eq=False)
class PairErrors:
    """Errors of P camera pairs, the pairs i < j of a sequence in the order (0,1), (0,2), ..., (1,2), ..."""

    rotation: Array  # (P,) float64, degrees 0..180; NaN where the prediction is not finite
    translation: Array  # (P,) float64, degrees 0..90; LOST where the prediction is not finite
    no_baseline: Array  # (P,) bool; the centres coincide, in the truth or in the prediction

    def __len__(self) -> int:
        return len(self.rotation)

    @property
    def worst(self) -> Array:
        """Returns the larger error of each pair, (P,) float64 in degrees; NaN where the rotation error is."""
        return np.maximum(self.rotation, self.translation)

    @property
    def lost(self) -> Array:
        """Returns the pairs without a finite prediction, (P,) bool. They count as misses."""
        return np.isnan(self.rotation) | (self.translation > 180)


def pair_errors(pred: ArrayLike, gt: ArrayLike, variant: str = VARIANTS[0]) -> PairErrors:
    """Returns the errors of all pairs i < j of N cameras, P = N (N - 1) / 2.

    pred, gt: world-to-camera matrices (N, 4, 4) or (N, 3, 4), OpenCV axes, each in any unit; variant: see `VARIANTS`.
    With the relative poses (R, t) of the prediction and (S, u) of the truth:
    rotation error = the angle of R S^T in degrees, from the unit quaternions q and p of R and S:
    acos(1 - 2 max(1 - (q.p)^2, 1e-15)), 0..180;
    translation error = the angle between the lines along t and u: acos(sqrt(1 - max(1 - cos^2, 1e-15))) with
    cos = t.u / (|t| |u|), 0..90, so that t and -t are the same.
    A translation of length 0 has no direction and gets 90 degrees; where the centres coincide but for rounding, the
    error is arbitrary between 0 and 90. Both kinds are marked in `no_baseline` and stay among the pairs.
    Raises PqkError for other shapes, fewer than 2 cameras, a truth that is not finite, and an unknown variant.
    """
    if variant not in VARIANTS:
        raise PqkError(
            f"unknown variant of the relative pose {variant!r}; allowed: {', '.join(VARIANTS)}"
            f"{nearest(variant, VARIANTS)}"
        )
    p, g = _matrices(pred, "predicted"), _matrices(gt, "true")
    if p.shape != g.shape:
        raise PqkError(f"{len(p)} predicted cameras do not fit {len(g)} true ones")
    if not np.isfinite(g).all():
        raise PqkError("the true cameras hold NaN or infinity; leave out frames without a pose")
    with np.errstate(invalid="ignore", over="ignore"):  # of predictions that are not finite
        found, expected = _relative(p, variant), _relative(g, variant)
        return PairErrors(
            _rotation_errors(found[:, :3, :3], expected[:, :3, :3]),
            _translation_errors(found[:, :3, 3], expected[:, :3, 3]),
            _coincide(p) | _coincide(g),
        )


def auc(errors: ArrayLike, threshold: int) -> float:
    """Returns the area under the curve of accuracy over the pair error from 0 to `threshold` degrees, 0..1, 1 at best.

    errors: (P,), degrees, 0 or more; NaN is a miss and stays in the number of pairs. threshold: whole degrees, 1 or
    more. A histogram in bins of 1 degree, the last one closed, is divided by P and summed up; the result is the mean
    of the sums, as in VGGT's evaluation. In closed form, the mean over the pairs of (T - floor(e)) / T for e < T, of
    1 / T for e = T, and of 0 beyond. This exceeds the exact area, the mean of max(0, T - e) / T, by about 0.5 / T of
    the hits. Raises PqkError for no pairs and for another threshold.
    """
    e = _errors(errors)
    if isinstance(threshold, bool) or threshold != int(threshold) or threshold < 1:
        raise PqkError(f"the threshold of AUC is a whole number of degrees above 0, not {threshold}")
    counts, _ = np.histogram(e[e <= threshold], bins=np.arange(int(threshold) + 1))
    return float(np.mean(np.cumsum(counts / e.size)))


def share_below(errors: ArrayLike, threshold: float) -> float:
    """Returns the share of errors strictly below `threshold`, 0..1, 1 at best.

    RRA@t is this share of the rotation errors, RTA@t of the translation errors (PoseDiffusion, ICCV 2023).
    errors: (P,), degrees; NaN is a miss. Raises PqkError for no pairs.
    """
    return float(np.mean(_errors(errors) < threshold))


def join(parts: Iterable[PairErrors]) -> PairErrors:
    """Returns the pairs of several sequences as one list, in their order. Raises PqkError for no sequence."""
    parts = list(parts)
    if not parts:
        raise PqkError("no sequence: there are no pose errors to join")
    names = ("rotation", "translation", "no_baseline")
    return PairErrors(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def by_category(sequences: Iterable[tuple[str, PairErrors]]) -> dict[str, PairErrors]:
    """Returns all pairs of each category; sequences: (category, its pairs). Categories in the order they come up."""
    parts: dict[str, list[PairErrors]] = {}
    for category, errors in sequences:
        parts.setdefault(category, []).append(errors)
    return {category: join(listed) for category, listed in parts.items()}


def scores(errors: PairErrors, thresholds: Sequence[int] = THRESHOLDS) -> dict[str, float]:
    """Returns auc_T, rra_T and rta_T of the pairs for each threshold in degrees, all 0..1. Raises PqkError."""
    found = {f"auc_{degrees}": auc(errors.worst, degrees) for degrees in thresholds}
    found |= {f"rra_{degrees}": share_below(errors.rotation, degrees) for degrees in thresholds}
    return found | {f"rta_{degrees}": share_below(errors.translation, degrees) for degrees in thresholds}


@dataclass(frozen=True)
class PoseSummary:
    """Scores of a data set, each entry as `scores` gives them (0..1), and counts of pairs.

    per_category takes all pairs of a category as one list. mean_over_categories is the plain mean of its entries and
    the number of VGGT's table; pooled takes all pairs of all sequences as one list and is the number of Pi3's.
    """

    per_sequence: tuple[dict[str, float], ...]
    per_category: dict[str, dict[str, float]]
    mean_over_categories: dict[str, float]
    mean_over_sequences: dict[str, float]
    pooled: dict[str, float]
    pairs: int
    no_baseline: int  # pairs whose centres coincide: kept, and their translation error says nothing
    lost: int  # pairs without a finite prediction: kept, as misses


def summarise(sequences: Iterable[tuple[str, PairErrors]], thresholds: Sequence[int] = THRESHOLDS) -> PoseSummary:
    """Returns the scores of sequences, given as (category, the pairs of the sequence). Raises PqkError for none."""
    sequences = list(sequences)
    everything = join(errors for _, errors in sequences)
    per_sequence = tuple(scores(errors, thresholds) for _, errors in sequences)
    per_category = {name: scores(errors, thresholds) for name, errors in by_category(sequences).items()}
    return PoseSummary(
        per_sequence,
        per_category,
        _mean(per_category.values()),
        _mean(per_sequence),
        scores(everything, thresholds),
        len(everything),
        int(everything.no_baseline.sum()),
        int(everything.lost.sum()),
    )


def _mean(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    rows = list(rows)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _matrices(cameras: ArrayLike, name: str) -> Array:
    """Returns (N, 4, 4) float64."""
    given = np.asarray(cameras, dtype=np.float64)
    if given.ndim != 3 or given.shape[1:] not in ((3, 4), (4, 4)):
        raise PqkError(f"the {name} cameras must have shape (N, 4, 4) or (N, 3, 4), got {given.shape}")
    if len(given) < 2:
        raise PqkError(f"relative poses need at least 2 cameras, got {len(given)} {name} ones")
    full = np.tile(np.eye(4), (len(given), 1, 1))
    full[:, :3] = given[:, :3]
    return full


def _relative(cameras: Array, variant: str) -> Array:
    """Returns the relative poses (P, 4, 4) of the pairs i < j."""
    if variant == "legacy":
        cameras = cameras @ _inverse(cameras[0])
    i, j = np.triu_indices(len(cameras), 1)
    if variant == "vggt":
        return cameras[i] @ _inverse(cameras[j])
    return cameras[j] @ _inverse(cameras[i]) if variant == "pi3" else _inverse(cameras[i]) @ cameras[j]


def _inverse(rigid: Array) -> Array:
    """Returns the inverse of rigid transforms (..., 4, 4) in closed form: R^T and -R^T t."""
    turned = np.swapaxes(rigid[..., :3, :3], -1, -2)
    inverse = np.zeros_like(rigid)
    inverse[..., :3, :3], inverse[..., 3, 3] = turned, 1.0
    inverse[..., :3, 3] = -np.einsum("...ij,...j->...i", turned, rigid[..., :3, 3])
    return inverse


def _rotation_errors(found: Array, expected: Array) -> Array:
    finite = np.asarray((np.abs(found) < 1e100).all(axis=(1, 2)))  # sums of larger numbers would be infinite
    q = rotation_to_quaternion(np.where(finite[:, None, None], found, np.eye(3)))
    cosine = np.einsum("pi,pi->p", q, rotation_to_quaternion(expected))
    angle = np.degrees(np.arccos(1 - 2 * np.maximum(1 - cosine**2, CLAMP)))
    return np.where(finite, angle, np.nan)


def _translation_errors(found: Array, expected: Array) -> Array:
    cosine = np.einsum("pi,pi->p", _directions(found), _directions(expected))
    angle = np.degrees(np.arccos(np.sqrt(1 - np.maximum(1 - cosine**2, CLAMP))))
    return np.where(np.isnan(angle), LOST, angle)


def _directions(vectors: Array) -> Array:
    """Returns unit vectors (P, 3); 0 where the vector is 0."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length != 0)


def _coincide(cameras: Array) -> Array:
    """Returns which pairs i < j have one centre but for rounding, (P,) bool."""
    i, j = np.triu_indices(len(cameras), 1)
    distance = np.linalg.norm(_relative(cameras, VARIANTS[0])[:, :3, 3], axis=1)
    from_origin = np.linalg.norm(cameras[:, :3, 3], axis=1)
    return distance <= NO_BASELINE * (from_origin[i] + from_origin[j])


def _errors(errors: ArrayLike) -> Array:
    e = np.asarray(errors, dtype=np.float64)
    if e.ndim != 1 or not e.size:
        raise PqkError(f"pose errors are one list of at least one pair, got the shape {e.shape}")
    return e
