"""DUSt3R: two images in, two point maps in the frame of the first camera out (Wang et al. 2024, arXiv 2312.14132).

A shared ViT encoder, two decoders that read each other's previous layer, one dense head per view. The names of all
parameters are those of the official checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.families.contract import GraphSpec
from pqk.families.dust3r.configs import Dust3rConfig, Mode, plain_config, read_config
from pqk.families.dust3r.dpt import DptHead, LinearHead
from pqk.families.dust3r.layers import DecoderBlock, EncoderBlock, LayerNorm, PatchEmbed
from pqk.families.layers import Rope, grid_rope
from pqk.families.merging import Cells, Merged, grid_cells

OUTPUTS = ("pts3d_1", "conf_1", "pts3d_2", "conf_2")


class EncoderParts(Protocol):
    """Whatever carries the encoder's modules: the model itself, or its exportable encoder graph."""

    patch_embed: PatchEmbed
    enc_blocks: nn.ModuleList
    enc_norm: LayerNorm


class DecoderParts(Protocol):
    """Whatever carries the modules behind the encoder: the model itself, or its exportable decoder graph."""

    sizes: Dust3rConfig
    decoder_embed: nn.Linear
    dec_blocks: nn.ModuleList
    dec_blocks2: nn.ModuleList
    dec_norm: LayerNorm
    downstream_head1: nn.Module
    downstream_head2: nn.Module


def run_encoder(parts: EncoderParts, image: Tensor, rope: Rope, cells: Cells | None = None) -> Tensor:
    """Image (B, 3, H, W) in [-1, 1] -> normalised tokens (B, H/p * W/p, enc_dim).

    cells: of a network that merges tokens; once, before the first block.
    """
    tokens, rope, merged = _merge(parts.patch_embed(image, rope.tokens), rope, cells)
    for block in parts.enc_blocks:
        tokens = block(tokens, rope)
    return parts.enc_norm(_whole(tokens, merged))


def _merge(tokens: Tensor, rope: Rope, cells: Cells | None) -> tuple[Tensor, Rope, Merged | None]:
    if cells is None:
        return tokens, rope, None
    merged = cells(tokens)
    return merged.tokens, merged.rope, merged


def _whole(tokens: Tensor, merged: Merged | None) -> Tensor:
    return tokens if merged is None else merged.undo(tokens)


