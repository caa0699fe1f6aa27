"""Pools boxes from a feature pyramid: the level of each box, and RoIAlign on all levels in one gather.

He et al. 2017 (RoIAlign, here aligned by half a pixel, with 2 x 2 samples in each of the 7 x 7 cells); Lin et al. 2017,
equation 1 (level of a box). Boxes are x1, y1, x2, y2 in pixels of the network's input. Maps get gradients, boxes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.families.diffusiondet.network.backbone import STRIDES
from pqk.families.diffusiondet.network.boxes import unseen, widened

CELLS, SAMPLES = 7, 2
"""Cells of a box in each direction, and samples of a cell in each direction."""
FIRST_LEVEL, LAST_LEVEL = 2, 5
CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4


class Pooler(nn.Module):
    """`pool` as a module, so that the nodes of an exported graph are named after it."""

    def forward(self, table: Pyramid, boxes: Tensor) -> Tensor:
        return pool(table, boxes)


class Pyramid(NamedTuple):
    """Maps of several strides as one table, whose rows are the places of image 0 level by level, then of image 1 ...

    rows: (B * places of an image, C). heights, widths, starts: of the levels; a start is a place in an image. exported:
    boxes are pooled in the form of an exported graph, outside of one too.
    """

    rows: Tensor
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    starts: tuple[int, ...]
    exported: bool = False

    @property
    def places(self) -> int:
        """Returns the places of one image."""
        return self.starts[-1] + self.heights[-1] * self.widths[-1]


class Joined(nn.Module):
    """Maps (B, C, h, w) -> the rows of their table (R, C); a module for its name in a graph, without weights."""

    def forward(self, *maps: Tensor) -> Tensor:
        rows = torch.cat([map_.flatten(2).transpose(1, 2) for map_ in maps], dim=1)
        return rows.reshape(-1, int(maps[0].shape[1]))  # as Flatten, ModelOpt would round it


def pyramid(maps: Sequence[Tensor], exported: bool = False, joined: Joined | None = None) -> Pyramid:
    """Returns the maps p2 ... p5, each (B, C, h, w), as one table. exported: see `Pyramid`."""
    heights, widths = (tuple(int(map_.shape[axis]) for map_ in maps) for axis in (2, 3))  # static in a traced graph
    starts, total = [], 0
    for height, width in zip(heights, widths, strict=True):
        starts.append(total)
        total += height * width
    return Pyramid((joined or Joined())(*maps), heights, widths, tuple(starts), exported)


def box_levels(boxes: Tensor) -> Tensor:
    """Returns the level 2 ... 5 of boxes (..., 4), int64: floor(4 + log2(sqrt(w h) / 224 + 1e-8)), limited."""
    boxes = widened(boxes.detach())
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    level = torch.floor(CANONICAL_LEVEL + torch.log2(area.sqrt() / CANONICAL_SIDE + 1e-8))
    return torch.where(level.isnan(), FIRST_LEVEL, level).clamp(FIRST_LEVEL, LAST_LEVEL).long()


def pool(table: Pyramid, boxes: Tensor) -> Tensor:
    """Returns the features of boxes (B, N, 4): (B, N, 49, C), the cells of a box row by row.

    Each cell is the mean of 2 x 2 bilinear samples. A sample more than one place outside of the map counts 0; one that
    is less far outside takes the value at the edge.
    """
    places, weights = _taps_of(table, boxes)
    sums = _product if table.exported or torch.jit.is_tracing() or torch.compiler.is_exporting() else _bag
    return sums(table.rows, places, weights.to(table.rows.dtype)).view(boxes.shape[0], boxes.shape[1], CELLS**2, -1)


@unseen
def _taps_of(table: Pyramid, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which rows of the table each cell of boxes (B, N, 4) reads, and their weights: (B * N * 49, 16)."""
    boxes = widened(boxes.detach())
    level = box_levels(boxes) - FIRST_LEVEL
    stride, height, width, start = (
        torch.tensor(values, device=boxes.device)[level]
        for values in (STRIDES, table.heights, table.widths, table.starts)
    )
    first = start + torch.arange(boxes.shape[0], device=boxes.device)[:, None] * table.places
    scaled = boxes / stride[..., None] - 0.5
    row, row_weight = _taps(scaled[..., 1], scaled[..., 3], height)
    column, column_weight = _taps(scaled[..., 0], scaled[..., 2], width)
    row = first[..., None, None] + row * width[..., None, None]
    # (B, N, cells of a column, 1, taps, 1) and (B, N, 1, cells of a row, 1, taps): all 16 taps of all 49 cells
    places = row[:, :, :, None, :, None] + column[:, :, None, :, None, :]
    weights = row_weight[:, :, :, None, :, None] * column_weight[:, :, None, :, None, :]
    taps = row.shape[-1] * column.shape[-1]
    return places.reshape(-1, taps), weights.reshape(-1, taps)


def _product(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Returns weighted sums of rows (R, C): (cells, C). places, weights: (cells, taps).

    A gather and a product of matrices, which every runtime has, and on CPUs the quickest of the exact forms: 0.65 to
    0.75 of the time of a sum of products, 0.2 to 0.35 of that of the operator RoiAlign on all four levels.
    """
    channels = rows.shape[1]
    taken = rows.index_select(0, places.reshape(-1)).view(-1, places.shape[1], channels)
    return (weights[:, None] @ taken).view(-1, channels)


def _bag(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Returns what `_product` does, without holding all taps: 0.4 GB less for 500 boxes of 256 channels."""
    return F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights)


def _taps(start: Tensor, stop: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the places along one axis that the cells of a box read, and their weights: (B, N, 7, 4) each.

    start, stop: of the box (B, N), in places. size: of the map (B, N). Weights of a cell inside of the map sum to 1.
    Limits are chosen and not minimums: quantizers lower a minimum to 8 bits, and with it the places.
    """
    steps = (torch.arange(CELLS * SAMPLES, device=start.device, dtype=start.dtype) + 0.5) / (CELLS * SAMPLES)
    at = start[..., None] + (stop - start)[..., None] * steps
    most = (size - 1)[..., None].to(at.dtype)
    inside = (at >= -1) & (at <= most + 1)
    at = torch.where(inside, at, 0.0).clamp(min=0)
    at = torch.where(at < most, at, most)
    low = at.floor()
    high = torch.where(low < most, low + 1, most)
    far = at - low
    weight = torch.stack((1 - far, far), dim=-1) * (inside[..., None] / SAMPLES)
    place = torch.stack((low, high), dim=-1).long()
    shape = (*start.shape, CELLS, 2 * SAMPLES)
    return place.reshape(shape), weight.reshape(shape)
