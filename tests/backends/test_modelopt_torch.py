"""TensorRT: quantization with ModelOpt's torch mode, which starts from the torch module."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from backend_toys import Calibration, error, image, linear_graph, magnitudes_seen, quantized, refused, toy, toy_flops
from torch import nn

import backends
from backends import registry
from backends.base import BackendError, Precision, QuantSpec, Source, Unavailable, executed_precision
from backends.exchange import export
from backends.onnx_graph import CONVOLUTIONS, MATMULS, OnnxGraph
from backends.quantspec import check_installed
from backends.trt.modelopt_torch import ModelOptTorchQuantizer

pytest.importorskip("modelopt", reason="ModelOpt is not installed")
pytest.importorskip("requests", reason="ModelOpt's torch mode needs requests")
pytest.importorskip("huggingface_hub", reason="ModelOpt's torch mode needs huggingface_hub")

ITEMS = 4
SPEC = QuantSpec(calibration_samples=ITEMS)
FEEDS = {"image": image(99).numpy()}
FOUND = registry.get("trt").availability()
pytestmark = pytest.mark.skipif(not FOUND.available, reason=FOUND.reason)


def quantize(source, folder, **changes):
    quantizer = ModelOptTorchQuantizer()
    return quantized(quantizer, SPEC, source, folder, **changes), quantizer


def emulate(graph, feeds):
    with registry.get("reference").compile(graph, Precision.INT8, {"fuse_qdq": False}) as engine:
        return engine.infer(feeds)


def constants(graph):
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(graph.path)).graph.initializer}


def int8_weights(graph):
    return [w for w in constants(graph).values() if w.dtype == np.int8 and w.ndim > 1]


def precisions(graph):
    found = OnnxGraph(graph.path)
    return {n.name: found.precision(n) for n in found.work() if n.op_type in MATMULS | CONVOLUTIONS}


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    return quantize(source, tmp_path_factory.mktemp("torch"))


@pytest.fixture(scope="module")
def want(source):
    with registry.get("reference").compile(source.graph, Precision.F32) as engine:
        return engine.infer(FEEDS)


@pytest.mark.parametrize(
    "changes",
    [{}, {"smooth_quant_alpha": 0.5}, {"weights": "per_tensor", "weight_range": "half"}],
    ids=["plain", "smooth", "per_tensor"],
)
def test_it_builds_and_stays_near_float(changes, source, want, tmp_path):
    graph, quantizer = quantize(source, tmp_path, **changes)
    backend = registry.get("trt")
    with backend.compile(graph, Precision.INT8, {"optimization_level": 1}) as engine:
        got, kernels = engine.infer(FEEDS), engine.kernels()
        assert engine.size_bytes > 100_000
        assert backend.kept_in_int8(engine, SPEC.keep, kernels) == []
    assert all(1e-4 < error(got[name], want[name]) < 0.1 for name in want)
    assert executed_precision(kernels)["int8"] > 0.9
    assert sum(k.flops for k in kernels) == pytest.approx(toy_flops())
    assert quantizer.report.items == ITEMS
    assert "attention stays in float" in quantizer.notes()
    assert ("linear layers are smoothed with alpha 0.5" in quantizer.notes()) == ("smooth_quant_alpha" in changes)
    assert ("weights use 7 of their 8 bits" in quantizer.notes()) == ("weight_range" in changes)


def test_the_graph_has_the_nodes_and_ports_of_the_source(made, source):
    graph, quantizer = made
    assert (graph.inputs, graph.outputs) == (source.graph.inputs, source.graph.outputs)
    assert graph.path.name == "q.onnx"
    assert list(precisions(graph)) == list(precisions(source.graph))
    floats = {name for name, kind in precisions(graph).items() if kind == "f32"}
    assert floats == {f"/blocks.{k}/MatMul{last}" for k in range(2) for last in ("", "_1")}
    assert set(quantizer.report.quantized) == precisions(graph).keys() - floats


def test_weights_are_stored_as_int8_and_turned(made, source):
    parameters = sum(p.numel() for p in source.module.parameters())
    assert parameters < made[0].size_bytes < 1.6 * parameters
    weights = int8_weights(made[0])
    assert len(weights) == 13
    assert all(np.abs(w.astype(int)).max() == 127 for w in weights)
    graph = OnnxGraph(made[0].path)
    matmuls = [n for n in graph.work() if n.name in made[1].report.quantized and n.op_type == "MatMul"]
    assert len(matmuls) == 8
    assert {graph.maker[n.input[1]].op_type for n in matmuls} == {"DequantizeLinear"}  # and no Transpose


def test_ranges_are_those_of_the_whole_set(made, source):
    """Each activation's scale holds the largest magnitude of all items, as a float session alone finds it."""
    graph, stored = OnnxGraph(made[0].path), constants(made[0])
    pairs = {n.input[0]: float(stored[n.input[1]]) for n in graph.nodes if n.op_type == "QuantizeLinear"}
    assert len(pairs) > 10
    largest = magnitudes_seen(source, pairs, Calibration(ITEMS))
    for name, scale in pairs.items():
        assert scale == pytest.approx(largest[name] / 127, rel=1e-4), name


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("half", [False, True])
def test_one_linear_layer_is_what_the_formulas_say(alpha, weights, half, tmp_path):
    """SmoothQuant (Xiao et al. 2023, equation 4): channel j of x is divided by max|x_j|^a / max|w_j|^(1 - a)."""
    module, graph = linear_graph(tmp_path)
    rng = np.random.default_rng(0)
    spread = np.geomspace(0.1, 10, 64, dtype=np.float32)
    items = [{"x": rng.uniform(-1, 1, (8, 64)).astype(np.float32) * spread} for _ in range(3)]
    spec = QuantSpec(
        weights=weights,
        smooth_quant_alpha=alpha,
        weight_range="half" if half else "full",
        calibration_samples=3,
        output_dir=tmp_path / "out",
    )
    source = Source("lin", module, {"x": torch.zeros(8, 64)}, ("y",), graph)
    made = ModelOptTorchQuantizer().quantize(source, spec, items)
    weight, bias = (p.detach().numpy().astype(np.float64) for p in (module.layer.weight, module.layer.bias))
    seen = np.stack([item["x"] for item in items]).astype(np.float64)
    divisor = np.ones(64)
    if alpha is not None:
        divisor = np.abs(seen).max((0, 1)) ** alpha / np.abs(weight).max(0) ** (1 - alpha)
    levels = 64 if half else 127
    smoothed = weight * divisor
    scale_w = np.abs(smoothed).max(1, keepdims=True) / 127 if weights == "per_channel" else np.abs(smoothed).max() / 127
    scale_w = scale_w * (127 / levels)
    scale_x = np.abs(seen / divisor).max() / 127
    x = items[1]["x"]
    rounded = np.clip(np.rint(x / divisor / scale_x), -128, 127) * scale_x
    want = rounded @ (np.rint(smoothed / scale_w) * scale_w).T + bias
    assert error(emulate(made, {"x": x})["y"], want) < 2e-3  # a number at a border may round the other way
    assert error(x @ weight.T + bias, want) > 2e-3
    assert [np.abs(w.astype(int)).max() for w in int8_weights(made)] == [levels]


