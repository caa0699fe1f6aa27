"""Quantization-aware training on backend trt, from the card to the records, and what is said without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends import registry
from backends.onnx_graph import OnnxGraph, kept_nodes
from pqk.families.registry import family
from pqk.recipe import candidate, runner
from pqk.recipe.quantization import Quantization
from pqk.recipe.request import Request
from pqk.settings.quant import load_quant
from pqk.stats.intervals import Interval

FOUND = registry.get("trt").availability()
pytestmark = [pytest.mark.skipif(not FOUND.available, reason=FOUND.reason), pytest.mark.usefixtures("forked_workers")]
QUICK = {"quant.trt.optimization_level": 1}


Done = tuple[list[dict[str, Any]], str, set[str]]


def run(root: Path, quantizer: str, model: Path, settings: dict[str, Any]) -> Done:
    """Card B1 in this process: its records, what was said, and the stages that were made."""
    said: list[str] = []
    made: set[str] = set()

    def on_event(kind: str, stage: str, key: str, seconds: float) -> None:
        if kind == "make":
            made.add(stage.partition(" ")[0])

    request = Request("B1", "trt", quantizer, str(model), settings=QUICK | settings, qat=True)
    return runner.run(request, root, on_event, said.append).records, "\n".join(said), made


@pytest.fixture
def project(tmp_path: Path, begun: Callable[[Path], Path]) -> Path:
    return begun(tmp_path / "project")


@pytest.fixture
def low_line(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    """A line that every quantized model is above: on random weights rounding may as well improve a score."""
    monkeypatch.setattr(candidate, "drop_limit", lambda *_: -1000.0)
    monkeypatch.chdir(project)


@pytest.mark.parametrize(
    ("quantizer", "changes", "says"),
    [
        ("modelopt", {}, "the quantizer 'modelopt' cannot train; --quantizer modelopt-torch can"),
        ("modelopt-fp8", {}, "the quantizer 'modelopt-fp8' cannot train; --quantizer modelopt-torch can"),
        ("modelopt", {"symmetric_activations": False}, "the quantizer 'modelopt' cannot train"),
        ("modelopt", {"bits_w": 4, "bits_a": 16}, "a model with only its weights quantized cannot be trained"),
    ],
)
def test_what_is_said_of_a_drop_where_nothing_can_be_trained(
    quantizer: str, changes: dict[str, Any], says: str
) -> None:
    pytest.importorskip("requests", reason="ModelOpt's torch mode needs requests")
    pytest.importorskip("huggingface_hub", reason="ModelOpt's torch mode needs huggingface_hub")
    experiment: Any = SimpleNamespace(
        family=family("dust3r"), quant=SimpleNamespace(ptq=load_quant().ptq.model_copy(update=changes))
    )
    nothing: Any = None
    quantization = Quantization(experiment, "trt", quantizer, "int8", nothing, {}, nothing, (), {}, {})
    rows: list[Any] = [SimpleNamespace(variant=name, own={}) for name in ("fp32", "int8")]
    for drop, limit, wanted in (
        (2.5, 1.0, [f"PTQ drops 2.50 % on validation samples, above 1 %; {says}"]),
        (0.1, 1.0, []),
    ):
        found = Interval(drop, drop - 1, drop + 1, 8)
        scored: Any = SimpleNamespace(drop=lambda variant, found=found: found)
        said: list[str] = []
        assert candidate._train_if_it_drops(scored, quantization, rows, limit, said.append) == found
        assert said == wanted and len(rows) == 2


@pytest.mark.slow
def test_the_torch_mode_trains_where_ptq_drops_too_much(low_line: None, project: Path, tiny_model: Path) -> None:
    pytest.importorskip("requests", reason="ModelOpt's torch mode needs requests")
    pytest.importorskip("huggingface_hub", reason="ModelOpt's torch mode needs huggingface_hub")
    keep = ["LayerNorm", "encoder:enc_blocks.0/mlp/fc1", "decoder:^/decoder_embed_1/MatMul"]
    settings = {"quant.ptq.keep_list": keep}
    records, said, made = run(project, "modelopt-torch", tiny_model, settings)
    assert ": quantization-aware training\n" in said and "QAT: drop " in said
    assert made >= {"quantized", "qat", "scores"}
    plain, trained = sorted((r for r in records if r["precision"] == "int8"), key=lambda r: "QAT: " in r["notes"])
    assert "QAT: 4 steps in " in trained["notes"] and "weights and biases were trained" in trained["notes"]
    assert trained["gpu_hours"] > 0 and plain["gpu_hours"] > 0
    assert trained["hashes"]["engine"] != plain["hashes"]["engine"]
    assert {trained["role"], plain["role"]} == {"candidate", "baseline"} and records[-1]["role"] == "candidate"
    assert records[-1]["validation_drop_pct"] == min(r["validation_drop_pct"] for r in (plain, trained))
    assert trained["quantizer"] == "modelopt-torch" and trained["keep_list"] == keep
    (folder,) = (m.parent for m in (project / "outputs" / "store" / "qat").glob("*/manifest.json"))
    about = json.loads((folder / "about.json").read_text())
    assert about["steps"] == 4 and about["feeds"]["decoder"] == 1
    encoder, decoder = (OnnxGraph(folder / f"{part}.onnx") for part in ("encoder", "decoder"))
    # One call of this layer is kept, so both are.
    wanted = ((encoder, "/enc_blocks.0/mlp/fc1/"), (decoder, "/decoder_embed/MatMul"), (decoder, "_embed_1/MatMul"))
    for graph, name in wanted:
        kept = kept_nodes(graph, [name])
        assert kept and all(graph.precision(node) == "f32" for node in graph.work() if node.name in kept)
    assert encoder.has_qdq() and decoder.has_qdq()
    assert not run(project, "modelopt-torch", tiny_model, settings)[2] & {"quantized", "qat", "predictions", "scores"}
