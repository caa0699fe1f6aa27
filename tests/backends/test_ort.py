"""ONNX Runtime's static quantizer and what its engines report. The common contract: see test_contract."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from backend_toys import Calibration, error, image, linear_graph, magnitudes_seen, quantized, refused, toy_flops
from contract_toys import network, write_graph
from onnx import numpy_helper
from onnxruntime import InferenceSession
from torch import nn

from backends import registry
from backends.base import BackendError, Graph, Precision, QuantSpec, Source, executed_precision, surgery_of
from backends.exchange import describe_onnx, export
from backends.onnx_graph import OnnxGraph
from backends.ort.kernels import executed_kernels
from backends.ort.quantizer import BORDER, ORTQuantizer
from backends.ort.rank import ORTSurgery
from backends.rank import rank_nodes

SPEC = QuantSpec(calibration_samples=3)
FEEDS = [{"image": image(99).numpy()}]
BACKEND = registry.get("onnxruntime")


@pytest.fixture(scope="module")
def made(source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, ORTQuantizer]:
    quantizer = ORTQuantizer()
    return quantized(quantizer, SPEC, source, tmp_path_factory.mktemp("ort")), quantizer


def outputs(graph: Graph, precision: Precision, seeds: range = range(50, 53)) -> list[dict[str, np.ndarray]]:
    with BACKEND.compile(graph, precision, {"threads": 1}) as engine:
        return [engine.infer({t.name: image(seed).numpy() for t in graph.inputs}) for seed in seeds]


def apart(source: Source, graph: Graph, name: str) -> float:
    found = zip(outputs(graph, Precision.INT8), outputs(source.graph, Precision.F32), strict=True)
    return float(np.mean([error(got[name], want[name]) for got, want in found]))


def pairs_of(graph: Graph) -> dict[str, float]:
    """The scale of every activation that is rounded, by the tensor's name."""
    model = onnx.load(str(graph.path))
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {n.input[0]: float(constants[n.input[1]]) for n in model.graph.node if n.op_type == "QuantizeLinear"}


def test_what_is_planned_runs_in_int8(made: tuple[Graph, ORTQuantizer], source: Source) -> None:
    graph, quantizer = made
    with BACKEND.compile(graph, Precision.INT8, {"threads": 1}) as engine:
        kernels, planned = engine.kernels(), engine.planned_flops()
        assert engine.measured == "engine"
        assert BACKEND.kept_in_int8(engine, SPEC.keep, kernels) == []
        assert BACKEND.kept_in_int8(engine, ("fc1/MatMul",), kernels)
    assert planned is not None
    assert sum(k.flops for k in kernels) == toy_flops()
    assert sum(k.flops for k in kernels if k.precision == "int8") == planned > 0.8 * toy_flops()
    ran = {name for k in kernels if k.precision == "int8" for name in k.originals}
    assert ran == set(quantizer.report.quantized)
    # one Gemm of product and bias, with the bias in int32; convolutions write int8
    kinds = {k.originals[0]: k.implementation for k in kernels}
    assert kinds["/blocks.0/fc1/MatMul"] == "QGemm"
    assert kinds["/conv1/Conv"] == "QLinearConv"
    types = {k.originals[0]: k.type for k in kernels if k.flops}
    assert (types["/blocks.0/fc1/MatMul"], types["/blocks.0/MatMul_1"]) == ("FullyConnected", "MatMul")
    assert types["/up/ConvTranspose"] == "Deconvolution"
    assert all(k.time_us > 0 for k in kernels if k.flops)
    assert 1e-3 < apart(source, graph, "tokens") < 0.03
    assert 1e-3 < apart(source, graph, "map") < 0.04


def test_any_session_runs_it_in_int8(made: tuple[Graph, ORTQuantizer], tmp_path: Path) -> None:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "ran.onnx")
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(str(made[0].path), settings, providers=["CPUExecutionProvider"])
    kinds = {n.name: n.op_type for n in onnx.load(settings.optimized_model_filepath).graph.node}
    assert kinds["/blocks.0/fc1/MatMul/MatMulAddFusion"] == "QGemm"
    floats = [name for name, kind in kinds.items() if kind in ("Gemm", "MatMul")]  # FusedMatMul: the kept scores
    assert sorted(floats) == ["/blocks.0/MatMul_1", "/blocks.1/MatMul_1"]  # products of the probabilities


