"""Speeds that are predicted from the times of parts: what is timed and kept, a card's rows, and recipes that train."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from run_toys import pqk

from backends.base import Precision
from backends.openvino.engine import best_float
from pqk.bench import predict_speed as module
from pqk.bench.predict_speed import Predictor, Unpredictable
from pqk.recipe.request import Request, asked_experiment

pytest.importorskip("nncf")
pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture(scope="module")
def root(finished: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which B1 has run, and whose parts are timed by the first test that asks."""
    return copytree(finished[0], tmp_path_factory.mktemp("predict") / "project", symlinks=True)


def predictor(root: Path, model: Path, card: str = "B1") -> tuple[Predictor, list[str]]:
    said: list[str] = []
    return Predictor(Request(card, "openvino", model=str(model)), root, lambda *_: None, said.append), said


def experiment(root: Path, model: Path, card: str, **settings: Any) -> Any:
    return asked_experiment(Request(card, "openvino", model=str(model), settings=settings), root)


def test_parts_are_timed_once_and_kept(root: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, said = predictor(root, tiny_model)
    teacher = module.Shaped(first.experiment, "teacher", first.graphs)
    found = {p: first.of_shaped(teacher, p) for p in (Precision.F32, Precision.INT8)}
    bf16 = best_float() is Precision.BF16  # int8's rest is in it: its parts, and those of the float graphs
    assert [re.findall(r" in (\w+), once on this machine", line) for line in said] == (
        [["f32"], ["bf16"], ["bf16"]] if bf16 else [["f32"], ["f32"]]
    )
    assert found[Precision.INT8].parts > found[Precision.F32].parts > 10
    for one in found.values():
        assert 0 < one.low <= one.ms <= one.high
    kept = sorted((root / "outputs" / "store" / "pieces").iterdir())
    assert len(kept) >= found[Precision.F32].parts

    def refuse(*_: Any) -> None:
        raise AssertionError("a part was timed again")

    monkeypatch.setattr(module.worker, "call", refuse)
    again, said = predictor(root, tiny_model)
    assert again.of_shaped(teacher, Precision.F32) == found[Precision.F32] and not said


def test_a_part_that_was_disturbed_is_timed_again_on_a_quiet_machine(
    root: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = predictor(root, tiny_model)
    teacher = module.Shaped(first.experiment, "teacher", first.graphs)
    before = first._added_up(teacher, Precision.F32)
    assert not first.disturbed
    monkeypatch.setattr(Predictor, "_most_load", -1.0)  # no machine is as quiet as that
    monkeypatch.setattr(module, "load_now", lambda: 0.0)
    busy = predictor(root, tiny_model)[0]
    assert busy._added_up(teacher, Precision.F32) == before and busy.disturbed
    monkeypatch.setattr(module, "load_now", lambda: -2.0)
    asked: list[int] = []

    def call(task: str, request: dict[str, Any]) -> dict[str, Any]:
        asked.append(len(request["graphs"]))
        return {"times": [[1.0, 1.0, 1.0] for _ in request["graphs"]], "yardstick_ms": 1.0, "load": -2.0}

    monkeypatch.setattr(module.worker, "call", call)
    quiet = predictor(root, tiny_model)[0]
    again = quiet._added_up(teacher, Precision.F32)
    assert sum(asked) == again.parts and again.low == again.high and not quiet.disturbed


def test_a_prediction_is_calibrated_by_the_teacher(root: Path, tiny_model: Path) -> None:
    """So the Teacher's own is what was timed, and another recipe's is in the same proportion."""
    found, _ = predictor(root, tiny_model)
    teacher = module.Shaped(found.experiment, "teacher", found.graphs)
    assert found.of_shaped(teacher, Precision.F32).ms == pytest.approx(found._measured[Precision.F32])
    asked = experiment(root, tiny_model, "B1")
    ratio = found.of_shaped(teacher, Precision.F32).ms / found.of_shaped(teacher, Precision.INT8).ms
    assert found.speedup(asked) == pytest.approx(ratio)


def test_recipes_that_train(root: Path, tiny_model: Path) -> None:
    """A student is cut, not trained; what P leaves is not known. Less tokens are fewer FLOPs, and so less time."""
    found, _ = predictor(root, tiny_model)
    shapes = found.shaped(experiment(root, tiny_model, "A1", **{"distill.student.ffn": 0.5}))
    assert shapes.name.endswith("+K") and shapes.graphs != found.graphs
    assert not (root / "outputs" / "store" / "distilled").exists()
    for card in ("C1", "G1"):
        with pytest.raises(Unpredictable, match="which units P leaves"):
            found.shaped(experiment(root, tiny_model, card))


def test_a_card_beside_its_records(root: Path, tiny_model: Path, tmp_path: Path) -> None:
    outcome = pqk(root, "profile", "B1", "--predict", "--backend", "openvino", "--model", tiny_model, "--json")
    assert outcome.code == 0, outcome.err
    data = outcome.record
    records = {r["precision"]: r for r in _records(root)}
    assert [row["precision"] for row in data["rows"]] == list(dict.fromkeys(("f32", *_floats(data), "int8")))
    for row in data["rows"]:
        measured = records[row["precision"]]["t_pair_p50_ms"]
        assert row["measured_p50_ms"] == measured
        assert row["error_pct"] == pytest.approx(100 * (row["predicted_p50_ms"] / measured - 1))
        assert row["predicted_spread_ms"][0] <= row["predicted_p50_ms"] <= row["predicted_spread_ms"][1]
    assert json.loads((root / "reports" / "profile" / "B1.predict.json").read_text()) == data


def _floats(data: dict[str, Any]) -> list[str]:
    return [row["precision"] for row in data["rows"] if row["precision"] != "int8"]


def _records(root: Path) -> list[dict[str, Any]]:
    from run_toys import written

    return [record for record in written(root) if record["exp_id"] == "B1"]


def test_without_a_record_there_is_no_error(copy_of: Callable[[], Path], tiny_model: Path) -> None:
    root = copy_of()
    for path in (root / "logs").glob("B1*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "device": "another machine"}))
    outcome = pqk(root, "profile", "B1", "--predict", "--backend", "openvino", "--model", tiny_model, "--json")
    assert {row["error_pct"] for row in outcome.record["rows"]} == {None}
    assert "logs/ has no record of this machine; `pqk run B1` measures" in outcome.err


def test_a_backend_that_cannot_time_parts(project: Path, tiny_model: Path) -> None:
    outcome = pqk(project, "profile", "B1", "--predict", "--backend", "reference", "--model", tiny_model)
    assert outcome.code == 2
    assert outcome.sentence == "backend reference cannot time parts of graphs, so no speed is predicted"
