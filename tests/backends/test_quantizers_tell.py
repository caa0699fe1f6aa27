"""What a quantizer cannot measure it refuses, and what it loses it says: NaN inside, nothing left, dead columns, small
channels. One suite for all quantizers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backend_toys import error, refused
from torch import nn

from backends import registry
from backends.base import BackendError, Feeds, Graph, Precision, QuantSpec, Source, Unavailable
from backends.calibration import CalibrationItems
from backends.exchange import export
from backends.quantspec import check_installed
from backends.reference import OnnxRuntimeEngine
from backends.trt.ranges import largest_magnitudes

QUANTIZERS = [("trt", "modelopt"), ("trt", "modelopt-fp8"), ("trt", "modelopt-torch"), ("openvino", "nncf")]
QUANTIZERS += [("openvino", "inc"), ("onnxruntime", "ort")]
TRAINING = [("trt", "modelopt-torch"), ("openvino", "nncf")]
SPEC = QuantSpec(keep=(), calibration_samples=3, weight_range="full")
each = pytest.mark.parametrize(("backend", "name"), QUANTIZERS, ids=[name for _, name in QUANTIZERS])
trained = pytest.mark.parametrize(("backend", "name"), TRAINING, ids=[name for _, name in TRAINING])


def tool(backend: str, name: str) -> Any:
    found = registry.get(backend).availability()
    if not found.available:
        pytest.skip(found.reason)
    quantizer = registry.get(backend).quantizers()[name]
    try:
        check_installed(quantizer)
    except Unavailable as error:
        pytest.skip(str(error))
    return quantizer


def source(module: nn.Module, folder: Path, shape: tuple[int, ...] = (1, 16, 32)) -> Source:
    example = {"x": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    graph = export(module.eval(), example, ["y"], folder / "float.onnx")
    return Source("part", module, example, ("y",), graph)


def items(count: int = 3, bad: int | None = None, value: float = 0.5, rows: slice = slice(None)) -> list[Feeds]:
    """Normal items; in the one at `bad`, `rows` are constant: their spread is 0."""
    made = [np.random.default_rng(k).normal(size=(1, 16, 32)).astype(np.float32) for k in range(count)]
    if bad is not None:
        made[bad][:, rows] = value
    return [{"x": item} for item in made]


class Normalised(nn.Module):
    """Divides each row by its spread, without an epsilon: a constant row gives 0/0 = NaN, or c/0 = inf."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.layer = kind, nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred * centred).mean(-1, keepdim=True).sqrt()
        return torch.relu(self.layer((centred if self.kind == "nan" else x) / spread))


@pytest.fixture(scope="module")
def normalised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return {kind: source(Normalised(kind), tmp_path_factory.mktemp(kind)) for kind in ("nan", "inf")}


@each
@pytest.mark.parametrize(("kind", "bad", "rows"), [("nan", 0, slice(5, 6)), ("inf", 2, slice(None))])
def test_an_item_that_gives_no_numbers_inside_is_refused(
    backend: str, name: str, kind: str, bad: int, rows: slice, normalised: dict[str, Source], tmp_path: Path
) -> None:
    """Also when it is one row of many, which a least and a largest value pass over, and which a Relu hides."""
    quantizer = tool(backend, name)
    spec = dataclasses.replace(SPEC, output_dir=tmp_path)
    tensor = {"modelopt-torch": "input of layer", "inc": "input of /layer/MatMul"}.get(name, "/Div_output_0")
    told = f"calibration item {bad} gives a value that is not finite (NaN or inf) in the tensor {tensor!r}"
    with refused(told, tmp_path):
        quantizer.quantize(normalised[kind], spec, items(bad=bad, rows=rows))


@trained
def test_training_refuses_such_an_item_too(
    backend: str, name: str, normalised: dict[str, Source], tmp_path: Path
) -> None:
    quantizer = tool(backend, name)
    asked = dataclasses.replace(SPEC, output_dir=tmp_path, smooth_quant_alpha=None)
    with refused("calibration item 1 gives a value that is not finite", tmp_path):
        quantizer.prepare(normalised["nan"], asked, items(bad=1, rows=slice(5, 6)))


