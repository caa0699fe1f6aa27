"""Quantization-aware training: the learned rounding, what NNCF prepares, and the engine that comes of it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from backend_toys import Calibration, Linear, error, image, refused, toy
from torch import nn

from backends.base import Precision, QuantSpec, Source, executed_precision
from backends.exchange import export

pytest.importorskip("nncf")
ov = pytest.importorskip("openvino")

from backends.openvino.engine import OpenVINOEngine, read_model  # noqa: E402
from backends.openvino.keep import check_keep  # noqa: E402
from backends.openvino.nncf import NNCFQuantizer  # noqa: E402
from backends.openvino.qat import FakeQuantizer, fake_quantizers  # noqa: E402

ITEMS = 4


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spec_for(folder, **changes) -> QuantSpec:
    return dataclasses.replace(QuantSpec(calibration_samples=ITEMS, output_dir=folder), **changes)


def stored_weights(path) -> list[np.ndarray]:
    """The int8 constants of an IR with more than one axis."""
    constants = [op for op in read_model(path).get_ops() if op.get_type_name() == "Constant"]
    return [
        op.get_data() for op in constants if op.get_element_type() == ov.Type.i8 and len(op.get_output_shape(0)) > 1
    ]


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """The toy, prepared and trained for a few steps towards the float toy: module, source, spec, graph and losses."""
    torch.set_num_threads(1)
    quantizer, spec = NNCFQuantizer(), spec_for(tmp_path_factory.mktemp("qat"), weight_range="half")
    module = quantizer.prepare(source, spec, Calibration(ITEMS))
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 2e-5)
    images = torch.cat([image(seed) for seed in range(ITEMS)])
    with torch.no_grad():
        aim = source.module(images)
    losses = []
    for _ in range(15):
        loss = sum((a - b).abs().mean() for a, b in zip(module(images), aim, strict=True))
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, source, spec, quantizer.finish(module, source, spec), losses


@pytest.mark.parametrize("axis", [None, 1])
def test_rounding_is_torchs_own(axis):
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([0.02]) if axis is None else torch.tensor([0.02, 0.05, 0.01])
    zero = torch.zeros(len(step), dtype=torch.int32)
    got = FakeQuantizer(step, zero, -63, 63, axis)(x)
    if axis is None:
        want = torch.fake_quantize_per_tensor_affine(x, step, zero, -63, 63)
    else:
        want = torch.fake_quantize_per_channel_affine(x, step, zero, axis, -63, 63)
    assert torch.equal(got, want)


def test_gradients_by_hand():
    """Inside the range x's gradient passes and the step's is round(x/s) - x/s; outside it is the end of the range."""
    x = torch.tensor([0.26, -0.14, 5.0, -7.0], requires_grad=True)
    quantizer = FakeQuantizer(torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32), -4, 3, None)
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    (quantizer(x) * weights).sum().backward()
    assert x.grad.tolist() == [1.0, 10.0, 0.0, 0.0]
    by_step = (3 - 2.6) * 1 + (-1 + 1.4) * 10 + 3 * 100 - 4 * 1000
    assert float(quantizer.stretch.grad) == pytest.approx(10 * 0.1 * by_step / math.sqrt(4 * 3), rel=1e-5)


def test_prepared_module_is_the_ptq_one_and_leaves_the_source_alone(source, tmp_path, capfd):
    before = {k: v.clone() for k, v in source.module.state_dict().items()}
    quantizer = NNCFQuantizer()
    module = quantizer.prepare(source, spec_for(tmp_path), Calibration(ITEMS))
    assert capfd.readouterr().out == ""
    assert quantizer.report.items == ITEMS
    ptq = NNCFQuantizer().quantize(source, spec_for(tmp_path), Calibration(ITEMS))
    with torch.no_grad(), OpenVINOEngine(ptq, Precision.INT8) as engine:
        want = engine.infer({"image": image(9).numpy()})
        for name, got in zip(source.output_names, module(image(9)), strict=True):
            assert error(got.numpy(), want[name]) < 0.05
    with torch.no_grad():
        tokens = module(torch.cat([image(1), image(2), image(3)]))[0]  # another batch than the exported one
        assert error(tokens[1:2].numpy(), module(image(2))[0].numpy()) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in source.module.state_dict().items())
    again = NNCFQuantizer().prepare(source, spec_for(tmp_path), Calibration(ITEMS))
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_training_lowers_the_loss_and_moves_the_steps(trained):
    module, _, _, _, losses = trained
    assert losses[-1] < 0.9 * losses[0]
    assert all(float(q.stretch.detach().abs().max()) > 0 for q in fake_quantizers(module).values())


def test_the_engine_computes_what_was_trained(trained):
    """Stated tolerance: 2 % of the mean magnitude, and nearer to the trained module than that is to the float one."""
    module, source, _, graph, _ = trained
    with OpenVINOEngine(graph, Precision.INT8, {"rest": "f32"}) as engine:
        got = engine.infer({"image": image(7).numpy()})
    with torch.no_grad():
        want, plain = module(image(7)), source.module(image(7))
    for name, a, b in zip(source.output_names, want, plain, strict=True):
        assert error(got[name], a.numpy()) < min(0.02, error(a.numpy(), b.numpy()))


def test_the_engine_runs_int8_and_keeps_the_keep_list(trained):
    _, source, spec, graph, _ = trained
    with OpenVINOEngine(graph, Precision.INT8) as engine:
        kernels = engine.kernels()
        assert executed_precision(kernels)["int8"] > 0.8
        assert check_keep(engine, spec.keep, kernels) == []
    assert graph.size_bytes < 0.5 * source.graph.size_bytes
    assert [t.name for t in graph.inputs] == ["image"] and tuple(t.name for t in graph.outputs) == source.output_names


def test_half_range_is_kept_through_training(trained, source, tmp_path):
    largest = max(int(np.abs(weights.astype(int)).max()) for weights in stored_weights(trained[3].path))
    assert 60 <= largest <= 63
    quantizer, spec = NNCFQuantizer(), spec_for(tmp_path, weight_range="full")
    full = quantizer.finish(quantizer.prepare(source, spec, Calibration(ITEMS)), source, spec)
    assert max(int(np.abs(weights.astype(int)).max()) for weights in stored_weights(full.path)) == 127


def test_one_layer_is_exact(tmp_path):
    module, x = Linear().eval(), torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    graph = export(module, {"x": x}, ["y"], tmp_path / "linear.onnx")
    source = Source("linear", module, {"x": x}, ("y",), graph)
    quantizer, spec = NNCFQuantizer(), spec_for(tmp_path, calibration_samples=1, weight_range="half")
    prepared = quantizer.prepare(source, spec, [{"x": x.numpy()}])
    with OpenVINOEngine(quantizer.finish(prepared, source, spec), Precision.INT8, {"rest": "f32"}) as engine:
        got = engine.infer({"x": x.numpy()})["y"]
    with torch.no_grad():
        assert error(got, prepared(x).numpy()) < 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_kept_layer_stays_in_float(source, tmp_path, symmetric):
    keep = ("LayerNorm", "Softmax", "AttentionScales", "^/blocks.1/fc1/MatMul$", "conv1/Conv")
    quantizer, spec = NNCFQuantizer(), spec_for(tmp_path, keep=keep, symmetric_activations=symmetric)
    graph = quantizer.finish(quantizer.prepare(source, spec, Calibration(ITEMS)), source, spec)
    with OpenVINOEngine(graph, Precision.INT8) as engine:
        kernels = engine.kernels()
        assert check_keep(engine, keep, kernels) == []
        assert not any(
            "/blocks.1/fc1" in name for k in kernels if k.precision == "int8" and k.flops for name in k.originals
        )
        assert executed_precision(kernels)["int8"] > 0.3


def test_attention_is_rounded_only_where_it_is_not_kept(source, tmp_path):
    names = [
        fake_quantizers(NNCFQuantizer().prepare(source, spec_for(tmp_path, keep=keep), Calibration(ITEMS)))
        for keep in (("LayerNorm",), ("LayerNorm", "AttentionScales"))
    ]
    assert len(names[0]) > len(names[1])


class Twice(nn.Module):
    """One weight, used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x)))


