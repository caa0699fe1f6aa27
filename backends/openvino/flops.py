"""Reads what an OpenVINO engine executed: per node its precision, its time and its share of the model's FLOPs.

FLOPs are counted on the source model (two per multiply-add of MatMul, convolutions and scaled dot product attention;
operations on constants are folded and count nothing) and handed to the executed node that lists the operation among
its originals. What no executed node claims becomes one kernel of precision 'unknown': the sum is always the analytic
total.

What was found on a CPU with AVX-512 VNNI and bf16 (OpenVINO 2026.4), and holds the code together:
- The runtime model's `primitiveType` is `<implementation>_<precision>`: `brgemm_avx512_i8`, `brgconv_avx512_I8` (from
  u8 inputs), `brgconv_avx512_1x1_bf16`, `gemm_mlas_f32`; with AMX `brgemm_avx512_amx_i8`. Its last part is what ran.
  `runtimePrecision` is not: a transposed convolution that got its int8 input converted back says `i8` there and
  `brgconv_avx512_bf16` in `primitiveType`.
- A FullyConnected lists the bias Add, and in int8 `<name>/DequantizationMultiply`, but never the MatMul's own name.
- Attention runs as one `Subgraph` (snippets), listing both MatMuls and the Softmax. It is named after the precision
  of its first input: with quantized queries and keys `jit_avx512_i8`, although the second MatMul is float, because
  probabilities are not quantized. So a MatMul inside such a Subgraph is reported as int8 only where both of its
  inputs come from FakeQuantize in the source model, else as a second kernel in the engine's float precision.
- An elementwise Subgraph that ends in FakeQuantize runs in float and only writes int8.

A matmul or convolution whose originals name no operation takes one of equal FLOPs that is left. Layers of one size may
be exchanged there, so such kernels are marked `matched="size"`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backends import flops
from backends.base import Kernel

if TYPE_CHECKING:
    import openvino as ov

MATMULS = {"MatMul", "ScaledDotProductAttention"}
CONVOLUTIONS = {"Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData"}

_PRECISIONS = {"i8": "int8", "u8": "int8", "int8": "int8", "fp16": "f16", "fp32": "f32"}
# Operations that only move values: the quantization of their input is that of their output.
MOVES = {"Reshape", "Transpose", "Concat", "Split", "VariadicSplit", "Gather", "Slice", "StridedSlice", "Squeeze"}
MOVES |= {"Unsqueeze", "MaxPool", "Relu", "Broadcast", "Convert"}


@dataclass(frozen=True)
class Work:
    """One operation of the source model that does multiply-adds, and the names that executed nodes know it by."""

    name: str
    aliases: tuple[str, ...]
    flops: float
    quantized: bool


def operation_flops(op: ov.Node) -> float:
    """FLOPs of one operation with static shapes (0 for anything but matmuls, convolutions and attention)."""
    kind = op.get_type_name()
    if kind not in MATMULS | CONVOLUTIONS:
        return 0.0
    shapes = [tuple(port.get_shape()) for port in op.inputs()]
    out = tuple(op.output(0).get_shape())
    if kind == "MatMul":
        first = shapes[0]
        inner = first[-2] if len(first) > 1 and op.get_attributes()["transpose_a"] else first[-1]
        return flops.matmul(out, inner)
    if kind == "ScaledDotProductAttention":
        return flops.attention(*shapes[:3])
    kernel = shapes[1][2 if kind.startswith("Group") else 1 :]
    return flops.convolution(shapes[0], out, kernel, "Backprop" in kind)


def live_operations(model: ov.Model) -> list[ov.Node]:
    """Returns the operations whose values depend on the inputs' values, in topological order (shapes are constants)."""
    live: set[str] = set()
    found = []
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Parameter":
            live.add(op.get_name())
        elif op.get_type_name() not in ("ShapeOf", "Result") and any(
            source.get_node().get_name() in live for source in op.input_values()
        ):
            live.add(op.get_name())
            found.append(op)
    return found


