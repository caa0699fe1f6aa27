"""Rounds the weights of a model, `quantize_weights`, and makes a model that uses them, `quantized_model`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pqk.compress.weights.activations import Activations
from pqk.compress.weights.layers import PACKED, PackedWeight, packed_layer, unfuse
from pqk.compress.weights.methods.inputs import Inputs
from pqk.compress.weights.methods.method import RTN, Method, pack_weight
from pqk.compress.weights.packed import PackedTensor
from pqk.compress.weights.schemes import Scheme
from pqk.errors import PqkError, nearest

Compute = Literal["packed", "dequantized", "integer"]
LEAST = 1024
"""Weights with fewer numbers stay in float: they are no size, and often the first or the last layer's."""
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Overrides = Sequence[tuple[str, Scheme | None]]


@dataclass(frozen=True)
class Target:
    """A weight that can be rounded.

    name: of the parameter in the model's state. layer, module, key: the module that owns it, its name, and the name of
    the parameter there. axis: the dimension of its output channels.
    """

    name: str
    layer: str
    module: nn.Module
    key: str
    parameter: nn.Parameter
    axis: int


@dataclass(frozen=True)
class QuantizedWeights:
    """The whole state of a model, its large weights packed.

    packed: by parameter name. rest: what stays as it was (biases, norms, small weights, buffers).
    tied: further names of a tensor -> the name that it has in `packed` or `rest`. about: whatever the caller adds.
    float_bytes: what all of it took before, every tensor once.
    """

    packed: dict[str, PackedTensor]
    rest: dict[str, Tensor]
    tied: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    float_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all tensors, without the header of a file."""
        return sum(tensor.nbytes for tensor in self.packed.values()) + _bytes(self.rest.values())

    @property
    def theory(self) -> int:
        """Returns the bytes that the schemes take in theory, and those of what stays as it was."""
        return sum(tensor.theory for tensor in self.packed.values()) + _bytes(self.rest.values())

    @property
    def ratio(self) -> float:
        """Returns how many times smaller it is than before (the compression ratio)."""
        return self.float_bytes / max(1, self.nbytes)

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Returns the state of the model, packed weights dequantized to `dtype`: dequantize-on-load."""
        found = dict(self.rest)
        found |= {name: tensor.dequantized(dtype) for name, tensor in self.packed.items()}
        return found | {name: found[first] for name, first in self.tied.items()}

    def errors(self, model: nn.Module) -> dict[str, float]:
        """Returns the relative error of every packed weight, see `PackedTensor.error`. model: the float one."""
        weights = dict(model.named_parameters(remove_duplicate=False))
        return {name: packed.error(weights[name]) for name, packed in self.packed.items()}

    def error(self, model: nn.Module) -> float:
        """Returns the error of all packed weights as one vector, relative to the float ones."""
        weights = dict(model.named_parameters(remove_duplicate=False))
        lost = total = 0.0
        for name, packed in self.packed.items():
            weight = weights[name].detach().float()
            lost += float((packed.dequantized() - weight).square().sum())
            total += float(weight.square().sum())
        return (lost / total) ** 0.5 if total else 0.0


