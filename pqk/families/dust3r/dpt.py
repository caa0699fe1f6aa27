"""The two dense heads of DUSt3R: a linear one and DPT (Ranftl et al. 2021, Vision Transformers for Dense Prediction).

Each turns the token list of one view into a raw map (B, 4, H, W): channels x, y, z and confidence before activation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pqk.families.dust3r.configs import DptSize, dpt_hooks

CHANNELS = 4


def enlarge(x: Tensor, factor: int = 2) -> Tensor:
    """Bilinear resize (B, C, h, w) -> (B, C, factor * h, factor * w), corners aligned."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)


class LinearHead(nn.Module):
    """One linear layer per token, then pixel shuffle."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.values = CHANNELS * patch_size**2
        self.proj = nn.Linear(width, self.values)

    def forward(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Last entry (B, N, width) -> (B, 4, H, W), with grid = (H / p, W / p) and N their product."""
        raw = self.proj(tokens[-1]).transpose(1, 2)
        return F.pixel_shuffle(raw.reshape(-1, self.values, *grid), self.patch_size)


class ResidualUnit(nn.Module):
    """t + conv2(relu(conv1(relu(t)))); the skip carries t before the relu."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Add a finer level to the coarse map, refine, double the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(width, width, 1)
        self.resConfUnit1 = ResidualUnit(width)
        self.resConfUnit2 = ResidualUnit(width)

    def forward(self, coarse: Tensor, level: Tensor | None, factor: int = 2) -> Tensor:
        """coarse and level (B, width, h, w) -> (B, width, factor * h, factor * w).

        Without a level (the coarsest map) resConfUnit1 is unused; official files carry its weights all the same.
        """
        fused = coarse if level is None else coarse + self.resConfUnit1(level)
        refined = self.resConfUnit2(fused)
        return self.out_conv(refined if factor == 1 else enlarge(refined, factor))


class Scratch(nn.Module):
    """The 3x3 projections of the four levels to one width, and the four fusion blocks.

    `layer_rn.{0..3}` are second names of `layer{1..4}_rn`, as in the official state dict.
    """

    def __init__(self, size: DptSize) -> None:
        super().__init__()
        for index, width in enumerate(size.layer_dims, start=1):
            setattr(self, f"layer{index}_rn", nn.Conv2d(width, size.feature_dim, 3, padding=1, bias=False))
        self.layer_rn = nn.ModuleList(getattr(self, f"layer{index}_rn") for index in range(1, 5))
        self.refinenet1 = Fusion(size.feature_dim)
        self.refinenet2 = Fusion(size.feature_dim)
        self.refinenet3 = Fusion(size.feature_dim)
        self.refinenet4 = Fusion(size.feature_dim)


class Dpt(nn.Module):
    """Four levels of tokens -> one map at 16 times the token grid.

    tail: how much coarser the grid of the last convolutions is. From the last residual unit to the last ReLU all is
    linear, so of a network whose kernels were folded (`pqk.families.dust3r.reduce`) the four channels of the result are
    resized in place of the features.
    """

    def __init__(self, widths: Sequence[int], size: DptSize, tail: int = 1) -> None:
        super().__init__()
        self.tail = tail
        dims = size.layer_dims
        self.widths = tuple(widths)
        self.scratch = Scratch(size)
        last = size.last_dim
        # Keys 1 and 3 of the official stack (resize, relu) own no weights.
        self.head = nn.ModuleDict(
            {
                "0": nn.Conv2d(size.feature_dim, size.feature_dim // 2, 3, padding=1),
                "2": nn.Conv2d(size.feature_dim // 2, last, 3, padding=1),
                "4": nn.Conv2d(last, CHANNELS, 1),
            }
        )
        project = [nn.Conv2d(width, dim, 1) for width, dim in zip(widths, dims, strict=True)]
        self.act_postprocess = nn.ModuleList(
            [
                nn.Sequential(project[0], nn.ConvTranspose2d(dims[0], dims[0], 4, stride=4)),
                nn.Sequential(project[1], nn.ConvTranspose2d(dims[1], dims[1], 2, stride=2)),
                nn.Sequential(project[2]),
                nn.Sequential(project[3], nn.Conv2d(dims[3], dims[3], 3, stride=2, padding=1)),
            ]
        )

    def forward(self, levels: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Four token tensors (B, h * w, width_j) with grid = (h, w) -> (B, 4, 16 h, 16 w)."""
        h, w = grid
        maps = []
        stages = zip(levels, self.widths, self.act_postprocess, self.scratch.layer_rn, strict=True)
        for tokens, width, reassemble, project in stages:
            maps.append(project(reassemble(tokens.transpose(1, 2).reshape(-1, width, h, w))))
        x = self.scratch.refinenet4(maps[3], None)
        # An odd size was rounded up when it was halved, so doubling gave one row or column too many.
        x = x[:, :, :h, :w]
        x = self.scratch.refinenet3(x, maps[2])
        x = self.scratch.refinenet2(x, maps[1])
        x = self.head["0"](self.scratch.refinenet1(x, maps[0], 1 if self.tail == 4 else 2))
        x = enlarge(x) if self.tail == 1 else x
        raw = self.head["4"](F.relu(self.head["2"](x)))
        return raw if self.tail == 1 else enlarge(raw, self.tail)


class DptHead(nn.Module):
    """DPT on four entries of the token list: the encoder output and three decoder layers."""

    def __init__(self, encoder_width: int, decoder_width: int, depth: int, size: DptSize, tail: int = 1) -> None:
        super().__init__()
        self.hooks = dpt_hooks(depth)
        self.dpt = Dpt([encoder_width, decoder_width, decoder_width, decoder_width], size, tail)

    def forward(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Token list (each (B, N, width)) with grid = (H / 16, W / 16) -> (B, 4, H, W)."""
        return self.dpt([tokens[hook] for hook in self.hooks], grid)
