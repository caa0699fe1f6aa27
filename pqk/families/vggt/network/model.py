"""Defines VGGT (Wang et al. 2025, arXiv 2503.11651): frames of a scene to their cameras, depths and points at once.

An image encoder per frame; an aggregator whose rounds attend inside each frame and then over all frames; a head for
the cameras and two DPT heads. The names of all parameters are those of the official checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.families.layers import Rope, grid_positions, rope_arrays
from pqk.families.merging import Cells, grid_cells
from pqk.families.vggt.network.camera import CameraHead
from pqk.families.vggt.network.configs import VggtConfig, read_config
from pqk.families.vggt.network.dpt import DptHead
from pqk.families.vggt.network.layers import Block, Dino, PatchEmbed, batch_of, repeated
from pqk.families.vggt.network.merged import merge
from pqk.families.vggt.network.track import TrackHead

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, per colour; images come in [0, 1]."""
ROPE_BASE = 100.0


class Aggregator(nn.Module):
    """Encoder and the alternating blocks: images to the token sequences that the heads read."""

    def __init__(self, sizes: VggtConfig) -> None:
        super().__init__()
        self.sizes = sizes
        dim = sizes.dim
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.zeros(1, 2, sizes.registers, dim))
        self.patch_embed: nn.Module
        if sizes.dino is None:
            self.patch_embed = PatchEmbed(dim, sizes.patch_size)
        else:
            self.patch_embed = Dino(dim, sizes.patch_size, sizes.img_size // sizes.patch_size, sizes.dino)
        self.frame_blocks = nn.ModuleList(Block(dim, size, qk_norm=True) for size in sizes.frame_blocks)
        self.global_blocks = nn.ModuleList(Block(dim, size, qk_norm=True) for size in sizes.global_blocks)

    def blocks_alone(self) -> Aggregator:
        """Returns a shallow copy that shares the blocks, and lacks the image encoder and the special tokens."""
        rest = copy(self)
        rest._modules = {name: part for name, part in self._modules.items() if name != "patch_embed"}
        rest._parameters = {}
        return rest

    def encode(self, image: Tensor, grid: tuple[int, int], cells: Cells | None = None) -> Tensor:
        """Frames (F, 3, H, W) in [0, 1] -> patch tokens (F, N, C). cells: of a network that merges patches."""
        return self.patch_embed(normalise(image), grid, None, cells)

    def special(self) -> Tensor:
        """The camera token and the registers: (2, 1 + registers, C), those of a first frame, then of any other."""
        return torch.cat([self.camera_token, self.register_token], dim=2)[0]

    def with_special(self, patches: Tensor, special: Tensor, batch: int, frames: int) -> Tensor:
        """Patch tokens (batch * frames, N, C) -> tokens (batch * frames, P, C): camera, registers, patches.

        special: as `special` gives them. The first frame of a sequence has its own; it sets the world's frame.
        """
        of_frames = torch.cat([special[:1], *[special[1:]] * (frames - 1)])
        return torch.cat((repeated(of_frames, batch), patches), dim=1)

    def levels(
        self, tokens: Sequence[Tensor], special: Tensor, ropes: tuple[Rope, Rope], cells: Cells | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Patch tokens (B, N, C) of each frame -> camera tokens (B, S, 2 C), and the rounds that the dense heads read,
        each (B * S, N, 2 C).

        special: as `special` gives them. ropes: see `rounds`. cells: of a network that merges patches.
        """
        batch, frames, first = batch_of(tokens[0]), len(tokens), self.sizes.special
        patches = ropes[0].tokens - first
        merged = None if cells is None else merge(cells, tokens, first)
        if merged is not None:
            tokens, ropes = merged.tokens, merged.ropes
        count = ropes[0].tokens
        x = torch.stack(list(tokens), dim=1).reshape(batch * frames, count - first, self.sizes.dim)
        x = self.with_special(x, special, batch, frames)
        wanted = sorted({*self.sizes.dpt.layers, last_round(self.sizes)})
        rounds = dict(zip(wanted, self.rounds(x, frames, count, ropes, wanted), strict=True))
        levels = []
        for layer in self.sizes.dpt.layers:
            level = rounds[layer][:, :, first:]
            level = level if merged is None else merged.undo(level)
            levels.append(level.reshape(batch * frames, patches, 2 * self.sizes.dim))
        return rounds[wanted[-1]][:, :, 0], levels

    def rounds(
        self, x: Tensor, frames: int, tokens: int, ropes: tuple[Rope, Rope], wanted: Sequence[int]
    ) -> list[Tensor]:
        """Tokens (B * frames, P, C) -> of each wanted round (B, frames, P, 2 C): after the frame and the global block.

        ropes: tables of one frame's tokens and of all frames' tokens.
        """
        dim, found = self.sizes.dim, {}
        for index, (inside, across) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            x = inside(x.reshape(-1, tokens, dim), tokens, ropes[0], ropes[0].bias)
            before = x.reshape(-1, frames, tokens, dim)
            x = across(x.reshape(-1, frames * tokens, dim), frames * tokens, ropes[1], ropes[1].bias)
            if index in wanted:
                found[index] = torch.cat((before, x.reshape(-1, frames, tokens, dim)), dim=-1)
        return [found[index] for index in wanted]


class Vggt(nn.Module):
    """The network of one configuration (`pqk.families.vggt.network.configs`), without dropout.

    Raises PqkError when the configuration is not a valid one.
    """

    family = "vggt"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.sizes = sizes = read_config(self.config)
        self.aggregator = Aggregator(sizes)
        width = 2 * sizes.dim
        if sizes.camera is not None:
            self.camera_head = CameraHead(width, sizes.camera)
        if sizes.point_head:
            self.point_head = DptHead(width, sizes.dpt, 4, sizes.patch_size)
        if sizes.depth_head:
            self.depth_head = DptHead(width, sizes.dpt, 2, sizes.patch_size)
        if sizes.track is not None:
            self.track_head = TrackHead(width, sizes.track, sizes.dpt.layers, sizes.patch_size)

    def forward(self, images: Tensor, query_points: Tensor | None = None) -> dict[str, Tensor]:
        """Images (B, S, 3, H, W) or (S, 3, H, W) in [0, 1], H and W multiples of the patch size -> the heads' outputs.

        pose_enc (B, S, 9), see `pqk.families.vggt.geometry`; depth (B, S, H, W, 1) and depth_conf (B, S, H, W);
        world_points (B, S, H, W, 3) in the first camera's frame and world_points_conf (B, S, H, W). All up to one
        scale per sequence. query_points (B, Q, 2) or (Q, 2), x and y in pixels of the first frame: with the track head
        also track (B, S, Q, 2), vis and conf (B, S, Q). Raises PqkError for images of another shape.
        """
        images = images[None] if images.ndim == 4 else images
        grid = self._grid(images)
        batch, frames = images.shape[:2]
        cells = cells_of(self.sizes, grid, images.device)
        patches = self.aggregator.encode(images.flatten(0, 1), grid, cells)
        tokens = patches.unflatten(0, (batch, frames)).unbind(1)
        camera_tokens, levels = self.aggregator.levels(
            tokens, self.aggregator.special(), self.ropes(grid, frames, patches), cells
        )
        out: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):
            if self.sizes.camera is not None:
                out["pose_enc"] = self.camera_head(camera_tokens.float(), frames)[-1]
            if self.sizes.depth_head:
                maps = depth_maps(self.depth_head([level.float() for level in levels], grid))
                out["depth"], out["depth_conf"] = (x.unflatten(0, (batch, frames)) for x in maps)
            if self.sizes.point_head:
                maps = point_maps(self.point_head([level.float() for level in levels], grid))
                out["world_points"], out["world_points_conf"] = (x.unflatten(0, (batch, frames)) for x in maps)
        if query_points is not None:
            if self.sizes.track is None:
                raise PqkError("this network has no track head; load it with enable_track=True")
            points = query_points[None] if query_points.ndim == 2 else query_points
            track, vis, conf = self.track_head(levels, grid, points, frames)
            out |= {"track": track, "vis": vis, "conf": conf}
        return out

    def ropes(self, grid: tuple[int, int], frames: int, like: Tensor) -> tuple[Rope, Rope]:
        """Fresh rotary tables of one frame's tokens and of those of all frames, on the device of `like`."""
        one, every = (
            Rope(torch.from_numpy(cos).to(like.device), torch.from_numpy(sin).to(like.device), len(cos))
            for cos, sin in rope_tables(self.sizes, grid, frames)
        )
        return one, every

    def _grid(self, images: Tensor) -> tuple[int, int]:
        patch = self.sizes.patch_size
        if images.ndim != 5 or images.shape[2] != 3:
            raise PqkError(f"images must be (B, S, 3, H, W) or (S, 3, H, W), got {tuple(images.shape)}")
        height, width = images.shape[-2:]
        if height % patch or width % patch or not height or not width or not images.shape[1]:
            raise PqkError(f"height and width must be multiples of {patch}, got {height}x{width}")
        return height // patch, width // patch


def rope_tables(sizes: VggtConfig, grid: tuple[int, int], frames: int) -> list[tuple[Any, Any]]:
    """Cosines and signed sines of one frame's tokens, then of all frames' tokens, each (tokens, head_dim) float32.

    Special tokens stand at (0, 0), the patch at row r and column c at (r + 1, c + 1); the frames' numbers play no part.
    """
    special = np.zeros((sizes.special, 2), dtype=np.int64)
    positions = np.concatenate((special, grid_positions(*grid) + 1))
    head_dims = sizes.frame_blocks[0].head_dim, sizes.global_blocks[0].head_dim
    return [
        rope_arrays(np.tile(positions, (count, 1)), head_dim, ROPE_BASE)
        for count, head_dim in zip((1, frames), head_dims, strict=True)
    ]


def cells_of(sizes: VggtConfig, grid: tuple[int, int], device: torch.device) -> Cells | None:
    """The cells whose patches are merged, in the encoder and in the rounds; None where none is."""
    head_dim = sizes.frame_blocks[0].head_dim
    cells = grid_cells(*grid, sizes.merged, head_dim, ROPE_BASE, corner=1) if sizes.merged else None
    return None if cells is None else cells.to(device)


def last_round(sizes: VggtConfig) -> int:
    """The number of the last round, which the camera head reads."""
    return len(sizes.frame_blocks) - 1


def normalise(image: Tensor) -> Tensor:
    """Images (F, 3, H, W) in [0, 1] -> less the mean of each colour, over its deviation."""
    mean, std = (torch.tensor(values, device=image.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (image - mean) / std


def depth_maps(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Raw map (F, 2, H, W) -> depth (F, H, W, 1) = e^v and confidence (F, H, W) = 1 + e^c."""
    return torch.exp(raw[:, :1]).permute(0, 2, 3, 1), 1 + torch.exp(raw[:, 1])


def point_maps(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Raw map (F, 4, H, W) -> points (F, H, W, 3) = sign(v) (e^|v| - 1) and confidence (F, H, W) = 1 + e^c.

    e^|v| - 1 is written as (e^|v| + 1) tanh(|v| / 2), which every exporter knows and which is exact near 0.
    """
    v = raw[:, :3].permute(0, 2, 3, 1)
    distance = v.abs()
    return torch.sign(v) * (torch.exp(distance) + 1) * torch.tanh(distance / 2), 1 + torch.exp(raw[:, 3])
