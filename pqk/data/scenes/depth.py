"""Reads raw depth maps: tells which numbers are measurements, and refuses files that hold no metres."""

from __future__ import annotations

import numpy as np

from pqk.errors import PqkError

NEAREST, FARTHEST = 1e-6, 1e5  # metres; nothing that a camera measures is nearer or farther
# What renderers write where a ray hits nothing: the largest float16 and uint16, and Blender's default.
FAR_PLANES = np.array([65504, 65535, 1e10], np.float32)


def measured_depth(stored: np.ndarray) -> np.ndarray:
    """(H,W) little-endian float32 as stored -> (H,W) float32 in metres, 0 where nothing was measured.

    No measurement are infinity, 0 and less, less than 1e-6 m, more than 1e5 m, and FAR_PLANES. Raises PqkError (one
    sentence, without a file name) for NaN, and when most of the numbers lie outside 1e-6 to 1e5 m: they are then of
    another type or unit, and the rest would pass for a sparse depth map.
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


def _likely_cause(stored: np.ndarray) -> str:
    """What the four bytes of each number may be instead of a little-endian float32, in words."""
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
