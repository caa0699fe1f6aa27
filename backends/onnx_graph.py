"""Reads an ONNX graph: its work in FLOPs, which nodes are quantized, and which ones a keep-list protects.

An operand counts as quantized when it comes from a DequantizeLinear, through nodes that only move values. A matmul or a
convolution is quantized when both of its operands are; any other node when an operand of its own comes straight from
a DequantizeLinear that follows a QuantizeLinear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backends import flops
from backends import keep as keep_list
from backends.base import BackendError

if TYPE_CHECKING:
    import onnx

MATMULS = {"MatMul", "Gemm"}
CONVOLUTIONS = {"Conv", "ConvTranspose"}
MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "Slice", "Gather", "Concat", "Flatten", "Expand"}
_QDQ = {"QuantizeLinear", "DequantizeLinear"}
_SMALL = 1024  # elements of a constant that may name a shape


class OnnxGraph:
    """An ONNX file without its weights: nodes in order, the makers of tensors, and shapes and types of tensors.

    nodes: all of them named. maker: the node that makes a tensor. weights: shapes of the initializers. inputs: the
    graph's inputs. live: tensors whose values depend on the values of the inputs. shapes, types: of every tensor for
    which they are known; types are those of `onnx.TensorProto`.
    """

    def __init__(self, path: Path, model: onnx.ModelProto | None = None) -> None:
        """Reads the file, or takes it as `model` where the caller has it loaded; its nodes are named in place.

        Raises BackendError when the file cannot be read. External weights are never loaded, but for small ones.
        """
        import onnx

        try:
            model = model or onnx.load(str(path), load_external_data=False)
        except Exception as error:
            raise BackendError(f"{path} is not a readable ONNX file: {type(error).__name__}") from error
        self.path = path
        self.nodes = list(model.graph.node)
        name_nodes(self.nodes)
        self.maker = {name: node for node in self.nodes for name in node.output if name}
        self.weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        self.types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        self.inputs = {value.name for value in model.graph.input if value.name not in self.weights}
        self.live = self._live()
        self.shapes: dict[str, tuple[int, ...]] = dict(self.weights)
        self._infer_shapes(model)

    def _live(self) -> set[str]:
        live = set(self.inputs)
        for node in self.nodes:
            if node.op_type not in ("Shape", "Size") and not live.isdisjoint(reads(node)):
                live.update(name for name in node.output if name)
        return live

    def _infer_shapes(self, model: onnx.ModelProto) -> None:
        import onnx

        bare = frame(model)
        bare.graph.node.extend(model.graph.node)
        bare.graph.output.extend(model.graph.output)
        bare.graph.input.extend(model.graph.input)
        bare.graph.value_info.extend(model.graph.value_info)
        listed = {value.name for value in model.graph.input}
        for tensor in model.graph.initializer:
            if math.prod(tensor.dims) <= _SMALL:  # it may be a shape, whose values inference needs
                bare.graph.initializer.append(with_data(tensor, self.path.parent))
            elif tensor.name not in listed:  # the shape is all that inference needs
                bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
        for value in [*inferred.input, *inferred.value_info, *inferred.output]:
            kind = value.type.tensor_type
            self.types.setdefault(value.name, kind.elem_type)
            if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
                self.shapes.setdefault(value.name, tuple(dim.dim_value for dim in kind.shape.dim))

    def work(self) -> list[onnx.NodeProto]:
        """Returns the nodes that compute with the inputs' values, in order, but for those that only round."""
        return [n for n in self.nodes if n.op_type not in _QDQ and n.output and n.output[0] in self.live]

    def flops(self, node: onnx.NodeProto) -> float:
        """Counts two per multiply-add of a matmul or convolution, else 0. Raises BackendError without its shape."""
        if node.op_type not in MATMULS | CONVOLUTIONS:
            return 0.0
        try:
            out, first, second = (self.shapes[name] for name in (node.output[0], node.input[0], node.input[1]))
        except KeyError as error:
            raise BackendError(
                f"{self.path.name}: the shape of {error.args[0]!r} at node {node.name!r} is unknown"
            ) from error
        if node.op_type == "MatMul":
            return flops.matmul(out, first[-1])
        if node.op_type == "Gemm":
            turned = any(a.name == "transA" and a.i for a in node.attribute)
            return flops.matmul(out, first[0 if turned else 1])
        return flops.convolution(first, out, second[1:], node.op_type == "ConvTranspose")

    def precision(self, node: onnx.NodeProto) -> str:
        """Returns 'int8' or 'fp8' for a quantized node (see the module), else the float type that it computes in."""
        if node.op_type in MOVES:
            return self._float(node.output[0])
        heavy = node.op_type in MATMULS | CONVOLUTIONS
        if heavy:
            kinds = [self._quantized(name) for name in node.input[:2]]
            found = kinds[0] if kinds[0] == kinds[1] else ""
        else:
            found = next((kind for kind in map(self._direct, node.input) if kind), "")
        # An integer weight alone is turned back into floats before the product (weight-only quantization).
        return found if found in ("int8", "fp8") else self._float(node.input[0] if heavy else node.output[0])

    def stored_as(self, node: onnx.NodeProto) -> set[str]:
        """Returns the formats of its operands in front of a DequantizeLinear: of 'int8', 'fp8', 'int4', 'other'.

        Also where that alone does not make it a quantized node: weights of weight-only quantization.
        """
        return {kind for kind in map(self._quantized, node.input) if kind}

    def _quantized(self, name: str) -> str:
        node = self.maker.get(name)
        while node is not None and node.op_type in MOVES:
            name = node.input[0]
            node = self.maker.get(name)
        return self._stored(node) if node is not None and node.op_type == "DequantizeLinear" else ""

    def _direct(self, name: str) -> str:
        node = self.maker.get(name)
        live = name in self.live and node is not None and node.op_type == "DequantizeLinear"
        return self._stored(node) if live and node is not None else ""

    def _stored(self, node: onnx.NodeProto) -> str:
        import onnx

        kinds = onnx.TensorProto
        known = {kinds.INT8: "int8", kinds.UINT8: "int8", kinds.FLOAT8E4M3FN: "fp8", kinds.INT4: "int4"}
        return known.get(self.types.get(node.input[0], 0), "other")

    def _float(self, name: str) -> str:
        import onnx

        kinds = onnx.TensorProto
        known = {kinds.FLOAT: "f32", kinds.FLOAT16: "f16", kinds.BFLOAT16: "bf16", kinds.INT64: "int64"}
        return known.get(self.types.get(name, 0), "unknown")

    def has_qdq(self) -> bool:
        return any(node.op_type in _QDQ for node in self.nodes)


