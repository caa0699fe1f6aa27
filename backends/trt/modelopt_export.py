"""Runs ModelOpt's torch mode and finishes its export as a Q/DQ graph: the steps that PTQ and QAT share.

ModelOpt gets a list of the layers to quantize: its ready-made configurations leave out whatever is named like
`proj_out` or `output`, and round the inputs of normalisations. The exported file is finished as that of the ONNX mode
is (`backends.trt.modelopt`): weights are stored as int8, as MatMul reads them, and kept nodes read the float tensors
again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.base import BackendError, Graph, Quantizer, QuantSpec, Source, Unavailable, first_line
from backends.calibration import CalibrationItems, finite_layers
from backends.exchange import export
from backends.keep import GROUPS
from backends.onnx_graph import CONVOLUTIONS, MATMULS, OnnxGraph, kept_nodes
from backends.qdq import tidy, write_graph
from backends.quantspec import check_common, check_installed, check_left, check_settings, module_of, nothing_left
from backends.quiet import quiet
from backends.trt.modelopt import free_kept, range_notes, store_weights

if TYPE_CHECKING:
    import onnx
    import torch

REMEDY = 'pip install -e ".[trt]"'


def check(quantizer: Quantizer, source: Source, spec: QuantSpec) -> torch.nn.Module:
    """Returns the source's module. Raises Unavailable without ModelOpt, and BackendError for a spec that it cannot
    follow and a source that lacks a module or does not fit its graph."""
    check_installed(quantizer)
    check_settings(quantizer, spec)
    check_common(spec, source)
    return module_of(source, "ModelOpt's torch mode")


def kept_in(source: Source, keep: Sequence[str]) -> dict[str, str]:
    """Returns names and types of the kept nodes of the source's graph. Raises BackendError where the graph that will be
    made has no node of such a name, and where all that could be quantized is kept."""
    graph = OnnxGraph(source.graph.path)
    if graph.has_qdq():
        raise BackendError(f"{source.graph.path.name} is quantized already")
    for entry in keep:
        # The tracing exporter, which this quantizer must use, names a node by its module: /blocks.0/fc1/MatMul.
        strange = [name for name in kept_nodes(graph, [entry]) if not name.startswith("/")]
        if entry not in GROUPS and strange:
            raise BackendError(
                f"keep entry {entry!r} names {strange[0]!r}, which no module's name can express, as ModelOpt's torch "
                f"mode needs it: keep groups ({', '.join(GROUPS)}) alone, or take the quantizer modelopt"
            )
    kept = kept_nodes(graph, keep)
    heavy = [node for node in graph.work() if node.op_type in MATMULS | CONVOLUTIONS]
    check_left(source.name, (node.name for node in heavy if node.input[1] not in graph.live), kept, keep)
    # What a group protects is never quantized here, so it need not be found again by its name.
    return {name: kind for name, kind in kept.items() if name.startswith("/")}


def calibrated(
    module: torch.nn.Module, source: Source, spec: QuantSpec, items: CalibrationItems, floats: Iterable[str] = ()
) -> torch.nn.Module:
    """Returns `module` itself, a copy of the source's, with linear layers and convolutions that round, but for the
    layers `floats`; ranges are those of the whole set."""
    import torch

    try:
        with quiet():
            import modelopt.torch.quantization as mtq
    except ImportError as error:
        raise Unavailable(f"quantizer 'modelopt-torch' cannot run: {error}; {REMEDY}") from error
    names = list(source.example)
    unsmoothed = dead_columns(module, spec)

    def run_set(model: torch.nn.Module) -> None:
        for name in unsmoothed:  # one range for all channels: ModelOpt passes over such a layer when it smooths
            layer: Any = model.get_submodule(name)
            layer.input_quantizer.axis = None
        with finite_layers(heavy_layers(model), items):
            for feeds in items:
                model(*(torch.from_numpy(feeds[name]) for name in names))

    smooth = {"method": "smoothquant", "alpha": spec.smooth_quant_alpha}
    algorithm = smooth if spec.smooth_quant_alpha is not None else "max"
    asked = {"quant_cfg": layers(module, spec.weights, floats), "algorithm": algorithm}
    try:
        with quiet(), torch.no_grad():
            return mtq.quantize(module, asked, run_set)
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"ModelOpt cannot quantize {type(source.module).__name__}: {first_line(error)}") from error


def export_rounding(prepared: torch.nn.Module, source: Source, made: Path) -> None:
    """Writes a module with ModelOpt's quantizers as the ONNX file `made`, a Q/DQ pair for each of them."""
    import torch

    example = {name: torch.as_tensor(value) for name, value in source.example.items()}
    with quiet():
        # How far rounding takes the outputs is no error of the export: any difference from torch is allowed.
        export(prepared, example, source.output_names, made, exporter="torchscript", tolerance=math.inf)


def complete(
    made: Path, source: Source, spec: QuantSpec, kept: Mapping[str, str], half: bool
) -> tuple[Graph, tuple[str, ...]]:
    """Finishes the file of `export_rounding` as the graph of `source` in `spec.output_dir`; returns it with the names
    of its int8 matmuls and convolutions. `half`: weights are held to 7 bits. Raises BackendError unless `kept` stayed
    in float."""
    import onnx

    model = onnx.load(str(made))
    lift_scales(model)
    free_kept(model, {*kept, *feeding_transposes(model, kept)})
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise nothing_left(source.name, spec.keep)
    store_weights(model, half)
    turn_weights(model)
    tidy(model)
    graph = write_graph(model, source.name, made.parent, spec.output_dir)
    del model
    found = OnnxGraph(graph.path)
    touched = {n.name for n in found.work() if found.precision(n) == "int8"}
    wrong = sorted(touched & kept.keys()) or sorted(kept.keys() - {n.name for n in found.work()})
    if wrong:
        raise BackendError(f"ModelOpt quantized or renamed kept nodes: {wrong[:3]}")
    return graph, tuple(n.name for n in found.work() if n.op_type in MATMULS | CONVOLUTIONS and n.name in touched)


