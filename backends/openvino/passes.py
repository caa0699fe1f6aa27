"""Rewrites OpenVINO models without changing a number, to make the files smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import openvino as ov

_SMALL = 4096  # elements; larger constants are compared by the writer of the `.bin` already


def fold_constants(model: ov.Model) -> None:
    """Evaluates what depends on constants alone, such as the shapes that the ONNX reader spells out.

    Only for float models: folding would turn stored int8 weights back into floats.
    """
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)


def share_constants(model: ov.Model) -> int:
    """Lets equal small constants be one node; returns how many were dropped.

    A quantized graph repeats each range as input and output limits, and each shape, axis and index wherever it is used.
    """
    first: dict[tuple[str, tuple[int, ...], bytes], ov.Node] = {}
    dropped = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Constant":
            continue
        shape = tuple(op.get_output_shape(0))
        if int(np.prod(shape, dtype=np.int64)) > _SMALL:
            continue
        key = (op.get_element_type().get_type_name(), shape, np.ascontiguousarray(op.get_data()).tobytes())
        kept = first.setdefault(key, op)
        if kept is op:
            continue
        for target in op.output(0).get_target_inputs():
            target.replace_source_output(kept.output(0))
        dropped += 1
    return dropped


def flatten_tables(model: ov.Model) -> int:
    """Writes float (1, ..., N, D) factors as (N, D), so that `split_tables` finds them; returns how many there were.

    Products spread out the leading axes themselves. Exported torch programs spell them out, the ONNX reader does not.
    """
    import openvino.opset13 as ops

    flattened = 0
    for op in model.get_ordered_ops():
        shape = tuple(op.get_output_shape(0)) if op.get_type_name() == "Constant" else ()
        if len(shape) <= 2 or int(np.prod(shape)) != shape[-2] * shape[-1] or int(np.prod(shape)) <= _SMALL:
            continue
        targets = op.output(0).get_target_inputs()
        products = all(port.get_node().get_type_name() == "Multiply" for port in targets)
        if op.get_element_type().get_type_name() != "f32" or not products:
            continue
        others = [
            v for port in targets for v in port.get_node().input_values() if v.get_node().get_name() != op.get_name()
        ]
        if not others or any(v.get_partial_shape().rank.get_length() < len(shape) for v in others):
            continue  # the product would lose axes
        flat = ops.constant(op.get_data().reshape(shape[-2:]))
        for port in targets:
            port.replace_source_output(flat.output(0))
        flattened += 1
    return flattened


def split_tables(model: ov.Model) -> int:
    """Stores tables over a grid (the rotary embedding's) by their rows and columns; returns how many were split.

    A (rows * cols, D) constant whose first D/2 columns depend on the row alone and whose others on the column alone is
    replaced by two small constants that are spread out again. The runtime folds that back when it compiles.
    """
    import openvino.opset13 as ops

    split = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Constant" or len(op.get_output_shape(0)) != 2:
            continue
        count, width = op.get_output_shape(0)
        if count * width <= _SMALL or width % 2 or op.get_element_type().get_type_name() != "f32":
            continue
        table = op.get_data()
        found = _row_and_column(table)
        if found is None:
            continue
        by_row, by_col = found
        grid = [by_row.shape[0], by_col.shape[1], width // 2]
        parts = [ops.broadcast(ops.constant(part), ops.constant(np.array(grid, np.int64))) for part in found]
        whole = ops.reshape(ops.concat(parts, -1), ops.constant(np.array([count, width], np.int64)), False)
        for target in op.output(0).get_target_inputs():
            target.replace_source_output(whole.output(0))
        split += 1
    return split


def _row_and_column(table: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the (rows,1,D/2) and (1,cols,D/2) parts of a grid table (rows*cols, D); None when it is none."""
    count, width = table.shape
    half = table[:, : width // 2]
    changed = np.flatnonzero((half != half[0]).any(axis=1))  # the first row of the grid ends where its half changes
    cols = int(changed[0]) if changed.size else count
    if cols < 2 or cols == count or count % cols:
        return None
    grid = table.reshape(count // cols, cols, width)
    by_row, by_col = grid[:, :1, : width // 2], grid[:1, :, width // 2 :]
    if not ((grid[..., : width // 2] == by_row).all() and (grid[..., width // 2 :] == by_col).all()):
        return None
    return np.ascontiguousarray(by_row), np.ascontiguousarray(by_col)
