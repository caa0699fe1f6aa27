"""Number formats of backend trt from the command line: the record, the table and the export call them by name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_toys import pqk

from backends import registry
from backends.base import BackendError, Unavailable
from backends.onnx_graph import OnnxGraph
from pqk.cli.run_output import run_card
from pqk.errors import PqkError
from pqk.recipe import candidate, stages
from pqk.recipe.request import Request

FOUND = registry.get("trt").availability()
pytestmark = [pytest.mark.skipif(not FOUND.available, reason=FOUND.reason), pytest.mark.usefixtures("forked_workers")]
QUICK = ("--set", "quant.trt.optimization_level=1")
W4A16 = ("--set", "quant.ptq.bits_w=4", "--set", "quant.ptq.bits_a=16")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, begun: Callable[[Path], Path]) -> Path:
    return begun(tmp_path_factory.mktemp("formats") / "project")


@pytest.mark.parametrize(
    ("asked", "precision", "bits", "images"),
    [
        (("--quantizer", "modelopt-fp8", "--set", "quant.float_rest=f32", *QUICK), "fp8", (8, 8), 8),
        ((*W4A16, *QUICK), "int4", (4, 16), 0),
    ],
)
def test_a_record_says_what_was_made(
    asked: tuple[str, ...], precision: str, bits: tuple[int, int], images: int, root: Path, tiny_model: Path
) -> None:
    once = ("--no-rollback", "--json")  # at four bits no move of the table would bring this model below its line
    done = pqk(root, "run", "B1", "--backend", "trt", "--model", tiny_model, *asked, *once)
    assert done.code in (0, 1, 4), done.err
    record = done.record
    assert (record["precision"], record["bits_w"], record["bits_a"]) == (precision, *bits)
    assert record["images_calibration"] == images
    assert f"candidate {precision}" in done.err
    assert "int8" not in json.dumps([record["verdict_reasons"], record["notes"]])
    if record["measured"] == "emulated":
        assert record["executed_precision"] is None
        assert 0 < abs(record["quality_drop_pct"]) < 50
    plans = [json.loads(path.read_text()) for path in (root / "outputs" / "engines").glob("*.json")]
    assert plans and {about["optimization_level"] for about in plans} == {1}, "quant.yaml's value reaches the builder"
    out = root / precision
    made = pqk(root, "export", "B1", "--backend", "trt", "--model", tiny_model, *asked, "-o", out.name)
    assert made.code == 0, made.err
    about = json.loads((out / "manifest.json").read_text())
    assert (about["precision"], about["record"]["precision"]) == (precision, precision)
    for part in ("encoder", "decoder"):
        assert about["graphs"][part]["plan"] == f"{part}.plan"
        assert (out / f"{part}.plan").stat().st_size > 10_000


def test_the_torch_mode_smooths_and_keeps_what_the_card_asks(root: Path, tiny_model: Path) -> None:
    """SmoothQuant, weights per tensor, and keep patterns for one graph each, from the command line to the record."""
    pytest.importorskip("requests", reason="ModelOpt's torch mode needs requests")
    pytest.importorskip("huggingface_hub", reason="ModelOpt's torch mode needs huggingface_hub")
    keep = ["LayerNorm", "encoder:enc_blocks.0/mlp/fc1", "decoder:^/decoder_embed_1/MatMul"]
    asked = (
        f"quant.ptq.keep_list={json.dumps(keep)}",
        "quant.ptq.smooth_quant_alpha=0.5",
        "quant.ptq.weights=per_tensor",
    )
    settings = [word for value in asked for word in ("--set", value)]
    tool = ("--backend", "trt", "--quantizer", "modelopt-torch")
    done = pqk(root, "run", "B1", *tool, "--model", tiny_model, *settings, *QUICK, "--json")
    assert done.code in (0, 1, 4), done.err
    record = done.record
    assert (record["precision"], record["quantizer"], record["keep_list"]) == ("int8", "modelopt-torch", keep)
    assert "linear layers are smoothed with alpha 0.5; attention stays in float" in record["notes"]
    if record["measured"] == "emulated":
        assert abs(record["quality_drop_pct"]) < 50
    manifests = (root / "outputs" / "store" / "quantized").glob("*/manifest.json")
    (made,) = [m.parent for m in manifests if json.loads(m.read_text())["inputs"]["quantizer"] == "modelopt-torch"]
    floats = {}
    for part in ("encoder", "decoder"):
        graph = OnnxGraph(made / f"{part}.onnx")
        floats[part] = {n.name for n in graph.work() if graph.flops(n) and graph.precision(n) != "int8"}
        assert len(floats[part]) < 0.5 * sum(1 for n in graph.work() if graph.flops(n))
    attention = re.compile(r"/(attn|cross_attn)/MatMul")
    assert {n for n in floats["encoder"] if not attention.search(n)} == {"/enc_blocks.0/mlp/fc1/MatMul"}
    assert {n for n in floats["decoder"] if not attention.search(n)} == {"/decoder_embed_1/MatMul"}


def test_a_float_rest_of_16_bits_is_refused(project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    request = Request("B1", "trt", model=str(tiny_model), settings={"quant.float_rest": "f16"})
    with pytest.raises(PqkError, match=r"quant\.float_rest is f16; backend trt supports here auto, f32$"):
        run_card(request, False)


@pytest.fixture
def no_stages(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaching a stage that takes long is an error."""

    def reached(*_: object) -> None:
        raise AssertionError("a stage began")

    real = candidate.open_split

    def opened(ctx: Any, experiment: Any, split: str, *rest: Any) -> Any:
        return reached() if split == "calibration" else real(ctx, experiment, split, *rest)

    monkeypatch.setattr(candidate, "open_split", opened)
    monkeypatch.setattr(stages, "export_graphs", reached)
    monkeypatch.chdir(project)


