"""Computes VGGT's training losses (Wang et al. 2025, section 3.3), and those against a Teacher.

Shapes: B sequences of S frames, H, W pixels; depth (B, S, H, W), points (B, S, H, W, 3), confidences above 1 and masks
(B, S, H, W), poses (B, S, 9). The truth is normalised (`normalise`), the network's outputs are not: it learns the unit.
Everything is computed in float32. Invalid pixels are replaced by constants and leave no value and no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pqk.families.losses import NEAREST, laplace_kl, masked_mean

Outputs = Mapping[str, Tensor]

CAMERA_WEIGHT = 5.0
"""Of the camera loss beside depth and points, as in the released recipe."""
FADE = 0.6
"""Weight of a round of the camera head, relative to the round after it."""
FOV_WEIGHT = 0.5
"""Of the fields of view, relative to translation and rotation."""
FARTHEST = 100.0
"""Translations are clipped to this."""
LEAST_VALID = 100
"""Valid pixels that a first frame must have for its sequence's poses to count."""
KEPT_SHARE = 0.98
"""Of errors: the largest are left out, as the truth is wrong at edges."""
SCALES = 3
"""Of the gradient terms, each at half the size of the one before."""


@dataclass
class Truth:
    """Ground truth of a batch of sequences, in the first camera's frame; pose: encodings (B, S, 9)."""

    depth: Tensor
    points: Tensor
    valid: Tensor
    pose: Tensor


def normalise(truth: Truth) -> Truth:
    """Returns the truth divided by the mean distance of its valid points to the first camera, per sequence.

    The factor is sum |x| / (count + 1e-3), clipped to [1e-6, 1e6]; translations, depths and points are divided by it.
    """
    far = torch.where(truth.valid, truth.points.norm(dim=-1), 0.0)
    factor = (far.sum((1, 2, 3)) / (truth.valid.sum((1, 2, 3)) + 1e-3)).clamp(1e-6, 1e6)
    of_map = factor[:, None, None, None]
    pose = torch.cat((truth.pose[..., :3] / factor[:, None, None], truth.pose[..., 3:]), dim=-1)
    return Truth(truth.depth / of_map, truth.points / of_map[..., None], truth.valid, pose)


def camera_loss(rounds: Sequence[Tensor], truth: Truth) -> Tensor:
    """L1 distance of the poses (B, S, 9) after each round to the true ones: a scalar.

    Round k of n weighs 0.6^(n - 1 - k) / n. Only sequences whose first frame has more than 100 valid pixels count.
    """
    counts = truth.valid[:, 0].flatten(1).sum(1) > LEAST_VALID
    total = torch.zeros((), device=truth.pose.device)
    for number, pose in enumerate(rounds):
        value = pose_distance(pose, truth.pose)
        weight = FADE ** (len(rounds) - 1 - number) / len(rounds)
        total = total + weight * (value.mean(1) * counts).sum() / counts.sum().clamp_min(1)
    return total


def map_loss(found: Tensor, conf: Tensor, true: Tensor, valid: Tensor, alpha: float) -> Tensor:
    """Confidence-weighted loss of a map (B, S, H, W, C): conf |e| - alpha ln conf, |e|, and conf |gradient of e|.

    e is the difference to the truth, |e| its Euclidean length. The largest 2 % of the lengths are left out. Gradients
    are differences of neighbours, at three scales. A scalar.
    """
    error = torch.where(valid[..., None], found.float() - true, 0.0)
    conf = torch.where(valid, conf.float(), 1.0)
    length = _length(error)
    counts = valid & (length <= _largest_kept(length.detach(), valid))
    total = masked_mean(conf * length - alpha * conf.log() + length, counts)
    for scale in range(SCALES):
        step = 2**scale
        total = total + _gradient(error[:, :, ::step, ::step], conf[:, :, ::step, ::step], counts[:, :, ::step, ::step])
    return total


