"""Predictions of a variant on disk, so that a changed metric does not run its engines again.

    pairs.bin      the arrays of every pair, one behind the other: `NAMES` in this order, 3 bytes a number
    pairs.json     per pair the place of its scene in the list (from 0), the names of its two images and their places in
                   the scene, and the shapes of its arrays
    about.json     what the engines are; see `pqk.run.predict`
    kernels.json   what they executed

A number is the upper 24 bits of its float32, rounded to nearest: at most 1.6e-5 of its value is lost (float16 loses
4.9e-4, which moves the median that scales a pair, and has no numbers above 65504). A pair of 512x512 takes 6.3 MB.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from pqk.errors import PqkError

NAMES = ("pts3d_1", "conf_1", "pts3d_2", "conf_2")
ABOUT, KERNELS = "about.json", "kernels.json"
_INDEX, _ARRAYS = "pairs.json", "pairs.bin"
_BYTES = 3  # of a number
_LARGEST = np.uint32(0x7F7FFF7F)  # a finite float32 above this would round to infinity


def bytes_of(pairs: int, height: int, width: int) -> int:
    """What the arrays of so many pairs take on disk: 4 numbers for each pixel of both views."""
    return pairs * 2 * height * width * 4 * _BYTES


def pack(values: np.ndarray) -> np.ndarray:
    """Numbers as bytes (N, 3). NaN and infinities stay what they are, and no finite number becomes one."""
    flat = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
    bits = flat.view("<u4")
    magnitude = bits & np.uint32(0x7FFFFFFF)
    bits = np.where(magnitude <= _LARGEST, bits + np.uint32(0x80), bits)
    bits = np.where(np.isnan(flat), np.uint32(0x7FC00000), bits)
    return np.ascontiguousarray(bits.view(np.uint8).reshape(-1, 4)[:, 1:])


def unpack(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack`: bytes (N, 3) -> (N,) float32."""
    whole = np.zeros((len(packed), 4), np.uint8)
    whole[:, 1:] = packed
    return whole.view("<f4").reshape(-1).astype(np.float32, copy=False)


class Writer:
    """Writes the predictions of a variant into an empty folder, pair by pair; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._stream = (self._folder / _ARRAYS).open("wb")
        return self

    def add(self, pair: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Append a pair. Raises PqkError when one of `NAMES` is missing."""
        for name in NAMES:
            if name not in arrays:
                raise PqkError(f"the prediction has no {name}; it has {', '.join(arrays) or 'nothing'}")
            self._stream.write(pack(arrays[name]).data)
        self._index.append({**pair, "shapes": [list(arrays[name].shape) for name in NAMES]})

    def __exit__(self, kind: object, *exc: object) -> None:
        self._stream.close()
        if kind is None:
            (self._folder / _INDEX).write_text(json.dumps(self._index))


class Predictions:
    """What a `Writer` left, pair by pair; a context manager. Many threads may read at once."""

    def __init__(self, folder: Path) -> None:
        self.pairs: list[dict[str, Any]] = json.loads((folder / _INDEX).read_text())
        sizes = [[int(np.prod(shape)) for shape in pair["shapes"]] for pair in self.pairs]
        self._starts = np.concatenate([[0], np.cumsum([_BYTES * sum(own) for own in sizes])]).astype(int)
        self._sizes = sizes
        self._handle = os.open(folder / _ARRAYS, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._handle)

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of the pair at this place, float32 in their own shapes."""
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        raw = os.pread(self._handle, end - start, start)
        if len(raw) != end - start:
            raise PqkError(f"the predictions of pair {index + 1} are cut short")
        numbers = unpack(np.frombuffer(raw, np.uint8).reshape(-1, _BYTES))
        parts = np.split(numbers, np.cumsum(self._sizes[index])[:-1])
        shapes = self.pairs[index]["shapes"]
        return {name: part.reshape(shape) for name, part, shape in zip(NAMES, parts, shapes, strict=True)}
