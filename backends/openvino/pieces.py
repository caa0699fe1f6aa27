"""Cuts a model into pieces, and times a piece alone: the measured parts of which a speed is predicted.

A piece is a linear layer or a convolution with all light work behind it, up to the next ones: what the runtime fuses
with it, such as bias, activation and residual addition, and what follows, such as a norm or the products of attention.
Pieces of equal operations and shapes take equal times, whatever their weights, and have equal keys. A piece never holds
two layers behind each other, so no engine of a model is built to time its pieces.

Where a piece begins or ends with rounded values, a stand-in quantizes before it or reads int8 behind it, so that the
runtime chooses the same types and layouts as inside the model. Their time is left out, and so are the changes of layout
at the ends, which a model does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from backends.base import Graph, Precision
from backends.openvino.engine import OpenVINOEngine, describe_ir, read_model, write_ir
from backends.openvino.flops import live_operations, operation_flops
from backends.openvino.keep import name_nodes
from backends.openvino.linear import as_convolutions, linear_nodes
from backends.openvino.passes import fold_constants
from backends.openvino.planned import heavy, live_names, quantize_as_planned

if TYPE_CHECKING:
    import openvino as ov

PLAIN, CONVOLVED = "plain", "linear layers as 1x1 convolutions"
_STAND_IN, _INPUT = "stand-in", "input_"
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze"}
_HASHED = 1 << 16  # elements: larger tables of integers are told apart by their shapes alone

Value = tuple[str, int]


@dataclass(frozen=True)
class Piece:
    """A part of a model. key: equal for pieces that do the same work; words: its layer and shapes, for a reader."""

    key: str
    words: str
    model: ov.Model

    def write(self, path: Path) -> Graph:
        """Writes the piece as IR."""
        return write_ir(self.model, path)


class OpenVINOPieces:
    """Cuts and times the pieces of OpenVINO's graphs."""

    sources: ClassVar[tuple[str, ...]] = ("backends.openvino.pieces",)

    def cut(self, graph: Graph, precision: Precision, keep: Sequence[str]) -> dict[str, list[tuple[int, Piece]]]:
        """Returns the pieces of a float graph as it runs at a precision, by form: how often each occurs, and the piece.

        Of INT8 the placement is planned from the keep-list, and there is a form for each that `Backend.forms` may
        offer. Raises BackendError for a graph that cannot be read and for a keep entry that matches no node.
        """
        found = {PLAIN: _cut(_model_of(graph, precision, keep))}
        if precision == Precision.INT8:
            model = _model_of(graph, precision, keep)
            if names := linear_nodes(model):
                as_convolutions(model, names)
                found[CONVOLVED] = _cut(model)
        return found

    def yardstick(self, path: Path) -> Graph:
        """Writes a linear layer, a convolution and a sum of large maps: what takes time in most models, a few ms."""
        import openvino as ov
        import openvino.opset13 as ops

        tokens, image = ops.parameter((1, 512, 512), np.float32), ops.parameter((1, 64, 64, 64), np.float32)
        inputs = [tokens, image]
        for place, one in enumerate(inputs):
            one.output(0).set_names({f"{_INPUT}{place}"})
        linear = ops.matmul(tokens, ops.constant(np.full((512, 512), 1e-3, np.float32)), False, True)
        kernel = ops.constant(np.full((64, 64, 3, 3), 1e-3, np.float32))
        conv = ops.convolution(image, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
        large = ops.interpolate(conv, np.array([256, 256]), "linear_onnx", "sizes", axes=np.array([2, 3]))
        results = [ops.result(value) for value in (linear, ops.sqrt(ops.abs(large)))]
        for place, one in enumerate(results):
            one.output(0).set_names({f"output_{place}"})
        return write_ir(ov.Model(results, inputs, "yardstick"), path)

    def opened(self, graph: Path, rest: Precision) -> Callable[[], float]:
        """Compiles a piece that was written to `graph`; each call runs it and returns its milliseconds.

        rest: its float precision.
        """
        described = describe_ir(graph)
        rounds = any(op.get_type_name() == "FakeQuantize" for op in read_model(graph).get_ops())
        random = np.random.default_rng(0)
        feeds = {
            info.name: random.standard_normal(info.shape).astype(info.dtype)
            if info.dtype.startswith("float")
            else np.zeros(info.shape, info.dtype)
            for info in described.inputs
        }
        options = {"perf_count": True, "rest": str(rest)}
        engine = OpenVINOEngine(described, Precision.INT8 if rounds else rest, options)
        counted = _counted(engine.runtime_model())

        def run() -> float:
            spent = sum(us for name, us in engine.node_times(feeds, 1).items() if name in counted)
            return max(0.0, spent) / 1e3  # what takes a microsecond may come out below 0

        return run


def _model_of(graph: Graph, precision: Precision, keep: Sequence[str]) -> ov.Model:
    model = read_model(graph.path)
    fold_constants(model)
    name_nodes(model)
    if precision == Precision.INT8:
        quantize_as_planned(model, keep)
    return model


def _cut(model: ov.Model) -> list[tuple[int, Piece]]:
    """Takes the model apart: the model itself is of no use afterwards."""
    live = live_names(model)
    layers = {op.get_name() for op in live_operations(model) if heavy(op, live)}
    groups = _groups(model, layers)
    member = {op.get_name(): number for number, group in enumerate(groups) for op in group}
    inputs = {op.get_name() for op in model.get_parameters()}
    described = [_described(group, number, member, inputs) for number, group in enumerate(groups)]
    ends = [_ends(group, number, member) for number, group in enumerate(groups)]
    counts: Counter[str] = Counter()
    pieces: dict[str, Piece] = {}
    for number, group in enumerate(groups):
        key = sha256(described[number].encode()).hexdigest()
        counts[key] += 1
        part = _separate(group, number, ends[number], member, inputs)
        if key not in pieces:
            pieces[key] = Piece(key, _words(group, layers), part)
    return [(counts[key], piece) for key, piece in pieces.items()]


def _groups(model: ov.Model, layers: set[str]) -> list[list[ov.Node]]:
    """Returns the operations of each piece, in topological order.

    The level of an operation is the largest number of layers on a way from an input to it; a piece is what hangs
    together on one level. Moves of values belong to the light work that reads them, on whatever level that is.
    """
    operations = live_operations(model)
    level: dict[str, int] = {}
    for op in operations:
        before = [level.get(source.get_node().get_name(), 0) for source in op.input_values()]
        level[op.get_name()] = max(before, default=0) + (op.get_name() in layers)
    for op in reversed(operations):
        readers = _readers(op)
        if op.get_type_name() in _MOVES and readers and not any(r.get_name() in layers for r in readers):
            levels = {level.get(reader.get_name(), -1) for reader in readers}
            if len(levels) == 1 and levels != {-1}:
                level[op.get_name()] = levels.pop()
    joined: dict[str, str] = {name: name for name in level}

    def root(name: str) -> str:
        while joined[name] != name:
            joined[name] = joined[joined[name]]
            name = joined[name]
        return name

    for op in operations:
        for source in op.input_values():
            name = source.get_node().get_name()
            if level.get(name, -1) == level[op.get_name()]:
                joined[root(name)] = root(op.get_name())
    groups: dict[str, list[ov.Node]] = {}
    for op in operations:
        groups.setdefault(root(op.get_name()), []).append(op)
    return list(groups.values())


def _readers(op: ov.Node) -> list[ov.Node]:
    return [port.get_node() for output in op.outputs() for port in output.get_target_inputs()]


def _described(group: list[ov.Node], number: int, member: Mapping[str, int], inputs: set[str]) -> str:
    """Returns a text that is equal for pieces of equal work: operations, attributes, shapes, and where values go."""
    places = {op.get_name(): place for place, op in enumerate(group)}
    outside: dict[Value, int] = {}
    lines = []
    for op in group:
        operands = []
        for value in op.input_values():
            node = value.get_node()
            if node.get_name() in places:
                operands.append(f"{places[node.get_name()]}.{value.get_index()}")
            elif node.get_name() in member or node.get_name() in inputs:
                which = outside.setdefault((node.get_name(), value.get_index()), len(outside))
                rounding = _rounding(value)
                operands.append(f"in{which}:{_type_of(value)}{_limits(rounding) if rounding else ''}")
            else:
                operands.append(_constant(value))
        goes = [
            f"{output.get_index()}>{'int8' if _rounding(output) else ''}"
            for output in op.outputs()
            if any(member.get(port.get_node().get_name()) != number for port in output.get_target_inputs())
        ]
        about = sorted((name, str(value)) for name, value in op.get_attributes().items())
        kind = _limits(op) if op.get_type_name() == "FakeQuantize" else ""
        out = [_type_of(output) for output in op.outputs()]
        lines.append(f"{op.get_type_name()}{kind} {about} {operands} {out} {goes}")
    return "\n".join(lines)


def _rounding(value: ov.Output) -> ov.Node | None:
    """Returns the FakeQuantize that a value comes from, through moves of values; None for another one."""
    node = value.get_node()
    while node.get_type_name() in _MOVES:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "FakeQuantize" else None


def _type_of(value: ov.Output) -> str:
    return f"{value.get_element_type().get_type_name()}{list(value.get_shape())}"


def _limits(node: ov.Node) -> str:
    """Returns whether a FakeQuantize rounds to signed numbers: kernels differ, and the ranges do not matter."""
    low = np.asarray(node.input_value(1).get_node().get_data())
    return f" signed={bool(low.min() < 0)} ranges={low.size}"


def _constant(value: ov.Output) -> str:
    """Returns the text of a constant: floats and weights by their shapes, small tables of integers by their values."""
    node = value.get_node()
    if node.get_type_name() != "Constant":
        return f"{node.get_type_name()}({', '.join(_constant(one) for one in node.input_values())})"
    kind = node.get_element_type().get_type_name()
    table = kind in ("i32", "i64") and int(np.prod(node.get_output_shape(0))) <= _HASHED
    values = sha256(np.ascontiguousarray(node.get_data()).tobytes()).hexdigest()[:16] if table else ""
    return f"const:{_type_of(value)}{values}"


def _words(group: list[ov.Node], layers: set[str]) -> str:
    """Returns 'MatMul [1, 1024, 384] x [384, 576] and 26 operations'."""
    found = [op for op in group if op.get_name() in layers]
    first = max(found or group, key=operation_flops)
    shapes = " x ".join(str(list(value.get_shape())) for value in first.input_values()[: 2 if found else 1])
    return f"{first.get_type_name()} {shapes} and {len(group) - 1} operations"


def _ends(group: list[ov.Node], number: int, member: Mapping[str, int]) -> list[ov.Output]:
    """Returns the values that something outside of the piece reads."""
    return [
        output
        for op in group
        for output in op.outputs()
        if any(member.get(port.get_node().get_name()) != number for port in output.get_target_inputs())
    ]


def _separate(
    group: list[ov.Node], number: int, ends: Sequence[ov.Output], member: Mapping[str, int], inputs: set[str]
) -> ov.Model:
    """Gives a piece inputs and outputs of its own, and returns it as a model."""
    import openvino as ov
    import openvino.opset13 as ops

    parameters: list[Any] = []
    given: dict[Value, Any] = {}
    for op in group:
        for port in op.inputs():
            value = port.get_source_output()
            name = value.get_node().get_name()
            if member.get(name) == number or (name not in member and name not in inputs):
                continue
            key = name, value.get_index()
            if key not in given:
                rounding = _rounding(value)
                parameter = ops.parameter(list(value.get_shape()), value.get_element_type())
                parameter.set_friendly_name(f"{_INPUT}{len(parameters)}")
                parameter.output(0).set_names({f"{_INPUT}{len(parameters)}"})
                parameters.append(parameter)
                given[key] = _stand_in(rounding, parameter) if rounding else parameter.output(0)
            port.replace_source_output(given[key])
    results = []
    for place, value in enumerate(ends):
        result = ops.result(_reader(value) if _rounding(value) else value)
        result.output(0).set_names({f"output_{place}"})
        results.append(result)
    return ov.Model(results, parameters, "piece")


def _stand_in(node: ov.Node, parameter: Any) -> ov.Output:
    """Returns the rounded values of an input, as the piece before makes them."""
    import openvino.opset13 as ops

    limits = [ops.constant(np.asarray(v.get_node().get_data())) for v in node.input_values()[1:]]
    made: ov.Output = ops.fake_quantize(parameter, *limits, node.get_attributes()["levels"]).output(0)
    made.get_node().set_friendly_name(f"{_STAND_IN}/rounded/{parameter.get_friendly_name()}")
    return made


def _reader(value: ov.Output) -> ov.Output:
    """Returns the output of a small int8 layer that reads rounded values, as the piece behind does."""
    import openvino.opset13 as ops

    shape = tuple(value.get_shape())
    image = len(shape) == 4
    width = shape[1] if image else shape[-1]
    stored = np.ones((8, width, 1, 1) if image else (8, width), np.int8)
    scale = np.full((8, *[1] * (stored.ndim - 1)), 1e-3, np.float32)
    weights = ops.multiply(ops.convert(ops.constant(stored), np.float32), ops.constant(scale))
    made = (
        ops.convolution(value, weights, [1, 1], [0, 0], [0, 0], [1, 1])
        if image
        else ops.matmul(value, weights, False, True)
    )
    made.set_friendly_name(f"{_STAND_IN}/reader/{value.get_node().get_friendly_name()}")
    output: ov.Output = made.output(0)
    return output


def _counted(runtime: ov.Model) -> set[str]:
    """Returns the names of the executed nodes of a piece that its model runs too; see the module."""
    left = set()
    for op in runtime.get_ordered_ops():
        info = op.get_rt_info()
        kind = str(info["layerType"].astype(str))
        originals = [name for name in str(info["originalLayersNames"].astype(str)).split(",") if name]
        named = originals or [op.get_friendly_name()]
        outer = kind in ("Input", "Parameter", "Output", "Result") or all(
            n.startswith((_STAND_IN, _INPUT)) for n in named
        )
        if outer:
            left.add(op.get_friendly_name())
    for op in runtime.get_ordered_ops():
        if str(op.get_rt_info()["layerType"].astype(str)) == "Reorder":
            sources = {value.get_node().get_friendly_name() for value in op.input_values()}
            readers = {node.get_friendly_name() for node in _readers(op)}
            if sources & left or readers <= left:
                left.add(op.get_friendly_name())
    return {op.get_friendly_name() for op in runtime.get_ordered_ops()} - left
