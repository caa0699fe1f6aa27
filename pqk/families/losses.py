"""Computes the losses that families share: densities of points compared, features compared, means over valid pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NEAREST = 0.05
"""Points nearer to the camera than this, in the Teacher's unit, count as being this far in the relative error."""
_SERIES_BELOW = 0.5
_SERIES = [(-1) ** n * (3 - n) / math.factorial(n + 1) for n in range(2, 15)]
"""Near 0 the closed form of the mean distance loses digits; its power series, from s^2 on, is exact up to there."""


def laplace_kl(distance: Tensor, rate_p: Tensor, rate_q: Tensor) -> Tensor:
    """KL(p || q) in nats, element by element, of two densities `rate^3 / (8 pi) exp(-rate |x - centre|)` of 3-D points.

    distance: between the two centres, at least 0, in the unit in which the rates are per unit; rates above 0.
    With t = ln(rate_q / rate_p) and s = rate_p distance it is `3 (e^t - 1 - t) + e^t (h(s) - 3)`, where
    `h(s) = s + 4 / s - e^-s (1 + 4 / s)` is the mean distance of a draw of p (rate 1) from a point at distance s.
    Both terms are at least 0, and 0 only where rates and centres agree.
    """
    log_ratio = rate_q.log() - rate_p.log()
    return 3 * (torch.expm1(log_ratio) - log_ratio) + log_ratio.exp() * _farther(rate_p * distance)


def _farther(s: Tensor) -> Tensor:
    """h(s) - 3: how much farther away, on average, a point at distance s is than the centre; s^2 / 6 near 0."""
    small = s.clamp(max=_SERIES_BELOW)
    series = torch.zeros_like(small)
    for coefficient in reversed(_SERIES):
        series = series * small + coefficient
    large = s.clamp(min=_SERIES_BELOW)
    closed = large - 3 - torch.exp(-large) - 4 * torch.expm1(-large) / large
    return torch.where(s < _SERIES_BELOW, small.square() * series, closed)


def feature_loss(teacher: dict[str, Tensor], student: dict[str, Tensor], bridges: nn.ModuleDict) -> Tensor:
    """Mean over the features of `|F_T - F_S|^2 / |F_T|^2`, squares of all tokens and samples together: a scalar.

    Relative, because the stream of a decoder grows from block to block, and every layer should count alike. bridges:
    a linear map from the student's width to the Teacher's for every feature whose widths differ.
    """
    parts = []
    for name, target in teacher.items():
        ours = bridges[name](student[name]) if name in bridges else student[name]
        error = (ours.float() - target.float()).square().mean()
        parts.append(error / target.float().square().mean().clamp_min(1e-8))
    return torch.stack(parts).mean()


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean () of values (B, H, W) over the valid pixels of the whole batch; 0 when there are none."""
    return torch.where(valid.bool(), values, 0.0).sum() / valid.float().sum().clamp_min(1.0)