def run_decoder(
    parts: DecoderParts,
    tokens1: Tensor,
    tokens2: Tensor,
    grid1: tuple[int, int],
    grid2: tuple[int, int],
    rope1: Rope,
    rope2: Rope,
    cells1: Cells | None = None,
    cells2: Cells | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (B, N, enc_dim) of both views -> points (B, H, W, 3) and confidence (B, H, W) of view 1, then of view 2.

    At every layer both decoders read the previous layer's outputs of both views. The heads get the encoder output, the
    raw outputs of the layers between, and the normalised output of the last layer. cells1, cells2: of a network that
    merges tokens; once for each view, and what the heads get is whole again.
    """
    list1, list2 = [tokens1], [tokens2]
    x1, rope1, merged1 = _merge(parts.decoder_embed(tokens1), rope1, cells1)
    x2, rope2, merged2 = _merge(parts.decoder_embed(tokens2), rope2, cells2)
    for block1, block2 in zip(parts.dec_blocks, parts.dec_blocks2, strict=True):
        x1, x2 = block1(x1, x2, rope1, rope2), block2(x2, x1, rope2, rope1)
        list1.append(_whole(x1, merged1))
        list2.append(_whole(x2, merged2))
    list1[-1], list2[-1] = parts.dec_norm(list1[-1]), parts.dec_norm(list2[-1])
    raw1, raw2 = parts.downstream_head1(list1, grid1), parts.downstream_head2(list2, grid2)
    modes = parts.sizes.depth_mode, parts.sizes.conf_mode
    return (*activate(raw1, *modes), *activate(raw2, *modes))


def activate(raw: Tensor, depth_mode: Mode, conf_mode: Mode) -> tuple[Tensor, Tensor]:
    """Raw map (B, 4, H, W) -> points (B, H, W, 3) and confidence (B, H, W), always in float32 (or wider).

    Depth mode exp: v / max(|v|, 1e-8) * (e^|v| - 1); square: v / max(|v|, 1e-8) * |v|^2; linear: v. Confidence exp:
    low + e^c, at most high; sigmoid: low + (high - low) * sigmoid(c).
    """
    with torch.autocast(raw.device.type, enabled=False):
        raw = raw if raw.dtype in (torch.float32, torch.float64) else raw.float()
        v, c = raw[:, :3].permute(0, 2, 3, 1), raw[:, 3]
        if depth_mode.name != "linear":
            distance = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
            if depth_mode.name == "exp":
                # e^d - 1 without cancellation near 0; unlike expm1 and sinh, every exporter knows exp and tanh.
                stretched = (torch.exp(distance) + 1) * torch.tanh(distance / 2)
            else:
                stretched = distance.square()
            v = v / distance.clamp(min=1e-8) * stretched
        if conf_mode.name == "exp":
            conf = torch.exp(c)
            if math.isfinite(conf_mode.high):
                conf = conf.clamp(max=conf_mode.high - conf_mode.low)
            conf = conf_mode.low + conf
        else:
            conf = conf_mode.low + (conf_mode.high - conf_mode.low) * torch.sigmoid(c)
        return v, conf


class Dust3r(nn.Module):
    """The network of one configuration (`pqk.families.dust3r.configs`), without dropout.

    Raises PqkError when the configuration is not a valid one.
    """

    family = "dust3r"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = plain_config(config)
        self.sizes = sizes = read_config(self.config)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, sizes.dec_dim))  # of the pretraining, unused here
        self.patch_embed = PatchEmbed(sizes.enc_dim, sizes.patch_size)
        self.enc_blocks = nn.ModuleList(EncoderBlock(sizes.enc_dim, size) for size in sizes.enc_blocks)
        self.enc_norm = LayerNorm(sizes.enc_dim)
        self.decoder_embed = nn.Linear(sizes.enc_dim, sizes.dec_dim)
        self.dec_blocks = nn.ModuleList(
            DecoderBlock(sizes.dec_dim, size, sizes.norm_memory) for size in sizes.dec_blocks
        )
        self.dec_norm = LayerNorm(sizes.dec_dim)
        self.dec_blocks2 = nn.ModuleList(
            DecoderBlock(sizes.dec_dim, size, sizes.norm_memory) for size in sizes.dec_blocks2
        )
        self.downstream_head1 = self._head()
        self.downstream_head2 = self._head()
        self._ropes: dict[tuple[int, int, int, torch.device], Rope] = {}
        self._cells: dict[tuple[int, int, int, torch.device], Cells | None] = {}

    def _head(self) -> nn.Module:
        sizes = self.sizes
        if sizes.dpt is None:
            return LinearHead(sizes.dec_dim, sizes.patch_size)
        return DptHead(sizes.enc_dim, sizes.dec_dim, len(sizes.dec_blocks), sizes.dpt, sizes.tail)

    def forward(
        self, img1: Tensor, img2: Tensor, true_shape1: Tensor | None = None, true_shape2: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> pts3d_1 and pts3d_2 (B, H, W, 3), conf_1 and conf_2 (B, H, W).

        Both point maps are in the frame of camera 1 (x right, y down, z forward), up to scale. H and W are multiples of
        the patch size; the two views may differ in size, but not in batch.
        true_shape1, true_shape2: real (H, W) of every sample (B, 2), for batches in which portrait samples are stored
        transposed; their outputs come back in the stored layout.
        """
        if true_shape1 is not None or true_shape2 is not None:
            return self._forward_stored(img1, img2, true_shape1, true_shape2)
        hw1, hw2 = self._image_size(img1), self._image_size(img2)
        if img1.shape[0] != img2.shape[0]:
            raise PqkError(f"both views need the same batch size, got {img1.shape[0]} and {img2.shape[0]}")
        if hw1 == hw2:
            tokens1, tokens2 = self.encode(torch.cat((img1, img2))).chunk(2)
        else:
            tokens1, tokens2 = self.encode(img1), self.encode(img2)
        return self.decode(tokens1, tokens2, hw1, hw2)

    def encode(self, img: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> tokens (B, H/p * W/p, enc_dim) after the encoder's last norm."""
        rows, cols = self._grid(self._image_size(img))
        place = (rows, cols, self.sizes.enc_blocks[0].head_dim, img.device)
        return run_encoder(self, img, self._rope(*place), self._cells_of(*place))

    def decode(self, tokens1: Tensor, tokens2: Tensor, hw1: tuple[int, int], hw2: tuple[int, int]) -> dict[str, Tensor]:
        """Tokens of both views as `encode` gives them, and the views' (H, W) -> the same dictionary as `forward`."""
        grid1, grid2 = self._grid(hw1), self._grid(hw2)
        for tokens, (rows, cols), hw in ((tokens1, grid1, hw1), (tokens2, grid2, hw2)):
            if tokens.shape[1] != rows * cols:
                raise PqkError(f"an image of {hw[0]}x{hw[1]} has {rows * cols} tokens, got {tokens.shape[1]}")
        head_dim = self.sizes.dec_blocks[0].head_dim
        places = ((*grid1, head_dim, tokens1.device), (*grid2, head_dim, tokens2.device))
        rope1, rope2 = (self._rope(*place) for place in places)
        cells1, cells2 = (self._cells_of(*place) for place in places)
        found = run_decoder(self, tokens1, tokens2, grid1, grid2, rope1, rope2, cells1, cells2)
        return dict(zip(OUTPUTS, found, strict=True))

    def graphs(self, height: int, width: int) -> dict[str, GraphSpec]:
        """Returns the two exportable graphs for views of one size (height x width), batch 1, with these weights.

        Example inputs are random, from a fixed seed: an image uniform in [-1, 1], and normal tokens, other ones for
        each view. Of equal tokens attention makes the same value whatever its scale, its RoPE or the order of tokens
        is, and of two equal views the exchange is invisible: an export checked on constants may be wrong in all that.
        """
        rows, cols = self._grid((height, width))
        device = self.mask_token.device
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(1, 3, height, width, generator=generator).mul_(2).sub_(1).to(device)
        tokens_1, tokens_2 = torch.randn(2, 1, rows * cols, self.sizes.enc_dim, generator=generator).to(device)
        encoder = EncoderGraph(self, rows, cols).to(device).train(self.training)
        decoder = DecoderGraph(self, rows, cols).to(device).train(self.training)
        return {
            "encoder": GraphSpec(encoder, {"image": image}, ("image",), ("tokens",)),
            "decoder": GraphSpec(
                decoder, {"tokens_1": tokens_1, "tokens_2": tokens_2}, ("tokens_1", "tokens_2"), OUTPUTS
            ),
        }

    def _forward_stored(
        self, img1: Tensor, img2: Tensor, true_shape1: Tensor | None, true_shape2: Tensor | None
    ) -> dict[str, Tensor]:
        """Turn transposed samples back, run groups of equal orientation, and return everything in the stored layout."""
        turned = list(zip(_turned(img1, true_shape1), _turned(img2, true_shape2), strict=True))
        merged: dict[str, Tensor] = {}
        for group in sorted(set(turned)):
            members = torch.tensor([i for i, pair in enumerate(turned) if pair == group], device=img1.device)
            views = [img[members].mT if turn else img[members] for img, turn in zip((img1, img2), group, strict=True)]
            for name, part in self(*views).items():
                if group[0] if name.endswith("_1") else group[1]:
                    part = part.transpose(1, 2)
                if name not in merged:
                    merged[name] = part.new_zeros(len(turned), *part.shape[1:])
                merged[name] = merged[name].index_copy(0, members, part)
        return merged

    def _image_size(self, img: Tensor) -> tuple[int, int]:
        if img.dim() != 4 or img.shape[1] != 3:
            raise PqkError(f"an image batch must have the shape (B, 3, H, W), got {tuple(img.shape)}")
        return int(img.shape[2]), int(img.shape[3])

    def _grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        patch = self.sizes.patch_size
        if hw[0] % patch or hw[1] % patch or min(hw) < patch:
            raise PqkError(f"image height and width must be multiples of {patch}, got {hw[0]}x{hw[1]}")
        return hw[0] // patch, hw[1] // patch

    def _rope(self, rows: int, cols: int, head_dim: int, device: torch.device) -> Rope:
        """Rotary tables on the device, kept for the next call unless they were made under a tracer or compiler."""
        key = (rows, cols, head_dim, device)
        if key in self._ropes:
            return self._ropes[key]
        with torch.inference_mode(False):
            cos, sin, tokens, _ = grid_rope(rows, cols, head_dim, self.sizes.rope_base)
            rope = Rope(cos.to(device), sin.to(device), tokens)
        if type(rope.cos) is Tensor and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            self._ropes[key] = rope
        return rope

    def _cells_of(self, rows: int, cols: int, head_dim: int, device: torch.device) -> Cells | None:
        """Returns the cells whose tokens are merged, kept like `_rope`."""
        key = (rows, cols, head_dim, device)
        if not self.sizes.merged or key in self._cells:
            return self._cells.get(key)
        with torch.inference_mode(False):
            cells = grid_cells(rows, cols, self.sizes.merged, head_dim, self.sizes.rope_base)
            cells = None if cells is None else cells.to(device)
        if cells is None or (type(cells.cos) is Tensor and not torch.jit.is_tracing()):
            self._cells[key] = cells
        return cells


def _turned(img: Tensor, true_shape: Tensor | None) -> list[bool]:
    """For each stored sample whether it is a transposed portrait; PqkError when its real size does not fit."""
    height, width = int(img.shape[2]), int(img.shape[3])
    if true_shape is None:
        return [False] * int(img.shape[0])
    turned = []
    for real in true_shape.tolist():
        if real not in ([height, width], [width, height]):
            raise PqkError(f"true_shape {real} does not fit images stored as {height}x{width}")
        turned.append(real != [height, width])
    return turned


class _Graph(nn.Module):
    """Keeps the rotary tables and the cells of one grid as constants of the graph."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Dust3rConfig, head_dim: int, rows: int, cols: int) -> None:
        super().__init__()
        self.sizes, self.head_dim, self.grid = sizes, head_dim, (rows, cols)
        rope = grid_rope(rows, cols, head_dim, sizes.rope_base)
        self.register_buffer("cos", rope.cos, persistent=False)
        self.register_buffer("sin", rope.sin, persistent=False)
        self.tokens = rope.tokens
        self.cells = grid_cells(rows, cols, sizes.merged, head_dim, sizes.rope_base)

    def rope(self) -> Rope:
        return Rope(self.cos, self.sin, self.tokens)

    def set_grid(self, rows: int, cols: int) -> None:
        """Run on another grid of tokens from now on: training at other sizes than the exported one."""
        if (rows, cols) != self.grid:
            rope = grid_rope(rows, cols, self.head_dim, self.sizes.rope_base)
            self.cos, self.sin = rope.cos.to(self.cos.device), rope.sin.to(self.cos.device)
            self.grid, self.tokens = (rows, cols), rope.tokens
            cells = grid_cells(rows, cols, self.sizes.merged, self.head_dim, self.sizes.rope_base)
            self.cells = None if cells is None else cells.to(self.cos.device)


class EncoderGraph(_Graph):
    """Image (1, 3, H, W) -> tokens (1, N, enc_dim) for one grid."""

    def __init__(self, model: Dust3r, rows: int, cols: int) -> None:
        super().__init__(model.sizes, model.sizes.enc_blocks[0].head_dim, rows, cols)
        self.patch_embed, self.enc_blocks, self.enc_norm = model.patch_embed, model.enc_blocks, model.enc_norm

    def forward(self, image: Tensor) -> Tensor:
        return run_encoder(self, image, self.rope(), self.cells)


class DecoderGraph(_Graph):
    """Tokens of both views (1, N, enc_dim) -> the four outputs for one grid."""

    def __init__(self, model: Dust3r, rows: int, cols: int) -> None:
        super().__init__(model.sizes, model.sizes.dec_blocks[0].head_dim, rows, cols)
        self.decoder_embed, self.dec_norm = model.decoder_embed, model.dec_norm
        self.dec_blocks, self.dec_blocks2 = model.dec_blocks, model.dec_blocks2
        self.downstream_head1, self.downstream_head2 = model.downstream_head1, model.downstream_head2

    def forward(self, tokens_1: Tensor, tokens_2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rope = self.rope()
        return run_decoder(self, tokens_1, tokens_2, self.grid, self.grid, rope, rope, self.cells, self.cells)