def common_notes(spec: QuantSpec, half: bool, module: torch.nn.Module) -> list[str]:
    """Returns the notes on a graph of the float `module`, trained or not."""
    notes = ["attention stays in float", *range_notes(half)]
    if spec.smooth_quant_alpha is not None:
        notes.insert(0, f"linear layers are smoothed with alpha {spec.smooth_quant_alpha:g}")
        dead = dead_columns(module, spec)
        if dead:
            listed = [f"{name} (column {', '.join(map(str, columns[:8]))})" for name, columns in list(dead.items())[:8]]
            more = f" and {len(dead) - 8} more" if len(dead) > 8 else ""
            notes.insert(
                1, f"not smoothed, as columns of their weights are zero or nearly so: {'; '.join(listed)}{more}"
            )
    return notes


def dead_columns(module: torch.nn.Module, spec: QuantSpec) -> dict[str, list[int]]:
    """Returns linear layers with input columns whose weights are zero, or too small to smooth with.

    SmoothQuant scales column j by max|w_j|^(1 - alpha) / max|x_j|^alpha. ModelOpt fails where that is 2^-31 or less;
    below a numerator of 1e-6, activations of ordinary size are enough to get there. Empty without SmoothQuant.
    """
    from torch import nn

    alpha = spec.smooth_quant_alpha
    if alpha is None:
        return {}
    found = {}
    for name, layer in heavy_layers(module):
        if isinstance(layer, nn.Linear):
            columns = (layer.weight.detach().abs().amax(0) ** (1 - alpha) <= 1e-6).nonzero().flatten().tolist()
            if columns:
                found[name] = columns
    return found


def layers(module: torch.nn.Module, weights: str, floats: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Returns ModelOpt's list of what to quantize: nothing, then all layers by full names but for `floats`.

    Output channels are a weight's first axis, but the second one of a transposed convolution.
    """
    from torch import nn

    turned = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
    left_out = set(floats)
    found: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, part in heavy_layers(module):
        if name in left_out:
            continue
        first = name + "." if name else ""
        axis = None if weights == "per_tensor" else int(isinstance(part, turned))
        for kind, along in (("weight", axis), ("input", None)):
            cfg = {"num_bits": 8, "axis": along}
            found.append({"quantizer_name": f"{first}{kind}_quantizer", "cfg": cfg, "enable": True})
    return found


def weight_steps(module: torch.nn.Module) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields per layer that rounds its weight its name, and per output channel its magnitude, also in steps of 127."""
    for name, layer in heavy_layers(module):
        rounding = getattr(layer, "weight_quantizer", None)
        if rounding is None or not rounding.is_enabled or rounding.amax is None:
            continue
        axis = int(bool(getattr(layer, "transposed", False)))
        weight: Any = layer.weight
        magnitudes = weight.detach().transpose(0, axis).flatten(1).abs().amax(1)
        steps = 127 * magnitudes / rounding.amax.detach().flatten()
        yield name, magnitudes.numpy(), steps.nan_to_num(0).numpy()


def heavy_layers(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Returns linear layers and convolutions by full names; one that has several names under the first of them."""
    from torch import nn

    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    kinds |= nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
    return [(name, part) for name, part in module.named_modules() if isinstance(part, kinds)]


def lift_scales(model: onnx.ModelProto) -> None:
    """Turns the Constant nodes in which the exporter keeps scales and zero points into initializers."""
    graph = model.graph
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    wanted = {name for node in pairs for name in node.input[1:]}
    others = []
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] in wanted:
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
        else:
            others.append(node)
    _set_nodes(graph, others)


def feeding_transposes(model: onnx.ModelProto, names: Iterable[str]) -> set[str]:
    """Returns the names of the Transpose nodes that turn weights of the nodes `names`."""
    transposes = {node.output[0]: node.name for node in model.graph.node if node.op_type == "Transpose"}
    wanted = set(names)
    readers = [node for node in model.graph.node if node.name in wanted and node.op_type in MATMULS]
    return {transposes[name] for node in readers for name in node.input if name in transposes}


def turn_weights(model: onnx.ModelProto) -> None:
    """Stores int8 weights as MatMul reads them: a dequantized weight's Transpose is replaced by the turned weight."""
    from onnx import numpy_helper

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    maker = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    renamed: dict[str, str] = {}
    others = []
    for node in graph.node:
        dequantize = maker.get(node.input[0]) if node.op_type == "Transpose" else None
        weight = stored.get(dequantize.input[0]) if dequantize is not None else None
        if dequantize is None or weight is None or len(weight.dims) != 2:
            others.append(node)
            continue
        turned = np.ascontiguousarray(numpy_helper.to_array(weight).T)
        weight.CopyFrom(numpy_helper.from_array(turned, weight.name))
        for attribute in dequantize.attribute:
            if attribute.name == "axis":
                attribute.i = 1 - attribute.i
        renamed[node.output[0]] = dequantize.output[0]
    for node in others:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    _set_nodes(graph, others)


def _set_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)
