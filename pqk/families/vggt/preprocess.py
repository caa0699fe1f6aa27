"""Prepares pictures as VGGT's own loaders do: the sides become multiples of 14, the values lie in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pqk.data.scenes.picture import read_picture, upright
from pqk.errors import PqkError, nearest

SIDE, PATCH = 518, 14
"""Pixels of the side that the network was trained on, and of a patch."""
MODES = ("crop", "pad")
SQUARE = 1024
"""Default side of `load_square`, in pixels."""

MOST_PIXELS = 178_956_970
"""Of a picture on its way to its final size: Pillow's limit for a picture in a file."""


def official_size(width: int, height: int, mode: str = "crop") -> tuple[int, int]:
    """Returns width and height of the network's input for one image of width x height pixels.

    crop: the width becomes 518 and the height follows, rounded to a multiple of 14; of more than 518 rows the central
    518 stay. pad: the long side becomes 518, the other one follows likewise, and white fills the square of 518.
    Raises PqkError for an unknown mode, a side that is no positive whole number, and an image so narrow that no patch
    is left of it or so tall that it would be enlarged beyond 179 million pixels.
    """
    new_width, new_height = _resized(width, height, mode)
    return (SIDE, SIDE) if mode == "pad" else (new_width, min(new_height, SIDE))


def official_preprocess(images: Sequence[np.ndarray], mode: str = "crop") -> np.ndarray:
    """Returns the network's input (S, 3, H, W) float32 in [0, 1], RGB, of S images.

    images: each (h, w), (h, w, 3) or (h, w, 4) uint8; transparent pixels are laid over white. Resized bicubic, then cut
    or padded as `official_size` says. Images of different final sizes are padded with white to the largest height and
    width, centred.
    Raises PqkError for an empty list, for what is no such image, and as `official_size`.
    """
    if not len(images):
        raise PqkError("there are no images to prepare")
    prepared = [_prepared(image, mode) for image in images]
    height, width = (max(image.shape[axis] for image in prepared) for axis in (0, 1))
    return np.stack([_values(_centred(image, height, width, 255)) for image in prepared])


def load_square(images: Sequence[np.ndarray], side: int = SQUARE) -> tuple[np.ndarray, np.ndarray]:
    """Returns square images (S, 3, side, side) float32 in [0, 1], RGB, and where the pictures lie in them.

    Each image (h, w), (h, w, 3) or (h, w, 4) uint8 is centred on a black square of its long side, then resized bicubic.
    Second result, (S, 6) float32: x1, y1, x2, y2 of the picture in pixels of the result, width and height of the image.
    Raises PqkError for an empty list, a side that is no positive whole number, what is no such image, and one whose
    square has more than 179 million pixels.
    """
    if not len(images):
        raise PqkError("there are no images to prepare")
    _check_side("the side of the square", side)
    _check_pixels(side, side)
    tensors, places = [], []
    for image in images:
        picture = _opaque(image)
        height, width = picture.shape[:2]
        longest = max(height, width)
        _check_pixels(longest, longest)
        square = Image.fromarray(_centred(picture, longest, longest, 0))
        tensors.append(_values(np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))))
        left, top = (longest - width) // 2, (longest - height) // 2
        corners = np.array([left, top, left + width, top + height]) * (side / longest)
        places.append([*corners, width, height])
    return np.stack(tensors), np.array(places, dtype=np.float32)


def read_images(paths: Sequence[Path | str]) -> list[np.ndarray]:
    """Returns the pictures in files as arrays (h, w, 3) uint8, turned as EXIF says, transparent pixels over white.

    Raises PqkError for a file that is no readable picture (`pqk.data.scenes.picture.read_picture`).
    """
    found = []
    for path in paths:
        try:
            picture = upright(*read_picture(path))
        except ValueError as error:
            raise PqkError(str(error)) from error
        clear = picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info
        found.append(_opaque(np.asarray(picture.convert("RGBA" if clear else "RGB"))))
    return found


def _resized(width: int, height: int, mode: str) -> tuple[int, int]:
    """Returns the sides before anything is cut or padded."""
    if mode not in MODES:
        raise PqkError(f"images can be prepared by {' or '.join(MODES)}, not {mode!r}{nearest(str(mode), MODES)}")
    _check_side("the width of an image", width)
    _check_side("the height of an image", height)
    # Python rounds ties to even, which is part of the rule.
    if mode == "pad" and height > width:
        sides = round(width * SIDE / height / PATCH) * PATCH, SIDE
    else:
        sides = SIDE, round(height * SIDE / width / PATCH) * PATCH
    if not all(sides):
        raise PqkError(f"an image of {width}x{height} pixels leaves no {PATCH}-pixel patch at a long side of {SIDE}")
    _check_pixels(*sides)
    return sides


def _prepared(image: np.ndarray, mode: str) -> np.ndarray:
    """Returns one image at its final size: (H, W, 3) uint8."""
    picture = _opaque(image)
    size = _resized(picture.shape[1], picture.shape[0], mode)
    resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    if mode == "pad":
        return _centred(resized, SIDE, SIDE, 255)
    top = max(0, len(resized) - SIDE) // 2
    return resized[top : top + SIDE]


def _opaque(image: np.ndarray) -> np.ndarray:
    """Returns an image as (h, w, 3) uint8, transparent pixels over white. Raises PqkError for what is no image."""
    right = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size > 0
    if not right or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,), (4,)):
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise PqkError(f"an image must be a uint8 array of shape (h, w), (h, w, 3) or (h, w, 4), got {found}")
    picture = Image.fromarray(np.ascontiguousarray(image))
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return np.asarray(picture.convert("RGB"))


def _centred(image: np.ndarray, height: int, width: int, colour: int) -> np.ndarray:
    """Returns the image (h, w, 3) in the middle of height x width pixels of a grey; an odd one is right or below."""
    rows, columns = height - image.shape[0], width - image.shape[1]
    margins = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
    return np.pad(image, margins, constant_values=colour)


def _values(image: np.ndarray) -> np.ndarray:
    """Returns (H, W, 3) uint8 as (3, H, W) float32 in [0, 1]."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / np.float32(255)


def _check_side(what: str, side: int) -> None:
    if isinstance(side, bool) or not isinstance(side, int | np.integer) or side < 1:
        raise PqkError(f"{what} must be a whole number of pixels above 0, got {side!r}")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise PqkError(f"an image would be enlarged to {width}x{height} pixels; at most {MOST_PIXELS} are made")