class Masked(nn.Module):
    """Attention whose mask is -inf: no number, but none that anything is measured of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = torch.triu(torch.full((16, 16), float("-inf")), 1)
        return self.proj((q @ k.transpose(1, 2) * 32**-0.5 + mask).softmax(-1) @ v)


@each
def test_a_mask_of_infinities_is_no_fault(backend: str, name: str, tmp_path: Path) -> None:
    quantizer = tool(backend, name)
    keep = ("Softmax", "AttentionScales")
    made = quantizer.quantize(
        source(Masked(), tmp_path), dataclasses.replace(SPEC, keep=keep, output_dir=tmp_path / "o"), items()
    )
    assert made.path.exists()


def test_least_and_largest_values_alone_would_pass_over_nan(tmp_path: Path, normalised: dict[str, Source]) -> None:
    graph = normalised["nan"].graph
    path = tmp_path / "g.onnx"
    path.write_bytes(graph.path.read_bytes())
    good = largest_magnitudes(path, graph.inputs, ["/Div_output_0"], items())
    assert 1 < good["/Div_output_0"] < 10
    with pytest.raises(BackendError, match="calibration item 2 gives"):
        largest_magnitudes(path, graph.inputs, ["/Div_output_0"], items(bad=2, rows=slice(7, 8)))
    assert [p.name for p in tmp_path.iterdir()] == ["g.onnx"]


class TwoLayers(nn.Module):
    """Linear, ReLU, linear; `columns` (input) and `channels` (output) scale weights of the second one."""

    def __init__(self, columns: dict[int, float] | None = None, channels: dict[int, float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            for k, factor in (columns or {}).items():
                self.second.weight[:, k] *= factor
            for k, factor in (channels or {}).items():
                self.second.weight[k] *= factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


NOTHING = "part: nothing is left to quantize: the keep-list (LayerNorm, .*) leaves it no matmul or convolution"


@each
def test_a_keep_list_that_leaves_nothing_is_refused_in_one_sentence(backend: str, name: str, tmp_path: Path) -> None:
    quantizer = tool(backend, name)
    asked = dataclasses.replace(SPEC, keep=("LayerNorm", ".*"), output_dir=tmp_path / "o")
    (tmp_path / "o").mkdir()
    with refused(NOTHING, tmp_path / "o"):
        quantizer.quantize(source(TwoLayers(), tmp_path), asked, items())


@trained
def test_training_refuses_it_in_the_same_sentence(backend: str, name: str, tmp_path: Path) -> None:
    quantizer = tool(backend, name)
    asked = dataclasses.replace(SPEC, keep=("LayerNorm", ".*"), smooth_quant_alpha=None, output_dir=tmp_path)
    with pytest.raises(BackendError) as caught:
        quantizer.prepare(source(TwoLayers(), tmp_path), asked, items())
    assert NOTHING in str(caught.value)


def test_int4_that_keeps_every_matmul_is_refused_too(tmp_path: Path) -> None:
    asked = dataclasses.replace(SPEC, bits_w=4, bits_a=16, keep=("MatMul",), output_dir=tmp_path)
    with pytest.raises(BackendError, match=r"nothing is left to quantize: the keep-list \(MatMul\)"):
        tool("trt", "modelopt").quantize(source(TwoLayers(), tmp_path), asked, items())


class NoWork(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + 1


@each
def test_a_graph_without_layers_is_refused(backend: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"part: nothing is left to quantize: the keep-list \(empty\)"):
        tool(backend, name).quantize(
            source(NoWork(), tmp_path), dataclasses.replace(SPEC, output_dir=tmp_path), items()
        )


def outputs(graph: Graph, backend: str, x: np.ndarray) -> np.ndarray:
    if graph.format == "onnx":
        with OnnxRuntimeEngine(graph, {"fuse_qdq": False}) as engine:
            return engine.infer({"x": x})["y"]
    with registry.get(backend).compile(graph, Precision.INT8, {"rest": "f32"}) as engine:
        return engine.infer({"x": x})["y"]


def float_outputs(module: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize(("alpha", "factor"), [(0.0, 0.0), (0.5, 0.0), (0.5, 1e-20), (1.0, 0.0)])
def test_smoothing_leaves_a_layer_with_a_dead_column_as_it_is(alpha: float, factor: float, tmp_path: Path) -> None:
    quantizer = tool("trt", "modelopt-torch")
    module = TwoLayers(columns={3: factor, 7: factor})
    spec = dataclasses.replace(SPEC, smooth_quant_alpha=alpha, output_dir=tmp_path / "o")
    made = quantizer.quantize(source(module, tmp_path), spec, items())
    x = items()[0]["x"]
    assert error(outputs(made, "trt", x), float_outputs(module, x)) < 0.03
    told = [note for note in quantizer.notes() if note.startswith("not smoothed")]
    # alpha 1 takes no weight into the scale, so nothing is in its way
    assert told == (
        [] if alpha == 1 else ["not smoothed, as columns of their weights are zero or nearly so: second (column 3, 7)"]
    )


def test_nncf_smooths_past_a_dead_column(tmp_path: Path) -> None:
    module = TwoLayers(columns={3: 0.0})
    spec = dataclasses.replace(SPEC, smooth_quant_alpha=0.5, weight_range="auto", output_dir=tmp_path / "o")
    made = tool("openvino", "nncf").quantize(source(module, tmp_path), spec, items())
    x = items()[0]["x"]
    assert error(outputs(made, "openvino", x), float_outputs(module, x)) < 0.05


SMALL = {1: 1e-6, 2: 1e-12, 4: 0.0}


@each
@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
def test_channels_of_very_small_weights_are_kept_or_told(backend: str, name: str, weights: str, tmp_path: Path) -> None:
    quantizer = tool(backend, name)
    if weights not in getattr(quantizer, "follows", {}).get("weights", (weights,)):
        pytest.skip(f"{name} has no weights {weights}")
    module = TwoLayers(channels=SMALL)
    # auto: int8 sums of the whole range saturate on a CPU without VNNI, which is another error than this one
    spec = dataclasses.replace(SPEC, weights=weights, weight_range="auto", output_dir=tmp_path / "o")
    made = quantizer.quantize(source(module, tmp_path), spec, items())
    x = items()[0]["x"]
    got, want = outputs(made, backend, x), float_outputs(module, x)
    lost = [k for k in (1, 2) if error(got[..., k], want[..., k]) > 0.5]
    told = [note for note in quantizer.notes() if "very small weights" in note]
    assert error(got[..., 0], want[..., 0]) < 0.1
    assert not got[..., 4].any()  # zero before, and none of those that are told
    if lost:
        assert len(told) == 1
        assert told[0].endswith(" 1, 2")
        assert "second" in told[0] or "y" in told[0]
        assert "(2 in all)" in told[0]
    else:
        assert told == []
    assert bool(lost) == (weights == "per_tensor" or name == "nncf")


@trained
def test_training_tells_of_such_channels(backend: str, name: str, tmp_path: Path) -> None:
    quantizer = tool(backend, name)
    weights = "per_tensor" if name == "modelopt-torch" else "per_channel"
    asked = dataclasses.replace(SPEC, weights=weights, smooth_quant_alpha=None, output_dir=tmp_path)
    quantizer.prepare(source(TwoLayers(channels=SMALL), tmp_path), asked, items())
    (told,) = [note for note in quantizer.notes() if "very small weights" in note]
    assert "second" in told
    assert told.endswith(" 1, 2")


def test_emulated_fp8_keeps_the_relu_in_front_of_it(tmp_path: Path) -> None:
    """ONNX Runtime's optimiser drops a Relu before a QuantizeLinear to fp8, and negative values come through."""
    module = TwoLayers()
    made = tool("trt", "modelopt-fp8").quantize(
        source(module, tmp_path), dataclasses.replace(SPEC, output_dir=tmp_path / "o"), items()
    )
    x = items()[0]["x"]
    assert error(outputs(made, "trt", x), float_outputs(module, x)) < 0.1


def test_the_position_of_the_item_is_known_while_it_is_used(tmp_path: Path, normalised: dict[str, Source]) -> None:
    seen: list[int] = []
    wanted = CalibrationItems(items(), normalised["nan"].graph.inputs, 3)
    for _ in range(2):
        for _ in wanted:
            seen.append(wanted.index)
    assert seen == [0, 1, 2, 0, 1, 2]
