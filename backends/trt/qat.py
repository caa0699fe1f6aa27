"""Trains quantized modules with ModelOpt: a torch module that rounds as its int8 engine will, and its Q/DQ graph.

ModelOpt's own training: its quantizers round in the forward pass and let gradients pass straight through inside the
range; weights, biases and norms learn, while the ranges of activations and weights stay those of calibration. (What it
can learn of ranges, method `lsq`, takes the scales of NVFP4 blocks alone; `learn_amax` was taken out.)
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backends.base import BackendError, Feeds, Graph, Quantizer, QuantSpec, Source
from backends.calibration import CalibrationItems
from backends.onnx_graph import CONVOLUTIONS, MATMULS, OnnxGraph
from backends.quantspec import lost_channels, nothing_left
from backends.trt.modelopt import Report
from backends.trt.modelopt_export import (
    calibrated,
    check,
    common_notes,
    complete,
    export_rounding,
    heavy_layers,
    kept_in,
    weight_steps,
)

_HALF_BITS, _HALF, _FULL = 7, 63, 127
LEARNED = "weights and biases were trained, ranges are those of calibration"


def prepare(
    quantizer: Quantizer, source: Source, spec: QuantSpec, calibration: Iterable[Feeds]
) -> tuple[nn.Module, Report]:
    """Returns a trainable copy of `source.module` that rounds as its engine will, its ranges calibrated, and a report.

    The module takes and returns what `source.module` does, at any batch and size that this runs at; all its parameters
    are trainable. Its ranges are buffers, part of the state_dict. A layer that is called more than once stays in float
    altogether when one of its calls is kept. Biases are trained, so `bias_correction` does not apply. The same input
    gives the same module. `calibration` and what is raised: as for `ModelOptTorchQuantizer.quantize`.
    """
    module = check(quantizer, source, spec)
    kept = kept_in(source, spec.keep)
    floats = _kept_layers(module, source, kept)
    items = CalibrationItems(calibration, source.graph.inputs, spec.calibration_samples)
    half = spec.weight_range == "half"
    prepared = calibrated(copy.deepcopy(module).eval(), source, spec, items, floats)
    if not _rounded(prepared):
        raise nothing_left(source.name, spec.keep)
    for layer in _rounded(prepared):
        layer.weight_quantizer.narrow_range = True  # -127..127: a weight that grows past its range ends there
        if half:
            layer.weight_quantizer.num_bits = _HALF_BITS
    notes = [*common_notes(spec, half, module), LEARNED, *lost_channels("ModelOpt", weight_steps(prepared))]
    return prepared.requires_grad_(True), Report(items.used, tuple(sorted(kept)), (), half, tuple(notes))


def finish(quantizer: Quantizer, module: nn.Module, source: Source, spec: QuantSpec) -> Graph:
    """Writes the trained `module` as `<spec.output_dir>/<source.name>.onnx` with Q/DQ nodes; returns that graph.

    `module` comes from `prepare` with the same source and spec; it is left as it is. The graph holds its rounded
    weights and its ranges, so it computes what the module does, up to values that fall on the other side of a rounding
    limit because sums are added in another order. Raises BackendError when the keep-list is not honoured, and for what
    cannot be exported.
    """
    check(quantizer, source, spec)
    kept = kept_in(source, spec.keep)
    fixed = copy.deepcopy(module).cpu().eval()
    with torch.no_grad():
        for layer in _rounded(fixed):
            rounding = layer.weight_quantizer
            layer.weight.copy_(rounding(layer.weight))
            if rounding.num_bits == _HALF_BITS:  # the same steps, of 8 bits: ONNX has no integers of 7
                rounding.num_bits = 8
                rounding.amax = rounding.amax * (_FULL / _HALF)
            rounding.narrow_range = False  # as the export wants it; no weight is below -127 steps any more
    spec.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{source.name}.", dir=spec.output_dir) as folder:
        made = Path(folder) / "made.onnx"
        export_rounding(fixed, source, made)
        del fixed
        return complete(made, source, spec, kept, half=False)[0]  # 7 bits are trained already


def _rounded(module: nn.Module) -> list[Any]:
    """Returns the layers whose weights and inputs ModelOpt rounds."""
    found: list[Any] = [part for _, part in heavy_layers(module) if hasattr(part, "weight_quantizer")]
    return [part for part in found if part.weight_quantizer.is_enabled]


def _kept_layers(module: nn.Module, source: Source, kept: Iterable[str]) -> set[str]:
    """Returns the names of the layers of which a call is kept. Calls and the graph's nodes with weights have one order.

    Raises BackendError where the module does other work than the graph.
    """
    graph, wanted = OnnxGraph(source.graph.path), set(kept)
    heavy = [node for node in graph.work() if node.op_type in MATMULS | CONVOLUTIONS]
    nodes = [node for node in heavy if node.input[1] not in graph.live]
    if wanted.isdisjoint(node.name for node in nodes):
        return set()
    calls = _calls(module, source)
    if [kind for _, kind in calls] != ["MatMul" if node.op_type in MATMULS else node.op_type for node in nodes]:
        raise BackendError(
            f"{source.name}: the module calls {len(calls)} layers with weights, its graph has {len(nodes)} nodes of "
            "that kind or another order, so what is kept cannot be found in it: keep groups alone"
        )
    return {name for (name, _), node in zip(calls, nodes, strict=True) if node.name in wanted}


def _calls(module: nn.Module, source: Source) -> Sequence[tuple[str, str]]:
    """Returns each call of a linear layer or convolution, in order: the layer's name, and the type of its ONNX node."""
    calls: list[tuple[str, str]] = []
    copied = copy.deepcopy(module, {id(p): p for p in module.parameters()})  # for the hooks
    for name, layer in heavy_layers(copied):
        kind = "MatMul" if isinstance(layer, nn.Linear) else "ConvTranspose" if layer.transposed else "Conv"
        layer.register_forward_pre_hook(lambda *_, call=(name, kind): calls.append(call))
    with torch.no_grad():
        copied.eval()(*(torch.as_tensor(value) for value in source.example.values()))
    return calls
