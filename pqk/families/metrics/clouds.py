"""Distances between the clouds of predicted and true point maps, after one similarity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pqk.errors import PqkError
from pqk.families.metrics.geometry import Array, chamfer, umeyama


def cloud_scores(
    points: Sequence[Array] | Array,
    truths: Sequence[Array] | Array,
    valids: Sequence[Array] | Array,
    align: str,
    chamfer_points: int,
    seed: int,
    paired: bool = True,
) -> dict[str, float]:
    """Returns chamfer, chamfer_accuracy and chamfer_completeness of point maps, in the truth's unit, 0 at best.

    points, truths: a map (H, W, 3) of each view, all in one frame; valids: (H, W) bool. The similarity is fitted on all
    corresponding valid pixels (`umeyama`); align="none": none. Of more than `chamfer_points` pixels so many are drawn,
    with `seed`, for each cloud apart: a perfect prediction is not compared with itself. paired: also chamfer_paired,
    prediction and truth at the same pixels.
    Raises PqkError for fewer than 3 `chamfer_points`, no valid pixel, NaN or infinity at one, and points that determine
    no similarity.
    """
    if chamfer_points < 3:
        raise PqkError(f"chamfer_points must be at least 3, got {chamfer_points}")
    pred_cloud = np.concatenate([p[v] for p, v in zip(points, valids, strict=True)])
    gt_cloud = np.concatenate([g[v] for g, v in zip(truths, valids, strict=True)])
    similarity = None if align == "none" else umeyama(pred_cloud, gt_cloud)
    places: list[Any] = [slice(None), slice(None)]
    if len(gt_cloud) > chamfer_points:
        random = np.random.default_rng(seed)
        places = [random.choice(len(gt_cloud), chamfer_points, replace=False) for _ in range(2)]
    gt, same, other = gt_cloud[places[0]], pred_cloud[places[0]], pred_cloud[places[1]]
    if similarity is not None:
        same, other = similarity.apply(same), similarity.apply(other)
    distances = chamfer(other, gt)
    found = {
        "chamfer": distances.mean,
        "chamfer_accuracy": distances.accuracy,
        "chamfer_completeness": distances.completeness,
    }
    return found | {"chamfer_paired": chamfer(same, gt).mean} if paired else found
