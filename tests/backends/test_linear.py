"""Quantized linear layers as 1x1 convolutions: the same numbers, other kernels, no work to change the layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from backend_toys import image, quantized

from backends.base import Graph, Kernel, Precision, QuantSpec, executed_precision, forms_of
from backends.openvino.backend import OpenVINOBackend

pytest.importorskip("openvino")
pytest.importorskip("nncf")

import openvino as ov
import openvino.opset13 as ops

from backends.openvino import linear
from backends.openvino.engine import OpenVINOEngine, read_model, write_ir
from backends.openvino.inc import INCQuantizer
from backends.openvino.keep import check_keep
from backends.openvino.nncf import NNCFQuantizer

NNCF_SPEC = QuantSpec(calibration_samples=4, smooth_quant_alpha=0.95, bias_correction="fast")
PLAIN_SPEC = QuantSpec(calibration_samples=4, smooth_quant_alpha=None, bias_correction="none")
FEEDS = {"image": image(99).numpy()}


@pytest.fixture(autouse=True)
def every_graph_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST_FLOPS", 0)


@pytest.fixture(scope="module", params=["nncf", "inc"])
def toy(request, source, tmp_path_factory) -> Graph:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "nncf":
        return quantized(NNCFQuantizer(), NNCF_SPEC, source, folder, keep=())
    pytest.importorskip("neural_compressor")
    return quantized(INCQuantizer(), PLAIN_SPEC, source, folder, keep=())


def run(graph: Graph, names: tuple[str, ...] = ()) -> tuple[dict[str, np.ndarray], list[Kernel]]:
    with OpenVINOEngine(graph, Precision.INT8, {"as_convolutions": names, "rest": "f32"}) as engine:
        return dict(engine.infer(FEEDS)), engine.kernels()


def assert_same(found: np.ndarray, want: np.ndarray) -> None:
    """But for values that float rounding, the kernel's own, puts on the other side of an int8 rounding limit."""
    apart, largest = np.abs(found - want), np.abs(want).max()
    assert apart.mean() < 5e-3 * largest and apart.max() < 0.05 * largest


def test_the_numbers_stay_and_the_kernels_change(toy: Graph) -> None:
    names = linear.linear_nodes(read_model(toy.path))
    assert len(names) == 8 and {name.rsplit("/", 2)[1] for name in names} == {"qkv", "proj", "fc1", "fc2"}
    plain, before = run(toy)
    conv, after = run(toy, tuple(names))
    for name, value in plain.items():
        assert_same(conv[name], value)
    types = [Counter(kernel.type for kernel in kernels) for kernels in (before, after)]
    assert types[0]["FullyConnected"] == 8 and types[1]["FullyConnected"] == 0
    assert types[1]["Convolution"] == types[0]["Convolution"] + 8
    assert types[1]["Transpose"] <= types[0]["Transpose"] and types[1]["Reorder"] <= types[0]["Reorder"]
    assert executed_precision(after) == pytest.approx(executed_precision(before))
    claimed = {original for kernel in after if kernel.type == "Convolution" for original in kernel.originals}
    assert claimed.issuperset(names) and all(kernel.precision == "int8" for kernel in after if "1x1" in kernel.name)


def test_some_layers_alone(toy: Graph) -> None:
    names = linear.linear_nodes(read_model(toy.path))
    chosen = tuple(name for name in names if "blocks.1" in name and "fc" in name)
    plain, _ = run(toy)
    conv, kernels = run(toy, chosen)
    assert sum(kernel.type == "FullyConnected" for kernel in kernels) == 6
    for name, value in plain.items():
        assert_same(conv[name], value)


def test_layers_that_share_what_they_read_may_differ(tmp_path: Path) -> None:
    """One quantized tensor for two layers, of which one becomes a convolution: neither is computed twice."""
    random = np.random.default_rng(0)
    x = ops.parameter([1, 48, 32], np.float32, "x")
    x.output(0).set_names({"x"})

    def quantized_linear(tokens: ov.Node, name: str) -> ov.Node:
        stored = ops.convert(ops.constant(random.integers(-63, 63, (32, 32)).astype(np.int8)), np.float32)
        made = ops.matmul(tokens, ops.multiply(stored, ops.constant(np.full((32, 1), 0.01, np.float32))), False, True)
        made.set_friendly_name(name)
        return made

    def rounded(tokens: ov.Node) -> ov.Node:
        return ops.fake_quantize(tokens, *[ops.constant(np.float32(v)) for v in (-4 * 128 / 127, 4) * 2], 256)

    shared = rounded(ops.gelu(quantized_linear(rounded(x), "first"), "erf"))
    total = ops.add(quantized_linear(shared, "left"), quantized_linear(shared, "right"))
    total.output(0).set_names({"y"})
    graph = write_ir(ov.Model([ops.result(total)], [x], "shared"), tmp_path / "shared.xml")
    feeds, found = {"x": random.normal(size=(1, 48, 32)).astype(np.float32)}, []
    for names in ((), ("first", "left")):
        with OpenVINOEngine(graph, Precision.INT8, {"as_convolutions": names, "rest": "f32"}) as engine:
            found.append(engine.infer(feeds)["y"])
            kinds = Counter(kernel.type for kernel in engine.kernels() if kernel.flops)
    assert kinds == {"Convolution": 2, "FullyConnected": 1}
    np.testing.assert_allclose(found[1], found[0], atol=2e-4 * np.abs(found[0]).max())


