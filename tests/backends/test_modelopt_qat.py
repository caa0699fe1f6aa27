"""Quantization-aware training with ModelOpt: what is prepared, what learns, and the graph that comes of it."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import onnx
import pytest
import torch
from backend_toys import Calibration, error, image, linear_graph, refused, toy
from torch import nn

from backends import registry
from backends.base import BackendError, Precision, QuantSpec, Source, can_train, executed_precision
from backends.exchange import export
from backends.onnx_graph import CONVOLUTIONS, MATMULS, OnnxGraph
from backends.trt import modelopt_export
from backends.trt.modelopt_torch import ModelOptTorchQuantizer

pytest.importorskip("modelopt", reason="ModelOpt is not installed")
pytest.importorskip("requests", reason="ModelOpt's torch mode needs requests")
pytest.importorskip("huggingface_hub", reason="ModelOpt's torch mode needs huggingface_hub")

ITEMS = 4


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spec_for(folder, **changes) -> QuantSpec:
    return dataclasses.replace(QuantSpec(calibration_samples=ITEMS, output_dir=folder), **changes)


def emulate(graph, **feeds):
    with registry.get("reference").compile(graph, Precision.INT8, {"fuse_qdq": False}) as engine:
        return engine.infer(feeds)


def int8_weights(graph) -> list[np.ndarray]:
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(str(graph.path)).graph.initializer]
    return [array.astype(int) for array in stored if array.dtype == np.int8 and array.ndim > 1]


def precisions(graph) -> dict[str, str]:
    found = OnnxGraph(graph.path)
    return {n.name: found.precision(n) for n in found.work() if n.op_type in MATMULS | CONVOLUTIONS}


def ranges(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if name.endswith("._amax")}


def train(module, feeds, aim, rate: float, steps: int) -> list[float]:
    """Mean distance to `aim` before each step of Adam."""
    optimizer = torch.optim.Adam(module.parameters(), rate)
    losses = []
    for _ in range(steps):
        got = module(feeds)
        pairs = zip(got, aim, strict=True) if isinstance(got, tuple) else [(got, aim)]
        loss = torch.stack([(a - b).abs().mean() for a, b in pairs]).sum()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """The toy, trained for a few steps towards the float toy: module, spec, graph, losses, ranges before."""
    torch.set_num_threads(1)
    quantizer, spec = ModelOptTorchQuantizer(), spec_for(tmp_path_factory.mktemp("qat"))
    module = quantizer.prepare(source, spec, Calibration(ITEMS))
    before = ranges(module)
    images = torch.cat([image(seed) for seed in range(ITEMS)])
    with torch.no_grad():
        aim = source.module(images)
    losses = train(module, images, aim, 2e-5, 15)
    return module, spec, quantizer.finish(module, source, spec), losses, before


def test_prepared_module_is_the_ptq_one_and_leaves_the_source_alone(source, tmp_path, capfd):
    before = {name: value.clone() for name, value in source.module.state_dict().items()}
    quantizer = ModelOptTorchQuantizer()
    assert can_train(quantizer)
    module = quantizer.prepare(source, spec_for(tmp_path), Calibration(ITEMS))
    assert capfd.readouterr().out == ""
    assert quantizer.report.items == ITEMS
    assert "weights and biases were trained, ranges are those of calibration" in quantizer.notes()
    assert all(p.requires_grad for p in module.parameters())
    assert len(list(module.parameters())) == len(list(source.module.parameters()))
    assert list(tmp_path.iterdir()) == []
    ptq = quantizer.quantize(source, spec_for(tmp_path), Calibration(ITEMS))
    want = emulate(ptq, image=image(9).numpy())
    with torch.no_grad():
        for name, got in zip(source.output_names, module(image(9)), strict=True):
            assert error(got.numpy(), want[name]) < 0.02
        tokens = module(torch.cat([image(1), image(2), image(3)]))[0]  # another batch than the exported one
        assert error(tokens[1:2].numpy(), module(image(2))[0].numpy()) < 1e-5
    after = source.module.state_dict()
    assert list(before) == list(after) and all(torch.equal(after[name], before[name]) for name in before)


def test_the_same_input_gives_the_same_module_and_a_state_dict_or_a_copy_carries_it(trained, source, tmp_path):
    prepared = [ModelOptTorchQuantizer().prepare(source, spec_for(tmp_path), Calibration(ITEMS)) for _ in range(2)]
    first, second = (module.state_dict() for module in prepared)
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    torch.save(trained[0].state_dict(), tmp_path / "checkpoint.pt")
    prepared[0].load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    with torch.no_grad():
        want = trained[0](image(5))[1]
        for module in (prepared[0], copy.deepcopy(trained[0])):
            assert torch.equal(module(image(5))[1], want)
        assert not torch.equal(prepared[1](image(5))[1], want)


def test_weights_and_biases_learn_and_ranges_stay(trained, source):
    module, _, _, losses, before = trained
    assert min(losses[-3:]) < 0.97 * losses[0]
    start = dict(source.module.named_parameters())
    assert all(not torch.equal(p, start[name]) for name, p in module.named_parameters() if ".attn" not in name)
    after = ranges(module)
    assert len(before) == 2 * 13 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_graph_computes_what_was_trained(trained, source):
    """Stated tolerance: 2 % of the mean magnitude, and nearer to the trained module than that is to the float one."""
    module, _, graph, _, _ = trained
    for seed in (7, 8):
        got = emulate(graph, image=image(seed).numpy())
        with torch.no_grad():
            want, plain = module(image(seed)), source.module(image(seed))
        for name, a, b in zip(source.output_names, want, plain, strict=True):
            assert error(got[name], a.numpy()) < min(0.02, error(a.numpy(), b.numpy()))


def test_the_engine_is_int8_and_keeps_the_keep_list(trained, source):
    found = registry.get("trt").availability()
    if not found.available:
        pytest.skip(found.reason)
    _, spec, graph, _, _ = trained
    backend = registry.get("trt")
    with backend.compile(graph, Precision.INT8, {"optimization_level": 1}) as engine:
        kernels = engine.kernels()
        assert executed_precision(kernels)["int8"] > 0.9
        assert backend.kept_in_int8(engine, spec.keep, kernels) == []
    assert graph.size_bytes < 0.5 * source.graph.size_bytes
    assert (graph.inputs, graph.outputs) == (source.graph.inputs, source.graph.outputs)


@pytest.mark.parametrize(
    "changes",
    [{}, {"weight_range": "half"}, {"weights": "per_tensor"}, {"smooth_quant_alpha": 0.5}],
    ids=["full", "half", "per_tensor", "smooth"],
)
def test_one_layer_is_exact_also_where_weights_grew_past_their_range(changes, tmp_path):
    module, graph = linear_graph(tmp_path)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    source = Source("linear", module, {"x": x}, ("y",), graph)
    quantizer, spec = ModelOptTorchQuantizer(), spec_for(tmp_path / "out", calibration_samples=1, **changes)
    prepared = quantizer.prepare(source, spec, [{"x": x.numpy()}])
    with torch.no_grad():
        prepared.layer.weight *= 1.5
        prepared.layer.bias += 0.25
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    made = quantizer.finish(prepared, source, spec)
    with torch.no_grad():
        want = prepared(x)
    assert error(emulate(made, x=x.numpy())["y"], want.numpy()) < 1e-5
    limit = 63 if "weight_range" in changes else 127
    (weights,) = int8_weights(made)
    assert (weights.min(), weights.max()) == (-limit, limit)
    assert (np.abs(weights) == limit).sum() > 64  # what grew too large ends at the end of its range
    after = prepared.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(prepared(x), want)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_a_kept_layer_stays_in_float(alpha, source, tmp_path):
    keep = ("LayerNorm", "blocks.1/fc1/MatMul$", "^/conv1/Conv", "^/up/")
    quantizer, spec = ModelOptTorchQuantizer(), spec_for(tmp_path, keep=keep, smooth_quant_alpha=alpha)
    module = quantizer.prepare(source, spec, Calibration(ITEMS))
    for kept, other in ((module.blocks[1].fc1, module.blocks[0].fc1), (module.conv1, module.conv2)):
        x = torch.randn(2, other.weight.shape[1], *(4,) * (other.weight.ndim - 2))
        assert torch.equal(kept.input_quantizer(x), x)
        assert not torch.equal(other.input_quantizer(x), x)
    graph = quantizer.finish(module, source, spec)
    floats = {name for name, kind in precisions(graph).items() if kind == "f32" and "blocks.0" not in name}
    assert floats >= {"/blocks.1/fc1/MatMul", "/conv1/Conv", "/up/ConvTranspose"}
    assert len(int8_weights(graph)) == 10
    got = emulate(graph, image=image(3).numpy())
    with torch.no_grad():
        want = module(image(3))
    assert all(error(got[name], a.numpy()) < 0.02 for name, a in zip(source.output_names, want, strict=True))


class Twice(nn.Module):
    """One layer that is called twice, and one that is called once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(torch.relu(self.layer(x))))


