"""Defines the attention among the boxes of an image, and the geometry that may be added to it.

Attention: Vaswani et al. 2017. Relation features: Hu et al. 2018 (Relation Networks), section 3.2.2. Boxes are corners
in pixels (B, N, 4); of pairs, m is the query and n the key.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.families.diffusiondet.network.boxes import to_centres

SMALLEST = 1e-3
"""Smallest width, height and relative distance in pair features."""
WAVES, WAVE_BASE, WAVE_SCALE = 8, 1000.0, 100.0
PLACE_BASE = 10_000.0
BIAS_HIDDEN = 64
LEAST_RELATION = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention among N boxes: (B, N, C) -> (B, N, C). The fused projection is ordered q, k, v."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """bias: added to the scores, broadcasts to (B, heads, N, N); None: nothing is."""
        batch, many, dim = x.shape
        fused = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = fused.view(batch, many, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q / math.sqrt(dim // self.heads)) @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        return self.out_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, many, dim))


def place_waves(boxes: Tensor, whwh: Tensor, dim: int) -> Tensor:
    """Returns sines and cosines of where boxes lie: (B, N, dim), a quarter each for cx, cy, w and h.

    whwh: w, h, w, h of each image (B, 4). Coordinates are relative to it and limited to [0, 1]; the frequencies are
    2 pi / 10000^(i / (dim / 8)), i = 0 ... dim / 8 - 1, first all sines, then all cosines.
    """
    place = (to_centres(boxes / whwh[:, None])).clamp(0, 1)
    count = dim // 8
    power = torch.arange(count, device=boxes.device, dtype=place.dtype) / count
    angle = place[..., None] * (2 * math.pi / PLACE_BASE**power)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def pair_features(boxes: Tensor) -> Tensor:
    """Returns how each box n lies to each box m: (B, N of m, N of n, 4).

    ln(|cx_m - cx_n| / w_m), ln(|cy_m - cy_n| / h_m), ln(w_n / w_m), ln(h_n / h_m), with sizes of at least 1e-3 pixels
    and distances of at least 1e-3 sizes.
    """
    middle, size = to_centres(boxes).split(2, dim=-1)
    size = size.clamp(min=SMALLEST)
    apart = (middle[:, :, None] - middle[:, None]).abs() / size[:, :, None]
    return torch.cat((apart.clamp(min=SMALLEST).log(), (size[:, None] / size[:, :, None]).log()), dim=-1)


def relation_waves(pairs: Tensor) -> Tensor:
    """Returns sines and cosines of pair features (..., 4): (..., 64), for each number 8 sines, then 8 cosines.

    Angles are 100 g / 1000^(i / 8), i = 0 ... 7.
    """
    power = torch.arange(WAVES, device=pairs.device, dtype=pairs.dtype) / WAVES
    angle = pairs[..., None] * WAVE_SCALE / WAVE_BASE**power
    return torch.cat((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def geometry_bias(kind: str, heads: int) -> nn.Sequential:
    """Returns the layers from pair features to a bias for each head, which begins at 0 (`start_geometry`).

    kind: 'relation', a linear layer on `relation_waves`; 'mlp', two layers on the features themselves.
    """
    if kind == "relation":
        return nn.Sequential(nn.Linear(4 * 2 * WAVES, heads))
    return nn.Sequential(nn.Linear(4, BIAS_HIDDEN), nn.ReLU(), nn.Linear(BIAS_HIDDEN, heads))


def bias_of(layers: nn.Sequential, boxes: Tensor) -> Tensor:
    """Returns the bias of attention (B, heads, N, N) from layers of `geometry_bias`.

    Of a relation it is ln max(relu(linear(waves)), 1e-6), so that the softmax multiplies by the relation's weight.
    """
    pairs = pair_features(boxes)
    if len(layers) > 1:
        return layers(pairs).permute(0, 3, 1, 2)
    return F.relu(layers(relation_waves(pairs))).clamp(min=LEAST_RELATION).log().permute(0, 3, 1, 2)


def nearest_mask(boxes: Tensor, nearest: int) -> Tensor:
    """Returns which boxes each box attends to: (B, N, N), True for the `nearest` ones.

    Nearest by the distance of centres in pixels, itself included; of equally near ones the first. By operators that
    every toolchain has: a stable sort cannot be exported.
    """
    middle = to_centres(boxes)[..., :2]
    distance = (middle[:, :, None] - middle[:, None]).square().sum(dim=-1)
    furthest = distance.topk(min(nearest, distance.shape[-1]), dim=-1, largest=False).values[..., -1:]
    nearer, level = distance < furthest, distance == furthest
    room = nearest - nearer.float().sum(dim=-1, keepdim=True)
    return nearer | (level & (level.float().cumsum(dim=-1) <= room))


@torch.no_grad()
def start_geometry(layers: nn.Sequential, generator: torch.Generator | None = None) -> None:
    """Sets layers of a bias, or of place features, so that they change nothing before they have learned.

    A relation begins with weights of deviation 0.01 around ln 1; other last layers begin with 0.
    """
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    if len(layers) == 1:
        nn.init.normal_(last.weight, std=0.01, generator=generator)
        nn.init.ones_(last.bias)
    else:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