def test_the_form_can_be_written_and_needs_no_option_then(toy: Graph, tmp_path: Path) -> None:
    names = linear.linear_nodes(read_model(toy.path))
    with OpenVINOEngine(toy, Precision.INT8) as engine:
        assert engine.write_form(tmp_path / "none.xml") is None
    with OpenVINOEngine(toy, Precision.INT8, {"as_convolutions": names, "rest": "f32"}) as engine:
        written, want = engine.write_form(tmp_path / "form.xml"), engine.infer(FEEDS)
    assert written is not None and written.outputs == toy.outputs and written.inputs == toy.inputs
    assert written.size_bytes < 1.1 * toy.size_bytes and written.sha256 != toy.sha256
    assert linear.linear_nodes(read_model(written.path)) == []
    got, kernels = run(written)
    assert all(np.array_equal(got[name], want[name]) for name in want)
    assert not any(kernel.type == "FullyConnected" for kernel in kernels)


def test_a_kept_layer_is_left_in_float(source, tmp_path: Path) -> None:
    graph = quantized(NNCFQuantizer(), NNCF_SPEC, source, tmp_path, keep=("blocks.0/fc1",))
    names = linear.linear_nodes(read_model(graph.path))
    assert len(names) == 7 and "/blocks.0/fc1/MatMul" not in names
    with OpenVINOEngine(graph, Precision.INT8, {"as_convolutions": [*names, "/blocks.0/fc1/MatMul"]}) as engine:
        assert check_keep(engine, ["blocks.0/fc1"]) == []
        float_kernels = [k for k in engine.kernels() if "/blocks.0/fc1/MatMul" in k.originals]
    assert [kernel.precision for kernel in float_kernels] == [executed_rest()]


def executed_rest() -> str:
    from backends.openvino.engine import best_float

    return str(best_float())


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_every_way_of_storing_weights(kind: type, transposed: bool, scales: str, tmp_path: Path) -> None:
    """Two layers with GELU between them; the first also feeds an output, and the tokens come in a batch of two."""
    random = np.random.default_rng(0)

    def layer(tokens: ov.Output, inner: int, outer: int, name: str) -> ov.Node:
        low, high = (-63, 63) if kind is np.int8 else (65, 191)  # more would saturate the sums of a CPU without VNNI
        integers = random.integers(low, high, (outer, inner)).astype(kind)
        scale = random.uniform(0.5, 1.5, (outer, 1)).astype(np.float32) / 127 / inner**0.5
        scale = scale if scales == "channel" else scale[:1]
        zero = np.full(scale.shape, 128, np.uint8)
        integers, scale, zero = (v if transposed else np.ascontiguousarray(v.T) for v in (integers, scale, zero))
        weight = ops.convert(ops.constant(integers), np.float32)
        if kind is np.uint8:
            weight = ops.subtract(weight, ops.convert(ops.constant(zero), np.float32))
        limits = [ops.constant(np.float32(value)) for value in (-4 * 128 / 127, 4) * 2]  # 0 is one of the 256 levels
        rounded = ops.fake_quantize(tokens, *limits, 256)
        made = ops.matmul(rounded, ops.multiply(weight, ops.constant(scale)), False, transposed)
        made.set_friendly_name(name)
        return ops.add(made, ops.constant(random.normal(size=(1, 1, outer)).astype(np.float32)))

    x = ops.parameter([2, 48, 32], np.float32, "x")
    x.output(0).set_names({"x"})
    first = layer(x.output(0), 32, 64, "first")
    second = layer(ops.gelu(first, "erf").output(0), 64, 32, "second")
    total = ops.add(second, x)
    results = []
    for name, value in (("middle", first), ("total", total)):
        value.output(0).set_names({name})
        results.append(ops.result(value))
    graph = write_ir(ov.Model(results, [x], "two"), tmp_path / "two.xml")
    assert linear.linear_nodes(read_model(graph.path)) == ["first", "second"]
    feeds = {"x": random.normal(size=(2, 48, 32)).astype(np.float32)}
    found = []
    for names in ((), ("first", "second")):
        with OpenVINOEngine(graph, Precision.INT8, {"as_convolutions": names, "rest": "f32"}) as engine:
            found.append(engine.infer(feeds))
            kinds = Counter(kernel.type for kernel in engine.kernels() if kernel.flops)
    assert kinds == {"Convolution": 2}
    for name in ("middle", "total"):
        np.testing.assert_allclose(found[1][name], found[0][name], atol=2e-4 * np.abs(found[0][name]).max())


def test_small_graphs_have_no_other_form(toy: Graph, monkeypatch: pytest.MonkeyPatch, source) -> None:
    backend = OpenVINOBackend()
    (form,) = forms_of(backend, toy).items()
    assert form[0] == "linear layers as 1x1 convolutions" and len(form[1]["as_convolutions"]) == 8
    assert forms_of(backend, source.graph) == {}  # float
    monkeypatch.setattr(linear, "LEAST_FLOPS", 1e8)
    assert forms_of(backend, toy) == {}
