"""Runs an image through DETR's graph."""

from __future__ import annotations

import numpy as np

from pqk.families.contract import Call, Sample
from pqk.families.detr.settings import Workload

MOST = 100
"""Detections of an image that COCO counts."""


def predict(call: Call, sample: Sample, workload: Workload, seed: int) -> dict[str, np.ndarray]:
    """Returns `logits` and `refined` as the graph gives them, and the detections, the best first: `boxes` (D, 4) in
    pixels of the annotated image, `scores` (D,), `labels` (D,).
    """
    fed = sample.inputs
    out = call("detector", {"image": fed.image})
    logits, refined = (np.asarray(out[name])[0] for name in ("logits", "refined"))
    found = boxes_of(logits, refined, fed.image.shape[2:], fed.size, fed.original)
    return {"logits": logits, "refined": refined, **found}


def boxes_of(
    logits: np.ndarray, refined: np.ndarray, shape: tuple[int, ...], size: tuple[int, int], original: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Returns the best pairs of box and class. shape: (H, W) of the input, in which a picture of `size` lies."""
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores = (grown / grown.sum(axis=1, keepdims=True))[:, :-1]
    best = np.argsort(-scores, axis=None, kind="stable")[:MOST]
    row, label = np.unravel_index(best, scores.shape)
    factor = np.array([shape[1] * original[1] / size[1], shape[0] * original[0] / size[0]], np.float32)
    middle, half = refined[row, :2] * factor, refined[row, 2:] * factor / 2
    limit = np.array([original[1], original[0]] * 2, np.float32)
    boxes = np.clip(np.concatenate((middle - half, middle + half), axis=1), 0, limit).astype(np.float32)
    real = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return {"boxes": boxes[real], "scores": scores[row, label][real], "labels": label[real].astype(np.int64)}
