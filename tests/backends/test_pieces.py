"""Graphs cut into parts that are timed alone: what is in them, how int8 is placed, and what their times add up to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from backend_toys import quantized, toy_flops

from backends.base import Graph, Precision, QuantSpec, Source, pieces_of
from backends.openvino.backend import OpenVINOBackend

pytest.importorskip("openvino")
pytest.importorskip("nncf")

import openvino as ov
import openvino.opset13 as ops

from backends.openvino import linear
from backends.openvino.engine import OpenVINOEngine, read_model, write_ir
from backends.openvino.flops import CONVOLUTIONS, MATMULS, from_fake_quantize, live_operations, operation_flops
from backends.openvino.keep import name_nodes
from backends.openvino.nncf import NNCFQuantizer
from backends.openvino.passes import fold_constants
from backends.openvino.pieces import CONVOLVED, PLAIN, OpenVINOPieces
from backends.openvino.planned import quantize_as_planned

KEEP = ("LayerNorm", "Softmax", "AttentionScales")


def mlp(folder: Path, depth: int, rows: int = 512, width: int = 256, seed: int = 0) -> Graph:
    """Layers of `width` with a bias and a ReLU, one behind the other, large enough to be timed."""
    random = np.random.default_rng(seed)
    x = ops.parameter((1, rows, width), np.float32)
    x.output(0).set_names({"x"})
    node = x
    for _ in range(depth):
        weight = (random.standard_normal((width, width)) / width**0.5).astype(np.float32)
        node = ops.relu(ops.add(ops.matmul(node, weight, False, True), random.standard_normal(width).astype("f4")))
    result = ops.result(node)
    result.output(0).set_names({"y"})
    return write_ir(ov.Model([result], [x], "mlp"), folder / f"mlp{seed}.xml")


def layers(model: ov.Model) -> list[ov.Node]:
    return [op for op in live_operations(model) if op.get_type_name() in MATMULS | CONVOLUTIONS]


def test_a_backend_may_have_none() -> None:
    class Bare:
        name = "bare"

    assert pieces_of(Bare()) is None  # type: ignore[arg-type]
    assert isinstance(pieces_of(OpenVINOBackend()), OpenVINOPieces)


@pytest.mark.parametrize("precision", [Precision.F32, Precision.INT8])
def test_every_product_is_in_one_part_and_none_holds_two_layers_behind_each_other(
    source: Source, precision: Precision
) -> None:
    forms = OpenVINOPieces().cut(source.graph, precision, KEEP)
    for parts in forms.values():
        flops = sum(
            count * operation_flops(op)
            for count, part in parts
            for op in layers(part.model)
            if "stand-in" not in op.get_friendly_name()
        )
        assert flops == pytest.approx(toy_flops())
        for _, part in parts:
            weighted = [op for op in layers(part.model) if op.input_value(1).get_node().get_type_name() == "Constant"]
            assert precision is Precision.INT8 or len(weighted) <= 1
    shared = Counter(part.words for _, part in forms[PLAIN])
    assert max(shared.values()) == 1  # the two blocks share their parts
    assert max(count for count, _ in forms[PLAIN]) == 2


def test_weights_do_not_matter_and_shapes_do(tmp_path: Path) -> None:
    tool = OpenVINOPieces()

    def keys(**more: int) -> Counter[str]:
        parts = tool.cut(mlp(tmp_path, **more), Precision.F32, ())[PLAIN]
        return Counter({part.key: count for count, part in parts})

    assert keys(depth=3) == keys(depth=3, seed=1)
    assert list(keys(depth=3).values()) == [3]
    assert not set(keys(depth=3)) & set(keys(depth=3, width=128))


@pytest.mark.parametrize("keep", [KEEP, (*KEEP, "conv2", "fc1")])
def test_int8_is_placed_as_nncf_places_it(source: Source, tmp_path: Path, keep: tuple[str, ...]) -> None:
    spec = QuantSpec(calibration_samples=4, smooth_quant_alpha=None, bias_correction="none")
    theirs = read_model(quantized(NNCFQuantizer(), spec, source, tmp_path, keep=keep).path)
    mine = read_model(source.graph.path)
    fold_constants(mine)
    name_nodes(mine)
    count = quantize_as_planned(mine, keep)

    def rounded(model: ov.Model) -> set[str]:
        return {op.get_friendly_name() for op in layers(model) if from_fake_quantize(op.input_value(0).get_node())}

    def sources(model: ov.Model) -> Counter[str]:
        return Counter(
            op.input_value(0).get_node().get_friendly_name()
            for op in live_operations(model)
            if op.get_type_name() == "FakeQuantize"
        )

    assert rounded(mine) == rounded(theirs) and len(rounded(mine)) == count
    assert sources(mine) == sources(theirs)


def test_the_forms_are_those_of_the_quantized_graph(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "LEAST_FLOPS", 0)
    spec = QuantSpec(calibration_samples=4, smooth_quant_alpha=None, bias_correction="none")
    made = quantized(NNCFQuantizer(), spec, source, tmp_path, keep=KEEP)
    planned = OpenVINOPieces().cut(source.graph, Precision.INT8, KEEP)
    assert set(planned) - {PLAIN} == set(OpenVINOBackend().forms(made)) == {CONVOLVED}


def test_the_parts_add_up_to_the_graph(tmp_path: Path) -> None:
    """Within a bound that a busy machine keeps: what is missing, or counts twice, is more."""
    tool, graph = OpenVINOPieces(), mlp(tmp_path, depth=8)
    total = 0.0
    for count, part in tool.cut(graph, Precision.F32, ())[PLAIN]:
        run = tool.opened(part.write(tmp_path / f"{part.key[:8]}.xml").path, Precision.F32)
        runs = [run() for _ in range(15)][3:]
        assert min(runs) > 0
        total += count * float(np.median(runs))
    with OpenVINOEngine(graph, Precision.F32, {"perf_count": True}) as engine:
        feeds = {"x": np.random.default_rng(0).standard_normal((1, 512, 256)).astype("f4")}
        runs = [sum(engine.node_times(feeds, 1).values()) / 1e3 for _ in range(15)][3:]
    assert 0.5 < total / float(np.median(runs)) < 2.0


def test_stand_ins_do_not_count(tmp_path: Path) -> None:
    """A part of an int8 graph is fed f32 and gives f32; rounding and reading that is the neighbours' time."""
    tool, graph = OpenVINOPieces(), mlp(tmp_path, depth=3)
    parts = tool.cut(graph, Precision.INT8, ())[PLAIN]
    inner = next(part for _, part in parts if "and 3 operations" in part.words)
    written = inner.write(tmp_path / "inner.xml")
    names = {op.get_friendly_name() for op in read_model(written.path).get_ops()}
    assert any("stand-in/rounded" in name for name in names) and any("stand-in/reader" in name for name in names)
    with OpenVINOEngine(written, Precision.INT8, {"perf_count": True}) as engine:
        kinds = {k.type: k.precision for k in engine.kernels() if k.flops > 0}
        assert "int8" in kinds.values()
        whole = sum(engine.node_times({"input_0": np.zeros((1, 512, 256), "f4")}, 1).values()) / 1e3
    assert 0 < tool.opened(written.path, Precision.F32)() < 10 * whole