def test_smoothing_helps_where_channels_differ(tmp_path):
    module, graph = linear_graph(tmp_path)
    spread = np.geomspace(0.01, 10, 64, dtype=np.float32)
    rng = np.random.default_rng(0)
    items = [{"x": rng.uniform(-1, 1, (8, 64)).astype(np.float32) * spread} for _ in range(3)]
    with torch.no_grad():
        module.layer.weight /= torch.from_numpy(spread)
    source = Source("lin", module, {"x": torch.zeros(8, 64)}, ("y",), graph)
    want = module(torch.from_numpy(items[0]["x"])).detach().numpy()
    found = []
    for alpha in (None, 0.5):
        spec = QuantSpec(calibration_samples=3, smooth_quant_alpha=alpha, output_dir=tmp_path / str(alpha))
        made = ModelOptTorchQuantizer().quantize(source, spec, items)
        found.append(error(emulate(made, items[0])["y"], want))
    assert found[1] < 0.3 * found[0]


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_kept_patterns_stay_float(alpha, source, tmp_path):
    keep = ("blocks.0/fc1/MatMul", "^/conv1/Conv", "LayerNorm")
    graph, quantizer = quantize(source, tmp_path, keep=keep, smooth_quant_alpha=alpha)
    found = precisions(graph)
    assert (found["/blocks.0/fc1/MatMul"], found["/conv1/Conv"]) == ("f32", "f32")
    assert (found["/blocks.1/fc1/MatMul"], found["/conv2/Conv"]) == ("int8", "int8")
    assert {"/blocks.0/fc1/MatMul", "/conv1/Conv", "/norm/LayerNormalization"} <= set(quantizer.report.kept)
    assert len(int8_weights(graph)) == 11
    backend = registry.get("trt")
    with backend.compile(graph, Precision.INT8, {"build": False}) as engine:
        kernels = engine.kernels()
        assert backend.kept_in_int8(engine, keep, kernels) == []
        assert len(backend.kept_in_int8(engine, ("blocks.1/fc1/MatMul",), kernels)) == 1


