"""Defines VGGT's layers: the one transformer block of all its stacks, and the two image encoders.

Shapes below: F frames (batch times frames of a sequence), P tokens of a frame, N patches, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqk.families.layers import Mlp, Rope, apply_rope, per_head
from pqk.families.merging import Cells
from pqk.families.sizes import BlockSize
from pqk.families.vggt.network.configs import DINO_REGISTERS

EPS, DINO_EPS = 1e-5, 1e-6


def batch_of(x: Tensor) -> int:
    """Returns the size of the first axis; 1 while a graph is traced, so that no shape is computed in it."""
    return 1 if torch.jit.is_tracing() else x.shape[0]


def repeated(x: Tensor, times: int, axis: int = 0) -> Tensor:
    """Repeats x along an axis, by concatenation: shape inference does not see through what is exported of `expand`."""
    return x if times == 1 else torch.cat([x] * times, dim=axis)


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention; the inner width may differ from `dim`.

    qk_norm: queries and keys are normalised over the head width before they are rotated.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.inner = heads, head_dim, heads * head_dim
        self.qkv = nn.Linear(dim, 3 * self.inner)
        self.q_norm = nn.LayerNorm(head_dim, eps=EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(self.inner, dim)

    def forward(self, x: Tensor, tokens: int, rope: Rope | None, bias: Tensor | None = None) -> Tensor:
        """x (B, tokens, dim) -> (B, tokens, dim); the fused projection is ordered q | k | v, each head by head."""
        q, k, v = self.qkv(x).split(self.inner, dim=-1)
        return self.proj(self.attend(q, k, v, tokens, rope, bias))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: int, rope: Rope | None, bias: Tensor | None = None
    ) -> Tensor:
        """q, k and v (B, tokens, inner) -> (B, tokens, inner). bias: added to the scores of each key (1, 1, 1, tokens).

        They are cut apart before they are split into heads. A five-dimensional reshape of all three, as in the official
        code, computes the same, but OpenVINO's CPU plugin gets it wrong for two tokens (docs/methods.md).
        """
        q, k, v = (self._split_heads(part, tokens) for part in (q, k, v))
        q, k = self.turned(q, k, rope)
        bias = per_head(bias, self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.head_dim**-0.5)
        return mixed.transpose(1, 2).reshape(-1, tokens, self.inner)

    def paid(self, x: Tensor, tokens: int, rope: Rope | None, bias: Tensor | None = None) -> Tensor:
        """x (B, tokens, dim) -> ln of the attention each token pays to every other, (B, heads, tokens, tokens)."""
        q, k, _ = (self._split_heads(part, tokens) for part in self.qkv(x).split(self.inner, dim=-1))
        q, k = self.turned(q, k, rope)
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        return (scores if bias is None else scores + bias).float().log_softmax(-1)

    def turned(self, q: Tensor, k: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, heads, tokens, head_dim) as they are compared: normalised, then rotated."""
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is None:
            return q, k
        return apply_rope(q, rope, self.head_dim), apply_rope(k, rope, self.head_dim)

    def _split_heads(self, x: Tensor, tokens: int) -> Tensor:
        return x.reshape(-1, tokens, self.heads, self.head_dim).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm block with LayerScale: self-attention, then MLP, both residual."""

    def __init__(self, dim: int, size: BlockSize, eps: float = EPS, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, size.heads, size.head_dim, qk_norm)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, size.ffn)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor, tokens: int, rope: Rope | None = None, bias: Tensor | None = None) -> Tensor:
        """x (B, tokens, dim) -> (B, tokens, dim). bias: see `Attention.attend`."""
        x = x + self.ls1(self.attn(self.norm1(x), tokens, rope, bias))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Cuts an image into square patches and projects each: (F, 3, H, W) -> (F, N, dim), row by row."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.dim = dim
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(
        self, image: Tensor, grid: tuple[int, int], table: Tensor | None = None, cells: Cells | None = None
    ) -> Tensor:
        """grid: patches in a column and in a row. table, cells: as of `Dino`; there are no positions and no blocks."""
        return self.proj(image).reshape(-1, self.dim, grid[0] * grid[1]).transpose(1, 2)


class Dino(nn.Module):
    """The DINOv2 encoder with registers (Oquab et al. 2023, Darcet et al. 2023): an image to its patch tokens."""

    def __init__(self, dim: int, patch_size: int, side: int, sizes: tuple[BlockSize, ...]) -> None:
        super().__init__()
        self.side = side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, DINO_REGISTERS, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # of the pretraining, unused here
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.blocks = nn.ModuleList(Block(dim, size, eps=DINO_EPS) for size in sizes)
        self.norm = nn.LayerNorm(dim, eps=DINO_EPS)

    def table(self, grid: tuple[int, int]) -> Tensor:
        """The position table of a token grid, (1, 1 + N, dim): the first entry is the class token's.

        A grid of another size than the stored one is resized with antialiased bicubic interpolation.
        """
        if grid == (self.side, self.side):
            return self.pos_embed
        first, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        dim = patches.shape[-1]
        square = patches.float().reshape(1, self.side, self.side, dim).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=grid, mode="bicubic", antialias=True, align_corners=False)
        flat = resized.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], dim)
        return torch.cat((first, flat.to(first.dtype)), dim=1)

    def forward(
        self, image: Tensor, grid: tuple[int, int], table: Tensor | None = None, cells: Cells | None = None
    ) -> Tensor:
        """Normalised image (F, 3, H, W) -> (F, N, dim). table: see `table`, where it was computed before.

        cells: of a network that merges patches; once, before the first block.
        """
        table = self.table(grid) if table is None else table
        patches = self.patch_embed(image, grid) + table[:, 1:]
        frames = batch_of(patches)
        leaders = torch.cat([self.cls_token + table[:, :1], self.register_tokens], dim=1)
        leading = 1 + DINO_REGISTERS
        merged = None if cells is None else cells(patches)
        left, bias = (patches, None) if merged is None else (merged.tokens, key_bias(merged.rope, leading))
        x = torch.cat((repeated(leaders, frames), left), dim=1)
        count = leading + (grid[0] * grid[1] if merged is None else merged.rope.tokens)
        for block in self.blocks:
            x = block(x, count, None, bias)
        return self.norm(x)[:, leading:] if merged is None else self.norm(merged.undo(x[:, leading:]))


def key_bias(rope: Rope, leading: int) -> Tensor:
    """The bias of merged keys (1, 1, 1, leading + N), of a frame whose first `leading` tokens are never merged."""
    assert rope.bias is not None
    return F.pad(rope.bias, (leading, 0))
