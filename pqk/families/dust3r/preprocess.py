"""DUSt3R's own preprocessing, as its demo feeds the network: the reference for `pqk.data.scenes.preprocess`."""

from __future__ import annotations

import numpy as np

from pqk.data.scenes.preprocess import PATCH, normalise, resize
from pqk.errors import PqkError


def official_size(width: int, height: int, size: int, square_ok: bool = False) -> tuple[int, int]:
    """Width and height of a DUSt3R input for an image of width x height (DUSt3R's demo preprocessing, size 224 or 512).

    Raises PqkError when the image is so narrow that nothing is left.
    """
    resized_width, resized_height = _official_resize(width, height, size)
    left, top, right, bottom = _official_crop(resized_width, resized_height, size, square_ok)
    if right <= left or bottom <= top:
        raise PqkError(f"an image of {width}x{height} pixels leaves no {PATCH}-pixel patch at size {size}")
    return right - left, bottom - top


def official_preprocess(image: np.ndarray, size: int, square_ok: bool = False) -> np.ndarray:
    """(H,W,3) uint8 -> (3,h,w) float32 in [-1,1], exactly as DUSt3R's demo feeds it.

    The long side becomes `size` (for 224: the short side), Lanczos where it shrinks and bicubic otherwise; then a
    centre crop to multiples of 16, to a square for 224, and to 4:3 for square images unless `square_ok`.
    """
    height, width = image.shape[:2]
    official_size(width, height, size, square_ok)
    resized_width, resized_height = _official_resize(width, height, size)
    resized = resize(image, resized_width, resized_height)
    left, top, right, bottom = _official_crop(resized_width, resized_height, size, square_ok)
    return normalise(resized[top:bottom, left:right])


def _official_resize(width: int, height: int, size: int) -> tuple[int, int]:
    long_side = max(width, height)
    target = round(size * max(width / height, height / width)) if size == 224 else size
    # Python rounds ties to even, which is part of the rule.
    return round(width * target / long_side), round(height * target / long_side)


def _official_crop(width: int, height: int, size: int, square_ok: bool) -> tuple[int, int, int, int]:
    """left, top, right, bottom around the centre (width // 2, height // 2)."""
    centre_x, centre_y = width // 2, height // 2
    if size == 224:
        half_width = half_height = min(centre_x, centre_y)
    else:
        half_width, half_height = 2 * centre_x // PATCH * PATCH // 2, 2 * centre_y // PATCH * PATCH // 2
        if width == height and not square_ok:
            half_height = 3 * half_width // 4
    return centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height