def test_with_all_but_the_last_layer_kept_it_is_the_float_graph_up_to_there(source, want, tmp_path):
    """Smoothed weights and the division of what they multiply cancel out."""
    graph, quantizer = quantize(source, tmp_path, keep=(r"/(?!out/).*/.*", "/embed/"), smooth_quant_alpha=0.5)
    assert quantizer.report.quantized == ("/out/Conv",)
    got = emulate(graph, FEEDS)
    assert error(got["tokens"], want["tokens"]) < 1e-5
    assert 1e-4 < error(got["map"], want["map"]) < 0.05


class Names(nn.Module):
    """Layers of names that ModelOpt's own configurations leave out; the first one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj_out, self.output = nn.Linear(32, 32), nn.Linear(32, 32)
        self.lm_head = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(8))
        self.unused = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.output(torch.tanh(self.proj_out(torch.relu(self.proj_out(x))))))


def test_every_layer_is_quantized_whatever_its_name_and_each_call_can_be_kept(tmp_path):
    module, example = Names().eval(), {"x": torch.zeros(1, 8, 32)}
    graph = export(module, example, ["y"], tmp_path / "names.onnx")
    source = Source("names", module, example, ("y",), graph)
    calls = [name for name in precisions(graph) if name.startswith("/proj_out")]
    assert len(calls) == 2
    items = [{"x": np.random.default_rng(k).standard_normal((1, 8, 32), dtype=np.float32)} for k in range(2)]
    for keep in ((), (f"^{calls[1]}$",)):
        spec = QuantSpec(calibration_samples=2, keep=keep, output_dir=tmp_path / str(len(keep)))
        made = ModelOptTorchQuantizer().quantize(source, spec, items)
        found = precisions(made)
        assert len(found) == 4
        assert {name for name, kind in found.items() if kind != "int8"} == set(calls[1:] if keep else ())
        assert len(int8_weights(made)) == 3  # both calls share one


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_the_module_and_torch_are_left_as_they_were(alpha, source, tmp_path):
    source = dataclasses.replace(source, module=toy())
    source.module.blocks[0].train()
    before = {name: value.clone() for name, value in source.module.state_dict().items()}
    functions = (nn.Linear.forward, nn.functional.linear, nn.functional.scaled_dot_product_attention, nn.Conv2d.forward)
    quantize(source, tmp_path, smooth_quant_alpha=alpha)
    assert functions == (
        nn.Linear.forward,
        nn.functional.linear,
        nn.functional.scaled_dot_product_attention,
        nn.Conv2d.forward,
    )
    assert source.module.blocks[0].training
    assert not source.module.blocks[1].training
    after = source.module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {type(part).__module__.partition(".")[0] for part in source.module.modules()} <= {"torch", "backend_toys"}
    again = export(toy(), source.example, list(source.output_names), tmp_path / "again.onnx")
    assert again.sha256 == source.graph.sha256


def test_calibration_holds_one_item_and_reads_what_was_asked(source, tmp_path):
    calibration = Calibration(40)
    quantizer = ModelOptTorchQuantizer()
    quantizer.quantize(source, dataclasses.replace(SPEC, output_dir=tmp_path, calibration_samples=20), calibration)
    assert quantizer.report.items == 20
    assert calibration.most_alive <= 3
    assert calibration.made <= 21


AGAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from backend_toys import Calibration, image, toy
from backends.base import QuantSpec, Source
from backends.exchange import describe_onnx
from backends.trt.modelopt_torch import ModelOptTorchQuantizer
source = Source("q", toy(), {"image": image()}, ("tokens", "map"), describe_onnx(Path(sys.argv[3])))
spec = QuantSpec(calibration_samples=4, output_dir=Path(sys.argv[1]))
print(ModelOptTorchQuantizer().quantize(source, spec, Calibration(4)).sha256)
"""


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes_in_another_process_that_prints_nothing_else(made, source, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, tmp_path, Path(__file__).parent, source.graph.path],
        capture_output=True,
        text=True,
        cwd=Path(backends.__file__).parent.parent,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == (made[0].sha256 + "\n", "")
    assert str(source.graph.path.parent).encode() not in made[0].path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits_w": 4, "bits_a": 16}, "lowers to W8A8, not W4A16"),
        (
            {"weights": "per_row"},
            "weights is per_row, and the quantizer 'modelopt-torch' takes per_channel or per_tensor",
        ),
        ({"symmetric_activations": False}, "symmetric_activations is false"),
        ({"activations": "per_token"}, "takes per_tensor alone"),
        ({"smooth_quant_alpha": 1.5}, "must lie in [0, 1]"),
        ({"weight_range": "halv"}, "did you mean 'half'?"),
        ({"calibration_samples": 0}, "at least 1"),
        ({"calibration_samples": 5, "items": 4}, "holds 4 items"),
        ({"items": 0}, "empty calibration set"),
        ({"name": "../out"}, "plain file name"),
        ({"keep": ("(",)}, "not a valid regular expression"),
        ({"keep": ("blocks.0/fcc1/MatMul",)}, "(did you mean '/blocks.0/fc1/MatMul'?)"),
    ],
)
def test_what_cannot_be_followed_writes_nothing(changes, says, source, tmp_path):
    with refused(says, tmp_path):
        quantize(source, tmp_path, **changes)