def is_quantized(op: ov.Node) -> bool:
    """Returns whether both operands of a matmul or convolution come from FakeQuantize, through moves of values only."""
    return all(from_fake_quantize(source.get_node()) for source in op.input_values()[:2])


def from_fake_quantize(node: ov.Node) -> bool:
    while node.get_type_name() in MOVES:
        node = node.input_value(0).get_node()
    return node.get_type_name() == "FakeQuantize"


def planned_flops(model: ov.Model) -> float:
    """Returns the FLOPs of products whose operands are both rounded: by FakeQuantize, or stored as integers."""
    return sum(
        operation_flops(op)
        for op in live_operations(model)
        if op.get_type_name() in MATMULS | CONVOLUTIONS
        and all(from_fake_quantize(source.get_node()) or _stored(source.get_node()) for source in op.input_values()[:2])
    )


def _stored(node: ov.Node) -> bool:
    """Returns whether a node scales integers that the file holds."""
    while node.get_type_name() in {"Convert", "Multiply", "Subtract", "Reshape", "Transpose", "Unsqueeze"}:
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and node.get_element_type().is_integral()


def works(model: ov.Model) -> list[Work]:
    """Returns every operation of the model that carries FLOPs."""
    found = []
    for op in live_operations(model):
        count = operation_flops(op)
        if count:
            found.append(Work(op.get_friendly_name(), _aliases(op), count, is_quantized(op)))
    return found


def _aliases(op: ov.Node) -> tuple[str, ...]:
    """Returns its name, its name after dequantization moved behind it, and the bias Add that absorbs it."""
    name = op.get_friendly_name()
    names = [name, f"{name}/DequantizationMultiply"]
    users = op.output(0).get_target_inputs()
    if len(users) == 1:
        user = next(iter(users)).get_node()
        if user.get_type_name() in ("Add", "Subtract") and any(
            _is_constant(source.get_node()) for source in user.input_values()
        ):
            names.append(user.get_friendly_name())
    return tuple(names)


def _is_constant(node: ov.Node) -> bool:
    while node.get_type_name() in {"Reshape", "Convert", "Multiply", "Unsqueeze"}:
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant"


def executed_precision_of(primitive: str, runtime: str) -> str:
    """Returns 'int8', 'bf16', 'f16', 'f32' or another type, from `primitiveType`, else from `runtimePrecision`."""
    last = primitive.rsplit("_", 1)[-1].lower()
    known = {*_PRECISIONS, "f32", "bf16", "f16", "i32", "i64", "boolean", "i4", "u4"}
    chosen = last if last in known else runtime.lower()
    return _PRECISIONS.get(chosen, chosen or "unknown")


Node = Mapping[str, Any]
"""A node of a runtime model as plain data; see `nodes_of`."""


def nodes_of(runtime_model: ov.Model) -> list[Node]:
    """Returns the nodes of a runtime model: name, place in the order, originals, implementation, precision, shapes."""
    return [_node(op) for op in runtime_model.get_ordered_ops()]


def executed_kernels(
    executed: Sequence[Node], spent: Mapping[str, float], todo: Sequence[Work], rest: str
) -> list[Kernel]:
    """Returns the kernels of a compiled model after inference with PERF_COUNT, in the order in which they run.

    executed: `nodes_of` its runtime model. `spent` has the microseconds of the nodes that inference ran
    (`profiling_info`): the runtime model also lists reorders of weights, which ran once while compiling. todo: `works`
    of the source model. `rest` is the float precision that was compiled.
    """
    nodes = [{**node, "time": spent[node["name"]]} for node in executed if node["name"] in spent]
    nodes.sort(key=lambda node: (node["order"], node["name"]))
    claims, by_size = _claim(nodes, todo)
    claimed = {id(work) for claimed_works in claims for work in claimed_works}
    kernels: list[Kernel] = []
    for index, (node, claim) in enumerate(zip(nodes, claims, strict=True)):
        kernels += _kernels_of(node, claim, rest, "size" if index in by_size else "name")
    missing = sum(work.flops for work in todo if id(work) not in claimed)
    if missing:
        names = tuple(work.name for work in todo if id(work) not in claimed)
        kernels.append(Kernel("(not attributed)", "unknown", "unknown", "unknown", 0.0, missing, names))
    return kernels


