"""Scores of a predicted pair (two point maps in camera 1) against ground truth, or against a teacher's prediction.

A prediction is a dict of numpy arrays: pts3d_1, pts3d_2 (H, W, 3), both in camera 1's frame (x right, y down,
z forward) and of arbitrary scale, and conf_1, conf_2 (H, W). Scores are in metres when the truth is:

| key | meaning | best |
| --- | --- | --- |
| absrel, rmse, delta1 | depth of both views, each in its own camera, after one scale | 0, 0, 1 |
| ause | how badly the confidences rank the pixels of both views by the error of their points | 0 |
| chamfer, chamfer_accuracy, chamfer_completeness | points of both views after one similarity, sampled apart | floor |
| chamfer_paired | the same, prediction and truth at the same pixels | 0 |
| reproj_px | points of each view against their own pixels, after the scale | 0 |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pqk.errors import PqkError
from pqk.families.contract import Sample
from pqk.families.dust3r.configs import lowest_confidence
from pqk.families.metrics.clouds import cloud_scores
from pqk.families.metrics.geometry import (
    Array,
    abs_rel,
    align_scale,
    delta,
    reprojection_error,
    rmse,
    sparsification_error,
)
from pqk.families.metrics.summary import summarise as summarise
from pqk.families.metrics.truth import PosedDepth, points_in_camera, refuse_broken_cameras

Prediction = Mapping[str, Array]
Scores = dict[str, float | None]
CONFIDENCES = ("conf_1", "conf_2")
OUTPUTS: dict[str, Literal["points", "values"]] = {
    "pts3d_1": "points",
    "pts3d_2": "points",
    "conf_1": "values",
    "conf_2": "values",
}
"""Of a prediction, and how those of two runtimes are compared."""


@dataclass(frozen=True)
class PairTruth:
    """Ground truth of an ordered pair; the views may differ in size. Points of invalid pixels are 0."""

    gt1: Array  # (H1, W1, 3) float32, points of view 1 in camera 1
    gt2: Array  # (H2, W2, 3) float32, points of view 2 in camera 1
    valid1: Array  # (H1, W1) bool
    valid2: Array  # (H2, W2) bool
    K1: Array  # (3, 3)
    K2: Array  # (3, 3)
    cam1_to_cam2: Array  # (4, 4)


def pair_truth(frame1: PosedDepth, frame2: PosedDepth) -> PairTruth:
    """Ground truth of the pair (frame1, frame2): both depth maps as points in camera 1.

    X = z K^-1 (u + 0.5, v + 0.5, 1) (Hartley & Zisserman 2004, section 6.1), view 2 moved by the relative pose.
    Raises PqkError for a frame without depth, or whose K or pose has a wrong shape or no inverse.
    """
    refuse_broken_cameras((frame1, frame2))
    cam1_to_world = np.linalg.inv(np.asarray(frame1.world_to_cam, dtype=np.float64))
    cam1_to_cam2 = np.asarray(frame2.world_to_cam, dtype=np.float64) @ cam1_to_world
    gt1, valid1 = points_in_camera(frame1)
    gt2, valid2 = points_in_camera(frame2)
    gt2 = _move(gt2, np.linalg.inv(cam1_to_cam2))
    gt2[~valid2] = 0.0
    return PairTruth(
        gt1.astype(np.float32),
        gt2.astype(np.float32),
        valid1,
        valid2,
        np.asarray(frame1.K, dtype=np.float64),
        np.asarray(frame2.K, dtype=np.float64),
        cam1_to_cam2,
    )


def score_pair(
    pred: Prediction, truth: PairTruth, align: str = "median", chamfer_points: int = 4096, seed: int = 0
) -> Scores:
    """All scores of one predicted pair (see the table at the top of this file).

    Depth: see `pair_depth`; all valid pixels of both views weigh the same. Confidence: `sparsification_error`, of all
    these pixels together, of the distance between true point and predicted point times the depth scale; that is what
    the loss makes the confidence predict. Chamfer: valid points of both views, after the similarity fitted on all
    corresponding pixels (Umeyama); prediction and truth are each sampled at `chamfer_points` pixels of their own, drawn
    with `seed`. Reprojection: mean over the valid pixels of both views, points times the depth scale, view 2's moved
    into camera 2 by the true relative pose.
    align="none" compares metric predictions as they are: scale 1 and no similarity.

    Raises PqkError for missing keys, wrong shapes, no valid pixel in view 1, NaN or infinity at a valid pixel (of a
    confidence: NaN), and predictions that no alignment fits (all points equal, depths not positive).
    """
    points = _points(pred, truth.gt1.shape, truth.gt2.shape)
    valids = (truth.valid1, truth.valid2)
    _check_view_1(valids)
    count1, count2 = int(truth.valid1.sum()), int(truth.valid2.sum())
    depth = pair_depth(points, (truth.gt1, truth.gt2), valids, truth.cam1_to_cam2, align)
    pairs = zip(points, (truth.gt1, truth.gt2), valids, strict=True)
    errors = np.concatenate([np.linalg.norm(depth.scale * p[v] - g[v], axis=1) for p, g, v in pairs])
    scores = depth.scores() | {"ause": sparsification_error(errors, _confidence(pred, valids))}
    scores |= cloud_scores(points, (truth.gt1, truth.gt2), valids, align, chamfer_points, seed)
    total = count1 * reprojection_error(depth.scale * points[0], truth.K1, truth.valid1)
    if count2:
        moved = _move(depth.scale * points[1], truth.cam1_to_cam2)
        total += count2 * reprojection_error(moved, truth.K2, truth.valid2)
    scores["reproj_px"] = total / (count1 + count2)
    return scores


def score_against_reference(
    pred: Prediction,
    reference: Prediction,
    align: str = "median",
    chamfer_points: int = 4096,
    seed: int = 0,
    min_conf: float = 1.0,
) -> Scores:
    """Scores of a prediction where another prediction (the teacher's, same pair) plays the truth.

    The teacher's pixels with finite points and a finite confidence above `min_conf` count: the bound of its activation,
    1 for DUSt3R's 1 + e^c, 0 for a plain sigmoid (`pqk.families.dust3r.configs.lowest_confidence`). Lengths are in the
    teacher's own unit. There is no pose, so view 2's depth is z in camera 1, like view 1's. ause ranks the pixels by
    the error that the teacher expects there, 1 / its confidence: what minimises its loss c |error| - a ln c (Wang et
    al. 2024, equation 4), up to the factor a. No intrinsics: reproj_px is None.
    Raises PqkError as `score_pair` does.
    """
    shapes = {key: np.shape(_get(reference, key, "reference")) for key in ("pts3d_1", "pts3d_2")}
    truths = _points(reference, shapes["pts3d_1"], shapes["pts3d_2"], "reference")
    points = _points(pred, truths[0].shape, truths[1].shape)
    valid = []
    for truth, key in zip(truths, CONFIDENCES, strict=True):
        conf = np.asarray(_get(reference, key, "reference"))
        if conf.shape != truth.shape[:2]:
            raise PqkError(f"the reference's {key} has shape {conf.shape}, expected {truth.shape[:2]}")
        valid.append(np.isfinite(conf) & (conf > min_conf) & np.isfinite(truth).all(axis=2))
    valids = (valid[0], valid[1])
    _check_view_1(valids)
    scores = pair_depth(points, truths, valids, None, align).scores()
    expected = 1 / _confidence(reference, valids).astype(np.float64)
    scores["ause"] = sparsification_error(expected, _confidence(pred, valids))
    scores |= cloud_scores(points, truths, valids, align, chamfer_points, seed)
    scores["reproj_px"] = None
    return scores


@dataclass(frozen=True)
class PairDepth:
    """Aligned and true depth (N,) of the pixels of both views that count, view 1 first, and the scale."""

    depth: Array
    truth: Array
    scale: float

    def scores(self) -> Scores:
        """absrel, rmse and delta1 over all these pixels."""
        return {
            "absrel": abs_rel(self.depth, self.truth),
            "rmse": rmse(self.depth, self.truth),
            "delta1": delta(self.depth, self.truth),
        }


def pair_depth(
    points: tuple[Array, Array],
    truths: tuple[Array, Array],
    valids: tuple[Array, Array],
    cam1_to_cam2: Array | None,
    align: str = "median",
) -> PairDepth:
    """Depth of a pair's two point maps, each along the axis of its own camera. Evaluation and training share this.

    points, truths: of view 1 and view 2, (H, W, 3) in camera 1; valids: (H, W) bool. One scale serves both views:
    `align_scale` of their z in camera 1, where scaling is a factor and nothing else; pixels whose true z is not above 0
    there do not count for it. Then view 2 is moved into camera 2 by the true relative pose. Without a pose its depth
    is z in camera 1 too, and pixels whose true z is not above 0 do not count at all.
    Raises PqkError for no valid pixel, NaN or infinity at a valid pixel, and a scale that is not above 0.
    """
    found = [p[v] for p, v in zip(points, valids, strict=True)]
    true = [t[v] for t, v in zip(truths, valids, strict=True)]
    near, true_near = (np.concatenate([p[:, 2] for p in both]).astype(np.float64) for both in (found, true))
    scale = align_scale(near, true_near, None, align)
    depth, truth = scale * near, true_near
    if cam1_to_cam2 is not None:
        first = len(found[0])
        depth[first:] = _depth(scale * found[1].astype(np.float64), cam1_to_cam2)
        truth[first:] = _depth(true[1].astype(np.float64), cam1_to_cam2)
    counts = truth > 0
    return PairDepth(depth[counts], truth[counts], scale)


def constant_depth_scores(truth: PairTruth, align: str = "median") -> Scores:
    """absrel, rmse and delta1 for the predictor that answers one depth for every pixel of both views, after alignment.

    The floor that any trained model must beat. Raises PqkError when there is no valid pixel.
    """
    return constant_depth((truth.gt1, truth.gt2), (truth.valid1, truth.valid2), truth.cam1_to_cam2, align).scores()


def constant_depth(
    truths: tuple[Array, Array], valids: tuple[Array, Array], cam1_to_cam2: Array, align: str = "median"
) -> PairDepth:
    """What `pair_depth` is for one depth everywhere, each view in its own camera. Arguments and errors as there."""
    true = np.concatenate([truths[0][valids[0]][:, 2], _depth(truths[1][valids[1]].astype(np.float64), cam1_to_cam2)])
    counts = true > 0
    scale = align_scale(np.ones(len(true)), true, None, align)
    return PairDepth(np.full(int(counts.sum()), scale), true[counts], scale)


def quality_drop_pct(value: float, teacher_value: float, higher_is_better: bool = False) -> float:
    """Relative loss of a metric against the teacher in percent; positive = worse, negative = better.

    100 (value - teacher) / teacher for errors, the negative of it for scores such as delta1; 0 when both are 0.
    Raises PqkError when only the teacher's value is 0, and for negative or non-finite values.
    """
    for name, number in (("value", value), ("teacher's value", teacher_value)):
        if not (math.isfinite(number) and number >= 0):
            raise PqkError(f"a quality drop needs finite metrics of 0 or more; the {name} is {number}")
    if value == teacher_value:
        return 0.0
    if teacher_value == 0:
        raise PqkError(f"the drop is undefined: the teacher's value is 0 and the model's is {value}")
    change = 100.0 * (value - teacher_value) / teacher_value
    return -change if higher_is_better else change


def _check_view_1(valids: tuple[Array, Array]) -> None:
    if not valids[0].any():
        raise PqkError("no valid pixel: there is nothing to compare with in view 1")


def _confidence(pred: Prediction, valids: tuple[Array, Array]) -> Array:
    """The confidences of the valid pixels, view 1 first (N,). Raises PqkError for a missing or misshapen one."""
    found = []
    for key, valid in zip(CONFIDENCES, valids, strict=True):
        conf = np.asarray(_get(pred, key, "prediction"))
        if conf.shape != valid.shape:
            raise PqkError(f"the prediction's {key} has shape {conf.shape}, expected {valid.shape}")
        found.append(conf[valid])
    return np.concatenate(found)


def _depth(points: Array, cam1_to_cam2: Array) -> Array:
    """z in camera 2 of points (N, 3) of camera 1."""
    return points @ cam1_to_cam2[2, :3] + cam1_to_cam2[2, 3]


def _move(points: Array, transform: Array) -> Array:
    """Apply a rigid (4, 4) transform to points (..., 3), in the points' own precision."""
    matrix = transform.astype(points.dtype)
    with np.errstate(invalid="ignore"):  # pixels that nobody looks at may hold infinities
        return points @ matrix[:3, :3].T + matrix[:3, 3]


def _points(
    pred: Prediction, shape1: tuple[int, ...], shape2: tuple[int, ...], name: str = "prediction"
) -> tuple[Array, Array]:
    found = []
    for key, shape in (("pts3d_1", shape1), ("pts3d_2", shape2)):
        points = np.asarray(_get(pred, key, name), dtype=np.float32)
        if points.shape != shape or points.ndim != 3 or shape[2] != 3:
            raise PqkError(f"the {name}'s {key} has shape {points.shape}, expected (H, W, 3) as in the truth, {shape}")
        found.append(points)
    return found[0], found[1]


def _get(pred: Prediction, key: str, name: str) -> Array:
    if key not in pred:
        raise PqkError(f"the {name} has no {key}; it has {', '.join(pred) or 'nothing'}")
    return pred[key]


@dataclass(frozen=True)
class Reference:
    """The Teacher's prediction of a pair in place of its truth, and the bound of its confidences."""

    prediction: Prediction
    min_conf: float


def as_truth(prediction: Prediction, sample: Sample, config: Mapping[str, Any]) -> Sample:
    """Returns the sample with the Teacher's prediction in place of the truth. config: of the Teacher's network."""
    return replace(sample, truth=Reference(prediction, lowest_confidence(config)))


def score(prediction: Prediction, sample: Sample, options: Mapping[str, Any], seed: int) -> Scores | None:
    """Returns the scores of a pair; None where a view has fewer than `min_valid_pixels` of ground truth.

    options: section `quality` of eval.yaml. Raises PqkError as `score_pair` does.
    """
    asked = {"align": options["scale_alignment"], "chamfer_points": options["chamfer_points"], "seed": seed}
    if isinstance(sample.truth, Reference):
        reference = sample.truth
        return score_against_reference(prediction, reference.prediction, **asked, min_conf=reference.min_conf)
    truth = pair_truth(*sample.truth)
    if min(int(truth.valid1.sum()), int(truth.valid2.sum())) < options["min_valid_pixels"]:
        return None
    return score_pair(prediction, truth, **asked)


def needs(options: Mapping[str, Any]) -> str:
    """Returns what a sample must hold to be scored, for the end of a sentence."""
    return f"two views with {options['min_valid_pixels']} valid depth pixels (quality.min_valid_pixels)"


def floor(sample: Sample, options: Mapping[str, Any]) -> Scores | None:
    """Returns the scores of one depth everywhere: the floor that any model must beat; None as `score` does."""
    truth = pair_truth(*sample.truth)
    if min(int(truth.valid1.sum()), int(truth.valid2.sum())) < options["min_valid_pixels"]:
        return None
    return constant_depth_scores(truth, options["scale_alignment"])
