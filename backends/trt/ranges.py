"""Sets the ranges of ModelOpt's Q/DQ pairs, measured by `backends.ranges` on the whole calibration set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from backends.base import BackendError, Feeds, TensorInfo
from backends.ranges import tensor_ranges

if TYPE_CHECKING:
    import onnx

_LARGEST = {"INT8": 127.0, "FLOAT8E4M3FN": 448.0}


def largest_magnitudes(
    path: Path, inputs: Sequence[TensorInfo], tensors: Sequence[str], items: Iterable[Feeds]
) -> dict[str, float]:
    """Returns max|x| of each tensor over all items; see `tensor_ranges`, also for errors."""
    return {name: max(-least, most) for name, (least, most) in tensor_ranges(path, inputs, tensors, items).items()}


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
