"""OpenVINO: quantization with Intel Neural Compressor, which starts from the torch module."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from backend_toys import Calibration, error, image, linear_graph, quantized, refused, toy, toy_flops
from torch import nn

import backends
from backends import registry
from backends.base import BackendError, Precision, QuantSpec, Source, Unavailable, executed_precision
from backends.exchange import export

pytest.importorskip("openvino")
pytest.importorskip("nncf")

from backends.cpu import saturates
from backends.openvino.backend import INC
from backends.openvino.engine import OpenVINOEngine, best_float, read_model
from backends.openvino.inc import INCQuantizer, _own_logs
from backends.openvino.keep import check_keep

ITEMS = 6
SPEC = QuantSpec(calibration_samples=ITEMS, smooth_quant_alpha=None, bias_correction="none")


@pytest.fixture(scope="session")
def inc():
    pytest.importorskip("neural_compressor", reason="needs Intel Neural Compressor: pip install 'pqk[inc]'")
    pytest.importorskip("torchao", reason="needs torchao: pip install 'pqk[inc]'")


def quantize(source, folder, **changes):
    quantizer = INCQuantizer()
    return quantized(quantizer, SPEC, source, folder, **changes), quantizer


@pytest.fixture(scope="module")
def made(inc, source, tmp_path_factory):
    return quantize(source, tmp_path_factory.mktemp("inc"))


def test_int8_engine_runs_int8_and_stays_near(made, source):
    graph, quantizer = made
    feeds = {"image": image(99).numpy()}
    with OpenVINOEngine(source.graph, Precision.F32) as engine:
        want = engine.infer(feeds)
    with OpenVINOEngine(graph, Precision.INT8) as engine:
        got = engine.infer(feeds)
        kernels = engine.kernels()
        assert check_keep(engine, SPEC.keep, kernels) == []
    share = executed_precision(kernels)
    assert share["int8"] > 0.5
    assert set(share) == {"int8", str(best_float())}
    assert sum(k.flops for k in kernels) == pytest.approx(toy_flops(), rel=1e-9)
    for name in want:
        assert 1e-4 < error(got[name], want[name]) < 0.1
    assert quantizer.report.items == ITEMS
    assert bool(quantizer.notes()) == saturates()


def test_the_graph_has_the_names_shapes_and_types_of_the_source(made, source):
    assert made[0].inputs == source.graph.inputs
    assert made[0].outputs == source.graph.outputs
    assert made[0].path.name == "q.xml"


def test_weights_are_stored_as_int8(made, source):
    parameters = sum(p.numel() for p in source.module.parameters())
    transposed = source.module.up.weight.numel()  # these stay float
    stored = made[0].path.with_suffix(".bin").stat().st_size
    assert parameters < stored - 3 * transposed < 1.4 * parameters


def test_only_matmuls_and_convolutions_are_quantized(made):
    model = read_model(made[0].path)
    moves = {"Reshape", "Transpose"}
    found = 0
    for op in model.get_ops():
        if op.get_type_name() != "FakeQuantize":
            continue
        users = [port.get_node() for port in op.output(0).get_target_inputs()]
        while users[0].get_type_name() in moves:
            users = [port.get_node() for port in users[0].output(0).get_target_inputs()]
        assert {user.get_type_name() for user in users} <= {"MatMul", "Convolution"}
        found += 1
    assert found == 4 * 2 + 4


def test_the_module_is_left_as_it_was(inc, source, tmp_path):
    source = dataclasses.replace(source, module=toy())
    source.module.blocks[0].train()
    before = {name: value.clone() for name, value in source.module.state_dict().items()}
    quantize(source, tmp_path)
    assert source.module.blocks[0].training
    assert not source.module.blocks[1].training
    after = source.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(value.is_contiguous() for value in after.values())
    assert torch.equal(source.module.eval()(image())[1], toy()(image())[1])


def test_a_kept_pattern_runs_in_float(inc, source, tmp_path):
    # the pattern that NNCF's test uses on the nodes of the ONNX file
    graph, quantizer = quantize(source, tmp_path, keep=("blocks.0/fc1/MatMul", "^/conv1/Conv"))
    with OpenVINOEngine(graph, Precision.INT8) as engine:
        kernels = engine.kernels()
        assert check_keep(engine, ("blocks.0/fc1/MatMul", "^/conv1/Conv"), kernels) == []
        assert len(check_keep(engine, ("blocks.1/fc1/MatMul",), kernels)) == 1
        assert len(check_keep(engine, ("^/conv2/Conv",), kernels)) == 1
    assert quantizer.report.kept == ("/blocks.0/fc1/MatMul", "/conv1/Conv")


def test_a_keep_list_that_was_not_honoured_is_refused(inc, source, tmp_path, monkeypatch):
    monkeypatch.setattr("backends.openvino.inc._strip", lambda prepared, kept: None)
    with pytest.raises(BackendError, match=r"quantized '/blocks\.0/fc1/MatMul', which the keep-list protects"):
        quantize(source, tmp_path, keep=("blocks.0/fc1/MatMul",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [{"symmetric_activations": False}, {"weights": "per_tensor", "keep": ()}],
)
def test_other_specs_quantize_too(inc, changes, source, tmp_path):
    graph, _ = quantize(source, tmp_path, **changes)
    feeds = {"image": image(99).numpy()}
    with OpenVINOEngine(source.graph, Precision.F32) as f32, OpenVINOEngine(graph, Precision.INT8) as engine:
        assert error(engine.infer(feeds)["map"], f32.infer(feeds)["map"]) < 0.15
        assert executed_precision(engine.kernels())["int8"] > 0.5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits_w": 4}, "not W4A8"),
        ({"weights": "per_row"}, "'per_channel' or 'per_tensor'"),
        ({"activations": "per_token"}, "must be 'per_tensor'"),
        ({"bias_correction": "fast"}, "bias_correction is fast, and the quantizer 'inc' takes none alone"),
        ({"smooth_quant_alpha": 0.5}, "smooth_quant_alpha is 0.5, and the quantizer 'inc' takes null alone"),
        ({"weight_range": "hlf"}, "did you mean 'half'?"),
        ({"calibration_samples": 0}, "at least 1"),
        ({"name": "../out"}, "plain file name"),
    ],
)
def test_a_spec_that_cannot_be_followed_writes_nothing(changes, says, source, tmp_path):
    with refused(says, tmp_path):
        quantize(source, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keep": ("LayerNrm",)}, "matches no node (did you mean 'LayerNorm'?)"),
        ({"keep": ("(",)}, "not a valid regular expression"),
        ({"calibration_samples": 7}, "holds 6 items, calibration_samples asks for 7"),
        ({"items": 0}, "empty calibration set"),
    ],
)
def test_a_keep_list_or_set_that_does_not_fit_writes_nothing(inc, changes, says, source, tmp_path):
    with refused(says, tmp_path):
        quantize(source, tmp_path, **changes)


def test_a_source_without_a_module_or_with_another_graph(inc, source, tmp_path):
    with pytest.raises(BackendError, match="starts from a torch module"):
        quantize(dataclasses.replace(source, module=None), tmp_path)
    with pytest.raises(BackendError, match="inputs \\['picture'\\] are not those of the graph, \\['image'\\]"):
        quantize(dataclasses.replace(source, example={"picture": image()}), tmp_path)
    with pytest.raises(BackendError, match="'tokens' is float32"):
        wrong = dataclasses.replace(source.graph, outputs=tuple(reversed(source.graph.outputs)))
        other = dataclasses.replace(wrong.outputs[1], shape=(1, 2, 3))
        quantize(
            dataclasses.replace(source, graph=dataclasses.replace(wrong, outputs=(wrong.outputs[0], other))), tmp_path
        )
    assert list(tmp_path.iterdir()) == []


class DataDependent(nn.Module):
    def forward(self, image):
        return image * 2 if image.sum() > 0 else image


def test_a_module_that_cannot_be_exported(inc, source, tmp_path):
    with pytest.raises(BackendError, match="cannot export DataDependent"):
        quantize(dataclasses.replace(source, module=DataDependent()), tmp_path)


def test_calibration_memory_is_bounded_and_only_the_asked_items_are_used(inc, source, tmp_path):
    calibration = Calibration(40)
    spec = dataclasses.replace(SPEC, output_dir=tmp_path, calibration_samples=20)
    quantizer = INCQuantizer()
    quantizer.quantize(source, spec, calibration)
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
from backends.openvino.engine import read_model
from backends.openvino.inc import INCQuantizer, _own_logs
graph = describe_onnx(sys.argv[3])
read_model(graph.path)  # moves the process-wide counter of automatic node names
source = Source("q", toy(), {"image": image()}, ("tokens", "map"), graph)
spec = QuantSpec(calibration_samples=6, smooth_quant_alpha=None, bias_correction="none", output_dir=Path(sys.argv[1]))
print(INCQuantizer().quantize(source, spec, Calibration(6)).sha256)
"""


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes_in_another_process_that_prints_nothing_else(made, source, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, tmp_path, Path(__file__).parent, source.graph.path],
        capture_output=True,
        text=True,
        cwd=Path(backends.__file__).parent.parent,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == made[0].sha256 + "\n"
    assert done.stderr == ""
    assert str(source.graph.path.parent) not in made[0].path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("weight_range", "levels"), [("full", 127), ("half", 63)])