def test_the_same_input_gives_the_same_bytes(made: tuple[Graph, ORTQuantizer], source: Source, tmp_path: Path) -> None:
    again = quantized(ORTQuantizer(), SPEC, source, tmp_path)
    assert again.path.read_bytes() == made[0].path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["q.onnx"]
    assert again.inputs == source.graph.inputs
    assert again.outputs == source.graph.outputs
    assert again.size_bytes < 0.5 * source.graph.size_bytes


@pytest.mark.parametrize(("backend", "tool"), [("onnxruntime", "ort"), ("trt", "modelopt")])
def test_weights_in_a_file_of_their_own(source: Source, backend: str, tool: str, tmp_path: Path) -> None:
    """As those of large graphs are; calibration runs on a graph beside them."""
    if not registry.get(backend).availability().available:
        pytest.skip(registry.get(backend).availability().reason)
    assert source.module is not None
    names = list(source.output_names)
    graph = export(source.module, source.example, names, tmp_path / "f.onnx", exporter="torchscript", external_above=0)
    assert [p.name for p in graph.files()] == ["f.onnx", "f.onnx.data"]
    quantizer = registry.get(backend).quantizers()[tool]
    made, plain = (
        quantized(quantizer, SPEC, each, tmp_path / folder)
        for folder, each in (("large", dataclasses.replace(source, graph=graph)), ("small", source))
    )
    assert pairs_of(made) == pairs_of(plain)  # names and scales of what is rounded
    assert [p.name for p in (tmp_path / "large").iterdir()] == ["q.onnx"]


def test_ranges_are_those_of_the_whole_set(made: tuple[Graph, ORTQuantizer], source: Source) -> None:
    scales = pairs_of(made[0])
    assert len(scales) > 10
    seen = magnitudes_seen(source, scales, Calibration(SPEC.calibration_samples))
    assert scales == pytest.approx({name: value / 127 for name, value in seen.items()}, rel=1e-5)


def test_one_item_is_in_memory(source: Source, tmp_path: Path) -> None:
    items = Calibration(6)
    quantizer = ORTQuantizer()
    spec = dataclasses.replace(SPEC, calibration_samples=5, output_dir=tmp_path)
    quantizer.quantize(source, spec, items)
    assert quantizer.report.items == 5
    assert items.most_alive <= 2
    assert items.made <= 6


def test_only_products_read_rounded_values(made: tuple[Graph, ORTQuantizer]) -> None:
    """But for what reads a convolution, whose int8 kernel writes int8."""
    nodes = OnnxGraph(made[0].path).nodes
    rounded = {n.output[0] for n in nodes if n.op_type == "QuantizeLinear"}
    behind = {n.output[0] for n in nodes if n.op_type == "DequantizeLinear" and n.input[0] in rounded}
    readers = {n.name for n in nodes if not behind.isdisjoint(n.input)}
    assert readers == {*made[1].report.quantized, "/Relu_1", "/Add"}  # these two read conv1 and conv2


def test_the_first_and_the_last_convolution_stay_in_float(made: tuple[Graph, ORTQuantizer]) -> None:
    assert {"/embed/Conv", "/out/Conv"}.isdisjoint(made[1].report.quantized)
    assert {"/conv1/Conv", "/conv2/Conv"} <= set(made[1].report.quantized)
    assert BORDER in made[1].notes()
    assert {"tokens", "map"}.isdisjoint(pairs_of(made[0]))


