"""Teaches the attention between frames where the same place is in another frame: `watching`, `match_loss`.

A small network that is trained for hours instead of weeks finds the cameras only after its attention has found what
the frames have in common, and the losses on cameras and maps alone do not lead it there (docs/methods.md). The released
network gets the same lesson from the loss on its tracks (Wang et al. 2025, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pqk.families.losses import masked_mean
from pqk.families.vggt.geometry import pose_encoding_to_extri_intri
from pqk.families.vggt.graphs import AggregatorGraph
from pqk.families.vggt.losses import Truth
from pqk.families.vggt.network.layers import Attention, Block
from pqk.families.vggt.settings import PATCH

NEAREST = 1e-3
"""Metres before a camera that a point must be to have a place in its image."""
TOLERANCE = 0.05
"""Share of the depth by which a point may miss the surface that is seen at its place."""


SAID_TO = 4.0
"""What the attention says of a place at the edge of the image, so that small motions do not drown in other channels."""


class Attended(NamedTuple):
    """What the attention of a global block did.

    paid: ln of what each patch of each frame pays to every other, (B, heads, S, N, S, N); what it pays to camera and
    register tokens is missing, so that the rest sums up to less than 1. said: its output for each patch (B, S, N, C).
    """

    paid: Tensor
    said: Tensor


@contextmanager
def watching(graph: AggregatorGraph) -> Iterator[list[Attended]]:
    """Gives a list that the aggregator, when it runs, appends what the attention of its middle global block did to."""
    blocks = cast(Sequence[Block], graph.aggregator.global_blocks)
    found: list[Attended] = []

    def keep(attention: Attention, args: tuple[Any, ...], output: Tensor) -> None:
        frames, first = graph.frames, graph.sizes.special
        paid = attention.paid(*args).unflatten(3, (frames, -1)).unflatten(2, (frames, -1))[..., first:, :, first:]
        found.append(Attended(paid, output.unflatten(1, (frames, -1))[:, :, first:].float()))

    handle = blocks[(len(blocks) - 1) // 2].attn.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def match_loss(attended: Attended, truth: Truth) -> Tensor:
    """Mean of -ln of the attention paid to the same place, plus `said_loss`: a scalar, at least ln(S - 1).

    A patch counts, for each other frame, where the point at its centre is visible there. The four patches around that
    place count by their bilinear weights: attention that pays as much to each of them gives the place itself, to a
    fraction of a patch, in which most of what cameras move by lies.
    """
    place, seen = same_places(truth)
    rows, cols = (side // PATCH for side in truth.depth.shape[-2:])
    aim = _weights(place[..., 0], rows)[..., :, None] * _weights(place[..., 1], cols)[..., None, :]
    right = (aim.flatten(-2)[:, None] * attended.paid.movedim(-2, -3)).sum(-1)
    paid_loss = masked_mean(-right, seen[:, None].expand(right.shape))
    return paid_loss + said_loss(attended.said, place, seen, (rows, cols))


def said_loss(said: Tensor, place: Tensor, seen: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean distance (L1) of the first two channels of the attention's output to the place in the other frames.

    Attention that pays to the right patch need not pass on where that patch lies, and without a reader it does not: a
    linear map of the tokens behind that block found hardly any of the motion. said and place as in
    `Attended` and `same_places`; row and column from -4 to 4 over the image, and their mean where several frames show
    the place.
    """
    count = seen.sum(2)
    scale = 2 * SAID_TO / torch.tensor(grid, dtype=place.dtype, device=place.device)
    mean = torch.where(seen[..., None], place, 0.0).sum(2) / count.clamp_min(1)[..., None]
    return masked_mean((said[..., :2] - ((mean + 0.5) * scale - SAID_TO)).abs().mean(-1), count > 0)


def _weights(place: Tensor, count: int) -> Tensor:
    """Linear weights (..., count) of patches for a place along one axis; beyond the outermost centres these alone."""
    centres = torch.arange(count, device=place.device)
    return (1 - (place.clamp(0, count - 1)[..., None] - centres).abs()).clamp_min(0)


def same_places(truth: Truth) -> tuple[Tensor, Tensor]:
    """Returns where in each frame the centre of each patch of each frame lies, and whether it is seen there.

    Places (B, S, S, N, 2): of frame i, in frame j, patch n; row and column, in patches, 0 at the centre of the first.
    Seen (B, S, S, N) is what projects into the image, within 5 % of its depth, from a valid pixel; a frame does not see
    itself.
    """
    frames, height, width = truth.depth.shape[1:]
    middle = slice(PATCH // 2, None, PATCH)
    rotation, translation, focal = _cameras(truth.pose, (height, width))
    points = truth.points[:, :, middle, middle].flatten(2, 3)  # (B, S, N, 3)
    moved = torch.einsum("bjxy,biny->bijnx", rotation, points) + translation[:, None, :, None]
    z = moved[..., 2].clamp_min(NEAREST)
    u = moved[..., 0] / z * focal[:, None, :, 0, None] + width / 2
    v = moved[..., 1] / z * focal[:, None, :, 1, None] + height / 2
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height) & (moved[..., 2] > NEAREST)
    column, row = u.clamp(0, width - 1).long(), v.clamp(0, height - 1).long()
    depth = truth.depth[:, None].expand(-1, frames, -1, -1, -1).flatten(3).gather(3, row * width + column)
    valid = truth.valid[:, :, middle, middle].flatten(2, 3)[:, :, None]
    other = ~torch.eye(frames, dtype=torch.bool, device=z.device)[None, :, :, None]
    seen = inside & valid & other & ((depth - z).abs() < TOLERANCE * z)
    return torch.stack((v, u), dim=-1) / PATCH - 0.5, seen


def _cameras(pose: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rotations (B, S, 3, 3), translations (B, S, 3) and focal lengths (B, S, 2: across, down) of pose encodings."""
    extrinsics, intrinsics = pose_encoding_to_extri_intri(pose, size)
    return extrinsics[..., :3], extrinsics[..., 3], intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2]
