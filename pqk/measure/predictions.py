"""Predictions of a variant on disk, so that a changed metric does not run its engines again.

    pairs.bin      the arrays of every pair, one behind the other: `NAMES` in this order, float32, little-endian
    pairs.json     per pair the place of its scene in the list (from 0), the names of its two images and their places in
                   the scene, and the shapes of its arrays
    about.json     what the engines are; see `pqk.measure.predict`
    kernels.json   what they executed

A pair of 512x512 takes 8.4 MB. Nothing is rounded: half of it, float16, moves the median that scales a pair by up to
2e-4, and three quarters still change what is left between a quantized model and its Teacher by more than 1e-4 of it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from pqk.errors import PqkError
from pqk.files import clear_write_errors

NAMES = ("pts3d_1", "conf_1", "pts3d_2", "conf_2")
ABOUT, KERNELS = "about.json", "kernels.json"
_INDEX, _ARRAYS = "pairs.json", "pairs.bin"
_BYTES = 4  # of a number


def bytes_of(pairs: int, height: int, width: int) -> int:
    """What the arrays of so many pairs take on disk: 4 numbers for each pixel of both views."""
    return pairs * 2 * height * width * 4 * _BYTES


class Writer:
    """Writes the predictions of a variant into an empty folder, pair by pair; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        with clear_write_errors(self._folder / _ARRAYS):
            self._stream = (self._folder / _ARRAYS).open("wb")
        return self

    def add(self, pair: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Append a pair. Raises PqkError when one of `NAMES` is missing, and when it cannot be written."""
        for name in NAMES:
            if name not in arrays:
                raise PqkError(f"the prediction has no {name}; it has {', '.join(arrays) or 'nothing'}")
            with clear_write_errors(self._folder / _ARRAYS):
                self._stream.write(np.ascontiguousarray(arrays[name], dtype="<f4").data)
        self._index.append({**pair, "shapes": [list(arrays[name].shape) for name in NAMES]})

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):  # the error that is on its way says more
                self._stream.close()
            return
        with clear_write_errors(self._folder):
            self._stream.close()
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
        numbers = np.frombuffer(raw, "<f4").astype(np.float32, copy=False)
        parts = np.split(numbers, np.cumsum(self._sizes[index])[:-1])
        shapes = self.pairs[index]["shapes"]
        return {name: part.reshape(shape) for name, part, shape in zip(NAMES, parts, shapes, strict=True)}
