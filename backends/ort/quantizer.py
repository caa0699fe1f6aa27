"""Quantizes graphs with ONNX Runtime's static quantizer: a float ONNX graph and calibration feeds -> Q/DQ nodes in it.

The tool places the Q/DQ nodes and rounds weights and biases. Which tensors get a pair, and with which ranges:

- Operands of matmuls and convolutions are rounded for these alone: every other reader of the tensor keeps the floats.
- The outputs of matmuls stay in float, which their int8 kernels write. Those of convolutions are rounded, as the only
  int8 kernel of a convolution writes int8. So a convolution that reads an input of the graph, or after which no other
  product comes, stays in float: its int8 result would be the residual stream of all blocks, or the prediction.
- Transposed convolutions, and products whose first operand is constant, stay in float: there are no int8 kernels.
- The product of attention's probabilities with the values stays in float: they are smaller than a step of int8.
- A range is from the least to the largest value over all items. Of the tool's own ways, entropy finds the same on the
  toy of the tests; percentiles are no better there (`tests/backends/test_ort.py`) and worse on the shipped model. The
  tool keeps the activations of all items for both; here one pass reduces each tensor to three numbers in the graph.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.base import BackendError, Feeds, Graph, QuantSpec, Source, first_line
from backends.calibration import CalibrationItems
from backends.cpu import half_range, weight_range_notes
from backends.onnx_graph import OnnxGraph, kept_nodes
from backends.ort.graph import (
    LOWERED,
    border_convolutions,
    copied_operands,
    drop_copies,
    loaded,
    lowered_nodes,
    round_biases,
)
from backends.qdq import tidy, write_graph
from backends.quantspec import check_common, check_left, check_settings, lost_channels
from backends.quiet import quiet
from backends.ranges import tensor_ranges

if TYPE_CHECKING:
    import onnx

BORDER = "the first and the last convolution of a graph stay in float: ONNX Runtime's int8 ones write int8"


@dataclass
class Report:
    """What the last `quantize` did: calibration items, kept nodes, quantized nodes, weights held to half range."""

    items: int = 0
    kept: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()
    half_range: bool = False
    notes: tuple[str, ...] = ()


class ORTQuantizer:
    """ONNX Runtime's static int8 quantization. `report` describes its last call."""

    name = "ort"
    starts_from = "graph"
    follows: Mapping[str, tuple[Any, ...]] = {
        "weights": ("per_channel", "per_tensor"),
        "activations": ("per_tensor",),
        "smooth_quant_alpha": (None,),
        "bias_correction": ("none",),
    }
    sources: tuple[str, ...] = ("backends.ort.quantizer",)  # and what it imports

    def __init__(self) -> None:
        self.report = Report()

    def notes(self) -> list[str]:
        """Returns notes on the last `quantize` for its results."""
        return [*weight_range_notes(self.report.half_range), *self.report.notes]

    def quantize(self, source: Source, spec: QuantSpec, calibration: Iterable[Feeds]) -> Graph:
        """Writes `<spec.output_dir>/<source.name>.onnx` (and `.onnx.data` for large graphs) and returns that graph.

        `calibration` must be iterable again; items are made, used and dropped one by one, and only the first
        `spec.calibration_samples` are used. The same input gives the same bytes. Raises BackendError for a spec that
        the tool cannot follow, a keep pattern without a match, a graph that is quantized already or of which nothing is
        left, an empty or too small calibration set, and an item that does not fit the graph or gives NaN or inf inside;
        nothing is written then.
        """
        check_settings(self, spec)
        check_common(spec, source)
        original = OnnxGraph(source.graph.path)
        if original.has_qdq():
            raise BackendError(f"{source.graph.path.name} is quantized already")
        kept = kept_nodes(original, spec.keep)
        items = CalibrationItems(calibration, source.graph.inputs, spec.calibration_samples)
        half = half_range(spec.weight_range)
        model = loaded(source.graph)
        first_and_last = border_convolutions(model)
        able = [name for name in lowered_nodes(model, original) if name not in first_and_last]
        check_left(source.name, able, kept, spec.keep)
        chosen = [name for name in able if name not in kept]
        copies = copied_operands(model, chosen, original)
        outputs = [n.output[0] for n in model.graph.node if n.op_type == "Conv" and n.name in chosen]
        before = _magnitudes(model, chosen)
        spec.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{source.name}.", dir=spec.output_dir) as folder:
            measured = sorted({*copies.values(), *outputs})
            ranges = tensor_ranges(_linked(source.graph, Path(folder)), source.graph.inputs, measured, items)
            known = {**{copy: ranges[tensor] for copy, tensor in copies.items()}, **{t: ranges[t] for t in outputs}}
            model = _quantized(model, source.name, known, chosen, spec, half)
            drop_copies(model, copies)
            round_biases(model)
            tidy(model)
            notes = [*([BORDER] if first_and_last else []), *_lost(model, before)]
            graph = write_graph(model, source.name, Path(folder), spec.output_dir)
        self.report = Report(items.used, tuple(sorted(kept)), tuple(chosen), half, tuple(notes))
        return graph


def _linked(graph: Graph, folder: Path) -> Path:
    """Returns the graph's file in `folder`, its data files beside it: the ranges are measured on a file there.

    ONNX Runtime refuses data behind a symbolic link that leads out of the folder.
    """
    for file in graph.files():
        try:
            (folder / file.name).hardlink_to(file.resolve())
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(file, folder / file.name)
    return folder / graph.path.name


def _quantized(
    model: onnx.ModelProto,
    name: str,
    ranges: Mapping[str, tuple[float, float]],
    chosen: Sequence[str],
    spec: QuantSpec,
    half: bool,
) -> onnx.ModelProto:
    with quiet():
        from onnxruntime.quantization import CalibrationMethod, QuantType
        from onnxruntime.quantization.calibrate import TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        limits = {tensor: (np.float32(least), np.float32(most)) for tensor, (least, most) in ranges.items()}
        try:
            tool = QDQQuantizer(
                model,
                per_channel=spec.weights == "per_channel",
                reduce_range=half,  # of weights
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QInt8,
                tensors_range=TensorsData(CalibrationMethod.MinMax, limits),
                nodes_to_quantize=list(chosen),
                nodes_to_exclude=[],
                op_types_to_quantize=sorted(LOWERED),
                extra_options={
                    "ActivationSymmetric": spec.symmetric_activations,
                    "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                },
            )
            made: onnx.ModelProto = tool.quantize_model()
            tool.model.topological_sort()  # new nodes stand at the end
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot quantize {name}: {first_line(error)}") from error
    return made


def _magnitudes(model: onnx.ModelProto, chosen: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns the largest weight of each output channel, for the nodes `chosen` with constant weights.

    Of a quantized model, whose weights stand behind a DequantizeLinear, those of the stored integers.
    """
    from onnx import numpy_helper

    names = set(chosen)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    stored = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    found = {}
    for node in model.graph.node:
        weight = stored.get(node.input[1], node.input[1]) if node.name in names else ""
        if weight in constants:
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            values = np.abs(numpy_helper.to_array(constants[weight]).astype(np.float32))
            axis = 0 if node.op_type == "Conv" or turned else values.ndim - 1
            found[node.name] = values.max(axis=tuple(k for k in range(values.ndim) if k != axis))
    return found


def _lost(model: onnx.ModelProto, before: Mapping[str, np.ndarray]) -> list[str]:
    after = _magnitudes(model, before)
    return lost_channels("ONNX Runtime", ((name, before[name], after[name]) for name in after))