def test_a_shared_weight_has_one_grid(tmp_path):
    module, x = Twice().eval(), torch.randn(4, 16)
    source = Source("twice", module, {"x": x}, ("y",), export(module, {"x": x}, ["y"], tmp_path / "twice.onnx"))
    spec = spec_for(tmp_path, calibration_samples=1)
    prepared = NNCFQuantizer().prepare(source, spec, [{"x": x.numpy()}])
    weights = [q for name, q in fake_quantizers(prepared).items() if name.startswith("pre_hooks")]
    assert len(weights) == 2 and weights[0] is weights[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keep": ("nothing_like_it",)}, "matches no node"),
        ({"smooth_quant_alpha": 0.5}, "SmoothQuant"),
        ({"bits_w": 4}, "8-bit"),
        ({"calibration_samples": 9}, "holds 4 items"),
    ],
)
def test_what_cannot_be_prepared_is_said(source, tmp_path, changes, says):
    with refused(says, tmp_path):
        NNCFQuantizer().prepare(source, spec_for(tmp_path, **changes), Calibration(ITEMS))


def test_a_source_without_its_module_is_refused(source, tmp_path):
    with refused("give both", tmp_path):
        NNCFQuantizer().prepare(dataclasses.replace(source, module=None), spec_for(tmp_path), Calibration(ITEMS))


class Joined(torch.nn.Module):
    """Joins weights in a tuple, of which NNCF's tracer loses where they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = torch.nn.ParameterList([torch.ones(4, 8), torch.ones(4, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.cat((self.halves[0], self.halves[1]))


def test_a_module_that_cannot_be_traced_is_named(tmp_path):
    module, x = Joined().eval(), torch.randn(2, 8)
    graph = export(module, {"x": x}, ["y"], tmp_path / "joined.onnx")
    source, out = Source("joined", module, {"x": x}, ("y",), graph), tmp_path / "out"
    out.mkdir()
    with refused("joined: NNCF cannot trace the module", out):
        NNCFQuantizer().prepare(source, spec_for(out, calibration_samples=1, keep=()), [{"x": x.numpy()}])


def test_a_source_of_another_module_is_refused(source, tmp_path):
    with refused("in its graph", tmp_path):
        other = dataclasses.replace(source, module=toy(depth=1), name="other")
        NNCFQuantizer().prepare(other, spec_for(tmp_path, keep=("Softmax",)), Calibration(ITEMS))
