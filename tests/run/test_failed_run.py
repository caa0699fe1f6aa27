"""A run that fails in its stages leaves a record that says so; one that is refused before them leaves none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_toys import Outcome, small_experiment, written

from backends.base import BackendError, Unavailable
from pqk.cli.run_output import run_card
from pqk.errors import PqkError
from pqk.parity.parity import parity
from pqk.recipe import stages
from pqk.recipe.request import Request
from pqk.record.schema import columns
from pqk.report.table import main as aggregate
from pqk.store.worker import WorkerCrashed

pytest.importorskip("openvino")
pytest.importorskip("nncf")

pytestmark = pytest.mark.usefixtures("forked_workers")
CRASH = WorkerCrashed("the quantize process ended with SIGSEGV:\nTraceback ...\nlast words")


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(stages, "export_graphs", fail)


def test_a_failure_is_a_row_of_the_table(
    project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    failing(monkeypatch, CRASH)
    request = Request("B1", "openvino", model=str(tiny_model))
    with pytest.raises(WorkerCrashed):  # still a defect, with its own exit code and traceback
        run_card(request, False)
    (record,) = written(project)
    assert record["run_id"] == request.run_id != Request("B1", "openvino").run_id
    assert record["measured_at"] is record["measured_commit"] is None
    assert record["notes"] == "failed: the quantize process ended with SIGSEGV: ... last words"
    known = ("exp_id", "role", "precision", "backend", "quantizer", "status")
    assert [record[name] for name in known] == ["B1", "candidate", "int8", "openvino", "nncf", "failed"]
    measured = [c.name for c in columns() if c.group in ("quality", "efficiency", "resources", "edge")]
    assert {record[name] for name in measured if name not in ("main_metric", "quality_reference")} == {None}
    assert len(record["hashes"]["scenes"]) == 64
    assert "a record of the failure is in logs" in capsys.readouterr().err

    assert aggregate([], project) == 0
    shown = capsys.readouterr().out
    assert "failed" in shown and "latency.png is left out" in shown
    assert json.loads((project / "reports" / "summary.json").read_text())[0]["status"] == "failed"

    # parity has no side left to compare, and says why in the words of the failure
    with pytest.raises(PqkError, match=r"openvino/nncf: failed: .*last words"):
        parity(Request("B1", "", model=str(tiny_model)), ["openvino"], ["nncf"], project, lambda *_: None, print)


def test_a_missing_package_is_unavailable(project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    failing(monkeypatch, Unavailable("inc is not installed"))
    with pytest.raises(Unavailable):
        run_card(Request("B1", "openvino", model=str(tiny_model)), False)
    assert [(r["status"], r["notes"]) for r in written(project)] == [
        ("unavailable", "unavailable: inc is not installed")
    ]


def test_what_ended_well_is_not_replaced_but_replaces(
    copy_of: Callable[[], Path],
    finished: tuple[Path, Outcome],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = copy_of()
    monkeypatch.chdir(root)
    before = written(root)
    failing(monkeypatch, BackendError("the toolchain said no"))
    request = Request("B1", "openvino", model=str(tiny_model))
    with pytest.raises(BackendError, match="said no"):
        run_card(request, False)
    assert written(root) == before
    (candidate,) = (root / "logs").glob("B1-candidate-*.json")
    candidate.unlink()
    with pytest.raises(BackendError, match="said no"):
        run_card(request, False)
    assert json.loads(candidate.read_text())["status"] == "failed"  # the very name that a good record has
    monkeypatch.undo()
    monkeypatch.chdir(root)
    assert run_card(request, False) == finished[1].code
    assert [r["status"] for r in written(root)] == ["ok"] * len(before)


def test_a_refused_request_leaves_no_record(project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    failing(monkeypatch, CRASH)
    settings = {"quant.float_rest": "f16"}
    for request in (
        Request("B2", "openvino", model=str(tiny_model)),
        Request("B1", "openvino", quantizer="nncv", model=str(tiny_model)),
        Request("B1", "openvino", model=str(tiny_model), settings=settings),
        Request("B1", "openvino", model=str(tiny_model), settings={"workload.calibration.source": "nowhere"}),
    ):
        with pytest.raises(PqkError):
            run_card(request, False)
    assert written(project) == []


def test_only_the_listed_metrics_are_recorded(finished: tuple[Path, Outcome]) -> None:
    from backends.base import Graph, Precision
    from pqk.engines.variant import Variant
    from pqk.recipe.columns import Measurements, measured_record

    record = dict(finished[1].record)
    summary = dict.fromkeys(("chamfer", "chamfer_accuracy", "chamfer_completeness", "absrel", "rmse"), 0.5)
    about = {"measured": "engine", "executed": {}, "matched_by_size": 0.0, "flops": 1e9, "size_bytes": 1}
    about |= {"groups": ["a"], "samples": [{"group": "a", "sample": "x, y"}]}
    graph = Graph(Path("toy.onnx"), (), (), "0" * 64)
    teacher = Variant("fp32", "openvino", Precision.F32, {"encoder": graph, "decoder": graph})
    measured = Measurements(teacher, {"fp32": {"summary": summary, **about}}, None, {})
    common = {name: record[name] for name in ("main_metric", "hashes")}
    for metrics, filled in ((("absrel",), {"absrel"}), (("absrel", "chamfer"), set(summary) - {"rmse"})):
        experiment = small_experiment({"eval.quality.metrics": list(metrics)})
        row = measured_record(common, measured, teacher, [teacher], True, experiment)
        assert {name for name in summary if row[name] is not None} == filled
