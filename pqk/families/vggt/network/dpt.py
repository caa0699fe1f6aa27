"""Defines VGGT's dense head: DPT (Ranftl et al. 2021) on four rounds of the aggregator, to depth or points.

It differs from the original in three places: the skip of a residual unit carries relu(t), the maps get an embedding of
their place in the image, and every resize goes to the exact size of the next level.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqk.families.vggt.network.configs import DptSize
from pqk.families.vggt.network.layers import EPS

LAST = 32
"""Channels between the last two convolutions, in every network."""
GRID = 8
"""Cells of the map before the last convolutions to a patch, along a side."""
PLACE = 0.1
"""Weight of the place embedding."""


@lru_cache(maxsize=64)
def place_waves(
    width: int, height: int, aspect: float, channels: int, of: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sines and cosines of every column's place, (width, channels / 2), and of every row's, (height, channels / 2).

    With n = sqrt(aspect^2 + 1), x takes `width` equidistant values from -(aspect / n) (width - 1) / width to its
    negative, y likewise from -(1 / n) (height - 1) / height. Of each the sines at frequencies
    100^(-i / (channels / 4)), then the cosines. Computed in float64 as the official code does, returned in float32.
    of: width and height of the map that this one is resized to later: the ends are then those of that map.
    """
    norm = (aspect * aspect + 1) ** 0.5
    frequencies = 100.0 ** -(np.arange(channels // 4, dtype=np.float64) / (channels / 4))

    def waves(count: int, whole: int, span: float) -> np.ndarray:
        end = span / norm * (whole - 1) / whole
        values = np.linspace(np.float32(-end), np.float32(end), count, dtype=np.float32)
        angles = values.astype(np.float64)[:, None] * frequencies
        return np.concatenate((np.sin(angles), np.cos(angles)), axis=-1).astype(np.float32)

    columns, rows = (width, height) if of is None else of
    return waves(width, columns, aspect), waves(height, rows, 1.0)


def place_embedding(width: int, height: int, aspect: float, channels: int) -> np.ndarray:
    """The embedding of the place of every cell of a map: (height, width, channels) float32, first x, then y."""
    across, down = place_waves(width, height, aspect, channels)
    shape = (height, width, channels // 2)
    return np.concatenate((np.broadcast_to(across, shape), np.broadcast_to(down[:, None], shape)), axis=-1)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (F, C, h, w) to the size, bilinear with corners aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class ResidualUnit(nn.Module):
    """r + conv2(relu(conv1(r))) with r = relu(t): unlike DPT's own, the skip carries r."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        r = F.relu(x)
        return r + self.conv2(F.relu(self.conv1(r)))


class Fusion(nn.Module):
    """Adds a finer level to the coarse map, refines, and resizes to the next level; the coarsest has no unit 1."""

    def __init__(self, width: int, coarsest: bool = False) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(width, width, 1)
        if not coarsest:
            self.resConfUnit1 = ResidualUnit(width)
        self.resConfUnit2 = ResidualUnit(width)

    def forward(self, coarse: Tensor, level: Tensor | None, size: tuple[int, int]) -> Tensor:
        """coarse and level (F, width, h, w) -> (F, width, *size)."""
        fused = coarse if level is None else coarse + self.resConfUnit1(level)
        return self.out_conv(resize(self.resConfUnit2(fused), size))


class Scratch(nn.Module):
    """The 3x3 projections of the four levels to one width, the fusion blocks, the last convolutions."""

    def __init__(self, size: DptSize, values: int | None) -> None:
        super().__init__()
        for index, width in enumerate(size.resized, start=1):
            setattr(self, f"layer{index}_rn", nn.Conv2d(width, size.features, 3, padding=1, bias=False))
        self.refinenet1 = Fusion(size.features)
        self.refinenet2 = Fusion(size.features)
        self.refinenet3 = Fusion(size.features)
        self.refinenet4 = Fusion(size.features, coarsest=True)
        width = size.features if values is None else size.last
        self.output_conv1 = nn.Conv2d(size.features, width, 3, padding=1)
        if values is not None:
            self.output_conv2 = nn.Sequential(
                nn.Conv2d(width, LAST, 3, padding=1), nn.ReLU(), nn.Conv2d(LAST, values, 1)
            )


class DptHead(nn.Module):
    """Four rounds of tokens -> a raw map of the image's size, or features of half that size.

    values: channels of the map; None: features (of the track head), without place embeddings. Of a network whose
    kernels were folded (`pqk.families.vggt.reduce`) the raw map is resized in place of the features: all from the last
    residual unit to the last ReLU is linear, and the embedding of places is as smooth as a resize.
    """

    def __init__(self, width: int, size: DptSize, values: int | None, patch_size: int) -> None:
        super().__init__()
        self.width, self.patch_size, self.values, self.size = width, patch_size, values, size
        dims, out = size.out_channels, size.resized
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.projects = nn.ModuleList(nn.Conv2d(width, dim, 1) for dim in dims)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(dims[0], out[0], 4, stride=4),
                nn.ConvTranspose2d(dims[1], out[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(dims[3], out[3], 3, stride=2, padding=1),
            ]
        )
        self.scratch = Scratch(size, values)

    def forward(self, levels: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Four tensors of patch tokens (F, N, width) with grid = (h, w) -> (F, values, h * patch, w * patch)."""
        h, w = grid
        maps = []
        for index, tokens in enumerate(levels):
            x = self.norm(tokens).transpose(1, 2).reshape(-1, self.width, h, w)
            x = self._placed(self.projects[index](x), self.size.out_channels[index], (h, w), grid)
            maps.append(getattr(self.scratch, f"layer{index + 1}_rn")(self.resize_layers[index](x)))
        sizes = [(4 * h, 4 * w), (2 * h, 2 * w), (h, w)]
        x = self.scratch.refinenet4(maps[3], None, sizes[2])
        x = self.scratch.refinenet3(x, maps[2], sizes[1])
        x = self.scratch.refinenet2(x, maps[1], sizes[0])
        last = GRID // 2 if self.size.tail == 4 else GRID
        x = self.scratch.refinenet1(x, maps[0], (last * h, last * w))
        x = self.scratch.output_conv1(x)
        ratio = 1 if self.values is not None else 2
        size = (h * self.patch_size // ratio, w * self.patch_size // ratio)
        if self.size.tail > 1:
            x = self._placed(x, self.size.last, (last * h, last * w), grid, size)
            return resize(self.scratch.output_conv2(x), size)
        x = self._placed(resize(x, size), self.size.last, size, grid)
        return x if self.values is None else self.scratch.output_conv2(x)

    def _placed(
        self,
        x: Tensor,
        channels: int,
        size: tuple[int, int],
        grid: tuple[int, int],
        resized: tuple[int, int] | None = None,
    ) -> Tensor:
        """The map plus the embedding of its places, as one table per axis: a whole one would be as large as the map.

        resized: the size that the sum is resized to later.
        """
        if self.values is None:
            return x
        of = None if resized is None else (resized[1], resized[0])
        across, down = place_waves(size[1], size[0], grid[1] / grid[0], channels, of)
        rest = np.zeros((1, channels // 2), dtype=np.float32)
        columns = np.concatenate((across, np.broadcast_to(rest, across.shape)), axis=-1).T[:, None, :]
        rows = np.concatenate((np.broadcast_to(rest, down.shape), down), axis=-1).T[:, :, None]
        for table in (columns, rows):
            x = x + torch.from_numpy(np.float32(PLACE) * np.ascontiguousarray(table)).to(x.device, x.dtype)
        return x
