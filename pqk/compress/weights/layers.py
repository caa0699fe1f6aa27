"""Layers that keep their weight packed: `packed_layer`. What each computes with is its `compute`.

They are layers of torch with `weight` as a property, so that code that reads the weight of a layer still works.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqk.compress.weights.activations import Activations, fake_rounded, per_position
from pqk.compress.weights.packed import PackedTensor
from pqk.errors import PqkError

FLOAT = "float: the packed weight is dequantized in every call"
EMULATED = "emulated: inputs are rounded and multiplied in float"
INTEGER = "integers: int8 inputs times int8 weights, added up in int32"
INTEGER_IN_FLOAT = "integers: int8 inputs times int8 weights, exact, multiplied by float units (this CPU has no VNNI)"
EXACT = 1024
"""Columns whose products float32 adds up exactly: 1024 x 127 x 128 is below 2^24."""


class PackedWeight(nn.Module):
    """What every packed layer has: the packed weight in buffers, and `weight`, which dequantizes it."""

    packed_fields: dict[str, Any]
    weight_codes: Tensor
    weight_scale: Tensor
    weight_like: Tensor

    @property
    def packed(self) -> PackedTensor:
        """Returns the packed weight; its tensors are the layer's buffers."""
        tensors = {name: getattr(self, f"weight_{name}") for name in ("codes", "scale", "zero_point", "smooth")}
        return PackedTensor(**self.packed_fields, **tensors)

    @property
    def weight(self) -> Tensor:
        """Returns the dequantized weight, in the layer's dtype."""
        return self.packed.dequantized(self.weight_like.dtype)

    @weight.setter
    def weight(self, value: object) -> None:
        raise PqkError("a packed weight cannot be set; quantize the float model anew")

    @property
    def compute(self) -> str:
        """Returns what the layer computes with."""
        return FLOAT

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the layer as any other; scales keep their precision when the layer's dtype changes."""
        kept = {name: getattr(self, name) for name in ("weight_scale", "weight_smooth")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            if tensor is not None:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def _hold(self, packed: PackedTensor, dtype: torch.dtype) -> None:
        self.packed_fields = {name: getattr(packed, name) for name in ("scheme", "shape", "axis", "rotation", "method")}
        for name in ("codes", "scale", "zero_point", "smooth"):
            self.register_buffer(f"weight_{name}", getattr(packed, name))
        self.register_buffer("weight_like", torch.empty(0, dtype=dtype, device=packed.codes.device), persistent=False)


class PackedLinear(PackedWeight, nn.Linear):
    """A linear layer that dequantizes its weight in every call; with `activations` it rounds its inputs too, emulated.

    It saves memory, not time: the product is a float one.
    """

    activations: Activations | None = None

    @property
    def compute(self) -> str:
        return FLOAT if self.activations is None else f"{EMULATED}, {self.activations.name}"

    def forward(self, inputs: Tensor) -> Tensor:
        if self.activations is None:
            return F.linear(inputs, self.weight, self.bias)
        packed = self.packed
        carried = fake_rounded(packed.carried(inputs), self.activations)
        return F.linear(carried, packed.matrix(inputs.dtype), self.bias)


class IntegerLinear(PackedLinear):
    """A linear layer that multiplies in integers: inputs rounded per position to int8, products added up in int32.

    Its weight has 8 bits per tensor or channel. Scales, zero points and bias follow in float32.
    """

    @property
    def compute(self) -> str:
        return INTEGER if has_vnni() else INTEGER_IN_FLOAT

    def forward(self, inputs: Tensor) -> Tensor:
        packed = self.packed
        codes, scale = per_position(packed.carried(inputs).reshape(-1, packed.cols))
        weights, zero_point = packed.unpacked()
        if weights.dtype == torch.uint8:
            weights = weights.bitwise_xor(128).view(torch.int8)  # minus 128
        products = integer_product(codes, weights)
        if zero_point is not None:
            products = products - (zero_point.int() - 128) * codes.sum(1, keepdim=True, dtype=torch.int32)
        found = products.float() * scale * packed.scale
        if self.bias is not None:
            found = found + self.bias.float()
        return found.reshape(*inputs.shape[:-1], packed.rows).to(inputs.dtype)


class PackedConv1d(PackedWeight, nn.Conv1d):
    """A convolution that dequantizes its weight in every call."""


class PackedConv2d(PackedWeight, nn.Conv2d):
    """A convolution that dequantizes its weight in every call."""


class PackedConv3d(PackedWeight, nn.Conv3d):
    """A convolution that dequantizes its weight in every call."""


class PackedConvTranspose1d(PackedWeight, nn.ConvTranspose1d):
    """A transposed convolution that dequantizes its weight in every call."""


class PackedConvTranspose2d(PackedWeight, nn.ConvTranspose2d):
    """A transposed convolution that dequantizes its weight in every call."""


class PackedConvTranspose3d(PackedWeight, nn.ConvTranspose3d):
    """A transposed convolution that dequantizes its weight in every call."""


PACKED: Mapping[type[nn.Module], type[PackedWeight]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Conv3d: PackedConv3d,
    nn.ConvTranspose1d: PackedConvTranspose1d,
    nn.ConvTranspose2d: PackedConvTranspose2d,
    nn.ConvTranspose3d: PackedConvTranspose3d,
}
"""Packed layers by the layer that they replace. Subclasses with a `forward` of their own are not replaced."""


def packed_layer(
    layer: nn.Module, packed: PackedTensor, activations: Activations | None = None, integer: bool = False
) -> PackedWeight:
    """Returns a packed layer in place of a layer of torch; everything but the weight is shared with it.

    activations: for linear layers, how inputs are rounded, emulated. integer: a linear layer that multiplies integers.
    Raises PqkError where integers were asked for and the weight is not of 8 bits per tensor or channel.
    """
    kind: type[PackedWeight] = PACKED[type(layer)]
    linear = kind is PackedLinear
    if integer and linear:
        if packed.scheme.bits != 8 or packed.scheme.granularity == "group":
            raise PqkError(
                f"integer products need weights of 8 bits per tensor or channel, not {packed.scheme.name}; "
                "take compute 'packed'"
            )
        kind = IntegerLinear
    dtype = next(layer.parameters()).dtype
    made = copy.copy(layer)
    made.__class__ = kind
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = dict(made.__dict__[name])
    del made._parameters["weight"]
    assert isinstance(made, PackedWeight)
    made._hold(packed, dtype)
    if linear and activations is not None and not integer:
        assert isinstance(made, PackedLinear)
        made.activations = activations
    return made


def has_vnni() -> bool:
    """Returns whether this CPU multiplies int8 quickly in torch."""
    return bool(torch.cpu._is_vnni_supported())


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """Returns `left @ right.T` of int8 matrices, exact, in int32: (positions, columns) and (rows, columns).

    left: -127..127. Without VNNI torch's own product is far slower than a float one (20 times on AVX2), so float32
    multiplies the integers in parts whose sums it holds exactly.
    """
    if has_vnni():
        return torch._int_mm(left, right.T)
    found = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    for start in range(0, left.shape[1], EXACT):
        part = slice(start, start + EXACT)
        found += (left[:, part].float() @ right[:, part].float().T).to(torch.int32)
    return found


def unfuse(model: nn.Module) -> None:
    """Makes torch's fused transformer layers call their linear layers.

    In eval mode they read the weights of these, and would pass by what a packed layer does.
    """
    for module in model.modules():
        layer: Any = module
        if hasattr(layer, "activation_relu_or_gelu"):
            layer.activation_relu_or_gelu = 0
        if hasattr(layer, "use_nested_tensor"):
            layer.use_nested_tensor = False
