"""Defines VGGT's optional track head: where points of the first frame are in every other frame.

After CoTracker (Karaev et al. 2023): correlation windows around the points, refined round by round by a transformer
over time and over points, with virtual tracks that all points read and write. Shapes below: B sequences, S frames, Q
points, C channels of the features. It runs in torch only; no engine is built of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqk.families.layers import Mlp
from pqk.families.vggt.network.configs import DptSize, TrackSize
from pqk.families.vggt.network.dpt import DptHead

STRIDE = 2
"""Pixels of the image for one of the feature map."""
SCALE = 518.0
"""Pixels that a displacement is divided by, in networks of any size."""
WAVES, TABLE_BASE = 1000.0, 10000.0


class SelfBlock(nn.Module):
    """x = norm1(x); x += attention(x); x += mlp(norm2(x)): what is added to is the normalised input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """As `SelfBlock`, with attention to a context, which is normalised too."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm_context, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x, context = self.norm1(x), self.norm_context(context)
        x = x + self.cross_attn(x, context, context, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class UpdateFormer(nn.Module):
    """Attention over time per track, then over the tracks of a frame by way of the virtual ones."""

    def __init__(self, width: int, size: TrackSize) -> None:
        super().__init__()
        dim, heads, deep = size.hidden_size, size.num_heads, range(size.depth)
        self.input_norm = nn.LayerNorm(width)
        self.input_transform = nn.Linear(width, dim)
        self.output_norm = nn.LayerNorm(dim)
        self.flow_head = nn.Linear(dim, 2 + size.latent_dim)
        self.virual_tracks = nn.Parameter(torch.zeros(1, size.num_virtual_tracks, 1, dim))  # spelled as in the files
        self.time_blocks = nn.ModuleList(SelfBlock(dim, heads) for _ in deep)
        self.space_virtual_blocks = nn.ModuleList(SelfBlock(dim, heads) for _ in deep)
        self.space_point2virtual_blocks = nn.ModuleList(CrossBlock(dim, heads) for _ in deep)
        self.space_virtual2point_blocks = nn.ModuleList(CrossBlock(dim, heads) for _ in deep)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, Q, S, width) -> updates (B, Q, S, 2 + latent)."""
        start = self.input_transform(self.input_norm(tokens))
        batch, points, frames, dim = start.shape
        x = torch.cat((start, self.virual_tracks.expand(batch, -1, frames, -1)), dim=1)
        for time, own, to_virtual, to_point in zip(
            self.time_blocks,
            self.space_virtual_blocks,
            self.space_point2virtual_blocks,
            self.space_virtual2point_blocks,
            strict=True,
        ):
            x = time(x.flatten(0, 1)).unflatten(0, (batch, -1))
            y = x.transpose(1, 2).flatten(0, 1)
            point, virtual = y[:, :points], y[:, points:]
            virtual = own(to_point(virtual, point))
            point = to_virtual(point, virtual)
            x = torch.cat((point, virtual), dim=1).reshape(batch, frames, -1, dim).transpose(1, 2)
        return self.flow_head(self.output_norm(x[:, :points] + start))