@pytest.mark.parametrize("call", [0, 1])
def test_a_layer_with_a_kept_call_stays_in_float_altogether(call, tmp_path):
    module, x = Twice().eval(), torch.randn(1, 4, 32)
    source = Source("twice", module, {"x": x}, ("y",), export(module, {"x": x}, ["y"], tmp_path / "twice.onnx"))
    nodes = list(precisions(source.graph))
    spec = spec_for(tmp_path / "out", calibration_samples=1, keep=(f"^{nodes[call]}$",))
    quantizer = ModelOptTorchQuantizer()
    prepared = quantizer.prepare(source, spec, [{"x": x.numpy()}])
    graph = quantizer.finish(prepared, source, spec)
    assert precisions(graph) == {nodes[0]: "f32", nodes[1]: "f32", nodes[2]: "int8"}
    with torch.no_grad():
        assert error(emulate(graph, x=x.numpy())["y"], prepared(x).numpy()) < 1e-5


def test_a_shared_layer_has_one_grid(tmp_path):
    module, x = Twice().eval(), torch.randn(1, 4, 32)
    source = Source("twice", module, {"x": x}, ("y",), export(module, {"x": x}, ["y"], tmp_path / "twice.onnx"))
    quantizer, spec = ModelOptTorchQuantizer(), spec_for(tmp_path / "out", calibration_samples=1)
    prepared = quantizer.prepare(source, spec, [{"x": x.numpy()}])
    train(prepared, x, torch.zeros(1, 4, 32), 1e-3, 5)
    graph = quantizer.finish(prepared, source, spec)
    assert len(int8_weights(graph)) == 2
    with torch.no_grad():
        assert error(emulate(graph, x=x.numpy())["y"], prepared(x).numpy()) < 0.02


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keep": ("nothing_like_it",)}, "matches no node"),
        ({"symmetric_activations": False}, "symmetric_activations is false"),
        ({"bits_w": 4, "bits_a": 16}, "lowers to W8A8, not W4A16"),
        ({"calibration_samples": 9}, "holds 4 items"),
    ],
)
def test_what_cannot_be_prepared_is_said(source, tmp_path, changes, says):
    with refused(says, tmp_path):
        ModelOptTorchQuantizer().prepare(source, spec_for(tmp_path, **changes), Calibration(ITEMS))


def test_a_source_that_does_not_fit_is_refused(source, tmp_path):
    quantizer = ModelOptTorchQuantizer()
    with refused("give both", tmp_path):
        quantizer.prepare(dataclasses.replace(source, module=None), spec_for(tmp_path), Calibration(ITEMS))
    other, spec = dataclasses.replace(source, module=toy(depth=1)), spec_for(tmp_path, keep=("conv1/Conv",))
    with refused("the module calls 9 layers with weights, its graph has 13 nodes", tmp_path):
        quantizer.prepare(other, spec, Calibration(ITEMS))


def test_finish_proves_the_keep_list(source, tmp_path, monkeypatch):
    """A module that was prepared with a shorter keep-list, and nothing that frees the kept node."""
    quantizer = ModelOptTorchQuantizer()
    module = quantizer.prepare(source, spec_for(tmp_path), Calibration(ITEMS))
    monkeypatch.setattr(modelopt_export, "free_kept", lambda *_: None)
    with pytest.raises(BackendError, match=r"quantized or renamed kept nodes: \['/conv1/Conv'\]"):
        quantizer.finish(module, source, spec_for(tmp_path, keep=("conv1/Conv",)))
