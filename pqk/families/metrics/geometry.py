"""Geometry metrics on depth maps, point clouds and point maps, in numpy.

Depths and points are in metres. Masks are bool (or 0/1) and choose the pixels that count; a ground-truth depth that is
not finite or not above 0 never counts. All sums run in float64. Every function raises PqkError for shapes that do not
fit, for no valid pixel or point at all, and for a NaN or infinity in a prediction where the truth is valid: a broken
model must not get a score from the pixels that survived.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pqk.errors import PqkError, nearest

Array = NDArray[Any]

log = logging.getLogger(__name__)

ALIGNMENTS = ("median", "lstsq", "none")
MIN_DEPTH = 1e-6  # metres; a point nearer than this, or behind the camera, has no usable projection
REACH = 1e4  # median distances; farther points are errors of a model or a far plane, which no alignment can follow


# Depth maps


def abs_rel(pred: ArrayLike, gt: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Mean of |pred - gt| / gt, 0 at best (Eigen et al. 2014, "Abs Relative difference"). 1-D or 2-D depths."""
    p, g = _valid_depths(pred, gt, mask)
    return float(np.mean(np.abs(p - g) / g))


def rmse(pred: ArrayLike, gt: ArrayLike, mask: ArrayLike | None = None) -> float:
    """sqrt of the mean of (pred - gt)^2, in metres, 0 at best (Eigen et al. 2014, "RMSE (linear)")."""
    p, g = _valid_depths(pred, gt, mask)
    return math.sqrt(np.mean((p - g) ** 2))


def delta(pred: ArrayLike, gt: ArrayLike, mask: ArrayLike | None = None, threshold: float = 1.25) -> float:
    """Share of pixels with max(pred/gt, gt/pred) < threshold, 0..1, 1 at best (Eigen et al. 2014).

    A predicted depth of 0 or below has no ratio and counts as a miss. Raises PqkError when threshold <= 1.
    """
    if not threshold > 1:
        raise PqkError(f"the delta threshold is a ratio above 1 (such as 1.25), not {threshold}")
    p, g = _valid_depths(pred, gt, mask)
    # g < threshold * p is g/p < threshold without the division, and is false for p <= 0.
    return float(np.mean((p < threshold * g) & (g < threshold * p)))


def align_scale(pred: ArrayLike, gt: ArrayLike, mask: ArrayLike | None, method: str) -> float:
    """Scale s that brings the predicted depths to the ground truth's unit.

    "median": median(gt) / median(pred) (Zhou et al. 2017, section 4.2); "lstsq": argmin_s |s pred - gt|^2 =
    sum(pred gt) / sum(pred^2); "none": 1. Raises PqkError when s is not a positive finite number.
    """
    if method not in ALIGNMENTS:
        raise PqkError(f"unknown alignment {method!r}; allowed: {', '.join(ALIGNMENTS)}{nearest(method, ALIGNMENTS)}")
    p, g = _valid_depths(pred, gt, mask)
    if method == "none":
        return 1.0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = np.median(g) / np.median(p) if method == "median" else np.dot(p, g) / np.dot(p, p)
    if not (np.isfinite(scale) and scale > 0):
        raise PqkError(f"scale alignment ({method}) failed: the predicted depths give a scale of {scale}")
    return float(scale)


def _valid_depths(pred: ArrayLike, gt: ArrayLike, mask: ArrayLike | None) -> tuple[Array, Array]:
    """The counting pixels of both, 1-D float64."""
    p, g = np.asarray(pred), np.asarray(gt)
    if p.shape != g.shape or p.ndim not in (1, 2):
        raise PqkError(f"predicted and true depth must be 1-D or 2-D and of one shape, got {p.shape} and {g.shape}")
    valid = np.isfinite(g) & (g > 0)
    if mask is not None:
        valid &= _mask(mask, g.shape)
    p, g = p[valid].astype(np.float64), g[valid].astype(np.float64)
    if not g.size:
        raise PqkError("no valid pixel: the mask and the ground-truth depth leave nothing to compare")
    _refuse_non_finite(p, "predicted depths")
    return p, g


# Confidence


