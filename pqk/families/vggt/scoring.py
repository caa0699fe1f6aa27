"""Scores the prediction of a set of frames against ground truth, or against a Teacher's prediction.

A prediction is a dict of numpy arrays of S frames (`pqk.families.vggt.predict`), all up to one scale: pose_enc (S, 9),
depth (S, H, W), depth_conf (S, H, W), world_points (S, H, W, 3) in the first camera's frame, world_points_conf
(S, H, W). Scores are in metres when the truth is:

| key | meaning | best |
| --- | --- | --- |
| absrel, delta1, rmse | depth after one scale of the set; of each frame, then the mean over the frames | 0, 1, 0 |
| chamfer, chamfer_accuracy, chamfer_completeness | points of all frames after one similarity, sampled apart | floor |
| ause | how badly depth_conf ranks the pixels of all frames by the error of their depth | 0 |
| rot_deg, trans_deg | errors of the relative poses of the set's pairs of frames, mean in degrees | 0 |
| aucT, rraT, rtaT | shares of these pairs within T degrees (`pqk.families.metrics.pose`) | 1 |
| pose_miss30 | 1 - auc30 | 0 |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pqk.data.scenes.colmap import quaternion_to_rotation
from pqk.errors import PqkError
from pqk.families.contract import Sample
from pqk.families.metrics import pose, summary
from pqk.families.metrics.clouds import cloud_scores
from pqk.families.metrics.geometry import Array, abs_rel, align_scale, delta, rmse, sparsification_error
from pqk.families.metrics.truth import PosedDepth, points_in_camera, refuse_broken_cameras

Prediction = Mapping[str, Array]
Scores = dict[str, float | None]

OUTPUTS: dict[str, Literal["points", "values"]] = {
    "pose_enc": "values",
    "depth": "values",
    "depth_conf": "values",
    "world_points": "points",
    "world_points_conf": "values",
}
"""Of a prediction, and how those of two runtimes are compared."""

SHARES = {"auc": (3, 5, 15, 30), "rra": (5, 15, 30), "rta": (5, 15, 30)}
"""Which shares of pairs are recorded, at how many degrees."""
POSE_METRICS = (
    "pose_miss30",
    "rot_deg",
    "trans_deg",
    *(f"{name}{degrees}" for name, listed in SHARES.items() for degrees in listed),
)
LOWEST_CONFIDENCE = 1.0
"""Bound of the network's confidences 1 + e^c."""


@dataclass(frozen=True, eq=False)
class SetTruth:
    """What S frames are scored against. Masks are bool; what they leave out counts nowhere.

    expected: errors of depth that the Teacher expects, by which confidences are ranked in place of the real ones.
    """

    depth: Array  # (S, H, W) float64, along the axis of each camera, in metres or the Teacher's unit
    valid: Array  # (S, H, W), pixels of known depth
    points: Array  # (S, H, W, 3) float64, in camera 1
    valid_points: Array  # (S, H, W), pixels of known points
    cameras: Array  # (S, 4, 4) or (S, 3, 4) float64, world to camera
    expected: Array | None = None  # (S, H, W) float64


@dataclass(frozen=True, eq=False)
class Reference:
    """The Teacher's prediction of a set of frames in place of its truth."""

    prediction: Prediction


def set_truth(frames: Sequence[PosedDepth]) -> SetTruth:
    """Returns the ground truth of frames of one size: their depth, also as points in the first camera, their poses.

    Raises PqkError for a frame without depth, for frames of different sizes, and for a K or pose that has a wrong
    shape or no inverse.
    """
    refuse_broken_cameras(frames)
    cameras = np.stack([np.asarray(frame.world_to_cam, dtype=np.float64) for frame in frames])
    known = [points_in_camera(frame) for frame in frames]
    if len({valid.shape for _, valid in known}) > 1:
        raise PqkError("the frames of a set must have one size")
    local, valid = np.stack([points for points, _ in known]), np.stack([valid for _, valid in known])
    to_first = cameras[0] @ np.linalg.inv(cameras)
    points = local @ np.swapaxes(to_first[:, None, :3, :3], -1, -2) + to_first[:, None, None, :3, 3]
    return SetTruth(local[..., 2], valid, points, valid, cameras)


