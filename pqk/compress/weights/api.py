"""Quantizes a model in one call, `quantize_model_advanced`, as `AdvancedQuantConfig` or `QuantizationConfig` says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pqk.compress.weights.activations import Activations
from pqk.compress.weights.methods.inputs import Mask, capture
from pqk.compress.weights.methods.method import Method
from pqk.compress.weights.model import LEAST, Compute, Overrides, QuantizedWeights, quantize_weights, quantized_model
from pqk.compress.weights.qat import Training, fine_tuned
from pqk.compress.weights.schemes import Scheme
from pqk.compress.weights.torch_dynamic import torch_dynamic
from pqk.errors import PqkError, nearest

DYNAMIC = "pytorch_dynamic"
TYPES: Mapping[str, Mapping[str, Any]] = {
    "int8_symmetric": {"bits": 8, "symmetric": True},
    "int8_asymmetric": {"bits": 8, "symmetric": False},
    "int8_per_tensor_sym": {"bits": 8, "symmetric": True, "per_channel": False},
    "int8_per_tensor_asym": {"bits": 8, "symmetric": False, "per_channel": False},
    "int8_per_channel_sym": {"bits": 8, "symmetric": True, "per_channel": True},
    "int8_per_channel_asym": {"bits": 8, "symmetric": False, "per_channel": True},
    "int4_group": {"bits": 4},
    DYNAMIC: {"bits": 8},
}
"""What each `quant_type` settles."""
DEFAULT_GROUP = 128
FLOAT_BITS = (16, 32)
"""`sensitive_bits` that leave a layer as it is."""


@dataclass(kw_only=True)
class AdvancedQuantConfig:
    """How a model is quantized. What is None follows from `quant_type`, or from the other settings.

    quant_type: one of `TYPES`; None: it follows from bits, per_channel and group_size.
    bits: 8 or 4. symmetric: without a zero point (default). per_channel: with 8 bits, a range per output channel;
    default: one per tensor. group_size: with 4 bits, default 128; groups lie inside channels.
    sensitive_layers: parts of layer names ("attention") or patterns with *, whose weights get `sensitive_bits` (8 or 4;
    16 and 32 leave them as they are); all others get `normal_bits`.
    quantization_type: "ptq", or "qat", which trains the weights first and needs `training`.
    method, compute, activations, least: see `Method`, `quantized_model`, `Activations`, `quantize_weights`.
    """

    quant_type: str | None = None
    bits: int | None = None
    symmetric: bool | None = None
    per_channel: bool | None = None
    group_size: int | None = None
    sensitive_layers: list[str] = field(default_factory=list)
    sensitive_bits: int = 8
    normal_bits: int | None = None
    quantization_type: str = "ptq"
    training: Training | None = None
    method: str | Method = "rtn"
    compute: Compute = "packed"
    activations: Activations | None = None
    least: int = LEAST

    def scheme(self) -> Scheme:
        """Returns the scheme of the layers that are not sensitive. Raises PqkError for settings that disagree."""
        found = self._settled()
        bits = self.normal_bits if self.sensitive_layers and self.normal_bits is not None else found["bits"]
        return self._of_bits(bits, found)

    def overrides(self) -> Overrides:
        """Returns the schemes of the sensitive layers, by pattern. Raises PqkError for other bits than 4, 8, 16, 32."""
        if not self.sensitive_layers:
            return ()
        if isinstance(self.sensitive_layers, str):
            raise PqkError(f"sensitive_layers is a list of names, not the text {self.sensitive_layers!r}")
        if self.sensitive_bits in FLOAT_BITS:
            return [(pattern, None) for pattern in self.sensitive_layers]
        scheme = self._of_bits(self.sensitive_bits, self._settled())
        return [(pattern, scheme) for pattern in self.sensitive_layers]

    def _settled(self) -> dict[str, Any]:
        """Returns the settings with those that `quant_type` settles; two that disagree are an error."""
        given = {name: getattr(self, name) for name in ("bits", "symmetric", "per_channel", "group_size")}
        found = {name: value for name, value in given.items() if value is not None}
        if self.quant_type is not None:
            if self.quant_type not in TYPES:
                raise PqkError(
                    f"unknown quant_type {self.quant_type!r}{nearest(self.quant_type, TYPES)}; "
                    f"known are {', '.join(TYPES)}"
                )
            for name, value in TYPES[self.quant_type].items():
                if found.setdefault(name, value) != value:
                    raise PqkError(f"quant_type {self.quant_type!r} has {name} {value}, and {name} says {found[name]}")
        elif "bits" not in found:
            found["bits"] = 4 if "group_size" in found else 8
        bits = [found["bits"], *([self.normal_bits, self.sensitive_bits] if self.sensitive_layers else [])]
        if "group_size" in found and 4 not in bits:
            raise PqkError(f"group_size {found['group_size']} is about 4 bits; no weight gets 4 bits here")
        return found

    def _of_bits(self, bits: int, found: Mapping[str, Any]) -> Scheme:
        """Returns the scheme of this many bits: as the settings say, or for other bits than theirs the usual one.

        4 bits: groups. 8 bits: per channel and symmetric, unless the settings are about 8 bits themselves.
        """
        symmetric = found.get("symmetric", True)
        if bits == 4:
            return Scheme(4, symmetric, "group", found.get("group_size", DEFAULT_GROUP))
        if bits == 8 and found["bits"] == 8:
            return Scheme(8, symmetric, "channel" if found.get("per_channel", False) else "tensor")
        return Scheme(bits, symmetric, "channel")


@dataclass(kw_only=True)
class QuantizationConfig(AdvancedQuantConfig):
    """The same with a name, as rows of a comparison have one."""

    name: str


def quantize_model_advanced(
    model: nn.Module,
    config: AdvancedQuantConfig,
    calibration: Iterable[Any] | None = None,
    mask: Mask | None = None,
) -> nn.Module:
    """Returns a quantized copy of a model; the model itself does not change.

    Its layers keep their weights packed, and compute as `config.compute` says; with quant_type "pytorch_dynamic" they
    are PyTorch's own. calibration, mask: what `capture` is run on, for methods that need inputs.
    Raises PqkError for settings that disagree, a method without calibration batches, "qat" without `training`, and as
    `quantize_weights` does.
    """
    if config.quant_type == DYNAMIC:
        config.scheme()
        if config.quantization_type != "ptq" or config.method != "rtn" or config.sensitive_layers:
            raise PqkError(f"{DYNAMIC} is PyTorch's own: it takes no method, no sensitive_layers and no qat")
        return torch_dynamic(model)
    trained = model_to_round(model, config)
    weights = quantize_model_weights(trained, config, calibration, mask)
    return quantized_model(trained, weights, config.compute, config.activations)


def model_to_round(model: nn.Module, config: AdvancedQuantConfig) -> nn.Module:
    """Returns the model whose weights are rounded: the model itself, or with "qat" a trained copy."""
    if config.quantization_type == "ptq":
        return model
    if config.quantization_type != "qat":
        raise PqkError(
            f"quantization_type is 'ptq' or 'qat', not {config.quantization_type!r}"
            f"{nearest(config.quantization_type, ('ptq', 'qat'))}"
        )
    if config.training is None:
        raise PqkError(
            "quantization_type 'qat' trains the model and needs config.training = Training(batches, loss); "
            "with 'ptq' weights are rounded without data"
        )
    return fine_tuned(model, config.scheme(), config.training, config.overrides(), config.least)


def quantize_model_weights(
    model: nn.Module,
    config: AdvancedQuantConfig,
    calibration: Iterable[Any] | None = None,
    mask: Mask | None = None,
) -> QuantizedWeights:
    """Returns the packed weights of a model as the settings say, without training it; `save_weights` writes them."""
    method = config.method if isinstance(config.method, Method) else Method(config.method)
    if method.needs_inputs and calibration is None:
        raise PqkError(f"method {method.name} needs calibration batches")
    inputs = capture(model, calibration, mask=mask) if method.needs_inputs and calibration is not None else None
    about = {"name": config.name} if isinstance(config, QuantizationConfig) else {}
    return quantize_weights(
        model,
        config.scheme(),
        overrides=config.overrides(),
        method=method,
        inputs=inputs,
        least=config.least,
        about=about,
    )
