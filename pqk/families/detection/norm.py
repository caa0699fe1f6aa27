"""Normalizes by the statistics of a batch, also of one that processes share: `batch_norm`."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
MOMENTUM = 0.05
"""Share of a batch in the averaged statistics."""


def batch_norm(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns features (B, C, H, W), each of C normalized over the batch, scaled and shifted (Ioffe and Szegedy 2015).

    Moves the averages `mean` and `var` (C,) towards the statistics of the batch. Where processes share it, these are
    over the features of all, and gradients go to all; torch's own module for that needs CUDA.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)
    from torch.distributed.nn.functional import all_reduce  # not in every build of torch

    values = x.float()
    count = all_reduce(values.new_tensor(values.numel() / values.shape[1]))
    middle = all_reduce(values.sum((0, 2, 3))) / count
    apart = values - middle[:, None, None]
    spread = all_reduce(apart.square().sum((0, 2, 3))) / count
    with torch.no_grad():
        mean.lerp_(middle.to(mean), MOMENTUM)
        var.lerp_((spread * count / (count - 1)).to(var), MOMENTUM)
    scale = weight * (spread + EPS).rsqrt()
    return (apart * scale[:, None, None] + bias[:, None, None]).to(x.dtype)
