"""Rewrites of OpenVINO models: smaller files, the same numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ov = pytest.importorskip("openvino")

import openvino.opset13 as ops  # noqa: E402

from backends.openvino.engine import write_ir  # noqa: E402
from backends.openvino.passes import flatten_tables, fold_constants, share_constants, split_tables  # noqa: E402

ROWS, COLS, WIDTH = 12, 16, 64


def rope_table(rows: int = ROWS, cols: int = COLS, width: int = WIDTH) -> np.ndarray:
    """(rows * cols, width): cosines of the row in the first half of the columns, of the column in the other."""
    speeds = 100.0 ** (-np.arange(width // 4) / (width // 4))

    def angles(count: int) -> np.ndarray:
        return np.tile(np.cos(np.arange(count)[:, None] * speeds), 2)

    by_row = np.broadcast_to(angles(rows)[:, None], (rows, cols, width // 2))
    by_col = np.broadcast_to(angles(cols)[None], (rows, cols, width // 2))
    return np.concatenate([by_row, by_col], -1).reshape(rows * cols, width).astype(np.float32)


def rope_model(table: np.ndarray) -> ov.Model:
    """x -> FakeQuantize(x * table) with limits that repeat, then a reshape whose target is computed from constants."""
    x = ops.parameter(list(table.shape), np.float32, name="x")
    turned = ops.multiply(x, ops.constant(table))
    low, high = np.float32(-2), np.float32(2)
    for _ in range(2):
        limits = [ops.constant(value) for value in (low, high, low, high)]
        turned = ops.fake_quantize(turned, *limits, 256)
    shape = ops.concat([ops.constant(np.array([n], np.int64)) for n in (2, table.shape[0] // 2, table.shape[1])], 0)
    return ov.Model([ops.reshape(turned, shape, False)], [x], "rope")


def run(model: ov.Model, x: np.ndarray) -> np.ndarray:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([x])[0])


def sample(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def kinds(model: ov.Model) -> Counter[str]:
    return Counter(op.get_type_name() for op in model.get_ordered_ops())


def size(model: ov.Model, folder: Path) -> int:
    return write_ir(model, folder / "m.xml").size_bytes


def test_together_smaller_and_the_same_numbers(tmp_path: Path) -> None:
    table = rope_table()
    model, x = rope_model(table), sample(table.shape)
    before, bytes_before = run(model, x), size(model, tmp_path)
    assert split_tables(model) == 1
    assert share_constants(model) > 0
    assert np.array_equal(run(model, x), before)
    assert size(model, tmp_path) < 0.5 * bytes_before
    again = ov.Core().read_model(tmp_path / "m.xml")
    assert np.array_equal(run(again, x), before)


def test_share_constants_keeps_one_of_each() -> None:
    model, x = rope_model(rope_table()), sample((ROWS * COLS, WIDTH))
    before, constants = run(model, x), kinds(model)["Constant"]
    dropped = share_constants(model)
    assert dropped == 6  # eight limits hold two values; the numbers of the shape differ from each other
    assert kinds(model)["Constant"] == constants - dropped
    assert share_constants(model) == 0
    assert np.array_equal(run(model, x), before)


def test_share_constants_tells_types_and_shapes_apart() -> None:
    """Equal bytes are not equal constants: 0.0 is not the integer 0, and [1] is not 1."""
    x = ops.parameter([4], np.float32, name="x")
    zero = ops.constant(np.float32(0))
    as_integer = ops.convert(ops.constant(np.int32(0)), np.float32)
    vector = ops.constant(np.zeros(1, np.float32))
    minus = ops.constant(np.float32(-0.0))
    whole = ops.add(ops.add(ops.add(ops.add(x, zero), as_integer), vector), minus)
    assert share_constants(ov.Model([whole], [x], "m")) == 0


def test_split_tables_rebuilds_every_bit() -> None:
    table = rope_table()
    model = rope_model(table)
    assert split_tables(model) == 1
    assert max(np.prod(op.get_output_shape(0)) for op in model.get_ops() if op.get_type_name() == "Constant") < 1024
    fold_constants(model)
    held = [op.get_data() for op in model.get_ops() if op.get_type_name() == "Constant"]
    assert [np.array_equal(array, table) for array in held if array.shape == table.shape] == [True]


@pytest.mark.parametrize(
    "case", ["noise", "one cell", "first column", "constant", "rows only", "small", "f16", "halves swapped"]
)
def test_split_tables_leaves_other_tables_alone(case: str) -> None:
    table = rope_table()
    if case == "noise":
        table = sample(table.shape)
    elif case == "one cell":
        table[5 * COLS + 3, 40] += 1e-6
    elif case == "first column":
        table[:, 0] = np.arange(len(table))
    elif case == "constant":
        table[:] = 0.5
    elif case == "rows only":
        table = np.tile(sample((1, WIDTH)), (ROWS * COLS, 1)) * np.arange(1, ROWS * COLS + 1, dtype=np.float32)[:, None]
    elif case == "small":
        table = rope_table(4, 4, 16)
    elif case == "halves swapped":
        table = np.concatenate([table[:, WIDTH // 2 :], table[:, : WIDTH // 2]], 1)
    x = ops.parameter(list(table.shape), np.float16 if case == "f16" else np.float32, name="x")
    constant = ops.constant(table.astype(np.float16) if case == "f16" else table)
    model = ov.Model([ops.multiply(x, constant)], [x], "m")
    constants = kinds(model)
    assert split_tables(model) == 0
    assert kinds(model) == constants


def test_fold_constants_evaluates_shapes_and_changes_no_number() -> None:
    model, x = rope_model(rope_table()), sample((ROWS * COLS, WIDTH))
    before = run(model, x)
    assert kinds(model)["Concat"] == 1
    fold_constants(model)
    assert kinds(model)["Concat"] == 0
    assert kinds(model)["FakeQuantize"] == 2
    assert np.array_equal(run(model, x), before)


@pytest.mark.parametrize(("shape", "flattened"), [([1, 3, 96, 64], 1), ([96, 64], 0)])
def test_tables_with_leading_axes_become_two_dimensional_where_the_product_keeps_its_axes(shape, flattened):
    table = np.random.default_rng(0).standard_normal((1, 1, 96, 64)).astype(np.float32)
    x = ops.parameter(shape, name="x")
    model = ov.Model([ops.multiply(x, ops.constant(table))], [x], "m")
    before = list(model.outputs[0].get_shape())
    assert flatten_tables(model) == flattened
    model.validate_nodes_and_infer_types()
    assert list(model.outputs[0].get_shape()) == before
    feed = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_array_equal(compiled([feed])[0], feed * table)
