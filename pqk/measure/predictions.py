"""Keeps predictions of a variant on disk, so that a changed metric does not run its engines again.

    arrays.bin     the arrays of every sample, one after another, in their own types, little-endian
    samples.json   per sample its group (place in the list, from 0), its name, and name, type and shape of each array
    about.json     facts about the engines; see `pqk.measure.predict`
    kernels.json   the kernels that they executed

Nothing is rounded. float16 would change the median that scales a pair of point maps by up to 2e-4. Even with three
quarters of the bits, the difference between a quantized model and its Teacher changes by more than 1e-4 of itself.
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

ABOUT, KERNELS = "about.json", "kernels.json"
_INDEX, _ARRAYS = "samples.json", "arrays.bin"


class Writer:
    """Writer of the predictions of a variant into an empty folder, sample by sample; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        with clear_write_errors(self._folder / _ARRAYS):
            self._stream = (self._folder / _ARRAYS).open("wb")
        return self

    def add(self, group: int, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends a sample. Raises PqkError when it cannot be written."""
        kept = {key: np.asarray(array, array.dtype.newbyteorder("<"), order="C") for key, array in arrays.items()}
        for array in kept.values():
            with clear_write_errors(self._folder / _ARRAYS):
                self._stream.write(array.data)
        told = [[key, array.dtype.str, list(array.shape)] for key, array in kept.items()]
        self._index.append({"group": group, "name": name, "arrays": told})

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):  # the error that is being raised says more
                self._stream.close()
            return
        with clear_write_errors(self._folder):
            self._stream.close()
            (self._folder / _INDEX).write_text(json.dumps(self._index))


class Predictions:
    """The predictions that a `Writer` wrote, sample by sample; a context manager. Many threads may read at once.

    samples: (group, name) of each, in order.
    """

    def __init__(self, folder: Path) -> None:
        index: list[dict[str, Any]] = json.loads((folder / _INDEX).read_text())
        self.samples: list[tuple[int, str]] = [(entry["group"], entry["name"]) for entry in index]
        self._arrays = [[(key, np.dtype(kind), tuple(shape)) for key, kind, shape in e["arrays"]] for e in index]
        self._sizes = [[kind.itemsize * int(np.prod(shape)) for _, kind, shape in own] for own in self._arrays]
        self._starts = np.concatenate([[0], np.cumsum([sum(own) for own in self._sizes])]).astype(int)
        self._handle = os.open(folder / _ARRAYS, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._handle)

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """Returns the arrays of the sample at this place, in their own types and shapes."""
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        raw = os.pread(self._handle, end - start, start)
        if len(raw) != end - start:
            raise PqkError(f"the predictions of sample {index + 1} are cut short")
        found, at = {}, 0
        for (key, kind, shape), size in zip(self._arrays[index], self._sizes[index], strict=True):
            found[key] = np.frombuffer(raw, kind, offset=at, count=size // kind.itemsize).reshape(shape)
            at += size
        return found