def _length(error: Tensor) -> Tensor:
    """Euclidean length over the last axis, with gradient 0 where it is 0."""
    if error.shape[-1] == 1:
        return error[..., 0].abs()
    square = error.square().sum(-1)
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _largest_kept(length: Tensor, valid: Tensor) -> Tensor:
    """The error that 98 % of the valid pixels do not exceed; of a million pixels at most, evenly spread."""
    values = length[valid]
    if not len(values):
        return torch.full((), math.inf, device=length.device)
    values = values[:: 1 + len(values) // 1_000_000]
    return values.kthvalue(math.ceil(KEPT_SHARE * len(values))).values  # quantile() sorts: seven times as long


def _gradient(error: Tensor, conf: Tensor, valid: Tensor) -> Tensor:
    total = torch.zeros((), device=error.device)
    for axis in (2, 3):
        size = error.shape[axis] - 1
        if size < 1:
            continue
        both = valid.narrow(axis, 0, size) & valid.narrow(axis, 1, size)
        apart = _length(error.narrow(axis, 1, size) - error.narrow(axis, 0, size))
        total = total + masked_mean(conf.narrow(axis, 0, size) * apart, both)
    return total / SCALES


def task_loss(out: Outputs, rounds: Sequence[Tensor], truth: Truth, alpha: float) -> Tensor:
    """Returns 5 * `camera_loss` + `map_loss` of depth and of points, against the normalised truth: a scalar.

    The maps may be those of the first sequences alone.
    """
    aim, count = normalise(truth), len(out["depth"])
    deep, at, valid = aim.depth[:count, ..., None], aim.points[:count], aim.valid[:count]
    depth = map_loss(out["depth"][..., None], out["depth_conf"], deep, valid, alpha)
    points = map_loss(out["world_points"], out["world_points_conf"], at, valid, alpha)
    return CAMERA_WEIGHT * camera_loss(rounds, aim) + depth + points


def softened_kl(teacher: Outputs, student: Outputs, valid: Tensor, conf_alpha: float, temperature: float) -> Tensor:
    """KL of the Teacher's densities of points and of depths to the student's, both softened, plus that of the poses.

    A pixel's density is the one whose negative logarithm the loss conf |e| - alpha ln conf is: of points
    `exp(-3 conf / alpha |x - p|)`, of depths `exp(-conf / alpha |z - d|)`, up to constants. Softening by a temperature
    divides the rate. The KL in nats is multiplied by alpha / 3 and alpha, the unit of that loss. Poses have no density:
    of them the weighted L1 distance counts, as in `camera_loss`.
    """
    rate = 1 / (conf_alpha * temperature)
    conf = [torch.where(valid, out["world_points_conf"].float(), 1.0) for out in (teacher, student)]
    apart = torch.where(valid[..., None], student["world_points"].float() - teacher["world_points"].float(), 0.0)
    points = laplace_kl(_length(apart), 3 * rate * conf[0], 3 * rate * conf[1])
    conf = [torch.where(valid, out["depth_conf"].float(), 1.0) for out in (teacher, student)]
    apart = torch.where(valid, student["depth"].float() - teacher["depth"].float(), 0.0)
    depth = laplace_kl_1d(apart.abs(), rate * conf[0], rate * conf[1])
    maps = conf_alpha / 3 * masked_mean(points, valid) + conf_alpha * masked_mean(depth, valid)
    return maps + CAMERA_WEIGHT * pose_distance(student["pose_enc"], teacher["pose_enc"]).mean()


def laplace_kl_1d(distance: Tensor, rate_p: Tensor, rate_q: Tensor) -> Tensor:
    """KL(p || q) in nats, element by element, of two densities `rate / 2 exp(-rate |x - centre|)` on a line.

    ln(rate_p / rate_q) - 1 + rate_q (d + exp(-rate_p d) / rate_p), as d + exp(-rate_p d) / rate_p is the mean distance
    of a draw of p from the centre of q, d away.
    """
    mean = distance + torch.exp(-rate_p * distance) / rate_p
    return rate_p.log() - rate_q.log() - 1 + rate_q * mean


def pose_distance(found: Tensor, aim: Tensor) -> Tensor:
    """Weighted L1 distance of poses (..., 9), as in `camera_loss`: (...)."""
    apart = (found.float() - aim.float()).abs()
    return apart[..., :3].clamp(max=FARTHEST).mean(-1) + apart[..., 3:7].mean(-1) + FOV_WEIGHT * apart[..., 7:].mean(-1)


def imitation(found: Outputs, aim: Outputs, alpha: float) -> Tensor:
    """How far outputs are from the Teacher's, per sequence (B,): relative errors of points and depths, and of poses.

    The mean over pixels of w |x - x_T| / max(|x_T|, 0.05) with w the Teacher's confidence over its mean in that frame,
    so that pixels it knows nothing about weigh little; plus alpha |ln conf - ln conf_T|; plus the poses' distance.
    """
    total = pose_distance(found["pose_enc"], aim["pose_enc"]).mean(1)
    for values, conf in (("world_points", "world_points_conf"), ("depth", "depth_conf")):
        mine, true = found[values].float(), aim[values].float()
        if mine.ndim == 4:
            mine, true = mine[..., None], true[..., None]
        sure, trusted = found[conf].float(), aim[conf].float()
        error = _length(mine - true) / true.norm(dim=-1).clamp_min(NEAREST)
        weight = trusted / trusted.mean(dim=(2, 3), keepdim=True)
        total = total + (weight * error).mean((1, 2, 3)) + alpha * (sure.log() - trusted.log()).abs().mean((1, 2, 3))
    return total


def output_probe(out: Outputs) -> Tensor:
    """Points, depths and poses, each relative to its size, projected on random signs: a scalar.

    The squared gradient of it by a weight is on average how far the weight moves the outputs (Hutchinson 1990), which
    is the second order of a loss against the network's own outputs. The signs are always the same.
    """
    generator, total = torch.Generator().manual_seed(0), torch.zeros((), device=out["depth"].device)
    for values in (out["world_points"], out["depth"][..., None], out["pose_enc"]):
        values = values.float()
        signs = torch.randint(2, values.shape, generator=generator).to(values) * 2 - 1
        far = values.detach().norm(dim=-1, keepdim=True).clamp_min(NEAREST)
        total = total + (signs * values / far).sum() / values[..., 0].numel() ** 0.5
    return total
