"""Recipes that train: K, P, K→Q, P→K→Q from the command line, their stop-loss, the rollback table, and SIGKILL."""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preloaded
import pytest
from run_toys import Outcome, kill, pqk, start, times_as_fast, written

from pqk.files import sha256_file
from pqk.models import load_model
from pqk.recipe.request import count_parameters
from pqk.record.runlog import RunLog


def run(root: Path, card: str, model: Path, *more: str) -> Outcome:
    return pqk(root, "run", card, "--backend", "openvino", "--model", model, "--json", *more)


def checkpoint(root: Path, stage: str) -> Path:
    """The only checkpoint of a stage in the store."""
    (found,) = (root / "outputs" / "store" / stage).glob("*/model")
    return found


def made(outcome: Outcome) -> list[str]:
    """The stages that were made, not reused, by the words of the progress lines."""
    return [line.split("… ")[1] for line in outcome.err.splitlines() if "… " in line]


@pytest.fixture(scope="module")
def distilled(
    tmp_path_factory: pytest.TempPathFactory, begun: Callable[[Path], Path], tiny_model: Path
) -> tuple[Path, Outcome]:
    """A project in which A1 has run, undisturbed."""
    root = begun(tmp_path_factory.mktemp("recipes") / "project")
    outcome = run(root, "A1", tiny_model, "--no-rollback")
    assert outcome.code in (0, 1, 4), outcome.err
    return root, outcome


@pytest.fixture
def copied(distilled: tuple[Path, Outcome], tmp_path: Path) -> Callable[[], Path]:
    def copy() -> Path:
        return Path(shutil.copytree(distilled[0], tmp_path / "copy"))

    return copy


