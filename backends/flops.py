"""Counts the FLOPs of one operation from its shapes: two per multiply-add, for every graph format and runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = Sequence[int]


def matmul(out: Shape, inner: int) -> float:
    """Returns the FLOPs of a product of shape `out` whose sums have `inner` terms."""
    return 2.0 * math.prod(out) * inner


def convolution(first: Shape, out: Shape, kernel: Shape, transposed: bool) -> float:
    """Returns the FLOPs of a convolution of the input shape `first` to the shape `out`.

    kernel: the shape of the weights that one value is multiplied with, channels included; that is one value of `out`,
    or of `first` where the convolution is transposed.
    """
    return 2.0 * math.prod(first if transposed else out) * math.prod(kernel)


def attention(query: Shape, key: Shape, value: Shape) -> float:
    """Returns the FLOPs of both products of scaled dot product attention; shapes (..., positions, channels)."""
    return 2.0 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
