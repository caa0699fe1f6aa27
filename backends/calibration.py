"""Hands a calibration set to a quantizer: bounded, checked, counted, with one item in memory.

An item that is finite itself may still give NaN or inf inside the model: a range made of it is worthless (or, as least
and largest values pass over NaN, right by luck alone), so every quantizer refuses it with the sentence of `not_finite`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.base import BackendError, Feeds, TensorInfo

if TYPE_CHECKING:
    import torch


class CalibrationItems:
    """The first `wanted` items of `source`, made, checked, handed on and dropped one by one; iterating starts anew.

    `passes` counts how often iterating was begun, `used` the items of the longest pass; `index` is the position of the
    item that was handed on last. Raises BackendError for an
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
        self.index = 0

    def __iter__(self) -> Iterator[Feeds]:
        self.passes += 1
        count = 0
        for item in self.source:
            if count == self.wanted:
                return
            self._check(item, count)
            self.index = count
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


def not_finite(tensor: str, item: int) -> BackendError:
    """Returns the error for a calibration item (counted from 0) that gives NaN or inf in a tensor inside the model."""
    return BackendError(
        f"calibration item {item} gives a value that is not finite (NaN or inf) in the tensor {tensor!r} of the float "
        "model, so no range can be measured there: take the item out of the calibration set, or correct the model"
    )


@contextlib.contextmanager
def finite_layers(layers: Iterable[tuple[str, torch.nn.Module]], items: CalibrationItems) -> Iterator[None]:
    """Checks the inputs of `layers` (by name) in every forward pass of an item of `items` inside this context.

    Raises BackendError (see `not_finite`) from inside that pass.
    """
    import torch

    def look(name: str, args: tuple[Any, ...]) -> None:
        # A sum is not finite when one of its terms is not, and costs no copy of the tensor.
        values = [x.detach() for x in args if torch.is_tensor(x) and x.is_floating_point()]
        if not all(bool(torch.isfinite(x.sum())) for x in values):
            raise not_finite(f"input of {name}", items.index)

    handles = [layer.register_forward_pre_hook(lambda _, args, name=name: look(name, args)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_finite(
    module: torch.nn.Module,
    layers: Sequence[tuple[str, torch.nn.Module]],
    names: Sequence[str],
    items: CalibrationItems,
) -> None:
    """Runs the float `module` over `items` (inputs in the order of `names`) and raises BackendError at the first
    one that gives NaN or inf in an input of `layers`."""
    import torch

    with finite_layers(layers, items), torch.no_grad():
        for feeds in items:
            module(*(torch.from_numpy(feeds[name]) for name in names))
