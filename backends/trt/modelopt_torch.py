"""Quantizes torch modules with ModelOpt's torch mode: module and calibration feeds -> ONNX graph with Q/DQ nodes.

ModelOpt measures ranges while the module runs in torch at f32 (largest magnitude over the set), smooths linear layers
when an alpha is given, and exports the rounding of each layer as Q/DQ pairs. The steps are in
`backends.trt.modelopt_export`, which quantization-aware training (`backends.trt.qat`) uses too.

Linear layers and convolutions are quantized. Attention (scores, Softmax, weighted sum) stays in float: in torch it is
one function, which has no layer that ModelOpt could quantize.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import Feeds, Graph, QuantSpec, Source
from backends.calibration import CalibrationItems
from backends.quantspec import lost_channels
from backends.trt.modelopt import NO_CORRECTION, Report
from backends.trt.modelopt_export import (
    REMEDY,
    calibrated,
    check,
    common_notes,
    complete,
    export_rounding,
    kept_in,
    weight_steps,
)

if TYPE_CHECKING:
    import torch


class ModelOptTorchQuantizer:
    """ModelOpt's torch mode, int8, with SmoothQuant and weights per tensor. `report` describes its last call."""

    name = "modelopt-torch"
    starts_from = "module"
    sources: tuple[str, ...] = ("backends.trt.modelopt_torch",)  # and what it imports
    needs = ("modelopt", "requests", "huggingface_hub")  # modelopt.torch imports the last two, and declares neither
    remedy = REMEDY
    follows: Mapping[str, tuple[Any, ...]] = {
        "weights": ("per_channel", "per_tensor"),
        "activations": ("per_tensor",),
        "symmetric_activations": (True,),
    }

    def __init__(self) -> None:
        self.report = Report()

    def notes(self) -> list[str]:
        """Returns notes on the last `quantize` for its results."""
        return list(self.report.notes)

    def quantize(self, source: Source, spec: QuantSpec, calibration: Iterable[Feeds]) -> Graph:
        """Writes `<spec.output_dir>/<source.name>.onnx` (and `.onnx.data` for large graphs) and returns that graph.

        A copy of `source.module` is quantized; the module is left as it was. Its nodes have the names of
        `source.graph`, on which the keep-list is looked up. `calibration` is iterated once, items are used and dropped
        one by one, and only the first `spec.calibration_samples` of them. The same input gives the same bytes.
        Raises Unavailable when ModelOpt or what it imports is missing, and BackendError for a spec that it cannot
        follow, a keep pattern that has no match or cannot be found in a traced module, and a calibration set that is
        empty, too small or does not fit the inputs; nothing is written then.
        """
        module = check(self, source, spec)
        kept = kept_in(source, spec.keep)
        items = CalibrationItems(calibration, source.graph.inputs, spec.calibration_samples)
        half = spec.weight_range == "half"  # as in ONNX mode: neither a GPU nor the emulation needs it
        spec.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{source.name}.", dir=spec.output_dir) as folder:
            made = Path(folder) / "made.onnx"
            # Smoothing changes weights in place; else the copy may share them, which saves a large model's memory.
            smooth = spec.smooth_quant_alpha is not None
            shared: dict[int, Any] = {} if smooth else {id(p): p for p in module.parameters()}
            prepared = calibrated(copy.deepcopy(module, shared).eval(), source, spec, items)
            export_rounding(prepared, source, made)
            notes = [*common_notes(spec, half, module), *lost_channels("ModelOpt", weight_steps(prepared))]
            del prepared
            graph, heavy = complete(made, source, spec, kept, half)
        if spec.bias_correction != "none":
            notes.append(NO_CORRECTION)
        self.report = Report(items.used, tuple(sorted(kept)), heavy, half, tuple(notes))
        return graph

    def prepare(self, source: Source, spec: QuantSpec, calibration: Iterable[Feeds]) -> torch.nn.Module:
        """Returns a trainable copy of `source.module` that rounds as the int8 engine will: see `qat.prepare`."""
        from backends.trt import qat

        module, self.report = qat.prepare(self, source, spec, calibration)
        return module

    def finish(self, module: torch.nn.Module, source: Source, spec: QuantSpec) -> Graph:
        """Returns the ONNX graph with Q/DQ nodes of a module that was prepared and trained: see `qat.finish`."""
        from backends.trt import qat

        return qat.finish(self, module, source, spec)
