"""Records what linear layers and convolutions are fed, `capture`: the sums that smoothing, AWQ and GPTQ need, never the
inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pqk.compress.weights.methods.patches import features_of, rows_of, taps_of
from pqk.errors import PqkError

Mask = Callable[[str, Tensor], Tensor | None]
"""Takes the name of a linear layer and its input (..., features); returns which positions count, bool of shape (...),
or None for all of them. Special tokens are left out with it."""
MEMORY = 2 * 2**30


@dataclass
class Inputs:
    """What is known of the inputs x (features,) of a layer.

    gram: sum of x x^T over all positions, float32 (features, features). largest: max |x| per feature. total: sum of |x|
    per feature. count: number of positions. convolved: of a convolution, whose features are the values under its
    kernel: no factor of one of them can be divided out of the input, so only GPTQ uses them.
    """

    gram: Tensor
    largest: Tensor
    total: Tensor
    count: int = 0
    convolved: bool = False

    @classmethod
    def none(cls, features: int, device: torch.device, convolved: bool = False) -> Inputs:
        zeros = torch.zeros(features, device=device)
        return cls(torch.zeros(features, features, device=device), zeros, zeros.clone(), convolved=convolved)

    @property
    def mean(self) -> Tensor:
        """Returns the mean of |x| per feature."""
        return self.total / max(1, self.count)

    def add(self, inputs: Tensor) -> None:
        """Adds the positions of `inputs` (positions, features). Raises PqkError for NaN or infinite ones."""
        if not inputs.shape[0]:
            return
        inputs = inputs.detach().float()
        size = inputs.abs()
        if not bool(torch.isfinite(size.max())):
            raise PqkError("a calibration input is NaN or infinite")
        self.gram.addmm_(inputs.T, inputs)
        torch.maximum(self.largest, size.amax(0), out=self.largest)
        self.total += size.sum(0)
        self.count += inputs.shape[0]

    def spread(self, taps: int) -> Inputs:
        """Returns the inputs of a weight matrix where `taps` neighbouring columns see each feature, one at a time."""
        if taps == 1:
            return self
        gram = torch.kron(self.gram, torch.eye(taps, device=self.gram.device))
        largest, total = (one.repeat_interleave(taps) for one in (self.largest, self.total))
        return Inputs(gram, largest, total, self.count, self.convolved)


def capture(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Collection[str] | None = None,
    mask: Mask | None = None,
    run: Callable[[nn.Module, Any], object] | None = None,
    memory: int = MEMORY,
) -> dict[str, Inputs]:
    """Returns the inputs of linear layers and convolutions by the name of their module, of the model as it is (float).

    Of a convolution they are the patches under its kernel, at most `POSITIONS` an item; `features_of` says which ones.

    batches: what the model is run on: a tensor, a tuple of arguments or a mapping of named ones; any object with `run`,
    which calls the model with it. layers: names of the modules; None: all. A layer that no batch reaches is left out.
    memory: bytes that sums may take at once; where they need more the model runs several times over the batches, which
    then must be a list or another thing that can be iterated again.
    Raises PqkError when there is no batch, no such layer, or an input is NaN or infinite.
    """
    found = {name: module for name, module in model.named_modules() if features_of(module)}
    unknown = sorted(set(layers or ()) - set(found))
    if unknown:
        raise PqkError(f"no linear layer or convolution is named {unknown[0]!r}")
    wanted = [name for name in found if layers is None or name in layers]
    parts = _parted({name: features_of(found[name]) * taps_of(found[name]) for name in wanted}, memory)
    if len(parts) > 1 and iter(batches) is batches:
        raise PqkError("the inputs of these layers need several runs over the batches: give them as a list")
    captured: dict[str, Inputs] = {}
    for part in parts:
        captured |= _captured(model, batches, {name: found[name] for name in part}, mask, run or _run)
    return {name: captured[name].spread(taps_of(found[name])) for name in wanted if captured[name].count}


def _captured(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    mask: Mask | None,
    run: Callable[[nn.Module, Any], object],
) -> dict[str, Inputs]:
    inputs = {
        name: Inputs.none(features_of(layer), _device(layer), not isinstance(layer, nn.Linear))
        for name, layer in layers.items()
    }

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            fed = positional[0] if positional else named["input"]
            kept = None if mask is None or inputs[name].convolved else mask(name, fed)
            if kept is not None and (kept.shape != fed.shape[:-1] or kept.dtype != torch.bool):
                raise PqkError(
                    f"the mask of {name} must be bool of shape {list(fed.shape[:-1])}, "
                    f"not {str(kept.dtype).removeprefix('torch.')} {list(kept.shape)}"
                )
            try:
                inputs[name].add(rows_of(layers[name], fed) if kept is None else fed[kept])
            except PqkError as error:
                raise PqkError(f"{name}: {error}") from None

        return record

    hooks = [layer.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, layer in layers.items()]
    modes, ran = [(module, module.training) for module in model.modules()], False
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
                ran = True
    finally:
        for module, training in modes:
            module.training = training
        for hook in hooks:
            hook.remove()
    if not ran:
        raise PqkError("there is nothing to capture: no calibration batch was given")
    return inputs


def _device(layer: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))


def _run(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _parted(features: Mapping[str, int], memory: int) -> list[list[str]]:
    """Returns the layers in parts whose sums fit into memory; a layer too large for it is a part of its own."""
    parts: list[list[str]] = [[]]
    used = 0
    for name, count in features.items():
        needed = 4 * count * (count + 2)
        if parts[-1] and used + needed > memory:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += needed
    return parts if parts[-1] else []