class Tracker(nn.Module):
    """The rounds of refinement on feature maps."""

    def __init__(self, size: TrackSize) -> None:
        super().__init__()
        self.size = size
        latent, window = size.latent_dim, (2 * size.corr_radius + 1) ** 2
        width = 3 * latent + 4
        self.corr_mlp = Mlp(size.corr_levels * window, size.hidden_size, latent)
        self.query_ref_token = nn.Parameter(torch.zeros(1, 2, width))
        self.updateformer = UpdateFormer(width, size)
        self.fmap_norm = nn.LayerNorm(size.features)
        self.ffeat_norm = nn.GroupNorm(1, latent)
        self.ffeat_updater = nn.Sequential(nn.Linear(latent, latent), nn.GELU())
        self.vis_predictor = nn.Sequential(nn.Linear(latent, 1))
        self.conf_predictor = nn.Sequential(nn.Linear(latent, 1))

    def forward(self, maps: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (B, S, C, h, w) and points (B, Q, 2) in their pixels -> places (B, S, Q, 2), vis and conf (B, S, Q)."""
        maps = self.fmap_norm(maps.movedim(2, -1)).movedim(-1, 2)
        frames = maps.shape[1]
        place = query[:, None].expand(-1, frames, -1, -1)
        feature = sample(maps[:, 0], query, "border")[:, None].expand(-1, frames, -1, -1)
        pyramid = [maps]
        for _ in range(self.size.corr_levels - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1].flatten(0, 1), 2).unflatten(0, maps.shape[:2]))
        table = sine_table(maps.shape[-2], maps.shape[-1], self.query_ref_token.shape[-1]).to(maps)
        where = sample(table.expand(maps.shape[0], -1, -1, -1), query, "border")[:, :, None]
        whose = torch.cat((self.query_ref_token[:, :1], self.query_ref_token[:, 1:].expand(-1, frames - 1, -1)), dim=1)
        for _ in range(self.size.iters):
            place = place.detach()
            seen = self.corr_mlp(self.correlations(pyramid, feature, place))
            moved = place - place[:, :1]
            far = moved / SCALE
            token = torch.cat((waves(moved, self.size.latent_dim // 2), far, far, seen, feature), dim=-1)
            change = self.updateformer(token.transpose(1, 2) + where + whose[:, None]).transpose(1, 2)
            step = self.ffeat_norm(change[..., 2:].flatten(0, 2)).unflatten(0, change.shape[:3])
            feature = feature + self.ffeat_updater(step)
            place = place + change[..., :2]
            place = torch.cat((query[:, None], place[:, 1:]), dim=1)
        vis, conf = (torch.sigmoid(part(feature)[..., 0]) for part in (self.vis_predictor, self.conf_predictor))
        return place, vis, conf

    def correlations(self, pyramid: Sequence[Tensor], feature: Tensor, place: Tensor) -> Tensor:
        """Dot products of each point's feature with the maps around its place: (B, S, Q, levels * window)."""
        radius = self.size.corr_radius
        steps = torch.arange(-radius, radius + 1, dtype=place.dtype, device=place.device)
        window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).reshape(-1, 2)  # x is the slow one
        found = []
        for level, maps in enumerate(pyramid):
            product = torch.einsum("bsqc,bschw->bsqhw", feature, maps) / maps.shape[2] ** 0.5
            points = (place / 2**level)[..., None, :] + window
            read = sample(product.flatten(0, 2)[:, None], points.flatten(0, 2), "zeros")
            found.append(read[..., 0].unflatten(0, place.shape[:3]))
        return torch.cat(found, dim=-1)


class TrackHead(nn.Module):
    """Features by DPT at half of the image's size, and the tracker on them."""

    def __init__(self, width: int, size: TrackSize, layers: tuple[int, int, int, int], patch_size: int) -> None:
        super().__init__()
        dpt = DptSize(size.features, size.out_channels, layers, size.out_channels, size.features)
        self.feature_extractor = DptHead(width, dpt, None, patch_size)
        self.tracker = Tracker(size)

    def forward(
        self, levels: Sequence[Tensor], grid: tuple[int, int], points: Tensor, frames: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Levels (B * S, N, width) as the DPT heads read them, points (B, Q, 2) in pixels of the first frame.

        Returns places (B, S, Q, 2) in pixels, visibility and confidence (B, S, Q) in [0, 1].
        """
        maps = self.feature_extractor(levels, grid).unflatten(0, (-1, frames))
        place, vis, conf = self.tracker(maps, points / STRIDE)
        return place * STRIDE, vis, conf


def sample(maps: Tensor, points: Tensor, padding: str) -> Tensor:
    """Maps (B, C, h, w) read at points (B, Q, 2), x and y in pixels, bilinear: (B, Q, C)."""
    height, width = maps.shape[-2:]
    span = torch.tensor([max(width - 1, 1), max(height - 1, 1)], dtype=points.dtype, device=points.device)
    grid = (points * (2 / span) - 1)[:, :, None]
    read = F.grid_sample(maps, grid, mode="bilinear", padding_mode=padding, align_corners=True)
    return read[..., 0].transpose(1, 2)


def waves(moved: Tensor, channels: int) -> Tensor:
    """Displacements (..., 2) -> (..., 2 * channels): per axis sines and cosines in turns, x first."""
    steps = torch.arange(0, channels, 2, dtype=moved.dtype, device=moved.device) * (WAVES / channels)
    angles = moved[..., None] * steps
    return torch.stack((torch.sin(angles), torch.cos(angles)), dim=-1).flatten(-3)


def sine_table(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of every pixel's x, then of its y: (1, channels, height, width) float32."""
    count = channels // 4
    frequencies = TABLE_BASE ** -(torch.arange(count, dtype=torch.float64) / count)

    def of(values: Tensor) -> Tensor:
        angles = values.double()[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    across = of(torch.arange(width))[None].expand(height, -1, -1)
    down = of(torch.arange(height))[:, None].expand(-1, width, -1)
    return torch.cat((across, down), dim=-1).permute(2, 0, 1)[None].float()
