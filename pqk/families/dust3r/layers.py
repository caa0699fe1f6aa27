"""Defines DUSt3R's layers: attention to the own view and to the other one, the two kinds of block, patches."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pqk.families.layers import Mlp, Rope, apply_rope, per_head
from pqk.families.sizes import BlockSize

LAYER_NORM_EPS = 1e-6


class LayerNorm(nn.LayerNorm):
    """Affine layer norm over the last axis, epsilon 1e-6."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=LAYER_NORM_EPS)


class _Attention(nn.Module):
    """What both kinds of attention share: the sizes, and softmax(q k^T / sqrt(head_dim) + bias) v, q and k rotated."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.inner = heads * head_dim

    def attend(self, q: Tensor, k: Tensor, v: Tensor, q_rope: Rope, k_rope: Rope) -> Tensor:
        """q (B, N, inner), k and v (B, M, inner) -> (B, N, inner)."""
        q = apply_rope(self._split_heads(q, q_rope.tokens), q_rope, self.head_dim)
        k = apply_rope(self._split_heads(k, k_rope.tokens), k_rope, self.head_dim)
        v = self._split_heads(v, k_rope.tokens)
        bias = per_head(k_rope.bias, self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.head_dim**-0.5)
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
