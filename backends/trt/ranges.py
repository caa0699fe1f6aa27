"""Measures ranges of activations: runs the float graph over the calibration items and reduces tensors inside it.

ModelOpt's own calibration does the same with all graph optimisations off, for every tensor that it may quantize.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from backends.base import BackendError, Feeds, Graph, TensorInfo
from backends.calibration import not_finite
from backends.reference import OnnxRuntimeEngine

if TYPE_CHECKING:
    import onnx

_LARGEST = {"INT8": 127.0, "FLOAT8E4M3FN": 448.0}


def largest_magnitudes(
    path: Path, inputs: Sequence[TensorInfo], tensors: Sequence[str], items: Iterable[Feeds]
) -> dict[str, float]:
    """Returns max|x| of each tensor over all items. Only one item is in memory at a time.

    Writes `<stem>.ranges.onnx` beside `path`, so that external weights are found. Raises BackendError for a tensor that
    the graph does not compute, and for an item that gives NaN or inf in one of the tensors.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    known = {name for node in graph.node for name in node.output} | {t.name for t in inputs}
    missing = sorted(set(tensors) - known)
    if missing:
        raise BackendError(f"{path.name} computes no tensor {missing[0]!r}, so it has no range")
    del graph.output[:]
    # Reductions read the tensor where it is; of Abs there would be a copy. Least and largest values pass over NaN, sums
    # do not.
    names = []
    for k, tensor in enumerate(tensors):
        for kind in ("ReduceMin", "ReduceMax", "ReduceSum"):
            names.append(f"range.{kind}.{k}")
            graph.node.append(onnx.helper.make_node(kind, [tensor], [names[-1]], names[-1], keepdims=0))
            graph.output.append(onnx.helper.make_tensor_value_info(names[-1], onnx.TensorProto.FLOAT, []))
    reduced = path.with_name(f"{path.stem}.ranges.onnx")
    onnx.save(model, str(reduced))
    del model
    outputs = tuple(TensorInfo(name, (), "float32") for name in names)
    largest = np.zeros(len(tensors), np.float32)
    try:
        with OnnxRuntimeEngine(Graph(reduced, tuple(inputs), outputs, "")) as engine:
            for index, item in enumerate(items):
                found = engine.infer(item)
                reductions = np.array([found[name] for name in names], np.float32).reshape(-1, 3)
                broken = ~np.isfinite(reductions).all(axis=1)
                if broken.any():
                    raise not_finite(tensors[int(broken.argmax())], index)
                largest = np.maximum(largest, np.abs(reductions[:, :2]).max(axis=1))
    finally:
        reduced.unlink()
    return dict(zip(tensors, largest.tolist(), strict=True))


def quantized_tensors(model: onnx.ModelProto) -> list[str]:
    """Returns the float tensors, in order, that a QuantizeLinear reads and that are no constants."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" or (node.op_type == "Identity" and node.input[0] in constants):
            constants.update(node.output)
    read = (node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear")
    return list(dict.fromkeys(name for name in read if name not in constants))


def set_ranges(model: onnx.ModelProto, ranges: dict[str, float]) -> None:
    """Lets every Q/DQ pair of a tensor represent [-range, range]: int8 up to 127, fp8 (E4M3) up to 448."""
    import onnx

    kinds = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            readers.setdefault(node.input[0], []).append(node)
    for node in [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in ranges]:
        kind = kinds.get(node.input[2], "") if len(node.input) > 2 else ""
        if kind not in _LARGEST:
            raise BackendError(f"the range of {node.input[0]!r} cannot be set: its Q/DQ pair holds {kind or 'no type'}")
        scale = np.float32(ranges[node.input[0]] / _LARGEST[kind])
        if not scale >= np.finfo(np.float32).tiny:  # a tensor of zeros
            scale = np.float32(1)
        name = f"{node.input[0]}.scale"
        if name not in kinds:
            kinds[name] = "FLOAT"
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(scale), name))
        for pair in (node, *readers.get(node.output[0], [])):
            pair.input[1] = name
