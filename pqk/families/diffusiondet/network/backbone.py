"""Defines the backbone: a ResNet of bottlenecks, whose norms are fixed, and a feature pyramid on it.

He et al. 2016 with the stride in the 3x3 convolutions; Lin et al. 2017 (feature pyramid). Names of all weights are
those of the official checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.families.detection.norm import EPS, batch_norm
from pqk.families.diffusiondet.network.configs import BackboneSize

STRIDES = (4, 8, 16, 32)
"""Of the maps p2, p3, p4 and p5 in pixels; sides of an image are multiples of the last one."""
FROZEN = ("stem", "res2")
"""Parts of the ResNet whose weights are not trained."""


class Norm(nn.Module):
    """Batch norm with fixed statistics, scale and shift: all four are buffers, and nothing is trained.

    learns: scale and shift are trained, and in training mode the statistics are those of the batch (Ioffe and Szegedy
    2015), over all processes that share it, whose average is kept. Names and result of a trained network are the same.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, learns: bool) -> None:
        super().__init__()
        self.learns = learns
        for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            values = torch.full((channels,), fill)
            if learns and name in ("weight", "bias"):
                self.register_parameter(name, nn.Parameter(values))
            else:
                self.register_buffer(name, values)

    def forward(self, x: Tensor) -> Tensor:
        if self.learns and self.training:
            return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        scale = self.weight * (self.running_var + EPS).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class NormedConv(nn.Conv2d):
    """A convolution without bias and the norm after it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, learns: bool) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = Norm(outputs, learns)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, first: bool, learns: bool) -> None:
        super().__init__()
        self.shortcut = NormedConv(inputs, outputs, 1, stride, learns) if first else None
        self.conv1 = NormedConv(inputs, inner, 1, 1, learns)
        self.conv2 = NormedConv(inner, inner, 3, stride, learns)
        self.conv3 = NormedConv(inner, outputs, 1, 1, learns)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(inside + (x if self.shortcut is None else self.shortcut(x)))


class Stem(nn.Module):
    """The first convolution and pooling: an image to a map of stride 4."""

    def __init__(self, outputs: int, learns: bool) -> None:
        super().__init__()
        self.conv1 = NormedConv(3, outputs, 7, 2, learns)

    def forward(self, image: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.conv1(image)), kernel_size=3, stride=2, padding=1)


class ResNet(nn.Module):
    """Image (B, 3, H, W) -> four maps of strides 4, 8, 16 and 32.

    The weights of `FROZEN` parts need no gradient, unless norms learn, as a network does that starts from nothing.
    """

    def __init__(self, size: BackboneSize) -> None:
        super().__init__()
        self.stem = Stem(size.stem, size.learns)
        inputs = size.stem
        for level, widths in enumerate(size.inner):
            outputs, stride = size.res2 << level, 2 if level else 1
            group = nn.Sequential(
                *(
                    Bottleneck(
                        outputs if index else inputs, inner, outputs, 1 if index else stride, index == 0, size.learns
                    )
                    for index, inner in enumerate(widths)
                )
            )
            self.add_module(f"res{level + 2}", group)
            inputs = outputs
        for name in () if size.learns else FROZEN:
            self.get_submodule(name).requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, maps = self.stem(image), []
        for level in range(len(STRIDES)):
            x = self.get_submodule(f"res{level + 2}")(x)
            maps.append(x)
        return maps


class Backbone(nn.Module):
    """Image (B, 3, H, W), sides multiples of 32 -> p2, p3, p4 and p5, each (B, C, H / stride, W / stride)."""

    def __init__(self, size: BackboneSize) -> None:
        super().__init__()
        self.bottom_up = ResNet(size)
        for level in range(len(STRIDES)):
            self.add_module(f"fpn_lateral{level + 2}", nn.Conv2d(size.res2 << level, size.out, 1))
            self.add_module(f"fpn_output{level + 2}", nn.Conv2d(size.out, size.out, 3, padding=1))

    def forward(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        above: Tensor | None = None
        for level, x in reversed(list(enumerate(self.bottom_up(image), start=2))):
            merged = self.get_submodule(f"fpn_lateral{level}")(x)
            if above is not None:
                merged = merged + F.interpolate(above, scale_factor=2.0, mode="nearest")
            maps.insert(0, self.get_submodule(f"fpn_output{level}")(merged))
            above = merged
        return maps
