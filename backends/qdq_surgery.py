"""Puts nodes of a Q/DQ graph back to float: the `Surgery` of TensorRT, and with a change that of ONNX Runtime.

A node reads the tensors from before their Q/DQ pairs (and before the scale of SmoothQuant) and takes its weights from
the float graph; other nodes that read the same Q/DQ pair keep reading it. Nodes are matched by name: the
quantizers keep them.

ONNX Runtime computes the outputs on the CPU, Q/DQ nodes as they are defined, as it does where TensorRT's engines are
emulated; also where there is a device: that needs no plan for each set of nodes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from backends.base import BackendError, Feeds, Graph
from backends.onnx_graph import CONVOLUTIONS, MATMULS, MOVES, OnnxGraph, constant_of, name_nodes, reads, with_data
from backends.qdq import tidy, write_graph
from backends.rank import check_names, other_model
from backends.reference import OnnxRuntimeEngine

if TYPE_CHECKING:
    import onnx

_HEAVY = MATMULS | CONVOLUTIONS


class QDQSurgery:
    """See `backends.base.Surgery`. Files are read anew for each set of nodes: memory holds no graph in between."""

    sources: ClassVar[tuple[str, ...]] = ("backends.qdq_surgery",)

    def __init__(self, quantized: Graph, plain: Graph) -> None:
        self._graph, self._plain = quantized, plain
        if OnnxGraph(plain.path).has_qdq():
            raise BackendError(f"{plain.path.name} is quantized: the float graph is wanted")
        found = OnnxGraph(quantized.path)
        self.nodes = tuple(node.name for node in found.work() if _is_quantized(found, node))

    def infer_plain(self, feeds: Sequence[Feeds]) -> list[Feeds]:
        return _run(self._plain, feeds)

    def infer(self, floats: Iterable[str], feeds: Sequence[Feeds]) -> list[Feeds]:
        with tempfile.TemporaryDirectory(prefix="pqk-rank-") as folder:
            return _run(self.write(floats, Path(folder) / "graph"), feeds)

    def write(self, floats: Iterable[str], target: Path) -> Graph:
        import onnx

        names = list(floats)
        check_names(names, self.nodes, self._graph.path.name)
        model = onnx.load(str(self._graph.path))
        name_nodes(model.graph.node)
        if names:
            self._restore(model.graph, set(names))
            tidy(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            return write_graph(model, target.name, Path(folder), target.parent)

    def _restore(self, graph: onnx.GraphProto, names: set[str]) -> None:
        """Lets the nodes `names` compute in float, as in the float graph."""
        _restore(graph, self._plain, names)


def _is_quantized(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Matmuls and convolutions with a quantized operand, be it the weight alone; others that read a Q/DQ pair."""
    if node.op_type in _HEAVY:
        return bool(graph.stored_as(node))
    return graph.precision(node) in ("int8", "fp8")


def _run(graph: Graph, feeds: Sequence[Feeds]) -> list[Feeds]:
    with OnnxRuntimeEngine(graph, {"fuse_qdq": False}) as engine:
        return [engine.infer(feed) for feed in feeds]


def _restore(graph: onnx.GraphProto, plain: Graph, names: set[str]) -> None:
    """Lets the nodes `names` compute in float, as in `plain`, and drops what is no longer read."""
    weights = _Weights(plain)
    maker = {name: node for node in graph.node for name in node.output if name}
    scales = _scales(graph, maker, weights)
    nodes: list[onnx.NodeProto] = []
    added: dict[str, onnx.TensorProto] = {}
    for node in list(graph.node):
        if node.name in names:
            twin = weights.nodes.get(node.name)
            if twin is None or twin.op_type != node.op_type or len(twin.input) != len(node.input):
                raise other_model(node.op_type, node.name)
            for index, name in enumerate(node.input):
                if twin.input[index] in weights.live:
                    node.input[index] = _unquantized(name, maker, scales, nodes)
                elif _from_dequantize(name, maker):
                    tensor = added.setdefault(twin.input[index], weights.tensor(twin.input[index], node.name))
                    node.input[index] = tensor.name
        nodes.append(node)
    kept = _read(nodes, {value.name for value in graph.output})
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(added.values())


def _from_dequantize(name: str, maker: dict[str, onnx.NodeProto]) -> bool:
    node = maker.get(name)
    while node is not None and node.op_type in MOVES:
        node = maker.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


def _scales(graph: onnx.GraphProto, maker: dict[str, onnx.NodeProto], weights: _Weights) -> dict[str, str]:
    """Returns the products by a constant that SmoothQuant added, and the other factor of each."""
    constants = {tensor.name for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "Mul" and node.name not in weights.nodes:
            fixed = [n in constants or (n in maker and maker[n].op_type == "Constant") for n in node.input]
            if sorted(fixed) == [False, True]:
                found[node.output[0]] = node.input[fixed.index(False)]
    return found


def _unquantized(
    name: str, maker: dict[str, onnx.NodeProto], scales: dict[str, str], nodes: list[onnx.NodeProto]
) -> str:
    """Returns the tensor from before its Q/DQ pair and its scale. Moves between are made anew, as others may read the
    quantized ones; they are appended to `nodes`."""
    import onnx

    node = maker.get(name)
    if node is None:
        return name
    if node.op_type == "DequantizeLinear":
        quantize = maker.get(node.input[0])
        if quantize is None or quantize.op_type != "QuantizeLinear":
            return name
        source = scales.get(quantize.input[0], quantize.input[0])
        return _unquantized(source, maker, scales, nodes)  # a tensor may be quantized again behind a move
    if node.op_type not in MOVES:
        return name
    sources = [_unquantized(source, maker, scales, nodes) for source in node.input]
    if sources == list(node.input):
        return name
    made = f"{name}/float"
    if made not in maker:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{node.name}/float"
        copy.input[:] = sources
        copy.output[:] = [f"{output}/float" if output else "" for output in node.output]
        maker.update((output, copy) for output in copy.output if output)
        nodes.append(copy)
    return made


def _read(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """Returns the nodes that lead to `outputs`, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            wanted.update(reads(node))
            kept.append(node)
    return kept[::-1]


class _Weights:
    """The float graph: its nodes by name, which tensors depend on the inputs' values, and its constants."""

    def __init__(self, graph: Graph) -> None:
        import onnx

        self._folder = graph.path.parent
        model = onnx.load(str(graph.path), load_external_data=False)
        found = OnnxGraph(graph.path, model)
        self.nodes = {node.name: node for node in found.nodes}
        self.live = found.live
        self._maker = found.maker
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}

    def tensor(self, name: str, reader: str) -> onnx.TensorProto:
        """Returns a copy of the constant `name`, called `<name>/float`. Raises BackendError when nodes compute it."""
        import onnx

        found = constant_of(name, self._maker, self._initializers)
        if found is None:
            kind = self._maker[name].op_type if name in self._maker else "nothing"
            raise BackendError(f"{reader!r}: its weights are computed by {kind}")
        made = onnx.TensorProto()
        made.CopyFrom(with_data(found, self._folder))
        made.name = f"{name}/float"
        return made
