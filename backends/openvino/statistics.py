"""Adds two checks that NNCF lacks: of the values that it measures on a calibration set, and of its rounding of weights.

- An item may give NaN or inf inside the model; NNCF takes the ranges that come of it. `watched` adds a sum of each
  operand of a matmul or convolution to the graph that NNCF runs (least and largest values pass over NaN, sums do not),
  and refuses the item.
- NNCF gives no output channel a range below 1 % of the widest one's, nor below 8e-5 (`fix_zero_filters_symmetric`): a
  channel of very small weights gets few steps or none. `weight_magnitudes` of both graphs shows which.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.calibration import CalibrationItems, not_finite
from backends.openvino.flops import CONVOLUTIONS, MATMULS, live_operations

if TYPE_CHECKING:
    import openvino as ov

_SUM = "finite sum of "


@contextlib.contextmanager
def watched(items: CalibrationItems) -> Iterator[None]:
    """Makes NNCF's engines raise BackendError for an item that gives NaN or inf inside, within this context."""
    from nncf.openvino.engine import OVNativeEngine

    patched: Any = OVNativeEngine
    start, run = patched.__init__, patched.infer

    def start_with_sums(engine: Any, model: ov.Model, *arguments: Any, **named: Any) -> None:
        start(engine, _with_sums(model), *arguments, **named)

    def run_and_check(engine: Any, input_data: Any) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = run(engine, input_data)
        for name in [name for name in outputs if name.startswith(_SUM)]:
            if not np.isfinite(outputs.pop(name)).all():
                raise not_finite(name.removeprefix(_SUM), items.index)
        return outputs

    patched.__init__, patched.infer = start_with_sums, run_and_check
    try:
        yield
    finally:
        patched.__init__, patched.infer = start, run


def _with_sums(model: ov.Model) -> ov.Model:
    """Returns a copy of `model` that also gives the sum of each operand of its matmuls and convolutions, in order.

    Those that Softmax makes are left out: they are large, and finite where the operands before it are.
    """
    import openvino.opset13 as ops

    copy = model.clone()
    live = live_operations(copy)
    computed = {op.get_friendly_name() for op in [*copy.get_parameters(), *live] if op.get_type_name() != "Softmax"}
    results: dict[str, Any] = {}
    for op in [op for op in live if op.get_type_name() in MATMULS | CONVOLUTIONS]:
        for value in op.input_values():
            maker = value.get_node().get_friendly_name()
            name = value.get_any_name() if value.get_names() else maker
            if maker in computed and name not in results:
                axes = np.arange(value.get_partial_shape().rank.get_length(), dtype=np.int64)
                total = ops.reduce_sum(value, ops.constant(axes), False)
                total.output(0).get_tensor().set_names({_SUM + name})
                results[name] = ops.result(total)
    copy.add_results(list(results.values()))
    return copy


def weight_magnitudes(model: ov.Model) -> dict[str, np.ndarray]:
    """Returns the largest weight of each output channel, for matmuls and convolutions with constant weights.

    Of a quantized model those of the stored integers, in steps of the channel.
    """
    found = {}
    for op in live_operations(model):
        if op.get_type_name() in MATMULS | CONVOLUTIONS:
            weight = _stored(op.input_value(1).get_node())
            if weight is not None:
                axes = tuple(axis for axis in range(weight.ndim) if axis not in _output_axes(op, weight.ndim))
                found[op.get_friendly_name()] = np.abs(weight.astype(np.float32)).max(axis=axes).reshape(-1)
    return found


def _stored(node: ov.Node) -> np.ndarray | None:
    """Returns the constant behind the nodes that spread integers to floats; None when there is none."""
    while node.get_type_name() in {"Multiply", "Subtract", "Convert", "FakeQuantize"}:
        node = node.input_value(0).get_node()
    return np.asarray(node.get_data()) if node.get_type_name() == "Constant" and node.get_output_shape(0) else None


def _output_axes(op: ov.Node, rank: int) -> tuple[int, ...]:
    """Returns the axes of a weight that index output channels."""
    kind = op.get_type_name()
    if kind == "MatMul":
        return (rank - 2,) if op.get_attributes()["transpose_b"] else (rank - 1,)
    axis = 1 if "Backprop" in kind else 0
    return (0, axis + 1) if kind.startswith("Group") else (axis,)