def f32_rows(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The f32 records of the Teacher and of the student."""
    teacher, student = (
        next(r for r in written(root) if r["role"] == role and r["precision"] == "f32")
        for role in ("teacher", "candidate")
    )
    return teacher, student


def test_a_student_is_measured_beside_its_teacher(distilled: tuple[Path, Outcome], tiny_model: Path) -> None:
    root, outcome = distilled
    teacher, student = f32_rows(root)
    assert student == outcome.record
    assert (student["model"], student["precision"], student["quantizer"]) == ("tiny+K", "f32", None)
    trained = checkpoint(root, "distilled")
    assert student["params"] == count_parameters(load_model(trained)) < teacher["params"]
    assert student["size_ratio"] < 1 and student["flops_G"] < teacher["flops_G"]
    assert (student["T"], student["beta"], student["gamma"]) == (3, 0.7, 0)
    assert teacher["T"] is None and teacher["gpu_hours"] is None
    card = json.loads((trained / "model_card.json").read_text())
    # the student's making counts, its export, scores and times do not
    assert card["training_s"] < 3600 * student["gpu_hours"] < student["wall_s"]
    assert card["steps"] == 6 and len(card["history"]) == 3 and card["seed"] == 0
    assert student["hashes"]["teacher"] == teacher["hashes"]["model"] != student["hashes"]["model"]
    drop = 100 * (student["absrel"] - teacher["absrel"]) / teacher["absrel"]
    assert student["quality_drop_pct"] == pytest.approx(drop)
    low, high = student["intervals"]["quality_drop_pct"]
    assert student["verdict"] == ("pass" if high <= 1 else "fail" if low > 1 else "undecided")
    assert "K: 6 steps in " in student["notes"]
    assert student["t_pair_p50_ms"] > 0 and student["speedup_vs_teacher_f32"] > 0


def test_the_changes_by_a_cut_are_shown_part_by_part(distilled: tuple[Path, Outcome]) -> None:
    root, outcome = distilled
    teacher, student = (next(r for r in written(root) if r["role"] == role) for role in ("teacher", "candidate"))
    with (root / "reports" / "parts" / "A1-openvino.csv").open(newline="") as file:
        rows = {row["part"]: row for row in csv.DictReader(file)}
    kinds = [row for row in rows.values() if row["part"] == row["kind"]]
    for side, record in (("before", teacher), ("after", student)):
        assert sum(int(row[f"params_{side}"]) for row in kinds) == record["params"]
        assert sum(float(row[f"gflops_{side}"]) for row in kinds) == pytest.approx(record["flops_G"], rel=1e-3)
        assert all(float(row[f"time_{side}_ms"]) > 0 for row in kinds)
    cut = rows["enc_blocks.0.mlp"]
    assert int(cut["params_after"]) < int(cut["params_before"])
    assert float(cut["gflops_after"]) < float(cut["gflops_before"])
    same = rows["enc_blocks.0.attn"]
    assert same["params_after"] == same["params_before"]
    assert {row["faster"] for row in kinds} <= {"true", "false"}
    assert "after the change, part by part" in outcome.err
    assert "kernel time of the cut parts, relative to the Teacher: " in student["notes"]


def test_recipes_share_their_stages(copied: Callable[[], Path], tiny_model: Path) -> None:
    """D1 quantizes the student that A1 made; F1 distils and quantizes what C1 pruned."""
    root = copied()
    outcome = run(root, "D1", tiny_model, "--no-rollback", "--no-qat")
    assert outcome.code in (0, 1, 4), outcome.err
    assert "distillation" not in made(outcome) and "quantization" in made(outcome)
    record = outcome.record
    assert (record["combo"], record["model"], record["precision"], record["bits_w"]) == ("K→Q", "tiny+K", "int8", 8)
    rows = {(r["role"], r["precision"]): r for r in written(root) if r["exp_id"] == "D1"}
    student = rows["baseline", "f32"]
    assert student["model"] == "tiny+K" and student["hashes"]["model"] == record["hashes"]["model"]
    # Each is held against its own model in f32, and against the Teacher's.
    assert record["speedup_vs_own_f32"] == pytest.approx(times_as_fast(record, student), rel=1e-3)
    teacher = rows["teacher", "f32"]
    assert record["speedup_vs_teacher_f32"] == pytest.approx(times_as_fast(record, teacher), rel=1e-3)
    assert student["speedup_vs_teacher_f32"] == pytest.approx(times_as_fast(student, teacher), rel=1e-3)
    assert student["speedup_vs_own_f32"] == teacher["speedup_vs_own_f32"] == teacher["speedup_vs_teacher_f32"] == 1
    assert record["gpu_hours"] > student["gpu_hours"] > 0  # calibration counts
    assert "K: 6 steps" in record["notes"] and "calibrated on" in record["notes"]

    pruned = run(root, "C1", tiny_model, "--no-rollback")
    told = json.loads((checkpoint(root, "pruned") / "model_card.json").read_text())
    assert told["training_s"] < 3600 * pruned.record["gpu_hours"] < pruned.record["wall_s"]  # the scan counts
    assert pruned.record["rho"] == 0.1 and pruned.record["params"] < teacher["params"]
    assert "files" in " ".join(pruned.record["verdict_reasons"])
    # What P took counts against the hours of a card that goes on from there, and is not lost.
    card = root / "schedule" / "TaskCards" / "F1.md"
    text = card.read_text()
    hours = f"gpu_hours: {pruned.record['gpu_hours'] / 1.2}"
    card.write_text(re.sub(r"gpu_hours: [\d.]+", hours, text))
    stopped = run(root, "F1", tiny_model, "--no-rollback")
    assert stopped.code == 1 and "GPU hours are above 120 % of the card's" in stopped.sentence
    card.write_text(text)
    whole = run(root, "F1", tiny_model, "--no-rollback")
    assert "pruning and fine-tuning" not in made(whole) and "distillation after P" in made(whole)
    assert (whole.record["model"], whole.record["combo"]) == ("tiny+P+K", "P→K→Q")
    assert whole.record["params"] == pruned.record["params"]  # K after P trains the pruned model and cuts nothing
    assert made(run(root, "F1", tiny_model, "--no-rollback")) == []


def test_quantization_is_trained_where_it_drops_too_much(
    tiny_model: Path, finished: tuple[Path, Outcome], copy_of: Callable[[], Path]
) -> None:
    """PTQ above its line calls for QAT; both are measured, the better one is the candidate and comes last."""
    root = copy_of()
    line = ("--set", "eval.quality.main_metric=delta1", "--set", "eval.thresholds.quality_drop_q_only_pct=0")
    outcome = run(root, "B1", tiny_model, "--no-rollback", *line)
    assert outcome.code in (0, 1, 4), outcome.err
    assert "quantization-aware training" in made(outcome) and "PTQ drops " in outcome.err
    rows = {r["role"]: r for r in written(root) if r["precision"] == "int8" and r["main_metric"] == "delta1"}
    assert rows["candidate"] == outcome.record
    assert rows["candidate"]["validation_drop_pct"] <= rows["baseline"]["validation_drop_pct"]
    (trained,) = (r for r in rows.values() if "QAT: 4 steps in " in r["notes"])
    (plain,) = (r for r in rows.values() if r is not trained)
    assert trained["gpu_hours"] > 0 and plain["gpu_hours"] > 0
    assert trained["hashes"]["engine"] != plain["hashes"]["engine"]
    assert trained["executed_precision"]["int8"] > 0.9 and trained["t_pair_p50_ms"] > 0


def test_stop_loss_and_the_rollback_table_act_by_themselves(copied: Callable[[], Path], tiny_model: Path) -> None:
    """A student whose training diverges is measured as it was best, recorded as stopped, and not quantized.

    Then K gets a smaller beta, then a longer task phase; attempts and moves are written down.
    """
    root = copied()
    outcome = run(root, "D1", tiny_model, "--set", "distill.train.learning_rate=0.5")
    entries = RunLog(root, "D1").read()
    attempts = [e for e in entries if e["event"] == "attempt"]
    moves = [e for e in entries if e["event"] == "move"]
    assert [e["name"] for e in moves][:2] == ["smaller-beta", "longer-task-phase"][: len(moves)] and moves
    assert len(attempts) == len(moves) + 1
    assert all(e["why"] and e["cost"] for e in moves)
    assert (attempts[0]["status"], attempts[0]["moves"]) == ("stopped", [])
    assert attempts[1]["moves"] == ["smaller-beta"]
    assert 0 < attempts[0]["hours"] < attempts[1]["hours"]
    # Every attempt diverged and kept the weights of the start, and one alone is scored on test samples.
    (record,) = (r for r in written(root) if r["exp_id"] == "D1" and r["role"] == "candidate")
    assert (record["status"], record["verdict"], record["precision"]) == ("stopped", "fail", "f32")
    assert record["verdict_reasons"][0].startswith("FAILED: stop-loss: diverged") and record["absrel"] > 0
    assert record["beta"] == 0.7 and "rollback" not in record["notes"]  # of equal attempts the first is the result
    assert "; not quantized" in outcome.err
    assert outcome.code == 1


def test_killed_in_training_and_started_again(
    distilled: tuple[Path, Outcome], copied: Callable[[], Path], tiny_model: Path
) -> None:
    """SIGKILL in the middle of the distillation, then no hours left, then enough of them: the third run ends with the
    very weights of the undisturbed one.
    """
    root = copied()
    shutil.rmtree(root / "outputs" / "store" / "distilled")
    command = ("run", "A1", "--backend", "openvino", "--model", tiny_model, "--json", "--no-rollback")
    process = start(command, root, preloaded.python())
    saved = root / "outputs" / "store" / ".scratch"
    deadline = time.monotonic() + 120
    while not list(saved.glob("distilled-*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(process, root)
    assert list(saved.glob("distilled-*/checkpoint.pt")) and not list(
        (root / "outputs/store/distilled").glob("[0-9a-f]*")
    )
    card = root / "schedule" / "TaskCards" / "A1.md"
    text = card.read_text()
    card.write_text(text.replace("{gpu_hours: 48}", "{gpu_hours: 0.00001}"))
    outcome = run(root, "A1", tiny_model)
    assert outcome.code == 1
    assert "stop-loss: " in outcome.sentence and "a larger budget goes on from there" in outcome.sentence
    card.write_text(text)
    outcome = run(root, "A1", tiny_model, "--no-rollback")
    assert outcome.code in (0, 1, 4), outcome.err
    weights = [sha256_file(checkpoint(r, "distilled") / "model.safetensors") for r in (root, distilled[0])]
    assert weights[0] == weights[1]
    assert not list(saved.glob("*"))  # nothing half-done is left
    parts = checkpoint(root, "distilled").parent
    told = json.loads((parts / "trained.json").read_text())
    assert told["device_s"] > json.loads((parts / "manifest.json").read_text())["seconds"]  # of the last part
    assert outcome.record["gpu_hours"] == pytest.approx(told["device_s"] / 3600)
    same: tuple[str, ...] = ("absrel", "params", "size_MB", "verdict", "hashes")
    first: dict[str, Any] = distilled[1].record
    assert [outcome.record[name] for name in same] == [first[name] for name in same]