def sparsification_error(errors: ArrayLike, confidence: ArrayLike) -> float:
    """Area under the sparsification error curve (AUSE; Ilg et al. 2018), 0 when errors are ranked perfectly.

    errors: (N,), finite and 0 or more; confidence: (N,), higher is surer, of any scale. A sparsification curve is the
    mean error of the pixels that are left when more and more are taken away: the least confident first, or for the
    oracle those of the largest error first. The area between the two is their mean difference over all N steps, and it
    is divided by the mean error of all pixels. Pixels of equal confidence are taken away in random order: the exact
    mean over all such orders is computed, so a constant scores what a random ranking scores on average. 0 where all
    errors are 0. Raises PqkError for shapes that differ, no pixel, NaN in either and infinity in the errors.
    """
    e, c = np.asarray(errors, dtype=np.float64), np.asarray(confidence)
    if e.shape != c.shape or e.ndim != 1:
        raise PqkError(f"errors and confidence must be 1-D and of one shape, got {e.shape} and {c.shape}")
    if not e.size:
        raise PqkError("no valid pixel: there is no confidence to score")
    _refuse_non_finite(e, "errors")
    if np.isnan(c).any():
        raise PqkError(f"NaN refused: the confidence holds {np.isnan(c).sum()} NaN of {c.size} numbers at valid pixels")
    mean = float(e.mean())
    if mean == 0:
        return 0.0
    weights = _areas(len(e))
    order = np.argsort(c)
    ranked = c[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    area = (e[order] * _means(weights, starts)).sum() - (np.sort(e)[::-1] * weights).sum()
    return max(0.0, float(area) / mean)


@lru_cache(maxsize=4)
def _areas(count: int) -> Array:
    """What each error, the one that is taken away first in front, adds to the area under a sparsification curve.

    The area is the mean over k of (e_k + ... + e_N) / (N - k + 1), so e_j counts (1/N + ... + 1/(N - j + 1)) / N times.
    """
    weights = np.cumsum(1.0 / np.arange(count, 0, -1)) / count
    weights.setflags(write=False)
    return weights


def _means(values: Array, starts: Array) -> Array:
    """Every value replaced by the mean of its run; runs begin at `starts`."""
    if len(starts) == len(values):
        return values
    counts = np.diff(np.append(starts, len(values)))
    return np.repeat(np.add.reduceat(values, starts) / counts, counts)


# Similarity alignment


@dataclass(frozen=True)
class Similarity:
    """x -> scale * rotation @ x + translation."""

    scale: float
    rotation: Array  # (3, 3), determinant +1
    translation: Array  # (3,)

    def apply(self, points: ArrayLike) -> Array:
        """Transform points (..., 3); float64."""
        return self.scale * (np.asarray(points) @ self.rotation.T) + self.translation


def umeyama(source: ArrayLike, target: ArrayLike, weights: ArrayLike | None = None) -> Similarity:
    """Similarity that minimises sum_i w_i |scale R source_i + t - target_i|^2 (Umeyama 1991, equations 39 to 42).

    source, target: corresponding points (N, 3), N >= 3; weights (N,) >= 0, all 1 when absent.
    Points that lie more than REACH times farther from the median point than half of the points do are left out with a
    logged note, in source or target: a single one at 1e10 m would decide the fit alone, and all others would coincide.
    Raises PqkError for fewer than 3 points (of positive weight), for points that all coincide or lie on one line
    (the rotation is then not determined), and for non-finite numbers.
    """
    x, y = _cloud(source, "source"), _cloud(target, "target")
    if x.shape != y.shape:
        raise PqkError(f"similarity alignment needs corresponding points, got {len(x)} and {len(y)}")
    if weights is None:
        count, w = len(x), None
    else:
        w = np.asarray(weights, dtype=np.float64)
        if w.shape != (len(x),) or not np.isfinite(w).all() or (w < 0).any():
            raise PqkError(f"similarity weights must be {len(x)} finite numbers of 0 or more")
        count = int(np.count_nonzero(w))
    if count < 3:
        raise PqkError(f"similarity alignment needs at least 3 points, got {count}")
    near = _within_reach(x) & _within_reach(y)
    if not near.all():
        log.warning(
            "%d of %d points lie more than %g times farther out than half of the points; the alignment leaves them out",
            len(near) - int(near.sum()), len(near), REACH,
        )  # fmt: skip
        x, y, w = x[near], y[near], None if w is None else w[near]

    mean_x, mean_y = np.average(x, axis=0, weights=w), np.average(y, axis=0, weights=w)
    x, y = x - mean_x, y - mean_y
    weighted, total = (x, len(x)) if w is None else (x * w[:, None], w.sum())
    covariance = y.T @ weighted / total
    variance_x = float(np.einsum("ij,ij->", x, weighted) / total)
    u, singular, vt = np.linalg.svd(covariance)
    # Rank 2 at least (Umeyama, theorem). Below the floor the covariance is rounding: of float32 data, of centring.
    spread_x, spread_y = math.sqrt(variance_x), math.sqrt(float(np.average((y**2).sum(axis=1), weights=w)))
    noise_x, noise_y = 1e-14 * float(np.linalg.norm(mean_x)), 1e-14 * float(np.linalg.norm(mean_y))
    floor = 1e-7 * spread_x * spread_y + noise_x * spread_y + noise_y * spread_x + noise_x * noise_y
    if singular[1] <= floor:
        raise PqkError("similarity alignment is not determined: the points coincide or lie on one line")
    sign = np.ones(3)
    if np.linalg.det(u) * np.linalg.det(vt) < 0:
        sign[2] = -1.0
    rotation = (u * sign) @ vt
    scale = float(singular @ sign) / variance_x
    return Similarity(scale, rotation, mean_y - scale * rotation @ mean_x)


def _within_reach(points: Array) -> Array:
    """Which points (N, 3) lie no more than REACH median distances from the median point; all when that is 0."""
    distance = np.linalg.norm(points - np.median(points, axis=0), axis=1)
    typical = np.median(distance)
    return (distance <= REACH * typical) | (typical == 0)


# Point clouds


@dataclass(frozen=True)
class Chamfer:
    """Distances between two point clouds, in metres, 0 at best."""

    accuracy: float  # mean distance of a predicted point to the nearest true point
    completeness: float  # mean distance of a true point to the nearest predicted point
    mean: float  # of the two ("overall")


def chamfer(pred: ArrayLike, gt: ArrayLike) -> Chamfer:
    """Accuracy, completeness and their mean for clouds (N, 3) and (M, 3).

    Euclidean nearest-neighbour means as in the DTU benchmark (Jensen et al. 2014); Tanks and Temples (Knapitsch et
    al. 2017) thresholds the same two distances. No outlier cut-off: each point counts.
    """
    from scipy.spatial import cKDTree

    p, g = _cloud(pred, "predicted"), _cloud(gt, "true")
    accuracy = float(np.mean(cKDTree(g).query(p, workers=-1)[0]))
    completeness = float(np.mean(cKDTree(p).query(g, workers=-1)[0]))
    return Chamfer(accuracy, completeness, (accuracy + completeness) / 2)


def _cloud(points: ArrayLike, name: str) -> Array:
    cloud = np.asarray(points, dtype=np.float64)
    if cloud.ndim != 2 or cloud.shape[1] != 3:
        raise PqkError(f"the {name} points must have shape (N, 3), got {cloud.shape}")
    if not len(cloud):
        raise PqkError(f"no valid point: the {name} cloud is empty")
    _refuse_non_finite(cloud, f"{name} points")
    return cloud


# Point maps


def reprojection_error(points: ArrayLike, intrinsics: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Mean distance, in pixels, between each point's projection and the centre of the pixel that predicted it.

    points: (H, W, 3) in the frame of this view's camera (x right, y down, z forward); intrinsics K (3, 3) in pixels,
    last row 0 0 1. x = K X / z (Hartley & Zisserman 2004, section 6.1); pixel (column u, row v) has its centre at
    (u + 0.5, v + 0.5) (COLMAP's convention). Every error is clipped at the image diagonal, and a point with
    z <= 1e-6 m, which has no projection, counts with the full diagonal: nothing is dropped.
    Range 0..sqrt(W^2 + H^2), 0 at best.
    """
    p, k = np.asarray(points), np.asarray(intrinsics, dtype=np.float64)
    if p.ndim != 3 or p.shape[2] != 3:
        raise PqkError(f"reprojection needs a point map (H, W, 3), got {p.shape}")
    if k.shape != (3, 3) or not np.isfinite(k).all():
        raise PqkError(f"the intrinsics must be a finite (3, 3) matrix, got shape {k.shape}")
    height, width = p.shape[:2]
    valid = np.ones((height, width), bool) if mask is None else _mask(mask, (height, width))
    rows, columns = np.nonzero(valid)
    if not rows.size:
        raise PqkError("no valid pixel: the mask leaves nothing to reproject")
    chosen = p[valid].astype(np.float64)
    _refuse_non_finite(chosen, "predicted points")
    x, y, z = chosen.T
    in_front = z > MIN_DEPTH
    safe_z = np.where(in_front, z, 1.0)
    du = (k[0, 0] * x + k[0, 1] * y) / safe_z + (k[0, 2] - 0.5) - columns
    dv = k[1, 1] * y / safe_z + (k[1, 2] - 0.5) - rows
    diagonal = math.hypot(width, height)
    errors = np.where(in_front, np.minimum(np.hypot(du, dv), diagonal), diagonal)
    return float(errors.mean())


def _mask(mask: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = np.asarray(mask)
    if array.shape != shape:
        raise PqkError(f"the mask has shape {array.shape}, the data has {shape}")
    return array.astype(bool)


def _refuse_non_finite(values: Array, name: str) -> None:
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise PqkError(f"NaN refused: the {name} hold {bad} NaN or infinite of {values.size} numbers at valid pixels")
