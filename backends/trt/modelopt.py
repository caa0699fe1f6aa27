"""Quantizes graphs with ModelOpt: a float ONNX graph and calibration feeds -> an ONNX graph with Q/DQ nodes.

ModelOpt places the Q/DQ nodes and quantizes the weights, from the graph and one item; the ranges of activations
are measured here over the whole set (`backends.trt.ranges`). Its file is finished here too: kept nodes read the float
tensors again (a tensor that feeds a quantized and a kept node reaches both through Q/DQ otherwise), so do additions and
all that is neither matmul nor convolution, and int8 weights are stored as int8.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.base import BackendError, Feeds, Graph, QuantSpec, Source, first_line
from backends.calibration import CalibrationItems
from backends.cpu import saturates
from backends.onnx_graph import CONVOLUTIONS, MATMULS, MOVES, OnnxGraph, kept_nodes, name_nodes
from backends.qdq import tidy, write_graph
from backends.quantspec import check_common, check_left, check_settings, nothing_left
from backends.quiet import quiet
from backends.trt.ranges import largest_magnitudes, quantized_tensors, set_ranges

if TYPE_CHECKING:
    import onnx

FORMATS = ("int8", "fp8", "int4")
_BITS = {"int8": (8, 8), "fp8": (8, 8), "int4": (4, 16)}
_HALF = 64  # the largest weight of 7 bits
_LARGEST_FP8 = 448  # of E4M3
_OPSET = {"int8": 19, "fp8": 19, "int4": 21}
INT4_BLOCK = 32
"""int4 weights of a column that share a scale."""
NO_CORRECTION = "ModelOpt corrects no biases"


@dataclass
class Report:
    """What the last `quantize` did: calibration items, kept nodes, quantized nodes, weights held to half range."""

    items: int = 0
    kept: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()
    half_range: bool = False
    notes: tuple[str, ...] = ()


class ModelOptQuantizer:
    """ModelOpt's ONNX mode. `number_format`: int8, fp8 (E4M3) or int4 (weights only); `report` describes its last call.

    QuantSpec.bits_w = 4 with bits_a = 16 asks the int8 quantizer for int4 weights.
    """

    starts_from = "graph"
    follows: Mapping[str, tuple[Any, ...]] = {
        "weights": ("per_channel",),
        "activations": ("per_tensor",),
        "symmetric_activations": (True,),
        "smooth_quant_alpha": (None,),
    }
    sources: tuple[str, ...] = ("backends.trt.modelopt",)  # and what it imports

    def __init__(self, number_format: str = "int8") -> None:
        if number_format not in FORMATS:
            raise BackendError(f"ModelOpt quantizes to {list(FORMATS)}, not {number_format!r}")
        self.number_format = number_format
        self.bits = ((8, 8), (4, 16)) if number_format == "int8" else (_BITS[number_format],)
        self.name = "modelopt" if number_format == "int8" else f"modelopt-{number_format}"
        self.report = Report()

    def notes(self) -> list[str]:
        """Returns notes on the last `quantize` for its results."""
        return list(self.report.notes)

    def quantize(self, source: Source, spec: QuantSpec, calibration: Iterable[Feeds]) -> Graph:
        """Writes `<spec.output_dir>/<source.name>.onnx` (and `.onnx.data` for large graphs) and returns that graph.

        `calibration` must be iterable again; items are made, used and dropped one by one, and only the first
        `spec.calibration_samples` are used. The same input gives the same bytes. Raises BackendError for a spec that
        ModelOpt cannot follow, a keep pattern without a match, a graph that is quantized already, an empty or too small
        calibration set, and an item that does not fit the graph; nothing is written then.
        """
        number_format = self._check(source, spec)
        original = OnnxGraph(source.graph.path)
        if original.has_qdq():
            raise BackendError(f"{source.graph.path.name} is quantized already")
        kept = kept_nodes(original, spec.keep)
        lowered = MATMULS if number_format in ("fp8", "int4") else MATMULS | CONVOLUTIONS
        check_left(source.name, (n.name for n in original.work() if n.op_type in lowered), kept, spec.keep)
        read = list(dict.fromkeys(name for n in original.work() if n.op_type in lowered for name in n.input))
        read = [name for name in read if name in original.live]
        # ModelOpt's fp8 convolutions are wrong by most of their output (two of them: mean error 0.79 against 0.03).
        convolutions = [n.name for n in original.work() if n.op_type in CONVOLUTIONS] if number_format == "fp8" else []
        floats = {*kept, *convolutions}
        # ModelOpt rounds both sides of residual additions too: that saves memory traffic and no arithmetic, and what
        # every block rounds off the residual stream adds up.
        light = {n.name for n in original.work() if n.op_type not in MATMULS | CONVOLUTIONS | MOVES}
        del original
        items = CalibrationItems(calibration, source.graph.inputs, spec.calibration_samples)
        # A GPU sums int8 in 32 bits and the emulation computes in floats: only a CPU's own int8 kernels may need it.
        half = number_format == "int8" and spec.weight_range == "half"
        spec.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{source.name}.", dir=spec.output_dir) as folder:
            one = CalibrationItems(calibration, source.graph.inputs, 1)
            try:
                made = _modelopt(source.graph, number_format, one, sorted(floats), Path(folder))
            except BackendError:
                given = Path(folder) / "given.onnx"  # not there when the item is refused before ModelOpt sees it
                if number_format != "int4" and given.exists():  # is it the item that ModelOpt cannot take?
                    largest_magnitudes(given, source.graph.inputs, read, one)
                raise
            import onnx

            model = onnx.load(str(made))
            free_kept(model, floats | light)
            if number_format != "int4":
                store_weights(model, half)
            tidy(model)  # before the float graph is loaded beside it: a large model's float weights are gone then
            if number_format != "int4":  # rounding weights needs no data
                tensors = quantized_tensors(model)
                if not tensors:
                    raise nothing_left(source.name, spec.keep)
                ranges = largest_magnitudes(Path(folder) / "given.onnx", source.graph.inputs, tensors, items)
                set_ranges(model, ranges)
                tidy(model)
            graph = write_graph(model, source.name, Path(folder), spec.output_dir)
            del model
        found = OnnxGraph(graph.path)
        if number_format == "int4":
            touched = {n.name for n in found.work() if "int4" in found.stored_as(n)}
        else:
            touched = {n.name for n in found.work() if found.precision(n) in ("int8", "fp8")}
        wrong = sorted(touched & floats)
        if wrong:
            raise BackendError(f"ModelOpt quantized kept nodes: {wrong[:3]}")
        notes = range_notes(half) if number_format == "int8" else []
        if number_format == "int4":
            notes.append(
                f"int4 weights of matmuls in blocks of {INT4_BLOCK}; convolutions and all arithmetic stay in float"
            )
        if convolutions:
            notes.append("convolutions stay in float: ModelOpt's fp8 ones are inaccurate")
        if spec.bias_correction != "none":
            notes.append(NO_CORRECTION)
        heavy = tuple(n.name for n in found.work() if n.op_type in MATMULS | CONVOLUTIONS and n.name in touched)
        self.report = Report(items.used, tuple(sorted(kept)), heavy, half, tuple(notes))
        return graph

    def _check(self, source: Source, spec: QuantSpec) -> str:
        check_settings(self, spec)
        check_common(spec, source)
        return "int4" if spec.bits_w == 4 else self.number_format


def _modelopt(graph: Graph, number_format: str, items: CalibrationItems, kept: list[str], folder: Path) -> Path:
    """Runs ModelOpt on a copy with named nodes; returns the file that it wrote into `folder`."""
    import onnx

    next(iter(items))  # refuses an empty set, which ModelOpt would take
    external = graph.path.with_name(graph.path.name + ".data").exists()
    given, made = folder / "given.onnx", folder / "made.onnx"
    model = onnx.load(str(graph.path), load_external_data=False)
    name_nodes(model.graph.node)
    for file in graph.files()[1:]:  # onnx refuses hard links to it, and ONNX Runtime symbolic ones
        shutil.copyfile(file, folder / file.name)
    onnx.save(model, str(given))
    del model
    names = [f"^{re.escape(name)}$" for name in kept]  # ModelOpt reads them as regular expressions
    with quiet():
        from modelopt.onnx.quantization import quantize

        try:
            quantize(
                str(given),
                quantize_mode=number_format,
                calibration_data_reader=_reader(items),
                calibration_method="max" if number_format != "int4" else "rtn_dq",
                calibration_eps=["cpu"],
                high_precision_dtype="fp32",
                nodes_to_exclude=names,
                use_external_data_format=external,
                output_path=str(made),
                opset=_OPSET[number_format],
                log_level="CRITICAL",
                **({"block_size": INT4_BLOCK} if number_format == "int4" else {}),
            )
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"ModelOpt cannot quantize {graph.path.name}: {first_line(error)}") from error
    return made


def range_notes(half: bool) -> list[str]:
    """Returns the notes on the range of int8 weights."""
    if half:
        return ["weights use 7 of their 8 bits"]
    if saturates():
        return ["weights use all 8 bits: right for a GPU and emulated exactly; this CPU's int8 kernels saturate"]
    return []


def free_kept(model: onnx.ModelProto, kept: set[str]) -> None:
    """Lets every kept node read the float tensors again, and drops Q/DQ pairs that nobody reads any more."""
    nodes = model.graph.node
    maker = {name: node for node in nodes for name in node.output}
    for node in nodes:
        if node.name not in kept:
            continue
        for index, name in enumerate(node.input):
            dequantize = maker.get(name)
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            quantize = maker.get(dequantize.input[0])
            if quantize is not None and quantize.op_type == "QuantizeLinear":
                node.input[index] = quantize.input[0]
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        read = {name for node in nodes for name in node.input} | {value.name for value in model.graph.output}
        for node in [n for n in nodes if n.op_type == kind and n.output[0] not in read]:
            nodes.remove(node)


def store_weights(model: onnx.ModelProto, half: bool) -> None:
    """Replaces each QuantizeLinear of a constant weight by its int8 or fp8 values: the same numbers in a quarter.

    `half`: weights of 7 bits: scales grow by 127/64 and values stay within 64, so sums of two products fit 16 bits.
    """
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:  # exporters give a weight that several layers share a second name
        if node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    scaled: set[str] = set()
    for node in [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in constants]:
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        if node.input[1] not in constants or zero is None:
            continue
        kind = numpy_helper.to_array(zero).dtype
        if kind.name not in ("int8", "float8_e4m3fn"):
            continue
        weight = numpy_helper.to_array(constants[node.input[0]])
        stored = constants[node.input[1]]
        scale = numpy_helper.to_array(stored)
        if half and stored.name not in scaled:
            scaled.add(stored.name)
            scale = (scale * np.float32(127 / _HALF)).astype(scale.dtype)
            stored.CopyFrom(numpy_helper.from_array(scale, stored.name))
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [1] * weight.ndim
        if scale.ndim:
            shape[axis] = -1
        values = weight / scale.reshape(shape)
        if kind == np.int8:
            limit = _HALF if half else 127
            values = np.clip(np.rint(values), -limit, limit).astype(np.int8)
        else:
            values = np.clip(values, -_LARGEST_FP8, _LARGEST_FP8).astype(kind)
        graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        graph.node.remove(node)


def _reader(items: CalibrationItems) -> Any:
    """Returns the set as ONNX Runtime's CalibrationDataReader, with the two calls that ModelOpt adds to it."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> Feeds | None:
            return next(self._left, None)

        def get_first(self) -> Feeds:
            return next(iter(items))

        def rewind(self) -> None:
            self._left = iter(items)

        def __iter__(self) -> Iterator[Feeds]:
            return iter(items)

    return Reader()
