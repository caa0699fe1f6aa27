"""Places quantization in a float model as NNCF would, without data: what an int8 engine will run is known before it.

Rounded are the values that linear layers, convolutions and resizes read, save where a keep-list protects the layer;
products of two activations stay in float, as a keep-list with the scales of attention makes NNCF leave them. The ranges
are invented, so the model computes nonsense: it serves to see how fast it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from backends.openvino.flops import CONVOLUTIONS, live_operations
from backends.openvino.keep import kept_nodes

if TYPE_CHECKING:
    import openvino as ov

_PASSED = {"Reshape", "Transpose", "Squeeze", "Unsqueeze"}
"""Moves of values that NNCF rounds before, not behind."""
_LIMIT = 4.0


def heavy(op: ov.Node, live: set[str]) -> bool:
    """Returns whether an operation is a linear layer or a convolution: its weights do not depend on the inputs."""
    if op.get_type_name() not in {"MatMul", *CONVOLUTIONS}:
        return False
    return op.input_value(1).get_node().get_name() not in live


def live_names(model: ov.Model) -> set[str]:
    """Returns the unique names of the inputs and of all operations whose values depend on them."""
    return {op.get_name() for op in (*model.get_parameters(), *live_operations(model))}


def quantize_as_planned(model: ov.Model, keep: Iterable[str]) -> int:
    """Rounds activations and weights in place, with one FakeQuantize per tensor; returns how many layers are rounded.

    Constants must be folded before. Raises BackendError for an entry of the keep-list that matches no node.
    """
    kept, live = kept_nodes(model, keep), live_names(model)
    rounded: dict[tuple[str, int], ov.Output] = {}
    count = 0
    for op in live_operations(model):
        is_heavy = heavy(op, live)
        if op.get_friendly_name() in kept or not (is_heavy or op.get_type_name() == "Interpolate"):
            continue
        if op.get_type_name() == "MatMul" and op.input_value(0).get_node().get_name() not in live:
            continue  # the activation stands on the right
        reader = op.input(0)
        while reader.get_source_output().get_node().get_type_name() in _PASSED:
            reader = reader.get_source_output().get_node().input(0)
        value = reader.get_source_output()
        if value.get_node().get_type_name() != "FakeQuantize":
            key = value.get_node().get_name(), value.get_index()
            if key not in rounded:
                rounded[key] = _rounded(value)
            reader.replace_source_output(rounded[key])
        if is_heavy:
            op.input(1).replace_source_output(_stored(op))
            count += 1
    model.validate_nodes_and_infer_types()
    return count


def _rounded(value: ov.Output) -> ov.Output:
    import openvino.opset13 as ops

    low = 0.0 if value.get_node().get_type_name() == "Relu" else -_LIMIT * 128 / 127
    limits = [ops.constant(np.float32(limit)) for limit in (low, _LIMIT) * 2]
    made: ov.Output = ops.fake_quantize(value, *limits, 256).output(0)
    made.get_node().set_friendly_name(f"{value.get_node().get_friendly_name()}/{value.get_index()}/rounded")
    return made


def _stored(op: ov.Node) -> ov.Output:
    """Returns the weights of a layer as int8 with a scale for each output channel, as an IR holds them."""
    import openvino.opset13 as ops

    shape = tuple(op.input_value(1).get_shape())
    axis = 0
    if op.get_type_name() == "MatMul":
        axis = len(shape) - (2 if op.get_attributes()["transpose_b"] else 1)
    elif op.get_type_name().endswith("BackpropData"):
        axis = 1
    integers = np.random.default_rng(0).integers(-63, 64, shape).astype(np.int8)
    scales = np.full([size if place == axis else 1 for place, size in enumerate(shape)], 1e-3, np.float32)
    made: ov.Output = ops.multiply(ops.convert(ops.constant(integers), np.float32), ops.constant(scales)).output(0)
    return made
