"""Writes quantized linear layers as 1x1 convolutions, which compute the same and may run faster.

Where a CPU has AVX2 but no VNNI, OpenVINO's int8 FullyConnected (`jit_gemm_i8`) is slower than the float one, while its
int8 convolution is about twice as fast as the float one (2026.4; `pqk bench engine` measures both). The layout decides
whether that reaches the user: tokens (B, N, C) become (B, C, N, 1) by a reshape to (B, N, 1, C) and the transpose
(0, 3, 1, 2), which the plugin, whose convolutions keep channels last, takes as no work at all. What stands between two
linear layers and works element by element, such as bias, GELU and FakeQuantize, stays in that layout.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from backends.openvino.flops import from_fake_quantize, live_operations, operation_flops

if TYPE_CHECKING:
    import openvino as ov

_TO_CONV, _TO_TOKENS = (0, 3, 1, 2), (0, 2, 3, 1)
_ALONE = {"Gelu", "Erf", "Relu", "Sigmoid", "Tanh", "Swish", "HSwish", "Clamp", "Negative", "Exp"}
_PAIRS = {"Add", "Subtract", "Multiply", "Divide", "FakeQuantize"}
"""Operations that are carried over: those of one tensor, and those whose others are constants or carried over too."""

Carried = dict[tuple[str, int], "ov.Output"]
"""A value by the name of its node and its port -> the same in (B, C, N, 1)."""

LEAST_FLOPS = 1e8
"""Of all linear layers of a graph together: fewer take less than a millisecond, whatever their form."""


def linear_nodes(model: ov.Model) -> list[str]:
    """Returns the names of the MatMuls that can be written as convolutions, in topological order.

    Of tokens (B, N, C) with static shapes, quantized, and a constant weight of stored integers. None where all of them
    together have fewer than `LEAST_FLOPS`.
    """
    found = [op for op in live_operations(model) if _kernel_of(op) is not None]
    return [op.get_friendly_name() for op in found] if sum(map(operation_flops, found)) >= LEAST_FLOPS else []


def as_convolutions(model: ov.Model, names: Collection[str]) -> int:
    """Rewrites the MatMuls of these names in place; returns how many. What cannot be written so is left as it is.

    Without names the model is not touched. The convolutions get the names of the MatMuls, and what is carried over
    between them keeps its name.
    """
    carried: Carried = {}
    moved: list[tuple[ov.Output, ov.Output, str]] = []  # value, the same in (B, C, N, 1), name of the node
    count = 0
    if not names:
        return count
    for op in live_operations(model):
        made = None
        if op.get_friendly_name() in names and (weight := _kernel_of(op)) is not None:
            made = _convolution(_carry(op.input_value(0), carried), *weight)
            count += 1
        elif op.get_type_name() in _ALONE | _PAIRS:
            made = _elementwise(op, carried)
        if made is not None:
            carried[_key(op.output(0))] = made.output(0)
            moved.append((op.output(0), made.output(0), op.get_friendly_name()))
    _join(model, carried, moved)
    return count


def _join(model: ov.Model, carried: Carried, moved: list[tuple[ov.Output, ov.Output, str]]) -> None:
    """Gives tokens back to every reader that was not carried over; what nothing reads any more is gone."""
    gone = {_key(value) for value, _, _ in moved}
    for op in reversed(model.get_ordered_ops()):  # quantized for convolutions alone
        if op.get_type_name() == "FakeQuantize" and _key(op.output(0)) in carried and _all_gone(op.output(0), gone):
            gone.add(_key(op.output(0)))
    for value, conv, name in moved:
        readers = [port for port in value.get_target_inputs() if not _is_gone(port, gone)]
        if readers:
            tokens = _to_tokens(conv, tuple(value.get_shape()))
            names = value.get_names()
            for port in readers:
                port.replace_source_output(tokens)
            if any(port.get_node().get_type_name() == "Result" for port in readers):
                tokens.set_names(names)
        value.get_node().set_friendly_name(f"{name}/linear")
        conv.get_node().set_friendly_name(name)
    model.validate_nodes_and_infer_types()


def _all_gone(value: ov.Output, gone: Collection[tuple[str, int]]) -> bool:
    return all(_is_gone(port, gone) for port in value.get_target_inputs())


def _is_gone(port: ov.Input, gone: Collection[tuple[str, int]]) -> bool:
    node = port.get_node()
    return node.get_type_name() != "Result" and all(_key(output) in gone for output in node.outputs())


def _key(value: ov.Output) -> tuple[str, int]:
    return value.get_node().get_name(), value.get_index()


def _kernel_of(op: ov.Node) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]] | None:
    """Returns the kernel of the convolution that a MatMul can be written as, see `_kernel`; None where it cannot."""
    if op.get_type_name() != "MatMul" or op.get_attributes()["transpose_a"]:
        return None
    tokens = op.input_value(0)
    shapes = tokens.get_partial_shape(), op.input_value(1).get_partial_shape()
    if not all(shape.is_static for shape in shapes) or (len(shapes[0]), len(shapes[1])) != (3, 2):
        return None
    return _kernel(op) if from_fake_quantize(tokens.get_node()) else None


def _kernel(matmul: ov.Node) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]] | None:
    """Returns the stored integers (O, I, 1, 1) of a MatMul's weight and the steps that dequantize them, kind and
    constant (O, 1, 1, 1) or (1, 1, 1, 1). None for any other weight.
    """
    turned = not matmul.get_attributes()["transpose_b"]
    node = matmul.input_value(1).get_node()
    width = node.get_output_shape(0)[1 if turned else 0]
    steps: list[tuple[str, np.ndarray]] = []
    while node.get_type_name() in ("Multiply", "Subtract"):
        values = _constant(node.input_value(1).get_node())
        each = (1, width) if turned else (width, 1)
        if values is None or (values.size != 1 and values.shape != each):
            return None
        steps.insert(0, (node.get_type_name(), values.reshape(-1, 1, 1, 1)))
        node = node.input_value(0).get_node()
    source = node.input_value(0).get_node() if node.get_type_name() == "Convert" else node
    stored = source.get_type_name() == "Constant" and source.get_element_type().get_type_name() in ("i8", "u8")
    if not steps or not stored:
        return None
    integers = source.get_data()
    return np.ascontiguousarray(integers.T if turned else integers)[..., None, None], steps


def _constant(node: ov.Node) -> np.ndarray | None:
    """Returns the values of a float constant, or of integers that are converted to floats."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return np.asarray(node.get_data(), dtype=np.float32) if node.get_type_name() == "Constant" else None