def _node(op: ov.Node) -> Node:
    info = op.get_rt_info()
    keys = ("layerType", "originalLayersNames", "primitiveType", "runtimePrecision")
    text = {key: str(info[key].astype(str)) for key in keys}
    return {
        **text,
        "name": op.get_friendly_name(),
        "order": int(info["execOrder"].astype(str)),
        "originals": tuple(name for name in text["originalLayersNames"].split(",") if name),
        "shapes": [tuple(port.get_shape()) for port in op.inputs() if port.get_partial_shape().is_static],
        "out": tuple(op.output(0).get_shape()) if op.get_output_size() and op.output(0).partial_shape.is_static else (),
    }


def _claim(nodes: Sequence[Node], todo: Sequence[Work]) -> tuple[list[list[Work]], set[int]]:
    """Returns the works that each executed node did: by name first, then matmul-like nodes without work by equal FLOPs.

    Also the positions of the nodes that were matched by FLOPs.
    """
    by_alias = {alias: work for work in reversed(todo) for alias in work.aliases}
    taken: set[int] = set()
    claims: list[list[Work]] = []
    for node in nodes:
        mine = []
        for name in node["originals"] if node["layerType"] not in ("Reorder", "Transpose", "Reshape") else ():
            work = by_alias.get(name)
            if work is not None and id(work) not in taken:
                taken.add(id(work))
                mine.append(work)
        claims.append(mine)
    by_size: set[int] = set()
    for index, (node, mine) in enumerate(zip(nodes, claims, strict=True)):
        size = 0.0 if mine else _node_flops(node)
        match = next((work for work in todo if size and id(work) not in taken and work.flops == size), None)
        if match is not None:
            taken.add(id(match))
            mine.append(match)
            by_size.add(index)
    return claims, by_size


def _node_flops(node: Node) -> float:
    """FLOPs that the shapes of an executed FullyConnected or convolution imply; 0 for other nodes."""
    kind, shapes, out = node["layerType"], node["shapes"], node["out"]
    if len(shapes) < 2 or not out:
        return 0.0
    if kind == "FullyConnected":
        return flops.matmul(out, shapes[0][-1])
    if kind == "MatMul":  # its first operand may be transposed
        return flops.matmul(out, math.prod(shapes[0][-2:]) // out[-2]) if len(out) > 1 else 0.0
    if kind in ("Convolution", "Deconvolution"):
        kernel = shapes[1][2 if len(shapes[1]) > len(out) else 1 :]
        return flops.convolution(shapes[0], out, kernel, kind == "Deconvolution")
    return 0.0


def _kernels_of(node: Node, claim: list[Work], rest: str, matched: str) -> list[Kernel]:
    """Returns one kernel per executed node; two for a Subgraph with two precisions: the first has the time."""
    precision = executed_precision_of(node["primitiveType"], node["runtimePrecision"])
    groups: dict[str, list[Work]] = {}
    for work in claim:
        partly = node["layerType"] == "Subgraph" and precision == "int8" and not work.quantized
        groups.setdefault(rest if partly else precision, []).append(work)
    heavy = {work.name for work in claim}
    others = tuple(name for name in node["originals"] if name not in heavy)
    kernels: list[Kernel] = []
    for ran, group in groups.items() or [(precision, [])]:
        first = not kernels
        kernels.append(
            Kernel(
                name=node["name"],
                type=node["layerType"],
                implementation=node["primitiveType"],
                precision=ran,
                time_us=node["time"] if first else 0.0,
                flops=sum(work.flops for work in group),
                originals=(*(work.name for work in group), *(others if first else ())),
                matched=matched,
            )
        )
    return kernels
