"""Fits pictures into the static shape of the network's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pqk.errors import PqkError
from pqk.families.detection.settings import PATCH

MEAN, STD = (123.675, 116.280, 103.530), (58.395, 57.120, 57.375)
"""Of ImageNet, per colour, of values 0 ... 255."""


@dataclass(frozen=True, eq=False)
class Fed:
    """What one sample feeds.

    image: (1, 3, H, W) float32, normalised, zeros at the right and below. size: (height, width) of the picture in it.
    original: (height, width) of the annotated image. number: of the image in its set, which the noise depends on.
    """

    image: np.ndarray
    size: tuple[int, int]
    original: tuple[int, int]
    number: int

    @property
    def whwh(self) -> np.ndarray:
        """Returns width, height, width, height of the picture in the input: (4,) float32, pixels."""
        return np.array([self.size[1], self.size[0]] * 2, dtype=np.float32)


def fitted_size(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Returns the largest (height, width) of the shape of `size` that fits into height x width, to whole pixels."""
    scale = min(height / size[0], width / size[1])
    tall, wide = (max(1, int(side * scale + 0.5)) for side in size)
    return min(tall, height), min(wide, width)


def fit(picture: np.ndarray, height: int, width: int, number: int) -> Fed:
    """Returns a picture (h, w, 3) uint8 RGB as it is fed: resized (bilinear, antialiased), normalised, padded.

    height, width: of the network's input. A picture that has the right size already is not resized. Raises PqkError for
    what is no picture.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or not picture.size or picture.dtype != np.uint8:
        raise PqkError(f"a picture must be (height, width, 3) uint8, got {picture.shape} {picture.dtype}")
    original = (picture.shape[0], picture.shape[1])
    size = fitted_size(original, height, width)
    if size != original:
        picture = np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    mean, std = (np.array(values, np.float32) for values in (MEAN, STD))
    pixels = (picture.astype(np.float32) - mean) / std
    image = np.zeros((1, 3, height, width), dtype=np.float32)
    image[0, :, : size[0], : size[1]] = pixels.transpose(2, 0, 1)
    return Fed(image, size, original, number)


def padded(images: Sequence[Tensor], least: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """Returns normalised images as one batch (B, 3, H, W), and their own sizes w, h, w, h (B, 4), both float32.

    images: (3, h, w) each, values 0 ... 255. Zeros are added at the right and at the bottom, to multiples of 32 that
    hold every image and have at least the height and width of `least`. Raises PqkError for what is no such image.
    """
    if not len(images):
        raise PqkError("there are no images to prepare")
    for image in images:
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise PqkError(f"an image must have the shape (3, height, width), got {tuple(image.shape)}")
    height, width = (
        -(-max(least[axis], *(image.shape[axis + 1] for image in images)) // PATCH) * PATCH for axis in (0, 1)
    )
    batch = torch.zeros(len(images), 3, height, width, device=images[0].device)
    mean, std = (torch.tensor(values, device=batch.device)[:, None, None] for values in (MEAN, STD))
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = (image.to(batch) - mean) / std
    sizes = [[image.shape[2], image.shape[1]] * 2 for image in images]
    return batch, torch.tensor(sizes, dtype=torch.float32, device=batch.device)
