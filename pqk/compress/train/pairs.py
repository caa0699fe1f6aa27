"""What a network sees while it trains: rendered pairs in both orders, the device, and the scores on held-out pairs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from pqk.data.render.stream import PairBatch, training_pairs
from pqk.data.render.synthetic import texture_bank
from pqk.errors import PqkError, nearest
from pqk.families.dust3r.scoring import constant_depth, pair_depth
from pqk.settings.seeds import split_seed
from pqk.settings.training import Fit, Training, TrainSpec


class SymmetricPairs(nn.Module):
    """Both orders of each pair from one encoding per image: images (B,2,3,H,W) -> outputs for 2B samples."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        height, width = images.shape[-2:]
        tokens = self.model.encode(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        a, b = tokens[:, 0], tokens[:, 1]
        return self.model.decode(torch.cat([a, b]), torch.cat([b, a]), (height, width), (height, width))


def depth_scores(points_1: torch.Tensor, points_2: torch.Tensor, pairs: PairBatch) -> list[dict[str, float]]:
    """AbsRel and delta1 of each sample whose first view has a valid pixel, as the evaluation scores it (`pair_depth`).

    points_1, points_2: (2B,H,W,3) of both views, in the order of `pairs.ordered()`, on any device. What the evaluation
    would refuse still gets a number, because a network in training may pass through it: NaN for points that are not
    finite, and 1 and 0, those of a depth of zero, where no scale above 0 brings the depth to that of the truth.
    """
    found = []
    for points, truths, valids, pose in _samples((points_1, points_2), pairs):
        if not valids[0].any():
            continue
        if not all(np.isfinite(p[v]).all() for p, v in zip(points, valids, strict=True)):
            found.append({"absrel": math.nan, "delta1": math.nan})
            continue
        try:
            scores = pair_depth(points, truths, valids, pose).scores()
        except PqkError:  # the scale
            scores = {"absrel": 1.0, "delta1": 0.0}
        found.append({name: float(scores[name] or 0.0) for name in ("absrel", "delta1")})
    return found


def constant_scores(pairs: PairBatch) -> list[dict[str, float]]:
    """What `depth_scores` gives a network that answers one depth everywhere, each view in its own camera."""
    found = []
    for _, truths, valids, pose in _samples(pairs.ordered()[:2], pairs):
        if valids[0].any():
            scores = constant_depth(truths, valids, pose).scores()
            found.append({name: float(scores[name] or 0.0) for name in ("absrel", "delta1")})
    return found


Two = tuple[np.ndarray, np.ndarray]


def _samples(points: tuple[torch.Tensor, torch.Tensor], pairs: PairBatch) -> Iterator[tuple[Two, Two, Two, np.ndarray]]:
    """Points, true points and valid pixels of both views, and the relative pose, of one sample after the other."""
    tensors = (*points, *pairs.ordered(), pairs.first_to_second())
    for p1, p2, t1, t2, v1, v2, pose in zip(*(_numpy(t) for t in tensors), strict=True):
        yield (p1, p2), (t1, t2), (v1, v2), pose


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    found: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    return found


ScoreOf = Callable[[torch.Tensor, dict[str, torch.Tensor]], list[float]]
"""Images (B, 2, 3, H, W) of held-out pairs and the outputs for them -> the score of each pair, lower is better."""


def validation_scores(
    model: nn.Module,
    spec: TrainSpec | Fit,
    device: torch.device,
    autocast: bool,
    seed: int,
    score_of: ScoreOf | None = None,
) -> dict[str, Any]:
    """AbsRel and delta1 on the held-out pairs, in both orders, and of a constant depth on the same pixels.

    Means over the samples of `depth_scores`. 'score' is the mean of `score_of` over the pairs; without it, the AbsRel.
    'scores' has one of each pair, and 'absrels' the AbsRel of each pair that has a valid pixel, for paired differences.
    Every call sees the same pairs in the same batches. Raises PqkError when no pair has a valid pixel and when the
    depth is not finite.
    """
    bank = texture_bank().to(device)
    symmetric = SymmetricPairs(model).eval()
    wanted, size, count = spec.validation.pairs, spec.validation.size, 0
    rows: list[dict[str, float]] = []
    whose: list[int] = []  # the pair of each row
    scores: list[float] = []
    while count < wanted:
        n = min(8, wanted - count)
        pairs = training_pairs(n, size, split_seed("validation", seed, count), bank, **scenery(spec))
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            out = symmetric(pairs.images)
        if score_of is not None:
            scores += score_of(pairs.images, out)
        seen = pairs.ordered()[2].flatten(1).any(1).tolist()
        whose += [count + k % n for k, valid in enumerate(seen) if valid]
        count += n
        flat = [{f"constant_{name}": value for name, value in row.items()} for row in constant_scores(pairs)]
        rows += [a | b for a, b in zip(depth_scores(out["pts3d_1"], out["pts3d_2"], pairs), flat, strict=True)]
    if not rows:
        raise PqkError("no validation pair has a valid pixel; lower min_covisible")
    means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}
    if not math.isfinite(means["absrel"]):
        raise PqkError("the depth of the model in training is not finite on the validation pairs; lower learning_rate")
    of_pairs: dict[int, list[float]] = {}
    for pair, row in zip(whose, rows, strict=True):
        of_pairs.setdefault(pair, []).append(row["absrel"])
    absrels = [math.fsum(orders) / len(orders) for orders in of_pairs.values()]
    score = means["absrel"] if score_of is None else math.fsum(scores) / count
    return {"score": score, **means, "scores": scores or absrels, "absrels": absrels}


def means_of(scores: dict[str, Any]) -> dict[str, float]:
    """What `validation_scores` returns, without the lists of single pairs."""
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def scenery(spec: Training) -> dict[str, Any]:
    """The options of `training_pairs` that a training file sets."""
    return {"spread": spec.spread_deg, "fov": spec.fov_deg, "min_covisible": spec.min_covisible}


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one. Raises PqkError for a device that is unknown or not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise PqkError(
            f"unknown device {name!r}{nearest(name, ('auto', 'cpu', 'cuda'))}; allowed are auto, cpu and cuda[:n]"
        )
    if name == "cpu":
        return torch.device(name)
    if "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    there = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= there:
        raise PqkError(f"device {name!r} was asked for, but torch sees {there} CUDA devices; use --device cpu")
    return torch.device(name)
