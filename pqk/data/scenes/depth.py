"""Reads depth maps: `measured_depth` for raw float32 files, of which those not in metres are refused, and `half_depth`
for CO3D's PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pqk.errors import PqkError, first_line
from pqk.oserrors import cannot_read

NEAREST, FARTHEST = 1e-6, 1e5  # metres; nothing that a camera measures is nearer or farther
# Values that renderers write where a ray hits nothing: the largest float16 and uint16, and Blender's default.
FAR_PLANES = np.array([65504, 65535, 1e10], np.float32)


def measured_depth(stored: np.ndarray) -> np.ndarray:
    """Returns depth (H,W) float32 in metres, 0 where nothing was measured, from the stored (H,W) little-endian float32.

    Infinity, 0 and less, less than 1e-6 m, more than 1e5 m, and FAR_PLANES are not measurements. Raises PqkError (one
    sentence, without a file name) for NaN, and when most of the numbers lie outside 1e-6 to 1e5 m: they are then of
    another type or unit, and the rest would look like a sparse depth map.
    """
    size = np.abs(stored)
    numbers = size[np.isfinite(size) & (size > 0) & ~np.isin(size, FAR_PLANES)]
    if numbers.size and numbers.max() > FARTHEST and numbers.min() < numbers.max():
        numbers = numbers[numbers < numbers.max()]  # a far plane of another value
    outside = numbers[(numbers < NEAREST) | (numbers > FARTHEST)]
    if 2 * outside.size > numbers.size:
        raise PqkError(
            f"{outside.size} of {numbers.size} depths lie outside {NEAREST:g} to {FARTHEST:g} m, the first is "
            f"{outside[0]:.3g}: {_likely_cause(stored)}; expected are little-endian float32 values in metres"
        )
    bad = int(np.isnan(stored).sum())
    if bad:
        raise PqkError(f"{bad} of {stored.size} depth values are NaN; write 0 or inf instead")
    valid = (stored >= NEAREST) & (stored <= FARTHEST) & ~np.isin(stored, FAR_PLANES)
    return np.where(valid, stored, 0).astype(np.float32)


def half_depth(path: Path, factor: float) -> np.ndarray:
    """Returns depth (H,W) float32, 0 where nothing was measured, of a grey 16-bit PNG as CO3D writes it.

    The 16 bits of a pixel are those of a float16 number; depth is that number times `factor`, in the unit of the
    data. Not finite numbers, 0 and less are no measurement. Raises PqkError (one sentence, with the file's name) for a
    missing or damaged file and for pixels of another kind.
    """
    try:
        with path.open("rb") as stream, Image.open(stream, formats=("PNG",)) as image:
            image.load()
            mode, words = image.mode, np.asarray(image)
    except Exception as error:  # what Pillow raises for a damaged file is not limited to a few kinds
        if isinstance(error, OSError) and error.strerror:  # from the system
            raise PqkError(cannot_read(path, error)) from error
        raise PqkError(f"{path}: the depth map is damaged or no PNG ({first_line(error)})") from error
    if not mode.startswith("I"):  # I;16, in older versions of Pillow I
        raise PqkError(f"{path}: the depth map has pixels of mode {mode}, expected grey ones of 16 bits")
    with np.errstate(over="ignore", invalid="ignore"):
        depth = words.astype(np.uint16).view(np.float16).astype(np.float32) * np.float32(factor)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def _likely_cause(stored: np.ndarray) -> str:
    """Returns in words the probable type of the numbers when they are not little-endian float32 in metres."""
    if np.mean((stored > FARTHEST) & (stored < 1e9)) > 0.5:
        return "probably another unit, or a far plane"
    readings = (
        ("the bytes are probably in big-endian order", ">f4", 1e-3, 1e4),
        ("the numbers are probably 32-bit integers, such as millimetres", "<i4", 1, 1e8),
        ("the numbers are probably big-endian 32-bit integers, such as millimetres", ">i4", 1, 1e8),
    )
    for words, kind, low, high in readings:
        with np.errstate(invalid="ignore"):  # another type may read as NaN, which is outside of any range
            values = stored.view(kind).astype(np.float64)
        values = values[values != 0]
        if np.mean((values >= low) & (values <= high)) > 0.9:
            return words
    return "probably another type of number"