def test_one_linear_layer_agrees_with_exact_integer_arithmetic(inc, tmp_path, weight_range, levels):
    module, graph = linear_graph(tmp_path)
    rng = np.random.default_rng(0)
    items = [{"x": rng.uniform(-1, 1, (8, 64)).astype(np.float32)} for _ in range(8)]
    spec = dataclasses.replace(
        SPEC, calibration_samples=8, keep=(), weight_range=weight_range, output_dir=tmp_path / weight_range
    )
    source = Source("lin", module, {"x": torch.zeros(8, 64)}, ("y",), graph)
    made = INCQuantizer().quantize(source, spec, items)
    # Weights by row; activations by the mean over the items of their least and largest value, at 255 levels.
    weight, bias = module.layer.weight.detach().numpy(), module.layer.bias.detach().numpy()
    low, high = (float(np.mean([f(item["x"]) for item in items])) for f in (np.min, np.max))
    scale_x = max(-low, high) / 127.5
    scale_w = np.abs(weight).max(1, keepdims=True) / levels
    x = items[0]["x"]
    want = (np.clip(np.round(x / scale_x), -128, 127) * scale_x) @ (np.round(weight / scale_w) * scale_w).T + bias
    assert np.abs(_int8_weights(made)).max() == levels
    with OpenVINOEngine(made, Precision.INT8, {"rest": "f32"}) as engine:
        got = engine.infer({"x": x})["y"]
    if weight_range == "full" and saturates():  # what the CPU does to full weights, and why auto halves them here
        assert error(got, want) > 0.05
    else:
        assert error(got, x @ weight.T + bias) < 0.02
        assert error(got, want) < 0.003