def _convolution(tokens: ov.Output, integers: np.ndarray, steps: list[tuple[str, np.ndarray]]) -> ov.Node:
    import openvino.opset13 as ops

    made: ov.Node = ops.convert(ops.constant(integers, dtype=integers.dtype), np.float32)
    for kind, values in steps:
        made = (ops.multiply if kind == "Multiply" else ops.subtract)(made, ops.constant(values))
    return ops.convolution(tokens, made, [1, 1], [0, 0], [0, 0], [1, 1])


def _elementwise(op: ov.Node, carried: Carried) -> ov.Node | None:
    """Returns a copy of the operation on values that are carried over; None where another tensor takes part."""
    from openvino.utils.node_factory import NodeFactory

    values = list(op.input_values())
    if not any(_key(value) in carried for value in values):
        return None
    shape = op.get_output_partial_shape(0)
    if not shape.is_static or len(shape) != 3:
        return None
    inputs: list[ov.Output] = []
    for value in values:
        if _key(value) in carried:
            inputs.append(carried[_key(value)])
        elif (made := _broadcast(value.get_node(), int(shape[2].get_length()))) is not None:
            inputs.append(made)
        else:
            return None
    return NodeFactory(op.get_type_info().version_id).create(op.get_type_name(), inputs, op.get_attributes())


def _broadcast(node: ov.Node, width: int) -> ov.Output | None:
    """Returns a constant of one value, or of one per channel, for (B, C, N, 1); None for any other."""
    import openvino.opset13 as ops

    if node.get_type_name() != "Constant":
        return None
    values = node.get_data()
    if values.size == 1:
        return ops.constant(values.reshape(())).output(0)
    if values.size == width and values.shape[-1] == width:
        return ops.constant(values.reshape(1, width, 1, 1)).output(0)
    return None


def _carry(value: ov.Output, carried: Carried) -> ov.Output:
    """Returns tokens (B, N, C) in (B, C, N, 1); a FakeQuantize is moved behind the change, next to the convolution."""
    if _key(value) not in carried:
        node = value.get_node()
        if node.get_type_name() == "FakeQuantize" and all(
            source.get_node().get_type_name() == "Constant" and np.size(source.get_node().get_data()) == 1
            for source in node.input_values()[1:]
        ):
            carried_source = _carry(node.input_value(0), carried)
            carried[_key(value)] = _requantized(node, carried_source)
        else:
            carried[_key(value)] = _to_conv(value)
    return carried[_key(value)]


def _requantized(node: ov.Node, source: ov.Output) -> ov.Output:
    import openvino.opset13 as ops

    limits = [ops.constant(np.reshape(limit.get_node().get_data(), ())) for limit in node.input_values()[1:]]
    made = ops.fake_quantize(source, *limits, node.get_attributes()["levels"])
    made.set_friendly_name(f"{node.get_friendly_name()}/channels")
    return made.output(0)


def _to_conv(value: ov.Output) -> ov.Output:
    import openvino.opset13 as ops

    batch, count, width = value.get_shape()
    wide = ops.reshape(value, ops.constant(np.array([batch, count, 1, width], np.int64)), False)
    return ops.transpose(wide, ops.constant(np.array(_TO_CONV, np.int64))).output(0)


def _to_tokens(value: ov.Output, shape: tuple[int, ...]) -> ov.Output:
    import openvino.opset13 as ops

    back = ops.transpose(value, ops.constant(np.array(_TO_TOKENS, np.int64)))
    return ops.reshape(back, ops.constant(np.array(shape, np.int64)), False).output(0)
