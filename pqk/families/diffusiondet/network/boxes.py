"""Codes boxes as signals and deltas, and compares them.

Corners are x1, y1, x2, y2; centres are cx, cy, w, h. A signal is a box in [-s, s], as the diffusion moves it. Every
function takes (..., 4) in any floating dtype; those that the sampler calls take tensors or numpy's arrays: on a hundred
boxes torch needs five times as long for an operation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A", Tensor, np.ndarray)
"""A tensor, or an array of numpy."""

DELTA_WEIGHTS = (2.0, 2.0, 1.0, 1.0)
LARGEST_DELTA = math.log(100_000 / 16)
"""Upper limit of the logarithm of a growth in one stage."""


def unseen(function: Callable[P, T]) -> Callable[P, T]:
    """Hides the operations of a function from tools that follow calls of torch (NNCF); exports and gradients see them.

    Such a tool trains with coordinates rounded to 8 bits, an error of pixels.
    """

    @functools.wraps(function)
    def hidden(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return hidden


def library_of(array: Tensor | np.ndarray) -> Any:
    """Returns torch or numpy, whose functions take the array. Both have those of the array API by the same names."""
    return torch if isinstance(array, Tensor) else np


def joined(parts: Sequence[A], axis: int) -> A:
    """Returns tensors or arrays as one, side by side along an axis."""
    return torch.cat(list(parts), axis) if isinstance(parts[0], Tensor) else np.concatenate(parts, axis)


def widened(values: Tensor) -> Tensor:
    """Returns values in float32, or in float64 where they are: half precision is too coarse for places."""
    return values if values.dtype == torch.float64 else values.float()


def to_centres(corners: A) -> A:
    """Returns x1, y1, x2, y2 as cx, cy, w, h."""
    low, high = corners[..., :2], corners[..., 2:]
    return joined(((low + high) / 2, high - low), -1)


def to_corners(centres: A) -> A:
    """Returns cx, cy, w, h as x1, y1, x2, y2."""
    middle, half = centres[..., :2], centres[..., 2:] / 2
    return joined((middle - half, middle + half), -1)


def as_signal(corners: A, whwh: A, scale: float) -> A:
    """Returns boxes in pixels as signals: (2 b - 1) s with b = cx, cy, w, h over the image's w, h, w, h.

    Not limited; the sampler limits to [-s, s] (Chen et al. 2023, section 3.3).
    """
    return (to_centres(corners / whwh) * 2 - 1) * scale


def from_signal(signal: A, whwh: A, scale: float) -> A:
    """Returns signals as boxes in pixels, after limiting them to [-s, s]. Corners can lie outside of the image."""
    return to_corners((signal.clip(-scale, scale) / scale + 1) / 2) * whwh


@unseen
def apply_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Returns boxes moved and scaled by deltas dx, dy, dw, dh (Girshick et al. 2014, appendix C).

    Centres move by size * (dx, dy) / 2, sizes grow by exp(min(dw, ln(100000 / 16))). Nothing is clipped to an image.
    """
    middle, size = to_centres(boxes).split(2, dim=-1)
    shift, growth = (deltas / deltas.new_tensor(DELTA_WEIGHTS)).split(2, dim=-1)
    return to_corners(torch.cat((middle + size * shift, size * growth.clamp(max=LARGEST_DELTA).exp()), dim=-1))


def areas(corners: A) -> A:
    """Returns the areas (...)."""
    return (corners[..., 2] - corners[..., 0]) * (corners[..., 3] - corners[..., 1])


def iou_and_union(one: A, other: A) -> tuple[A, A]:
    """Returns IoU in [0, 1] and union of boxes that broadcast with each other; two empty boxes have IoU 0."""
    of = library_of(one)
    low = of.maximum(one[..., :2], other[..., :2])
    high = of.minimum(one[..., 2:], other[..., 2:])
    size = (high - low).clip(0)
    shared = size[..., 0] * size[..., 1]
    union = areas(one) + areas(other) - shared
    return of.where(union > 0, shared / of.where(union > 0, union, 1.0), 0.0), union


def giou(one: Tensor, other: Tensor) -> Tensor:
    """Returns the generalised IoU in [-1, 1] of boxes that broadcast: IoU - (hull - union) / hull.

    Rezatofighi et al. 2019, algorithm 1. Two empty boxes at one place have 0.
    """
    iou, union = iou_and_union(one, other)
    low = torch.minimum(one[..., :2], other[..., :2])
    high = torch.maximum(one[..., 2:], other[..., 2:])
    hull = (high - low).clamp(min=0).prod(dim=-1)
    return torch.where(hull > 0, iou - (hull - union) / torch.where(hull > 0, hull, 1.0), iou)
