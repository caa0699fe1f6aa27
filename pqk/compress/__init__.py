"""Makes models smaller. The names of weight quantization are imported, with torch, when they are first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqk.compress.weights.activations import Activations
    from pqk.compress.weights.api import (
        AdvancedQuantConfig,
        QuantizationConfig,
        quantize_model_advanced,
        quantize_model_weights,
    )
    from pqk.compress.weights.files import load_weights, save_weights
    from pqk.compress.weights.methods.inputs import capture
    from pqk.compress.weights.methods.method import Method
    from pqk.compress.weights.model import QuantizedWeights, quantize_weights, quantized_model, size_bytes
    from pqk.compress.weights.qat import Training
    from pqk.compress.weights.quantizers import AsymmetricQuantizer, GroupWiseQuantizer, SymmetricQuantizer
    from pqk.compress.weights.schemes import SCHEMES, Scheme, scheme_named

_WHERE = {
    "activations": ("Activations",),
    "api": ("AdvancedQuantConfig", "QuantizationConfig", "quantize_model_advanced", "quantize_model_weights"),
    "files": ("load_weights", "save_weights"),
    "methods.inputs": ("capture",),
    "methods.method": ("Method",),
    "model": ("QuantizedWeights", "quantize_weights", "quantized_model", "size_bytes"),
    "qat": ("Training",),
    "quantizers": ("AsymmetricQuantizer", "GroupWiseQuantizer", "SymmetricQuantizer"),
    "schemes": ("SCHEMES", "Scheme", "scheme_named"),
}
"""Names by their module, as text: the key of an artifact holds the code that its stage imports, and none does these."""

__all__ = [
    "SCHEMES",
    "Activations",
    "AdvancedQuantConfig",
    "AsymmetricQuantizer",
    "GroupWiseQuantizer",
    "Method",
    "QuantizationConfig",
    "QuantizedWeights",
    "Scheme",
    "SymmetricQuantizer",
    "Training",
    "capture",
    "load_weights",
    "quantize_model_advanced",
    "quantize_model_weights",
    "quantize_weights",
    "quantized_model",
    "save_weights",
    "scheme_named",
    "size_bytes",
]


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name in names:
            return getattr(import_module(f"pqk.compress.weights.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
