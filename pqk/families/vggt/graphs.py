"""Splits a VGGT into graphs of static shape: encoder, aggregator, and one per head.

| graph | inputs | outputs |
| --- | --- | --- |
| encoder | image (1, 3, H, W) in [0, 1] | tokens (1, N, C), special (2, 5, C) |
| aggregator | special, tokens_0, tokens_1 ... | camera_tokens (1, S, 2 C), level_0 ... level_3 (S, N, 2 C) |
| camera | camera_tokens | pose_enc (1, S, 9) |
| depth | level_0 ... level_3 | depth (S, H, W, 1), depth_conf (S, H, W) |
| points | level_0 ... level_3 | world_points (S, H, W, 3), world_points_conf (S, H, W) |

S frames of N patches, C channels. The special tokens (camera and registers) do not depend on the image; they are
passed on all the same, so that a calibration can give the aggregator others (`predict.calibrated`). The modules share
the network's weights and also take batches of sequences, as a training feeds them; an export is of one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pqk.families.contract import GraphSpec
from pqk.families.layers import Rope
from pqk.families.merging import Cells
from pqk.families.vggt.network.dpt import DptHead
from pqk.families.vggt.network.layers import Dino
from pqk.families.vggt.network.model import Vggt, cells_of, depth_maps, normalise, point_maps, rope_tables

LEVELS = ("level_0", "level_1", "level_2", "level_3")
DEPTH = ("depth", "depth_conf")
POINTS = ("world_points", "world_points_conf")


class Sized(nn.Module):
    """A part of the network for `frames` frames of grid = (rows, columns) patches."""

    def __init__(self, model: Vggt, grid: tuple[int, int], frames: int) -> None:
        super().__init__()
        self.sizes, self.grid, self.frames = model.sizes, grid, frames
        self.cells: Cells | None = None  # of a network that merges patches

    def set_size(self, rows: int, cols: int, frames: int) -> None:
        """Takes frames of another size, or another number of them."""
        if (rows, cols, frames) != (*self.grid, self.frames):
            self.grid, self.frames = (rows, cols), frames
            self.resized()

    def resized(self) -> None:
        """Computes what depends on the size."""


class EncoderGraph(Sized):
    """Images (F, 3, H, W) -> patch tokens (F, N, C), and the special tokens (2, 1 + registers, C).

    folded: the position table is resized once and is a constant from then on, as exporters know no antialiased resize.
    A training leaves it as it is, so that the table learns.
    """

    folded: Tensor

    def __init__(self, model: Vggt, grid: tuple[int, int], frames: int, folded: bool) -> None:
        super().__init__(model, grid, frames)
        self.patch_embed = model.aggregator.patch_embed
        self.camera_token, self.register_token = model.aggregator.camera_token, model.aggregator.register_token
        self.folds = folded and isinstance(self.patch_embed, Dino)
        if self.folds:
            self.register_buffer("folded", self._table(), persistent=False)
        self.cells = cells_of(self.sizes, grid, self.camera_token.device)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        special = torch.cat([self.camera_token, self.register_token], dim=2)[
            0
        ]  # a list: NNCF traces no tuple of weights
        table = self.folded if self.folds else None
        return self.patch_embed(normalise(image), self.grid, table, self.cells), special

    def resized(self) -> None:
        if self.folds:
            self.folded = self._table()
        self.cells = cells_of(self.sizes, self.grid, self.camera_token.device)

    def _table(self) -> Tensor:
        with torch.no_grad():
            return self.patch_embed.table(self.grid).clone()  # type: ignore[operator]


class AggregatorGraph(Sized):
    """Special and patch tokens, these (B, N, C) per frame -> camera tokens (B, S, 2 C), levels (B * S, N, 2 C)."""

    def __init__(self, model: Vggt, grid: tuple[int, int], frames: int) -> None:
        super().__init__(model, grid, frames)
        self.aggregator = model.aggregator.blocks_alone()
        for name in ("frame_cos", "frame_sin", "global_cos", "global_sin"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.resized()

    def forward(self, special: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
        count = self.sizes.special + self.grid[0] * self.grid[1]
        ropes = Rope(self.frame_cos, self.frame_sin, count), Rope(self.global_cos, self.global_sin, count * self.frames)
        camera_tokens, levels = self.aggregator.levels(tokens, special, ropes, self.cells)
        return camera_tokens, *levels

    def resized(self) -> None:
        device = next(self.aggregator.parameters()).device
        one, every = rope_tables(self.sizes, self.grid, self.frames)
        self.frame_cos, self.frame_sin = (torch.from_numpy(table).to(device) for table in one)
        self.global_cos, self.global_sin = (torch.from_numpy(table).to(device) for table in every)
        self.cells = cells_of(self.sizes, self.grid, device)


class CameraGraph(Sized):
    """Camera tokens (B, S, 2 C) -> poses (B, S, 9); with `every`, those of all rounds, (rounds, B, S, 9)."""

    def __init__(self, model: Vggt, grid: tuple[int, int], frames: int, every: bool = False) -> None:
        super().__init__(model, grid, frames)
        self.camera_head, self.every = model.camera_head, every

    def forward(self, camera_tokens: Tensor) -> Tensor:
        rounds = self.camera_head(camera_tokens, self.frames)
        return torch.stack(rounds) if self.every else rounds[-1]


class DenseGraph(Sized):
    """Four levels of patch tokens (F, N, 2 C) -> a map of values and its confidence."""

    def __init__(self, model: Vggt, name: str, grid: tuple[int, int], frames: int) -> None:
        super().__init__(model, grid, frames)
        self.name = name
        setattr(self, name, getattr(model, name))  # part of the names of nodes
        self.activate = depth_maps if name == "depth_head" else point_maps

    def forward(self, *levels: Tensor) -> tuple[Tensor, Tensor]:
        head: DptHead = getattr(self, self.name)
        return self.activate(head(levels, self.grid))


def parts_of(model: Vggt, grid: tuple[int, int], frames: int, training: bool = False) -> dict[str, Sized]:
    """Returns the modules of all graphs of a network, by name; heads that it lacks are left out.

    training: the position table learns, and the camera head gives the poses of all rounds.
    """
    found: dict[str, Sized] = {
        "encoder": EncoderGraph(model, grid, frames, folded=not training),
        "aggregator": AggregatorGraph(model, grid, frames),
    }
    if model.sizes.camera is not None:
        found["camera"] = CameraGraph(model, grid, frames, every=training)
    if model.sizes.depth_head:
        found["depth"] = DenseGraph(model, "depth_head", grid, frames)
    if model.sizes.point_head:
        found["points"] = DenseGraph(model, "point_head", grid, frames)
    return found


def graphs_of(model: Vggt, frames: int, height: int, width: int) -> dict[str, GraphSpec]:
    """Returns the exportable graphs for `frames` frames of height x width pixels, with these weights.

    Example inputs are random, from a fixed seed: images uniform in [0, 1], and normal tokens, other ones for each
    frame. Of equal tokens attention makes the same value whatever its scale, its RoPE or the order of tokens.
    """
    patch = model.sizes.patch_size
    grid = height // patch, width // patch
    count, dim = grid[0] * grid[1], model.sizes.dim
    random = torch.Generator().manual_seed(0)

    def tokens(names: tuple[str, ...], *shape: int) -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=random) for name in names}

    feeds: Mapping[str, dict[str, Tensor]] = {
        "encoder": {"image": torch.rand((1, 3, height, width), generator=random)},
        "aggregator": {
            **tokens(("special",), 2, model.sizes.special, dim),
            **tokens(tuple(f"tokens_{index}" for index in range(frames)), 1, count, dim),
        },
        "camera": tokens(("camera_tokens",), 1, frames, 2 * dim),
        "depth": tokens(LEVELS, frames, count, 2 * dim),
        "points": tokens(LEVELS, frames, count, 2 * dim),
    }
    outputs = {
        "encoder": ("tokens", "special"),
        "aggregator": ("camera_tokens", *LEVELS),
        "camera": ("pose_enc",),
        "depth": DEPTH,
        "points": POINTS,
    }
    return {
        name: GraphSpec(module, feeds[name], tuple(feeds[name]), outputs[name])
        for name, module in parts_of(model, grid, frames).items()
    }
