"""Makes kernels of the events of ONNX Runtime's profiler: what ran, in which precision, and which FLOPs it did.

The profile names the nodes of the optimized graph. An event belongs to the node of the file whose name its own begins
with (`/fc1/MatMul/MatMulAddFusion`), or whose result it computes (`TENSOR_nchwc`); what is left is matched by its size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from backends import flops
from backends.base import Kernel
from backends.onnx_graph import CONVOLUTIONS, MATMULS, OnnxGraph

if TYPE_CHECKING:
    import onnx

_END = "_kernel_time"
_PRODUCT = re.compile("MatMul|Gemm|Conv")
_INTEGER = re.compile("^(QLinear|QGemm|QAttention|MatMulInteger|ConvInteger|DynamicQuantize(MatMul|LSTM))")
_TYPES = {"float": "f32", "float16": "f16", "bfloat16": "bf16", "double": "f64"}
_KINDS = {"Conv": "Convolution", "ConvTranspose": "Deconvolution"}


def executed_kernels(events: Iterable[Mapping[str, Any]], graph: OnnxGraph, first: int) -> list[Kernel]:
    """Returns the kernels of the profiled runs from the run `first` (from 0) on, in the order in which they run.

    Times are means over these runs. FLOPs are those of the nodes of `graph`, the file that was loaded; what no kernel
    claims stands in a last one, `(not attributed)`.
    """
    seen: dict[str, Mapping[str, Any]] = {}
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_END):
            name = event["name"].removesuffix(_END)
            seen.setdefault(name, event["args"])
            times.setdefault(name, []).append(float(event["dur"]))
    todo = {node.name: node for node in graph.work() if graph.flops(node)}
    claims = {name: node for name, args in seen.items() if (node := _claimed(name, args, todo, graph)) is not None}
    by_size = {}
    for name, args in seen.items():
        if name not in claims and (size := _size(args)):
            match = next((node for node in todo.values() if graph.flops(node) == size), None)
            if match is not None:
                by_size[name] = todo.pop(match.name)
    kernels = []
    for name, args in seen.items():
        runs = times[name][first:] or [0.0]
        kernels.append(_kernel(name, args, sum(runs) / len(runs), claims.get(name), by_size.get(name), graph))
    if todo:
        left = sum(graph.flops(node) for node in todo.values())
        kernels.append(Kernel("(not attributed)", "unknown", "unknown", "unknown", 0.0, left, tuple(todo)))
    return kernels


def _claimed(
    name: str, args: Mapping[str, Any], todo: dict[str, onnx.NodeProto], graph: OnnxGraph
) -> onnx.NodeProto | None:
    """Returns the node of the file that an executed product did, and takes it out of `todo`; None without one."""
    if not _PRODUCT.search(args.get("op_name", "")):
        return None
    bare = re.sub(r"(_token_\d+)+$", "", name)
    found = bare if bare in todo else ""
    if bare.endswith("_nchwc"):
        found = _maker(bare.removesuffix("_nchwc"), todo, graph)
    for other in todo:
        if bare.startswith(f"{other}/") and len(other) > len(found):
            found = other
    return todo.pop(found) if found else None


def _maker(tensor: str, todo: Mapping[str, onnx.NodeProto], graph: OnnxGraph) -> str:
    """Returns the name of the convolution behind a tensor: its maker, or one before it through fused nodes."""
    node = graph.maker.get(tensor)
    while node is not None and node.name not in todo:
        live = [name for name in node.input if name in graph.live]
        node = graph.maker.get(live[0]) if len(live) == 1 else None
    return node.name if node is not None else ""


def _size(args: Mapping[str, Any]) -> float:
    """FLOPs that the shapes of an executed product imply; 0 for other nodes and where the profile lacks a shape."""
    kind = args.get("op_name", "")
    inputs = [next(iter(shape.values())) for shape in args.get("input_type_shape", [])]
    outputs = [next(iter(shape.values())) for shape in args.get("output_type_shape", [])]
    if not _PRODUCT.search(kind) or not inputs or not outputs or len(inputs[0]) < 2:
        return 0.0
    if "Conv" not in kind:
        return flops.matmul(outputs[0], inputs[0][-1])
    kernel = next((shape for shape in inputs[1:] if len(shape) == len(inputs[0])), None)
    return flops.convolution(inputs[0], outputs[0], kernel[1:], "Transpose" in kind) if kernel else 0.0


def _kernel(
    name: str,
    args: Mapping[str, Any],
    microseconds: float,
    claimed: onnx.NodeProto | None,
    by_size: onnx.NodeProto | None,
    graph: OnnxGraph,
) -> Kernel:
    ran = args.get("op_name", "unknown")
    node = claimed if claimed is not None else by_size
    types = [kind for shape in args.get("output_type_shape", []) for kind in shape]
    own = re.sub(r"(_token_\d+)+$", "", name)
    return Kernel(
        name=name,
        type=ran if node is None else _kind(node, graph),
        implementation=ran,
        precision="int8" if _INTEGER.match(ran) else next((_TYPES.get(kind, kind) for kind in types), "unknown"),
        time_us=microseconds,
        flops=graph.flops(node) if node is not None else 0.0,
        originals=(node.name if node is not None else own,),
        matched="name" if by_size is None else "size",
    )


def _kind(node: onnx.NodeProto, graph: OnnxGraph) -> str:
    """Returns what a product is: a convolution, a layer with constant weights, or a matmul of two activations."""
    if node.op_type in CONVOLUTIONS:
        return _KINDS[node.op_type]
    return "FullyConnected" if node.op_type in MATMULS and node.input[1] not in graph.live else "MatMul"