def targets(model: nn.Module, least: int = LEAST) -> list[Target]:
    """Returns the weights that can be rounded: of linear layers, convolutions and multi-head attention.

    least: weights with fewer numbers are left out, as are those that a parametrization computes. A weight that several
    layers share is there once, under its first name.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[int, Target] = {}
    for layer, module in model.named_modules():
        for key, axis in _keys(module):
            parameter = module._parameters.get(key)
            if parameter is None or not parameter.is_floating_point() or parameter.numel() < least:
                continue
            found.setdefault(id(parameter), Target(first[id(parameter)], layer, module, key, parameter, axis))
    return list(found.values())


def _keys(module: nn.Module) -> tuple[tuple[str, int], ...]:
    """Returns the names of a module's weights and the dimension of their output channels."""
    if isinstance(module, nn.MultiheadAttention):
        return tuple((key, 0) for key in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"))
    if isinstance(module, (nn.Linear, *_CONV)):
        return (("weight", 0),)
    return (("weight", 1),) if isinstance(module, _TRANSPOSED) else ()


def quantize_weights(
    model: nn.Module,
    scheme: Scheme,
    *,
    overrides: Overrides = (),
    method: Method = RTN,
    inputs: Mapping[str, Inputs] | None = None,
    least: int = LEAST,
    about: Mapping[str, Any] | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> QuantizedWeights:
    """Returns the weights of a model, rounded with `scheme` and packed; the model does not change.

    overrides: pairs of a pattern and the scheme of the layers that it matches (None: they stay in float), the first
    match counts; see `matches`. inputs: of `capture`, by layer, for methods that need them.
    least: weights with fewer numbers stay in float. report: is called with each name, its number and their count.
    Raises PqkError when there is no weight to round, a pattern matches nothing, a method lacks its inputs, or a weight
    is NaN or infinite.
    """
    if method.needs_inputs and not inputs:
        raise PqkError(f"method {method.name} needs inputs of the layers: run `capture` on calibration batches")
    found = plan(model, scheme, overrides, least)
    packed: dict[str, PackedTensor] = {}
    for number, (target, chosen) in enumerate(found):
        if report is not None:
            report(target.name, number, len(found))
        try:
            packed[target.name] = pack_weight(
                target.parameter, chosen, target.axis, method, (inputs or {}).get(target.layer)
            )
        except PqkError as error:
            raise PqkError(f"{target.name}: {error}") from None
    rest, tied, float_bytes = _others(model, packed)
    return QuantizedWeights(packed, rest, tied, dict(about or {}), float_bytes)


def matches(layer: str, pattern: str) -> bool:
    """Returns whether a pattern means a layer: part of its name ("attention"), or with *, ? or [ all of it."""
    return fnmatchcase(layer, pattern) if set(pattern) & set("*?[") else pattern in layer


def plan(
    model: nn.Module, scheme: Scheme, overrides: Overrides = (), least: int = LEAST
) -> list[tuple[Target, Scheme]]:
    """Returns the weights that are rounded, each with its scheme; see `quantize_weights`.

    Raises PqkError when there is none, or a pattern matches no layer.
    """
    found = targets(model, least)
    if not found:
        raise PqkError(
            f"there is nothing to round: the model has no linear layer or convolution of {least} or more weights"
        )
    layers = [target.layer for target in found]
    for pattern, _ in overrides:
        if not pattern or not any(matches(layer, pattern) for layer in layers):
            words = {word for layer in layers for word in layer.split(".") if not word.isdigit()}
            raise PqkError(f"no layer that can be rounded matches {pattern!r}{nearest(pattern, words)}")
    schemes = [next((other for pattern, other in overrides if matches(layer, pattern)), scheme) for layer in layers]
    planned = [(target, chosen) for target, chosen in zip(found, schemes, strict=True) if chosen is not None]
    if not planned:
        raise PqkError("there is nothing to round: every layer is to stay in float")
    return planned


def quantized_model(
    model: nn.Module,
    weights: QuantizedWeights,
    compute: Compute = "packed",
    activations: Activations | None = None,
) -> nn.Module:
    """Returns a copy of a model that uses packed weights; the model itself does not change.

    model: the one that was rounded, or another of the same architecture, such as one with random weights: its whole
    state is replaced.
    compute: "packed": layers keep the packed weight and dequantize it in every call; "integer": linear layers multiply
    int8 inputs with int8 weights, convolutions as "packed"; "dequantized": plain layers, weights in float.
    activations: how inputs of linear layers are rounded, emulated in float (with "packed").
    Inside nn.MultiheadAttention, and in subclasses of torch's layers, weights are always dequantized.
    Raises PqkError when the state does not fit the model, or for settings that exclude each other.
    """
    if compute not in get_args(Compute):
        raise PqkError(
            f"compute is one of {', '.join(get_args(Compute))}, not {compute!r}{nearest(compute, get_args(Compute))}"
        )
    if activations is not None and compute != "packed":
        raise PqkError(f"rounded inputs are emulated with compute 'packed', not {compute!r}")
    _check(model, weights)
    keeping: set[str] = set() if compute == "dequantized" else _replaceable(model, weights)
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = weights.tied.get(name, name)
        if first in weights.packed and id(parameter) not in memo:
            held = first in keeping
            value = (
                parameter.new_empty(0)
                if held
                else weights.packed[first].dequantized(parameter.dtype).to(parameter.device)
            )
            memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    made = copy.deepcopy(model, memo)
    with torch.no_grad():
        state = made.state_dict(keep_vars=True)
        for name, tensor in weights.rest.items():
            state[name].copy_(tensor)
    return _replaced(made, weights, keeping, activations, compute == "integer")


def _replaceable(model: nn.Module, weights: QuantizedWeights) -> set[str]:
    """Returns the packed weights all of whose users are layers that have a packed form."""
    users: dict[str, bool] = {}
    inside = {
        child for module in model.modules() if isinstance(module, nn.MultiheadAttention) for child in module.modules()
    }
    for layer, module in model.named_modules():
        for key in module._parameters:
            name = f"{layer}.{key}" if layer else key
            first = weights.tied.get(name, name)
            if first in weights.packed:
                fits = type(module) in PACKED and key == "weight" and module not in inside
                users[first] = users.get(first, True) and fits
    return {name for name, fits in users.items() if fits}


def _replaced(
    made: nn.Module, weights: QuantizedWeights, keeping: set[str], activations: Activations | None, integer: bool
) -> nn.Module:
    """Puts packed layers in place of those whose weights are kept packed. Returns the model."""
    layers: dict[int, PackedWeight] = {}
    for layer, module in made.named_modules():
        name = f"{layer}.weight" if layer else "weight"
        first = weights.tied.get(name, name)
        if first in keeping and type(module) in PACKED:
            device = next(module.parameters()).device
            layers[id(module)] = packed_layer(module, weights.packed[first].to(device), activations, integer)
    for module in list(made.modules()):
        for key, child in module._modules.items():
            if id(child) in layers:
                module._modules[key] = layers[id(child)]
    if layers:
        unfuse(made)
    return layers.get(id(made), made)


def size_bytes(model: nn.Module) -> int:
    """Returns the bytes of a model's state, every tensor once: packed ones as they are, PyTorch's int8 ones too."""
    return _bytes(_tensors(model.state_dict()))


def _check(model: nn.Module, weights: QuantizedWeights) -> None:
    """Raises PqkError when names or shapes of the weights are not those of the model."""
    state = model.state_dict()
    held: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in weights.rest.items()}
    held |= {name: packed.shape for name, packed in weights.packed.items()}
    for name, first in weights.tied.items():
        held[name] = held[first]
    for name in state:
        if name not in held:
            raise PqkError(f"the quantized weights have no {name}{nearest(name, held)}: they are of another model")
    for name, shape in held.items():
        if name not in state:
            raise PqkError(f"the model has no {name}{nearest(name, state)}: the quantized weights are of another model")
        if tuple(state[name].shape) != shape:
            raise PqkError(f"{name} has the shape {list(state[name].shape)} in the model, quantized {list(shape)}")


def _others(model: nn.Module, packed: Mapping[str, PackedTensor]) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Returns what is not packed, further names of tied tensors, and the bytes of the whole float state."""
    rest: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[int, str] = {}
    size = 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise PqkError(f"{name} of the model's state is no tensor, and cannot be kept")
        if id(tensor) in seen:
            tied[name] = seen[id(tensor)]
            continue
        seen[id(tensor)] = name
        size += tensor.numel() * tensor.element_size()
        if name not in packed:
            rest[name] = tensor.detach().cpu().clone()
    return rest, tied, size


def _tensors(found: Any) -> list[Tensor]:
    """Returns the tensors of a state, those inside tuples and mappings too, each once."""
    if isinstance(found, Tensor):
        return [found]
    inner = found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple | list) else ()
    every = {(t.data_ptr(), t.shape): t for part in inner for t in _tensors(part)}
    return list(every.values())


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
