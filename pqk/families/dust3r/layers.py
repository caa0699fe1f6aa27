"""Transformer parts shared by the model families: rotary embedding, attention, MLP, the two kinds of block.

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
from torch.nn import functional as F

from pqk.errors import PqkError
from pqk.families.dust3r.configs import BlockSize

LAYER_NORM_EPS = 1e-6


class Rope(NamedTuple):
    """Rotary tables of a token grid: cosines and signed sines, each (N, head_dim) or (B, 1, N, head_dim), float32.

    `tokens` is N as a Python number: blocks reshape with it, so that traced graphs contain no shape arithmetic.
    """

    cos: Tensor
    sin: Tensor
    tokens: int


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


class LayerNorm(nn.LayerNorm):
    """Affine layer norm over the last axis, epsilon 1e-6."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=LAYER_NORM_EPS)


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Attention(nn.Module):
    """What both kinds of attention share: the sizes, and softmax(q k^T / sqrt(head_dim)) v with rotary q and k."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.inner = heads * head_dim

    def attend(self, q: Tensor, k: Tensor, v: Tensor, q_rope: Rope, k_rope: Rope) -> Tensor:
        """q (B, N, inner), k and v (B, M, inner) -> (B, N, inner)."""
        q = apply_rope(self._split_heads(q, q_rope.tokens), q_rope, self.head_dim)
        k = apply_rope(self._split_heads(k, k_rope.tokens), k_rope, self.head_dim)
        v = self._split_heads(v, k_rope.tokens)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return mixed.transpose(1, 2).reshape(-1, q_rope.tokens, self.inner)

    def _split_heads(self, x: Tensor, tokens: int) -> Tensor:
        return x.reshape(-1, tokens, self.heads, self.head_dim).transpose(1, 2)


class SelfAttention(_Attention):
    """Multi-head self-attention with rotary queries and keys; the inner width may differ from `dim`."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        self.qkv = nn.Linear(dim, 3 * self.inner)
        self.proj = nn.Linear(self.inner, dim)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """x (B, N, dim) -> (B, N, dim); the fused projection is ordered q | k | v, each head by head."""
        q, k, v = self.qkv(x).split(self.inner, dim=-1)
        return self.proj(self.attend(q, k, v, rope, rope))


class CrossAttention(_Attention):
    """Multi-head attention of one view's tokens to the other view's tokens, each rotated by its own grid."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        self.projq = nn.Linear(dim, self.inner)
        self.projk = nn.Linear(dim, self.inner)
        self.projv = nn.Linear(dim, self.inner)
        self.proj = nn.Linear(self.inner, dim)

    def forward(self, x: Tensor, memory: Tensor, rope: Rope, memory_rope: Rope) -> Tensor:
        """x (B, N, dim), memory (B, M, dim) -> (B, N, dim)."""
        q, k, v = self.projq(x), self.projk(memory), self.projv(memory)
        return self.proj(self.attend(q, k, v, rope, memory_rope))


class EncoderBlock(nn.Module):
    """Pre-norm block: self-attention, then MLP, both residual."""

    def __init__(self, dim: int, size: BlockSize) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = SelfAttention(dim, size.heads, size.head_dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, size.ffn)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """x (B, N, dim) -> (B, N, dim)."""
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """Pre-norm block: self-attention, attention to the other view, MLP, all residual; the other view is only read."""

    def __init__(self, dim: int, size: BlockSize, norm_memory: bool = True) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = SelfAttention(dim, size.heads, size.head_dim)
        self.cross_attn = CrossAttention(dim, size.heads, size.head_dim)
        self.norm2 = LayerNorm(dim)
        self.norm3 = LayerNorm(dim)
        self.mlp = Mlp(dim, size.ffn)
        self.norm_y = LayerNorm(dim) if norm_memory else nn.Identity()

    def forward(self, x: Tensor, other: Tensor, rope: Rope, other_rope: Rope) -> Tensor:
        """x (B, N, dim), other (B, M, dim) -> (B, N, dim)."""
        x = x + self.attn(self.norm1(x), rope)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(other), rope, other_rope)
        return x + self.mlp(self.norm3(x))


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each: (B, 3, H, W) -> (B, H/p * W/p, dim), row by row."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.dim = dim
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor, tokens: int) -> Tensor:
        """`tokens` is the number of patches, H/p * W/p."""
        return self.proj(image).reshape(-1, self.dim, tokens).transpose(1, 2)


@torch.no_grad()
def initialize(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fill every parameter with fresh weights, in module order, from `generator` (None: torch's global generator).

    Linear layers: Xavier uniform; convolutions: uniform with deviation 1 / sqrt(3 fan_in), torch's default; biases 0;
    norms 1 and 0; single parameters (tokens): normal with deviation 0.02.
    """
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, generator=generator)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_uniform_(part.weight, a=math.sqrt(5), generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        else:
            for token in part.parameters(recurse=False):
                nn.init.normal_(token, std=0.02, generator=generator)