def skip_without(backend: str) -> None:
    found = registry.get(backend).availability()
    if not found.available:
        pytest.skip(found.reason)


@pytest.mark.parametrize(
    ("backend", "quantizer", "says"),
    [
        ("openvino", "nncf", "lowers to W8A8, not W4A16$"),
        ("openvino", "inc", "lowers to W8A8, not W4A16$"),
        ("trt", "modelopt-fp8", "lowers to W8A8, not W4A16; take --quantizer modelopt$"),
        ("trt", "modelopt-torch", "lowers to W8A8, not W4A16; take --quantizer modelopt$"),
    ],
)
def test_other_quantizers_refuse_int4_before_the_stages(
    backend: str, quantizer: str, says: str, no_stages: None, tiny_model: Path
) -> None:
    skip_without(backend)
    settings = {"quant.ptq.bits_w": 4, "quant.ptq.bits_a": 16}
    request = Request("B1", backend, quantizer, str(tiny_model), settings=settings)
    with pytest.raises(BackendError, match=rf"the quantizer '{quantizer}' {says}") as refused:
        run_card(request, False)
    assert refused.value.exit_code == 2
    with pytest.raises(PqkError, match="must hold bits_w 8 with bits_a 8"):
        run_card(Request("B1", backend, quantizer, str(tiny_model), settings={"quant.ptq.bits_w": 4}), False)


@pytest.mark.parametrize(
    ("backend", "quantizer", "setting", "value", "says"),
    [
        ("trt", "modelopt", "smooth_quant_alpha", 0.5, "is 0.5, .* takes null alone; take --quantizer modelopt-torch$"),
        ("trt", "modelopt", "weights", "per_tensor", "takes per_channel alone; take --quantizer modelopt-torch$"),
        ("trt", "modelopt-fp8", "weights", "per_tensor", "takes per_channel alone; take --quantizer modelopt-torch$"),
        ("trt", "modelopt-torch", "symmetric_activations", False, "is false, .* takes true alone$"),
        ("openvino", "inc", "smooth_quant_alpha", 0.5, "is 0.5, .* takes null alone; take --quantizer nncf$"),
        ("openvino", "inc", "bias_correction", "fast", "is fast, .* takes none alone; take --quantizer nncf$"),
    ],
)
def test_what_a_quantizer_cannot_do_is_refused_before_the_stages(
    backend: str, quantizer: str, setting: str, value: object, says: str, no_stages: None, tiny_model: Path
) -> None:
    skip_without(backend)
    request = Request("B1", backend, quantizer, str(tiny_model), settings={f"quant.ptq.{setting}": value})
    with pytest.raises(
        BackendError, match=rf"^quant\.ptq\.{setting} is .* the quantizer '{quantizer}' takes"
    ) as refused:
        run_card(request, False)
    assert re.search(says, str(refused.value))
    assert refused.value.exit_code == 2


def test_a_quantizer_that_is_not_installed_is_refused_before_the_stages(
    no_stages: None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "requests", None)
    with pytest.raises(Unavailable, match="quantizer 'modelopt-torch' cannot run: no module named"):
        run_card(Request("B1", "trt", "modelopt-torch", str(tiny_model)), False)