def frame(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a model with the versions, operator sets and functions of `model` and an empty graph."""
    import onnx

    made = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    made.graph.name = model.graph.name
    return made


def reads(node: onnx.NodeProto) -> list[str]:
    """Returns the tensors that a node reads, with those that the bodies of its branches and loops may read."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for body in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            names += [name for inner in body.node for name in reads(inner)]
            names += [value.name for value in body.output]
    return names


def constant_of(
    name: str, maker: Mapping[str, onnx.NodeProto], initializers: Mapping[str, onnx.TensorProto]
) -> onnx.TensorProto | None:
    """Returns the constant that the tensor `name` is: an initializer or the value of a Constant node, also behind
    Identity nodes; None for a tensor that is computed. External data is not loaded."""
    while name in maker and maker[name].op_type == "Identity":
        name = maker[name].input[0]
    node = maker.get(name)
    if node is not None and node.op_type == "Constant" and node.attribute[0].name == "value":
        return node.attribute[0].t
    return initializers.get(name)


def with_data(tensor: onnx.TensorProto, folder: Path) -> onnx.TensorProto:
    """Returns `tensor` itself, or a copy with its data where that is in a file of `folder`."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor
    made = onnx.TensorProto()
    made.CopyFrom(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    # onnx's own loader refuses a file with two hard links, as the parts of a bisected graph have it.
    with (folder / Path(place["location"]).name).open("rb") as stream:
        stream.seek(int(place.get("offset", 0)))
        made.raw_data = stream.read(int(place.get("length", -1)))
    del made.external_data[:]
    made.ClearField("data_location")
    return made


def name_nodes(nodes: Sequence[onnx.NodeProto]) -> None:
    """Gives every node without a name `<type>.<position>`; some tools and every keep-list go by names."""
    for index, node in enumerate(nodes):
        if not node.name:
            node.name = f"{node.op_type}.{index}"


def kept_nodes(graph: OnnxGraph, keep: Iterable[str]) -> dict[str, str]:
    """Returns names and types of the nodes that a keep-list protects; see `backends.keep.kept`, also for errors."""
    nodes = []
    for node in graph.nodes:
        if node.output and node.output[0] in graph.live:
            live = (name for name in node.input if name in graph.live)
            makers = tuple(graph.maker[name].name if name in graph.maker else "" for name in live)
            fixed = (name for name in node.input if name and name not in graph.live)
            sizes = tuple(math.prod(graph.shapes.get(name, ())) for name in fixed)
            nodes.append(keep_list.Node(node.name, node.op_type, makers, sizes))
    return keep_list.kept(nodes, keep)
