"""Finishes and writes ONNX graphs with Q/DQ nodes, the same bytes for the same model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from backends.base import Graph
from backends.exchange import EXTERNAL_ABOVE, SHARED_ABOVE, describe_onnx, move_graph, save_with_data

if TYPE_CHECKING:
    import onnx


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


def write_graph(model: onnx.ModelProto, name: str, folder: Path, target: Path) -> Graph:
    """Writes the finished graph, its data file first, and describes it. The same model gives the same bytes."""
    model.producer_name = model.producer_version = model.doc_string = ""
    del model.metadata_props[:]
    del model.graph.value_info[:]
    made = folder / "out" / f"{name}.onnx"
    made.parent.mkdir()
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EXTERNAL_ABOVE:
        save_with_data(model, made)
    else:
        made.write_bytes(model.SerializeToString(deterministic=True))
    move_graph(made, target / made.name)
    return describe_onnx(target / made.name)
