"""Turns what a convolution is fed into rows that its weight matrix multiplies, `rows_of`: GPTQ learns from them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

POSITIONS = 4096
"""Outputs per item of a batch that are taken at most, evenly spread: neighbours are much alike, and a sum needs few."""


def features_of(layer: nn.Module) -> int:
    """Returns the columns of a layer's weight matrix; 0 where `rows_of` knows no rows.

    Known are linear layers, 2D convolutions of one group, and 2D transposed ones whose kernels do not overlap
    (stride = kernel size, no padding), as patch embeddings and heads of transformers have them.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    if isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1 and layer.stride == layer.kernel_size:
        return layer.in_channels if _nothing_added(layer) else 0
    return 0


def taps_of(layer: nn.Module) -> int:
    """Returns how many columns of the weight matrix see one and the same feature, each for an output of its own.

    1 but for transposed convolutions: an input channel is multiplied once for each place of the kernel.
    """
    return layer.kernel_size[0] * layer.kernel_size[1] if isinstance(layer, nn.ConvTranspose2d) else 1


def rows_of(layer: nn.Module, fed: Tensor) -> Tensor:
    """Returns inputs of a layer as rows (positions, features), see `features_of`; a convolution's are its patches.

    fed: (..., features) of a linear layer, (items, channels, height, width) or (channels, height, width) of others.
    """
    if isinstance(layer, nn.Linear):
        return fed.reshape(-1, fed.shape[-1])
    images: Tensor = fed if fed.dim() == 4 else fed[None]
    if isinstance(layer, nn.ConvTranspose2d):
        step = _step(images.shape[2] * images.shape[3])
        return images[:, :, ::step, ::step].permute(0, 2, 3, 1).reshape(-1, images.shape[1])
    assert isinstance(layer, nn.Conv2d)
    padded = _padded(layer, images)
    high, wide = (
        (padded.shape[2 + axis] - layer.dilation[axis] * (layer.kernel_size[axis] - 1) - 1) // layer.stride[axis] + 1
        for axis in (0, 1)
    )
    step = _step(high * wide)
    stride = (layer.stride[0] * step, layer.stride[1] * step)
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _step(positions: int) -> int:
    """Returns every how manyth position of both axes is taken."""
    step = 1
    while positions > POSITIONS * step * step:
        step += 1
    return step


def _padded(layer: nn.Conv2d, images: Tensor) -> Tensor:
    if isinstance(layer.padding, str):  # "same", or "valid": nothing
        same = layer.padding == "same"
        total = [d * (k - 1) * same for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [side for size in reversed(total) for side in (size // 2, size - size // 2)]
    else:
        sides = [size for size in reversed(layer.padding) for _ in range(2)]
    mode: Any = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(images, sides, mode=mode) if any(sides) else images


def _nothing_added(layer: nn.ConvTranspose2d) -> bool:
    return not any((*layer.padding, *layer.output_padding)) and layer.dilation == (1, 1)
