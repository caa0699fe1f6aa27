"""Finishes and writes ONNX graphs with Q/DQ nodes, the same bytes for the same model."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from backends.base import Graph
from backends.exchange import EXTERNAL_ABOVE, SHARED_ABOVE, describe_onnx, move_graph, save_with_data

if TYPE_CHECKING:
    import onnx

HALF = 64
"""Largest int8 weight of 7 bits: sums of two products with int8 values then fit 16 bits."""


def tidy(model: onnx.ModelProto) -> None:
    """Drops constants that nobody reads, and stores equal ones once: ModelOpt gives every reader of a table a copy."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    read = {name for node in graph.node for name in node.input} | outputs
    for node in [n for n in graph.node if n.op_type == "Identity" and n.output[0] not in read]:
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input} | outputs
    first: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    kept = []
    for tensor in graph.initializer:
        if tensor.name not in read:
            continue
        content = hashlib.sha256(tensor.raw_data).digest() + str((tensor.data_type, list(tensor.dims))).encode()
        if len(tensor.raw_data) < SHARED_ABOVE or content not in first or tensor.name in outputs:
            first.setdefault(content, tensor.name)
            kept.append(tensor)
        else:
            renamed[tensor.name] = first[content]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in renamed:
                node.input[index] = renamed[name]


def with_half_range(graph: Graph, target: Path) -> Graph | None:
    """Writes a copy of a Q/DQ graph to the folder `target` whose int8 weights take 7 of their 8 bits.

    None where they do so already.

    A weight and its int32 bias are halved, rounded, and their scales doubled; scales that others read stay. What has a
    zero point other than 0 is left as it is.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(graph.path))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    stored = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    stored = [n for n in stored if len(n.input) < 3 or not numpy_helper.to_array(constants[n.input[2]]).any()]
    values = {node.input[0]: numpy_helper.to_array(constants[node.input[0]]) for node in stored}
    if all(np.abs(q.astype(np.int16)).max(initial=0) <= HALF for q in values.values() if q.dtype == np.int8):
        return None
    for name, q in values.items():
        if q.dtype in (np.int8, np.int32):
            constants[name].CopyFrom(numpy_helper.from_array(np.rint(q / 2).astype(q.dtype), name))
    for number, node in enumerate(stored):
        if values[node.input[0]].dtype in (np.int8, np.int32):
            scale = numpy_helper.to_array(constants[node.input[1]])
            node.input[1] = f"{node.input[1]}_doubled_{number}"
            model.graph.initializer.append(numpy_helper.from_array(2 * scale, node.input[1]))
    tidy(model)
    with tempfile.TemporaryDirectory(prefix=".half.", dir=target) as folder:
        return write_graph(model, graph.path.stem, Path(folder), target)


def write_graph(model: onnx.ModelProto, name: str, folder: Path, target: Path, shapes: bool = False) -> Graph:
    """Writes the finished graph, its data file first, and describes it. The same model gives the same bytes.

    shapes: the shapes of tensors that it lists stay; needed where operators are not those of ONNX.
    """
    model.producer_name = model.producer_version = model.doc_string = ""
    del model.metadata_props[:]
    if not shapes:
        del model.graph.value_info[:]
    made = folder / "out" / f"{name}.onnx"
    made.parent.mkdir()
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EXTERNAL_ABOVE:
        save_with_data(model, made)
    else:
        made.write_bytes(model.SerializeToString(deterministic=True))
    move_graph(made, target / made.name)
    return describe_onnx(target / made.name)