def test_auto_holds_weights_to_half_their_range_where_sums_saturate(inc, tmp_path, monkeypatch):
    module, graph = linear_graph(tmp_path)
    source = Source("lin", module, {"x": torch.zeros(8, 64)}, ("y",), graph)
    items = [{"x": np.random.default_rng(0).uniform(-1, 1, (8, 64)).astype(np.float32)}]
    for here, largest in ((False, 127), (True, 63)):
        monkeypatch.setattr("backends.cpu.saturates", lambda here=here: here)
        quantizer = INCQuantizer()
        spec = dataclasses.replace(SPEC, calibration_samples=1, output_dir=tmp_path / str(here))
        made = quantizer.quantize(source, spec, items)
        assert np.abs(_int8_weights(made)).max() == largest
        assert bool(quantizer.notes()) is here


def _int8_weights(graph):
    model = read_model(graph.path)
    found = [op.data for op in model.get_ops() if op.get_type_name() == "Constant" and op.data.dtype == np.int8]
    assert len(found) == 1
    return found[0].astype(np.int32)


class Mixed(nn.Module):
    """A product of two tensors and a residual beside a convolution, both of which INC would quantize."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image * torch.exp(image)
        return x + self.last(torch.relu(self.conv(x)))


def test_products_and_residuals_stay_float_and_positive_values_take_all_levels(inc, tmp_path):
    example = {"image": torch.randn(1, 8, 16, 16)}
    graph = export(Mixed(), example, ["y"], tmp_path / "mixed.onnx")
    items = [{"image": torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(k)).numpy()} for k in range(4)]
    spec = dataclasses.replace(SPEC, calibration_samples=4, output_dir=tmp_path)
    made = INCQuantizer().quantize(Source("mixed", Mixed(), example, ("y",), graph), spec, items)
    limits = []
    for op in read_model(made.path).get_ordered_ops():
        if op.get_type_name() == "FakeQuantize":
            assert [p.get_node().get_type_name() for p in op.output(0).get_target_inputs()] == ["Convolution"]
            limits.append(tuple(float(op.input_value(k).get_node().get_data().item()) for k in (1, 2)))
    assert len(limits) == 2
    assert sum(low == 0 for low, _ in limits) == 1  # behind the ReLU
    assert sum(low < 0 < high for low, high in limits) == 1


def test_a_convolution_gets_the_ranges_and_weights_of_arithmetic(inc, tmp_path):
    module, example = Mixed().requires_grad_(False), {"image": torch.randn(1, 8, 16, 16)}
    graph = export(module, example, ["y"], tmp_path / "mixed.onnx")
    images = [torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(5)]
    spec = dataclasses.replace(SPEC, calibration_samples=5, weight_range="full", output_dir=tmp_path)
    source = Source("mixed", module, example, ("y",), graph)
    made = INCQuantizer().quantize(source, spec, [{"image": x.numpy()} for x in images])
    entering = [x * torch.exp(x) for x in images]
    behind = [torch.relu(module.conv(x)) for x in entering]
    means = [
        [float(torch.stack([f(x) for x in xs]).mean()) for f in (torch.amin, torch.amax)] for xs in (entering, behind)
    ]
    step = max(-means[0][0], means[0][1]) / 127.5
    want = [(-128 * step, 127 * step), (0.0, means[1][1])]
    found = {}
    for op in read_model(made.path).get_ordered_ops():
        if op.get_type_name() == "FakeQuantize":
            user = next(iter(op.output(0).get_target_inputs())).get_node().get_friendly_name()
            found[user] = tuple(float(op.input_value(k).get_node().get_data().item()) for k in (1, 2))
    assert list(found) == ["/conv/Conv", "/last/Conv"]
    np.testing.assert_allclose(list(found.values()), want, rtol=1e-5)
    stored = [
        op.data for op in read_model(made.path).get_ordered_ops() if op.get_element_type().get_type_name() == "i8"
    ]
    for layer in (module.conv, module.last):
        weight = layer.weight.detach().numpy()
        rounded = np.round(weight / np.abs(weight).max((1, 2, 3), keepdims=True) * 127)
        assert any(data.shape == weight.shape and (data != rounded).mean() < 0.01 for data in stored)


def test_listed_but_unavailable_without_the_package(source, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "neural_compressor"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "neural_compressor", None)
    listed = registry.get("openvino").quantizers()
    assert list(listed) == ["nncf", "inc"]
    spec = dataclasses.replace(SPEC, output_dir=tmp_path)
    with pytest.raises(Unavailable, match=r'pip install -e "\.\[openvino,inc\]"'):
        listed["inc"].quantize(source, spec, Calibration(ITEMS))
    assert list(tmp_path.iterdir()) == []


def test_availability_shows_the_version_without_importing(inc):
    code = "from backends import registry; import sys; print(dict(registry.get('openvino').availability().versions));"
    code += "registry.get('openvino').quantizers(); print('neural_compressor' in sys.modules, 'torchao' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert INC in done.stdout
    assert done.stdout.split()[-2:] == ["False", "False"]


def test_the_log_of_inc_goes_into_a_temporary_folder(inc, tmp_path):
    """Importing it makes ~/.habana_logs, and fails where the home is no folder, as containers have it."""
    code = (
        "import os\nfrom backends.openvino.inc import _own_logs\nwith _own_logs():\n"
        "    from neural_compressor.torch.quantization import StaticQuantConfig\nassert 'HABANA_LOGS' not in os.environ"
    )
    env = {name: value for name, value in os.environ.items() if name != "HABANA_LOGS"}
    env |= {"HOME": "/dev/null", "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [path for path in tmp_path.rglob("*") if "inc" in path.name]


def test_a_log_folder_of_the_user_is_kept(monkeypatch):
    monkeypatch.setenv("HABANA_LOGS", "mine")
    with _own_logs():
        assert os.environ["HABANA_LOGS"] == "mine"
    monkeypatch.delenv("HABANA_LOGS")
    with _own_logs():
        assert Path(os.environ["HABANA_LOGS"]).is_dir()
    assert "HABANA_LOGS" not in os.environ
