"""What a network sees while it trains: rendered pairs in both orders, the device, and the scores on held-out pairs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pqk.data.seeds import split_seed
from pqk.data.stream import training_pairs
from pqk.data.synthetic import texture_bank
from pqk.errors import PqkError, nearest
from pqk.spec.training import Fit, Training, TrainSpec


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


def depth_scores(pred_z: torch.Tensor, gt_z: torch.Tensor, valid: torch.Tensor) -> dict[str, float]:
    """Mean AbsRel and delta1 over samples (B,H,W) after median scaling per sample (Eigen 2014, Zhou 2017)."""
    absrel, delta = [], []
    for pred, gt, mask in zip(pred_z.float(), gt_z.float(), valid, strict=True):
        if not bool(mask.any()):
            continue
        p, g = pred[mask], gt[mask]
        p = (p * (g.median() / p.median())).clamp(min=1e-6)
        absrel.append(((p - g).abs() / g).mean())
        delta.append((torch.maximum(p / g, g / p) < 1.25).float().mean())
    if not absrel:
        raise PqkError("no validation pair has a valid pixel; lower min_covisible")
    return {"absrel": float(torch.stack(absrel).mean()), "delta1": float(torch.stack(delta).mean())}


ScoreOf = Callable[[torch.Tensor, dict[str, torch.Tensor]], float]
"""Images (B, 2, 3, H, W) of held-out pairs and the outputs for them -> their mean score, lower is better."""


def validation_scores(
    model: nn.Module,
    spec: TrainSpec | Fit,
    device: torch.device,
    autocast: bool,
    seed: int,
    score_of: ScoreOf | None = None,
) -> dict[str, float]:
    """AbsRel and delta1 of view 1 on the held-out pairs, both orders, and of a constant depth on the same pixels.

    'score' is the mean of `score_of` over the pairs; without it, the AbsRel. Every call sees the same pairs in the same
    batches. Raises PqkError when no pair has a valid pixel and when the depth is not finite.
    """
    bank = texture_bank().to(device)
    symmetric = SymmetricPairs(model).eval()
    wanted, size, count, samples = spec.validation.pairs, spec.validation.size, 0, 0
    totals: dict[str, float] = {}
    score = 0.0
    while count < wanted:
        n = min(8, wanted - count)
        pairs = training_pairs(n, size, split_seed("validation", seed, count), bank, **scenery(spec))
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            out = symmetric(pairs.images)
        count += n
        if score_of is not None:
            score += n * score_of(pairs.images, out)
        gt1, _, valid1, _ = pairs.ordered()
        usable = int(valid1.flatten(1).any(1).sum())  # a pair without overlap has no valid pixel
        if not usable:
            continue
        scores = depth_scores(out["pts3d_1"][..., 2], gt1[..., 2], valid1)
        flat = depth_scores(torch.ones_like(gt1[..., 2]), gt1[..., 2], valid1)
        for key, value in {**scores, **{f"constant_{k}": v for k, v in flat.items()}}.items():
            totals[key] = totals.get(key, 0.0) + value * usable
        samples += usable
    if not samples:
        raise PqkError("no validation pair has a valid pixel; lower min_covisible")
    means = {k: v / samples for k, v in totals.items()}
    if not math.isfinite(means["absrel"]):
        raise PqkError("the depth of the model in training is not finite on the validation pairs; lower learning_rate")
    return {"score": means["absrel"] if score_of is None else score / count, **means}


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
