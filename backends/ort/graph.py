"""Prepares float graphs for ONNX Runtime's quantizer, and finishes what it made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from backends.base import Graph
from backends.onnx_graph import MOVES, OnnxGraph, constant_of, name_nodes

if TYPE_CHECKING:
    import onnx

LOWERED = {"MatMul", "Gemm", "Conv"}
_SUM = 2**30  # a bias in steps of its sums must leave them room in 32 bits


def loaded(graph: Graph) -> onnx.ModelProto:
    """Reads the whole model, names its nodes, and makes constants initializers, which is where the tool looks for
    weights."""
    import onnx

    model = onnx.load(str(graph.path))
    name_nodes(model.graph.node)
    maker = {name: node for node in model.graph.node for name in node.output}
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [n for n in model.graph.node if n.op_type in LOWERED]:
        for name in [n for n in node.input[1:] if n and n not in initializers]:
            found = constant_of(name, maker, initializers)
            if found is None:
                continue
            made = onnx.TensorProto()
            made.CopyFrom(found)
            made.name = name
            initializers[name] = made
            model.graph.initializer.append(made)
            # An Identity or a Constant: what it made is the initializer now.
            model.graph.node.remove(maker.pop(name))
    return model


def lowered_nodes(model: onnx.ModelProto, original: OnnxGraph) -> list[str]:
    """Returns the names of the nodes that int8 kernels can compute well, in order."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type not in LOWERED or node.input[0] not in original.live:
            continue
        weight = node.input[1]
        live = node.op_type == "MatMul" and weight in original.live and not _of_softmax(node.input[0], original)
        fixed = weight in shapes and (node.op_type == "Conv" or len(shapes[weight]) == 2)
        if (live or fixed) and all(name in shapes for name in node.input[2:] if name):
            found.append(node.name)
    return found


def _of_softmax(tensor: str, graph: OnnxGraph) -> bool:
    """Returns whether a tensor holds probabilities: of a thousand, most are smaller than a step of int8."""
    node = graph.maker.get(tensor)
    while node is not None and node.op_type in MOVES:
        node = graph.maker.get(node.input[0])
    return node is not None and node.op_type == "Softmax"


def border_convolutions(model: onnx.ModelProto) -> set[str]:
    """Returns the names of the convolutions that read an input of the graph, moved at most, or whose results reach an
    output of the graph without another product in between."""
    graph = model.graph
    products = LOWERED | {"ConvTranspose"}
    fed = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    found = set()
    for node in graph.node:
        if node.input and node.input[0] in fed:
            if node.op_type in MOVES:
                fed.update(node.output)
            elif node.op_type == "Conv":
                found.add(node.name)
    last = {value.name for value in graph.output}
    for node in reversed(graph.node):
        if last.isdisjoint(node.output):
            continue
        if node.op_type not in products:
            last.update(name for name in node.input if name)
        elif node.op_type == "Conv":
            found.add(node.name)
    return found


def copied_operands(model: onnx.ModelProto, chosen: Sequence[str], original: OnnxGraph) -> dict[str, str]:
    """Lets the nodes `chosen` read their operands through a node Identity; returns tensors by the name of their copy.

    The tool rounds a tensor for all of its readers; of the copy there are no others. What a chosen convolution makes is
    rounded by itself.
    """
    import onnx

    names = set(chosen)
    rounded = {node.output[0] for node in model.graph.node if node.op_type == "Conv" and node.name in names}
    nodes: list[onnx.NodeProto] = []
    copies: dict[str, str] = {}
    for node in model.graph.node:
        if node.name in names:
            for index, tensor in enumerate(node.input[:2]):
                if tensor not in original.live or tensor in rounded:
                    continue
                copy = f"{tensor}/rounded"
                if copy not in copies:
                    copies[copy] = tensor
                    nodes.append(onnx.helper.make_node("Identity", [tensor], [copy], copy))
                node.input[index] = copy
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return copies


def drop_copies(model: onnx.ModelProto, copies: Mapping[str, str]) -> None:
    """Lets the Q/DQ pairs read the tensors themselves again."""
    for node in [n for n in model.graph.node if n.op_type == "Identity" and n.output[0] in copies]:
        model.graph.node.remove(node)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = copies.get(name, name)


def round_biases(model: onnx.ModelProto) -> None:
    """Stores the biases of quantized linear layers as int32, in steps of the sums that they are added to.

    The runtime makes one Gemm of MatMul and Add before it chooses kernels, and its int8 Gemm takes an int32 bias alone:
    with a float bias the layer would run in float. A bias that is too large for its steps stays as it is.
    """
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {value.name: [value] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        pairs = [maker[name] for name in node.input if name in maker] if node.op_type == "MatMul" else []
        if [pair.op_type for pair in pairs] == ["DequantizeLinear"] * 2 and pairs[1].input[0] in constants:
            added = _bias_of(node, readers, maker, constants)
            scales = [numpy_helper.to_array(constants[pair.input[1]]) for pair in pairs]
            if added is not None:
                bias = numpy_helper.to_array(added[1])
                weight = numpy_helper.to_array(constants[pairs[1].input[0]])
                steps = np.broadcast_to(scales[1], bias.shape).astype(np.float32)
                alone = scales[1].ndim == 1 and len(readers[node.input[1]]) == 1
                dead = (weight == 0).all(axis=0) & (bias != 0) & alone
                # Of a column of zeros the tool knows no step and takes 1; any other gives zeros too, and a finer bias.
                steps = np.where(dead, np.abs(bias) / (scales[0] * np.float32(2**20)), steps).astype(np.float32)
                values = np.rint(bias.astype(np.float64) / (scales[0].astype(np.float64) * steps))
                if (np.abs(values) < _SUM).all():
                    if dead.any():
                        constants[pairs[1].input[1]].CopyFrom(numpy_helper.from_array(steps, pairs[1].input[1]))
                    nodes.append(_stored_bias(graph, node.name, values, scales[0] * steps))
                    (reader,) = readers[node.output[0]]
                    reader.input[list(reader.input).index(added[0])] = nodes[-1].output[0]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _bias_of(
    node: onnx.NodeProto,
    readers: Mapping[str, Sequence[onnx.NodeProto]],
    maker: Mapping[str, onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
) -> tuple[str, onnx.TensorProto] | None:
    """Returns name and value of the constant vector that is added to the result of a matmul, where nothing else reads
    that; else None."""
    following = readers.get(node.output[0], [])
    if len(following) != 1 or getattr(following[0], "op_type", "") != "Add":
        return None
    found = ((name, constant_of(name, maker, constants)) for name in following[0].input if name != node.output[0])
    return next(((name, tensor) for name, tensor in found if tensor is not None and len(tensor.dims) == 1), None)


def _stored_bias(graph: onnx.GraphProto, layer: str, values: np.ndarray, steps: np.ndarray) -> onnx.NodeProto:
    """Adds a bias as int32 to the graph's constants; returns the DequantizeLinear that reads it."""
    import onnx
    from onnx import numpy_helper

    names = [f"{layer}/bias_{part}" for part in ("quantized", "scale", "zero_point")]
    arrays = (values.astype(np.int32), steps.astype(np.float32), np.zeros(values.shape, np.int32))
    graph.initializer.extend(numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True))
    name = f"{layer}/bias"
    return onnx.helper.make_node("DequantizeLinear", names, [name], name, axis=0)
