"""Translates a `QuantSpec` into NNCF's settings, and checks it against what the quantizers of OpenVINO support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backends.base import BackendError, QuantSpec, Source, nearest
from backends.cpu import half_range
from backends.quantspec import check_common

BIAS_CORRECTIONS = ("none", "fast", "full")


@dataclass
class Report:
    """Describes the last `quantize`: passes over the calibration set, items of a pass, kept nodes, whether the weights
    were held to half their range, and notes for the results."""

    passes: int = 0
    items: int = 0
    kept: tuple[str, ...] = ()
    half_range: bool = False
    notes: tuple[str, ...] = ()


def check_spec(spec: QuantSpec, source: Source, tool: str) -> None:
    """Raises BackendError for settings that no quantizer of OpenVINO supports; `tool` is its name in the message."""
    if (spec.bits_w, spec.bits_a) != (8, 8):
        raise BackendError(f"{tool} quantizes to 8-bit weights and activations here, not W{spec.bits_w}A{spec.bits_a}")
    if spec.weights not in ("per_channel", "per_tensor"):
        raise BackendError(f"weights must be 'per_channel' or 'per_tensor', got {spec.weights!r}")
    if spec.activations != "per_tensor":
        raise BackendError(f"activations must be 'per_tensor' for OpenVINO, got {spec.activations!r}")
    check_common(spec, source)


def check_correction(spec: QuantSpec) -> None:
    """Raises BackendError for an unknown bias correction."""
    if spec.bias_correction not in BIAS_CORRECTIONS:
        hint = nearest(spec.bias_correction, BIAS_CORRECTIONS)
        raise BackendError(
            f"bias_correction must be one of {list(BIAS_CORRECTIONS)}, got {spec.bias_correction!r}{hint}"
        )


def preset(spec: QuantSpec) -> Any:
    """Returns NNCF's preset for symmetric activations (PERFORMANCE) or asymmetric ones (MIXED)."""
    import nncf

    presets = nncf.QuantizationPreset
    return presets.PERFORMANCE if spec.symmetric_activations else presets.MIXED


def advanced_parameters(spec: QuantSpec) -> Any:
    """Returns NNCF's settings beyond the plain arguments of `nncf.quantize`."""
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        AdvancedSmoothQuantParameters,
        OverflowFix,
        QuantizationParameters,
    )

    # A negative alpha turns SmoothQuant off.
    alpha = -1.0 if spec.smooth_quant_alpha is None else spec.smooth_quant_alpha
    return AdvancedQuantizationParameters(
        overflow_fix=OverflowFix.ENABLE if half_range(spec.weight_range) else OverflowFix.DISABLE,
        disable_bias_correction=spec.bias_correction == "none",
        smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=alpha, convolution=-1.0),
        weights_quantization_params=QuantizationParameters(per_channel=spec.weights == "per_channel"),
        activations_quantization_params=QuantizationParameters(per_channel=False),
    )