def test_a_source_that_does_not_fit_is_refused(made, source, tmp_path):
    with refused("starts from a torch module", tmp_path):
        quantize(dataclasses.replace(source, module=None), tmp_path)
    with refused("inputs ['picture'] are not those of the graph, ['image']", tmp_path):
        quantize(dataclasses.replace(source, example={"picture": image()}), tmp_path)
    with refused("q.onnx is quantized already", tmp_path):
        quantize(dataclasses.replace(source, graph=made[0]), tmp_path)


def test_a_keep_pattern_that_no_module_can_express_is_refused_before_calibration(tmp_path):
    module, graph = linear_graph(tmp_path)
    model = onnx.load(str(graph.path))
    model.graph.node[0].name = "node_linear"  # as other exporters name it
    onnx.save(model, str(graph.path))
    source = Source("lin", module, {"x": torch.zeros(8, 64)}, ("y",), graph)

    class Never:
        def __iter__(self):
            raise AssertionError("calibration began")

    spec = QuantSpec(calibration_samples=1, keep=("node_linear",), output_dir=tmp_path / "out")
    with pytest.raises(BackendError, match="'node_linear' names 'node_linear', which no module's name can express"):
        ModelOptTorchQuantizer().quantize(source, spec, Never())
    items = [{"x": np.ones((8, 64), np.float32)}]
    groups = dataclasses.replace(spec, keep=("LayerNorm", "Softmax", "AttentionScales"))
    assert len(int8_weights(ModelOptTorchQuantizer().quantize(source, groups, items))) == 1


def test_listed_but_unavailable_without_what_it_imports(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    listed = registry.get("trt").quantizers()
    assert list(listed)[:2] == ["modelopt", "modelopt-torch"]
    check_installed(listed["modelopt"])
    said = r"quantizer 'modelopt-torch' cannot run: no module named requests; pip install -e \"\.\[trt\]\""
    with pytest.raises(Unavailable, match=said):
        check_installed(listed["modelopt-torch"])
    with pytest.raises(Unavailable, match=said):
        quantize(source, tmp_path)
    assert list(tmp_path.iterdir()) == []
