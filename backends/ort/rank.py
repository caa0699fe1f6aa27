"""Puts nodes of a graph of the quantizer `ort` back to float: the `Surgery` of ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from backends.base import Graph
from backends.onnx_graph import OnnxGraph
from backends.ort.graph import LOWERED
from backends.qdq_surgery import QDQSurgery

if TYPE_CHECKING:
    import onnx


class ORTSurgery(QDQSurgery):
    """See `backends.base.Surgery`. What `ort` quantizes are products alone; a node that reads a rounded convolution is
    none. With a product its bias goes back to float, and of a convolution its result too, but for products behind it.
    """

    sources: ClassVar[tuple[str, ...]] = ("backends.ort.rank",)

    def __init__(self, quantized: Graph, plain: Graph) -> None:
        super().__init__(quantized, plain)
        products = {node.name for node in OnnxGraph(quantized.path).nodes if node.op_type in LOWERED}
        self.nodes = tuple(name for name in self.nodes if name in products)

    def _restore(self, graph: onnx.GraphProto, names: set[str]) -> None:
        results = {node.output[0] for node in graph.node if node.name in names}
        biases = {node.name for node in graph.node if node.op_type == "Add" and not results.isdisjoint(node.input)}
        read_results(graph, results)
        super()._restore(graph, names | biases)


def read_results(graph: onnx.GraphProto, results: set[str]) -> None:
    """Lets the nodes that are no products read the tensors `results` from before their Q/DQ pairs."""
    rounded = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in results}
    pairs = {
        n.output[0]: rounded[n.input[0]]
        for n in graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in rounded
    }
    for node in graph.node:
        if node.op_type not in LOWERED:
            for index, name in enumerate(node.input):
                node.input[index] = pairs.get(name, name)