def reference_truth(reference: Prediction) -> SetTruth:
    """Returns the Teacher's prediction as a truth, in its own unit.

    Pixels count whose depth (or point) is finite and whose confidence in it is finite and above 1. The Teacher expects
    an error of 1 / depth_conf: what minimises its loss c |error| - a ln c (Wang et al. 2025, section 3.3), up to the
    factor a. Raises PqkError for a missing or misshapen array and for cameras that are not finite.
    """
    shape = np.shape(_get(reference, "depth", "reference"))
    maps = {name: _array(reference, name, shape, "reference") for name in ("depth", "depth_conf", "world_points_conf")}
    points = _array(reference, "world_points", (*shape, 3), "reference")
    sure = {
        name: np.isfinite(maps[name]) & (maps[name] > LOWEST_CONFIDENCE) for name in ("depth_conf", "world_points_conf")
    }
    valid = sure["depth_conf"] & np.isfinite(maps["depth"]) & (maps["depth"] > 0)
    return SetTruth(
        maps["depth"],
        valid,
        points,
        sure["world_points_conf"] & np.isfinite(points).all(axis=-1),
        cameras_of(reference, shape, "reference"),
        1 / np.where(valid, maps["depth_conf"], 1.0),
    )


def score_set(
    pred: Prediction, truth: SetTruth, align: str = "median", chamfer_points: int = 4096, seed: int = 0
) -> Scores:
    """Returns all scores of one predicted set (see the table at the top of this file).

    align: how depth is scaled (`align_scale` over the valid pixels of all frames); "none" compares metric predictions
    as they are, without a similarity of the points. chamfer_points: pixels drawn from each cloud, with `seed`. Scores
    of poses are None for a single frame.
    Raises PqkError for missing keys, wrong shapes, no valid pixel, NaN or infinity at a valid pixel (of depth_conf:
    NaN) or in a camera, and predictions that no alignment fits (all points equal, depths not positive).
    """
    shape = truth.depth.shape
    depth, conf = (_array(pred, name, shape) for name in ("depth", "depth_conf"))
    points = _array(pred, "world_points", (*shape, 3))
    scores, scaled = depth_scores(depth, truth, align)
    scores |= cloud_scores(points, truth.points, truth.valid_points, align, chamfer_points, seed, paired=False)
    errors = np.abs(scaled - truth.depth) if truth.expected is None else truth.expected
    scores["ause"] = sparsification_error(errors[truth.valid], conf[truth.valid])
    return scores | pose_scores(cameras_of(pred, shape), truth.cameras)


def constant_scores(truth: SetTruth, align: str = "median") -> Scores:
    """Returns the scores of depths and poses for the predictor that answers one depth for every pixel of all frames,
    and that all cameras are where the first one is.

    A pose without a baseline is 90 degrees off in translation. Raises PqkError when there is no valid pixel.
    """
    scores, _ = depth_scores(np.ones(truth.depth.shape), truth, align)
    return scores | pose_scores(np.tile(np.eye(4), (len(truth.depth), 1, 1)), truth.cameras)


def depth_scores(depth: Array, truth: SetTruth, align: str = "median") -> tuple[Scores, Array]:
    """Returns absrel, delta1 and rmse as means over the frames with a valid pixel, and the scaled depth (S, H, W)."""
    scaled = align_scale(depth[truth.valid], truth.depth[truth.valid], None, align) * depth
    frames = [place for place, valid in enumerate(truth.valid) if valid.any()]

    def mean(metric: Any) -> float:
        return float(np.mean([metric(scaled[place], truth.depth[place], truth.valid[place]) for place in frames]))

    return {"absrel": mean(abs_rel), "delta1": mean(delta), "rmse": mean(rmse)}, scaled


def pose_scores(found: Array, true: Array) -> Scores:
    """Returns `POSE_METRICS` of world-to-camera matrices (S, 4, 4) or (S, 3, 4), over the pairs of frames i < j.

    rot_deg, trans_deg: means in degrees; the others: shares, 0..1. For a single frame all are None.
    """
    if len(true) < 2:
        return dict.fromkeys(POSE_METRICS)
    errors = pose.pair_errors(found, true)
    shares = pose.scores(errors)
    named = {f"{name}{degrees}": shares[f"{name}_{degrees}"] for name, listed in SHARES.items() for degrees in listed}
    return {
        "pose_miss30": 1 - named["auc30"],
        "rot_deg": float(errors.rotation.mean()),
        "trans_deg": float(errors.translation.mean()),
        **named,
    }