def test_they_would_cost_a_third_of_the_error(
    made: tuple[Graph, ORTQuantizer], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.ort.quantizer.border_convolutions", lambda model: set())
    graph = quantized(ORTQuantizer(), SPEC, source, tmp_path)
    for name in ("tokens", "map"):
        assert apart(source, made[0], name) < 0.7 * apart(source, graph, name)


@pytest.mark.parametrize(("percent", "least", "most"), [(99.99, 0.92, 1.08), (99.9, 1.05, 2.0)])
def test_the_extremes_are_as_good_as_percentiles(
    percent: float, least: float, most: float, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors with percentiles over those with the extremes."""
    spec = dataclasses.replace(SPEC, calibration_samples=16)
    extremes = quantized(ORTQuantizer(), spec, source, tmp_path / "extremes")

    def measured(path: Path, inputs: Any, tensors: list[str], items: Any) -> dict[str, tuple[float, float]]:
        model = onnx.load(str(path))
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
        session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        values = [np.stack(one) for one in zip(*(session.run(list(tensors), item) for item in items), strict=True)]
        found = [np.percentile(one, [100 - percent, percent]) for one in values]
        return {name: (min(low, 0.0), max(high, 0.0)) for name, (low, high) in zip(tensors, found, strict=True)}

    monkeypatch.setattr("backends.ort.quantizer.tensor_ranges", measured)
    graph = quantized(ORTQuantizer(), spec, source, tmp_path / "percentiles")
    for name in ("tokens", "map"):
        assert least < apart(source, graph, name) / apart(source, extremes, name) < most


def test_the_keep_list_is_followed(source: Source, tmp_path: Path) -> None:
    quantizer = ORTQuantizer()
    graph = quantized(quantizer, SPEC, source, tmp_path, keep=("Softmax", r"blocks\.0/", "fc1/MatMul"))
    assert not any("blocks.0" in name or "fc1" in name or "MatMul_1" in name for name in quantizer.report.quantized)
    assert "/blocks.1/MatMul" in quantizer.report.quantized  # AttentionScales was left out
    found = OnnxGraph(graph.path)
    assert {n.name for n in found.work() if found.flops(n) and found.precision(n) == "int8"} == set(
        quantizer.report.quantized
    )
    with pytest.raises(BackendError, match="matches no node"):
        quantized(quantizer, SPEC, source, tmp_path, keep=("ghost",))


def test_asymmetric_activations_are_nearer(made: tuple[Graph, ORTQuantizer], source: Source, tmp_path: Path) -> None:
    graph = quantized(ORTQuantizer(), SPEC, source, tmp_path, symmetric_activations=False)
    assert apart(source, graph, "tokens") < apart(source, made[0], "tokens")


@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
@pytest.mark.parametrize(("weight_range", "most"), [("half", 64), ("full", 127)])
def test_weights_are_stored_as_asked(
    source: Source, weights: str, weight_range: str, most: int, tmp_path: Path
) -> None:
    graph = quantized(ORTQuantizer(), SPEC, source, tmp_path, weights=weights, weight_range=weight_range)
    stored = [numpy_helper.to_array(t) for t in onnx.load(str(graph.path)).graph.initializer if t.data_type == 3]
    matrices = [values for values in stored if values.ndim > 1]
    assert len(matrices) == 10
    assert max(np.abs(values).max() for values in matrices) == most
    for values in matrices:
        columns = np.abs(values).max(axis=tuple(range(1, values.ndim)) if values.ndim == 4 else 0)
        assert (len(set(columns)) == 1) == (weights == "per_channel")


def test_a_gemm_keeps_its_float_result(tmp_path: Path) -> None:
    module, graph = linear_graph(tmp_path)
    assert [n.op_type for n in OnnxGraph(graph.path).nodes] == ["Gemm"]
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    source = Source("q", module, {"x": x}, ("y",), graph)
    made = ORTQuantizer().quantize(
        source, dataclasses.replace(SPEC, keep=(), calibration_samples=1, output_dir=tmp_path), [{"x": x.numpy()}]
    )
    with BACKEND.compile(made, Precision.INT8) as engine, torch.no_grad():
        assert executed_precision(engine.kernels()) == {"int8": 1.0}
        assert error(engine.infer({"x": x.numpy()})["y"], module(x).numpy()) < 0.02


class Layers(nn.Module):
    """Two linear layers of one weight, and a third one; dead or tiny columns of the third one have a bias."""

    def __init__(self, column: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.last = nn.Linear(32, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.last.weight[3] *= column
            self.last.bias[3] = 0.37

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.shared(torch.relu(self.shared(x)))))


@pytest.mark.parametrize("column", [1.0, 0.0, 1e-14])
def test_biases_come_through(column: float, tmp_path: Path) -> None:
    """Of a dead column too, for which the tool knows no step, and where the steps are too small for int32."""
    module = Layers(column).eval()
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    source = Source("q", module, {"x": x}, ("y",), export(module, {"x": x}, ["y"], tmp_path / "f.onnx"))
    spec = dataclasses.replace(SPEC, keep=(), calibration_samples=1, output_dir=tmp_path)
    graph = ORTQuantizer().quantize(source, spec, [{"x": x.numpy()}])
    with BACKEND.compile(graph, Precision.INT8) as engine, torch.no_grad():
        got, want = engine.infer({"x": x.numpy()})["y"], module(x).numpy()
        assert executed_precision(engine.kernels()) == {"int8": 1.0}
    assert error(got, want) < 0.04
    if column < 1:
        np.testing.assert_allclose(got[..., 3], 0.37, rtol=1e-5)


REFUSED = [
    ({"smooth_quant_alpha": 0.5}, "smooth_quant_alpha is 0.5, and the quantizer 'ort' takes null alone"),
    ({"bias_correction": "fast"}, "bias_correction is fast, and the quantizer 'ort' takes none alone"),
    ({"activations": "per_channel"}, "activations is per_channel, and the quantizer 'ort' takes per_tensor alone"),
    ({"bits_w": 4, "bits_a": 16}, "lowers to W8A8, not W4A16"),
    ({"weight_range": "hal"}, "(did you mean 'half'?)"),
    ({"items": 2}, "the calibration set holds 2 items, calibration_samples asks for 3"),
    ({"items": 0}, "empty calibration set"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[says[:20] for _, says in REFUSED])
def test_what_it_cannot_follow_is_refused(source: Source, changes: Any, says: str, tmp_path: Path) -> None:
    with refused(says, tmp_path):
        quantized(ORTQuantizer(), SPEC, source, tmp_path, **changes)


def test_a_quantized_graph_is_not_quantized_again(tmp_path: Path) -> None:
    graph = write_graph(network(), tmp_path / "q.onnx", quantized=True)
    with pytest.raises(BackendError, match=r"q\.onnx is quantized already"):
        ORTQuantizer().quantize(Source("again", None, {}, ("y",), graph), SPEC, [])


def test_threads_are_those_asked_for(tmp_path: Path) -> None:
    graph = write_graph(network(), tmp_path / "f.onnx", quantized=False)
    for asked in (1, 3):
        with BACKEND.compile(graph, Precision.F32, {"threads": asked}) as engine:
            assert engine._session.get_session_options().intra_op_num_threads == asked
    for rest in ("bf16", "f16"):
        with pytest.raises(BackendError, match="option 'rest' must be 'best' or 'f32'"):
            BACKEND.compile(graph, Precision.F32, {"rest": rest})


def event(name: str, kind: str, inputs: list[list[int]], outputs: list[list[int]], us: int = 5) -> dict[str, Any]:
    shapes = {"input_type_shape": [{"float": s} for s in inputs], "output_type_shape": [{"float": s} for s in outputs]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": {"op_name": kind, **shapes}}


def test_products_under_other_names_are_found_by_their_size(tmp_path: Path) -> None:
    """The network's products are [8, 64] x [64, 128] and [8, 128] x [128, 32]."""
    graph = OnnxGraph(write_graph(network(), tmp_path / "f.onnx", quantized=False).path)
    events = [
        event("/fc1/MatMulAddFusion", "Gemm", [[8, 64], [128]], [[8, 128]], us=90),
        event("other", "Gemm", [[8, 128], [32]], [[8, 32]]),
        event("/fc1/MatMulAddFusion", "Gemm", [[8, 64], [128]], [[8, 128]], us=6),
        event("/fc1/MatMulAddFusion", "Gemm", [[8, 64], [128]], [[8, 128]], us=8),
        {"cat": "Session", "name": "model_run", "dur": 1},
    ]
    one, two = executed_kernels(events, graph, first=1)
    assert (one.originals, one.matched, one.flops, one.time_us) == (("/fc1",), "name", 2 * 8 * 64 * 128, 7)
    assert (two.originals, two.matched, two.flops) == (("/fc2",), "size", 2 * 8 * 128 * 32)
    left = executed_kernels(events[:1], graph, first=0)[-1]
    assert (left.name, left.precision, left.originals) == ("(not attributed)", "unknown", ("/fc2",))


@pytest.fixture(scope="module")
def everything(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Scores are quantized too."""
    return quantized(ORTQuantizer(), SPEC, source, tmp_path_factory.mktemp("everything"), keep=())


def test_all_nodes_back_in_float_is_the_float_graph(everything: Graph, source: Source, tmp_path: Path) -> None:
    surgery = ORTSurgery(everything, source.graph)
    (share,) = rank_nodes(surgery, FEEDS, names={"all": surgery.nodes})
    assert 1e-3 < share.error_all < 0.5
    assert share.error_without < 1e-6
    graph = onnx.load(str(surgery.write(surgery.nodes, tmp_path / "float").path)).graph
    assert not any("Linear" in node.op_type for node in graph.node)
    assert not any(t.data_type == onnx.TensorProto.INT8 for t in graph.initializer)


def test_nodes_back_in_float_are_those_of_the_keep_list(everything: Graph, source: Source, tmp_path: Path) -> None:
    """The same graph comes of a surgery and of a keep-list, and what is kept runs in float."""
    assert surgery_of(BACKEND) is ORTSurgery
    surgery, quantizer = ORTSurgery(everything, source.graph), ORTQuantizer()
    some = ("/blocks.0/fc1/MatMul", "/blocks.1/MatMul", "/conv1/Conv")
    assert set(some) < set(surgery.nodes)
    mixed = surgery.write(some, tmp_path / "mixed")
    keep = tuple(f"^{re.escape(name)}$" for name in some)
    again = quantized(quantizer, SPEC, source, tmp_path, keep=keep)
    assert surgery.nodes == ORTSurgery(everything, source.graph).nodes
    assert ORTSurgery(mixed, source.graph).nodes == ORTSurgery(again, source.graph).nodes == quantizer.report.quantized
    for one, other in zip(outputs(mixed, Precision.INT8), outputs(again, Precision.INT8), strict=True):
        for name, array in one.items():
            np.testing.assert_allclose(array, other[name], rtol=1e-4, atol=1e-4)
    with BACKEND.compile(mixed, Precision.INT8, {"threads": 1}) as engine:
        kernels = engine.kernels()
        assert BACKEND.kept_in_int8(engine, keep, kernels) == []
        assert {name for k in kernels if k.precision == "int8" for name in k.originals} == set(
            quantizer.report.quantized
        )


def test_the_node_that_hurts_is_ranked_first(made: tuple[Graph, ORTQuantizer], source: Source, tmp_path: Path) -> None:
    """Its activations are clipped to a thirtieth of their range."""
    model = onnx.load(str(made[0].path))
    node = next(n for n in model.graph.node if n.name == "/blocks.1/fc2/MatMul")
    pair = next(n for n in model.graph.node if n.output[0] == node.input[0])
    stored = next(t for t in model.graph.initializer if t.name == pair.input[1])
    stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) / np.float32(30), stored.name))
    onnx.save(model, str(tmp_path / "q.onnx"))
    ranked = rank_nodes(ORTSurgery(describe_onnx(tmp_path / "q.onnx"), source.graph), FEEDS)
    assert ranked[0].name == "/blocks.1/fc2/MatMul"
    assert ranked[0].share > 0.3 > ranked[1].share
