"""Holds the transformer parts that model families share: rotary embedding, MLP, fresh weights.

Nothing here looks at the values of a tensor, so every module traces to a fixed graph. The rotary tables come from
outside as plain tensors: computed once per grid, constants in an exported graph.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pqk.errors import PqkError


class Rope(NamedTuple):
    """Rotary tables of a token grid: cosines and signed sines, each (N, head_dim) or (B, 1, N, head_dim), float32.

    `tokens` is N as a Python number: blocks reshape with it, so that traced graphs contain no shape arithmetic. bias:
    added to the scores of attention of each of these tokens as a key (1, 1, 1, N); None: nothing is.
    """

    cos: Tensor
    sin: Tensor
    tokens: int
    bias: Tensor | None = None


def per_head(bias: Tensor | None, heads: int) -> Tensor | None:
    """Returns a bias of keys (1, 1, 1, N) as (1, heads, 1, N), the same numbers for each head; None: there is none.

    OpenVINO's CPU plugin (2026.4, AVX-512 with bf16) fuses attention in bf16 wrongly where one row is added for all
    heads and queries: the outputs are off by as much as their size. A row for each head it computes rightly.
    """
    return None if bias is None else torch.cat([bias] * heads, dim=1)


def grid_positions(rows: int, cols: int) -> np.ndarray:
    """Integer (row, column) of every token of a grid, row by row: (rows * cols, 2) int64."""
    return np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), axis=-1).reshape(-1, 2)


def rope_arrays(positions: np.ndarray, head_dim: int, base: float = 100.0) -> tuple[np.ndarray, np.ndarray]:
    """Tables of the 2-D rotary embedding for integer positions (..., 2): two float32 arrays (..., head_dim).

    The head vector is cut in two halves of size D: the first turns with the row, the second with the column. Inside a
    half, component i is paired with i + D/2 and turns by position * base^(-2i/D) (RoPE, Su et al. 2021, section 3.2.2,
    with the half-split pairing). The sign of the rotation is folded into the sine table, see `apply_rope`.
    """
    if head_dim % 4:
        raise PqkError(f"the 2-D rotary embedding needs a head width that is a multiple of 4, got {head_dim}")
    half = head_dim // 2
    frequencies = 1.0 / np.float32(base) ** (np.arange(0, half, 2, dtype=np.float32) / np.float32(half))
    angles = positions.astype(np.float32)[..., None] * frequencies.astype(np.float32)  # (..., 2, D/2)
    cos, sin = np.cos(angles), np.sin(angles)
    flat = (*positions.shape[:-1], head_dim)
    return (
        np.ascontiguousarray(np.concatenate([cos, cos], axis=-1).reshape(flat)),
        np.ascontiguousarray(np.concatenate([-sin, sin], axis=-1).reshape(flat)),
    )


@lru_cache(maxsize=64)
def _grid_rope_arrays(rows: int, cols: int, head_dim: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    return rope_arrays(grid_positions(rows, cols), head_dim, base)


def grid_rope(rows: int, cols: int, head_dim: int, base: float = 100.0) -> Rope:
    """Fresh CPU tensors with the rotary tables of a token grid, each (rows * cols, head_dim) float32.

    Only numpy arrays are cached, so no tensor made under tracing or inference mode can leak into a later call.
    """
    cos, sin = _grid_rope_arrays(rows, cols, head_dim, base)
    return Rope(torch.from_numpy(cos.copy()), torch.from_numpy(sin.copy()), rows * cols)


def apply_rope(x: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """Rotate queries or keys (B, heads, N, head_dim); computed in float32 (or wider), returned in the dtype of x.

    With quarters a | b | c | d of the head vector the result is x * cos + (b | a | d | c) * signed sin.
    """
    a, b, c, d = x.split(head_dim // 4, dim=-1)
    turned = x * rope.cos + torch.cat((b, a, d, c), dim=-1) * rope.sin
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear: (..., dim) -> (..., out), by default to the same width."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@torch.no_grad()
def initialize(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fill every parameter with fresh weights, in module order, from `generator` (None: torch's global generator).

    Linear layers: Xavier uniform; convolutions: uniform with deviation 1 / sqrt(3 fan_in), torch's default; biases 0;
    norms 1 and 0; single parameters (tokens): normal with deviation 0.02.
    """
    for part in module.modules():
        if isinstance(part, nn.LayerNorm | nn.GroupNorm):
            if part.weight is None:
                continue
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_uniform_(part.weight, a=math.sqrt(5), generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        else:
            for token in part.parameters(recurse=False):
                nn.init.normal_(token, std=0.02, generator=generator)