def cameras_of(pred: Prediction, shape: tuple[int, ...], name: str = "prediction") -> Array:
    """Returns the world-to-camera matrices (S, 3, 4) float64 of a prediction's pose encodings; shape: (S, H, W).

    Raises PqkError for encodings that are missing or misshapen, that are not finite, and whose quaternion is 0.
    """
    encoded = _array(pred, "pose_enc", (shape[0], 9), name)
    found: Array = np.empty((shape[0], 3, 4))
    found[..., 3] = encoded[:, :3]
    with np.errstate(invalid="ignore", divide="ignore"):  # of a quaternion that is 0, or not finite
        # COLMAP has w first; `geometry` computes the same in torch, which takes two seconds to import
        found[..., :3] = np.stack([quaternion_to_rotation(q) for q in encoded[:, [6, 3, 4, 5]]])
    numbers = np.concatenate([encoded, found.reshape(len(found), -1)], axis=1)
    broken = len(numbers) - int(np.isfinite(numbers).all(axis=1).sum())
    if broken:
        raise PqkError(f"NaN refused: the {name}'s pose_enc gives no camera for {broken} of {len(numbers)} frames")
    return found


def _array(pred: Prediction, key: str, shape: tuple[int, ...], name: str = "prediction") -> Array:
    """A float64 copy. Raises PqkError for a missing or misshapen one."""
    found = np.array(_get(pred, key, name), dtype=np.float64)
    if found.shape != shape:
        raise PqkError(f"the {name}'s {key} has shape {found.shape}, expected {shape}")
    return found


def _get(pred: Prediction, key: str, name: str) -> Array:
    if key not in pred:
        raise PqkError(f"the {name} has no {key}; it has {', '.join(pred) or 'nothing'}")
    return pred[key]


def as_truth(prediction: Prediction, sample: Sample, config: Mapping[str, Any]) -> Sample:
    """Returns the sample with the Teacher's prediction in place of the truth."""
    return replace(sample, truth=Reference(prediction))


def score(prediction: Prediction, sample: Sample, options: Mapping[str, Any], seed: int) -> Scores | None:
    """Returns the scores of a set; None where a frame has fewer than `min_valid_pixels` of ground truth.

    options: section `quality` of eval.yaml. Raises PqkError as `score_set` does.
    """
    if isinstance(sample.truth, Reference):
        truth = reference_truth(sample.truth.prediction)
    elif (known := _known(sample, options)) is None:
        return None
    else:
        truth = known
    return score_set(prediction, truth, options["scale_alignment"], options["chamfer_points"], seed)


def _known(sample: Sample, options: Mapping[str, Any]) -> SetTruth | None:
    """The ground truth of a sample; None where a frame has too little of it."""
    truth = set_truth(sample.truth)
    enough = (truth.valid.sum(axis=(1, 2)) >= options["min_valid_pixels"]).all()
    return truth if enough else None


def needs(options: Mapping[str, Any]) -> str:
    """Returns what a sample must hold to be scored, for the end of a sentence."""
    return f"frames with {options['min_valid_pixels']} valid depth pixels each (quality.min_valid_pixels)"


def floor(sample: Sample, options: Mapping[str, Any]) -> Scores | None:
    """Returns the scores of one depth everywhere and one camera: the floor that any model must beat; None as `score`
    does. Points and confidence have none."""
    truth = _known(sample, options)
    return None if truth is None else constant_scores(truth, options["scale_alignment"])


def summarise(evidence: Sequence[Mapping[str, Any]]) -> Scores:
    """Returns the mean over sets of each metric, and absrel_p95, the 95th percentile of absrel.

    All sets have as many pairs of frames, so that the mean of aucT is that of all pairs. Raises PqkError as
    `pqk.families.metrics.summary.summarise` does.
    """
    return summary.summarise(evidence, "sets")
