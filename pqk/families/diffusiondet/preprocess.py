"""Prepares pictures as the detector is fed: the short side to 800, normalised, padded to a multiple of 32.

Pictures are RGB with values 0 ... 255. Sizes are (height, width) everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pqk.data.scenes.picture import read_picture, upright
from pqk.errors import PqkError
from pqk.families.detection.inputs import MEAN, STD

SHORT, LONG = 800, 1333
"""Default side of the short side, and the most of the long side, in pixels."""
MULTIPLE = 32


def official_size(height: int, width: int, short: int = SHORT, long: int = LONG) -> tuple[int, int]:
    """Returns the size that a picture is resized to: the short side becomes `short`, the long one at most `long`.

    Raises PqkError for a side that is no positive number.
    """
    if min(height, width, short, long) < 1:
        raise PqkError(f"a picture of {height} x {width} pixels cannot be resized to sides of {short} to {long}")
    sides = {min(height, width): float(short), max(height, width): short / min(height, width) * max(height, width)}
    if (most := max(sides.values())) > long:
        sides = {side: long / most * new for side, new in sides.items()}
    return max(1, int(sides[height] + 0.5)), max(1, int(sides[width] + 0.5))


def resized(image: np.ndarray, short: int = SHORT, long: int = LONG) -> np.ndarray:
    """Returns a picture (h, w, 3) uint8 in the size of `official_size`, bilinear with antialiasing."""
    height, width = official_size(image.shape[0], image.shape[1], short, long)
    if (height, width) == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resized_boxes(boxes: np.ndarray, size: tuple[int, int], output: tuple[int, int]) -> np.ndarray:
    """Returns corners (..., 4) in pixels of a picture of `size` as those of the resized picture, not clipped."""
    return boxes * np.array([output[1] / size[1], output[0] / size[0]] * 2, dtype=boxes.dtype)


def load_picture(path: Path | str) -> np.ndarray:
    """Returns a picture file, upright, as (h, w, 3) uint8 RGB. Raises PqkError for what is no picture."""
    try:
        picture, orientation = read_picture(path)
    except ValueError as error:
        raise PqkError(str(error)) from error
    return np.asarray(upright(picture.convert("RGB"), orientation))


def batch_of(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns normalised images as one batch (B, 3, H, W), and their own sizes w, h, w, h (B, 4), both float32.

    images: (3, h, w) each, values 0 ... 255. Zeros are added at the right and at the bottom, to multiples of 32 that
    hold every image. Raises PqkError for what is no such image.
    """
    if not len(images):
        raise PqkError("there are no images to prepare")
    for image in images:
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise PqkError(f"an image must have the shape (3, height, width), got {tuple(image.shape)}")
    height, width = (-(-max(image.shape[axis] for image in images) // MULTIPLE) * MULTIPLE for axis in (1, 2))
    batch = torch.zeros(len(images), 3, height, width, device=images[0].device)
    mean, std = (torch.tensor(values, device=batch.device)[:, None, None] for values in (MEAN, STD))
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = (image.to(batch) - mean) / std
    sizes = [[image.shape[2], image.shape[1]] * 2 for image in images]
    return batch, torch.tensor(sizes, dtype=torch.float32, device=batch.device)
