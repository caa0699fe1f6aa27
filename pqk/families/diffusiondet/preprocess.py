"""Prepares pictures as the official detector is fed: the short side to 800.

Pictures are RGB with values 0 ... 255. Sizes are (height, width) everywhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pqk.data.scenes.picture import read_picture, upright
from pqk.errors import PqkError

SHORT, LONG = 800, 1333
"""Default side of the short side, and the most of the long side, in pixels."""


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
