"""The calibration set as a quantizer sees it: bounded, checked, counted, one item in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from backends.base import BackendError, Feeds, TensorInfo


class CalibrationItems:
    """The first `wanted` items of `source`, made, checked, handed on and dropped one by one; iterating starts anew.

    `passes` counts how often iterating was begun, `used` the items of the longest pass. Raises BackendError for an
    iterator, which cannot start anew; while iterating, for an item whose names, shapes or types are not those of
    `inputs` or that holds a value which is not finite, and at the end for a set that is empty or smaller than `wanted`.
    """

    def __init__(self, source: Iterable[Feeds], inputs: Iterable[TensorInfo], wanted: int) -> None:
        if isinstance(source, Iterator):
            raise BackendError(
                "the calibration set must be iterable again: pass a list or an object with __iter__, not an iterator"
            )
        self.source = source
        self.inputs = {t.name: t for t in inputs}
        self.wanted = wanted
        self.passes = 0
        self.used = 0

    def __iter__(self) -> Iterator[Feeds]:
        self.passes += 1
        count = 0
        for item in self.source:
            if count == self.wanted:
                return
            self._check(item, count)
            count += 1
            self.used = max(self.used, count)
            yield item
        if count == 0:
            raise BackendError("empty calibration set")
        if count < self.wanted:
            raise BackendError(f"the calibration set holds {count} items, calibration_samples asks for {self.wanted}")

    def _check(self, item: Feeds, index: int) -> None:
        if set(item) != set(self.inputs):
            raise BackendError(f"calibration item {index}: inputs must be {sorted(self.inputs)}, got {sorted(item)}")
        for name, array in item.items():
            want = self.inputs[name]
            if tuple(array.shape) != want.shape or array.dtype.name != want.dtype:
                raise BackendError(
                    f"calibration item {index}: {name!r} must be {want.dtype}{list(want.shape)}, "
                    f"got {array.dtype.name}{list(array.shape)}"
                )
            if not np.isfinite(array).all():
                raise BackendError(f"calibration item {index}: {name!r} holds a value that is not finite")
