"""Detectors through the same commands as any family: a small network on a small project."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_toys import REPOSITORY, Outcome, make_project, pqk

from pqk.settings.card import load_card

pytestmark = pytest.mark.whole

TOY: dict[str, Any] = {
    "hidden_dim": 32,
    "nheads": 2,
    "dim_feedforward": 32,
    "dim_dynamic": 8,
    "num_heads": 2,
    "num_classes": 3,
    "num_proposals": 12,
    "blocks": [1, 1, 1, 1],
    "stem_out": 8,
    "res2_out": 16,
    "width_per_group": 8,
}
_STAGES = "  stages:                        # images per step\n    - {size: 64, batch: 2, until: 1.00}\n"
SMALLER = {
    "workload.yaml": {
        r"shape: \[1, 3, 256, 320\]": "shape: [1, 3, 64, 96]",
        r"boxes: 100": "boxes: 12",
        r"(validation: \{source: synthetic, images:) \d+": r"\1 3",
        r"(test: \{source: synthetic, images:) \d+": r"\1 4",
        r"(calibration: \{source: synthetic, images:) \d+": r"\1 4",
    },
    "eval.yaml": {
        r"min_rounds: 30": "min_rounds: 4",
        r"min_seconds: 2": "min_seconds: 0",
        r"warmup: 3": "warmup: 1",
        r"max_seconds: 20": "max_seconds: 5",
        r"max_load: 0.25": "max_load: 10000",
        r"  pairs: 12": "  pairs: 2",
    },
    "quant.yaml": {
        r"calibration_images: 512": "calibration_images: 4",
        r"  epochs: 12": "  epochs: 2",
        r"steps_per_epoch: \d+": "steps_per_epoch: 2",
        r"  stages:[^\n]*\n(    - [^\n]*\n)+": _STAGES,
        r"validation: \{size: \d+, pairs: \d+\}": "validation: {size: 64, pairs: 4}",
    },
    "distill.yaml": {
        r"  epochs: \d+": "  epochs: 1",
        r"steps_per_epoch: \d+": "steps_per_epoch: 2",
        r"fold_pairs: 32": "fold_pairs: 2",
        r"fold_size: \d+": "fold_size: 64",
        r"  stages:[^\n]*\n(    - [^\n]*\n)+": _STAGES,
        r"validation: \{size: \d+, pairs: \d+\}": "validation: {size: 64, pairs: 4}",
    },
    "prune.yaml": {
        r"  epochs: \d+": "  epochs: 1",
        r"steps_per_epoch: \d+": "steps_per_epoch: 2",
        r"samples: \{pairs: \d+, size: \d+\}": "samples: {pairs: 2, size: 64}",
        r"  pairs: \d+\n  size: \d+": "  pairs: 2\n  size: 64",
        r"levels: \[0.25, 0.5, 0.75\]": "levels: [0.5]",
        r"round_to: 8": "round_to: 4",
        r"rho: 0.15": "rho: 0.05",
        r"  stages:[^\n]*\n(    - [^\n]*\n)+": _STAGES,
        r"validation: \{size: \d+, pairs: \d+\}": "validation: {size: 64, pairs: 4}",
    },
}
MODEL = ("--model", "models/toy")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino")
    import torch

    from pqk.data.detection.generate import SetPlan, make_set
    from pqk.models import build_model, save_model

    root = make_project(tmp_path_factory.mktemp("detection") / "project")
    for name, edits in SMALLER.items():
        path = root / "configs" / "diffusiondet" / name
        text = path.read_text(encoding="utf-8")
        for old, new in edits.items():
            text, count = re.subn(old, new, text)
            assert count == 1, (name, old)
        path.write_text(text, encoding="utf-8")
    model = build_model("diffusiondet", TOY, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.head_series[-1].class_logits.bias += 6.0  # sure of what it finds, so that it can play the truth
    save_model(model, root / "models" / "toy")
    folder = make_set(root / "own", SetPlan("train", 5, 10, 96, 72), jobs=1)
    shutil.copytree(folder / "images", root / "photos")
    return root


def ended(outcome: Outcome, *codes: int) -> Outcome:
    assert outcome.code in (codes or (0,)), outcome.err
    assert "Traceback" not in outcome.err
    return outcome


@pytest.fixture(scope="module")
def ran(project: Path) -> Outcome:
    words = ("run", "B1", "--backend", "openvino", *MODEL, "--images", "photos", "--json", "--no-qat")
    return ended(pqk(project, *words), 0, 1, 4)


def test_a_card_runs_on_photographs(ran: Outcome) -> None:
    record = ran.record
    assert (record["family"], record["model"], record["precision"]) == ("diffusiondet", "toy", "int8")
    assert record["measured"] == "engine" and record["quality_reference"] == "teacher"
    assert record["main_metric"] == "ap" and record["metrics"]["ap"]["better"] == "higher"
    assert record["pairs"] == 10 and len(record["scenes"]) == 10
    assert set(record["samples"]) == {"pair", "backbone", "head"}
    assert record["executed_precision"]["int8"] > 0.3
    found = record["metrics"]["ap"]
    assert 0 < found["value"] < 100
    assert record["quality_drop_pct"] == pytest.approx(100 - found["value"])


def test_more_steps_call_the_head_more_often(project: Path) -> None:
    words = ("run", "B1", "--backend", "openvino", *MODEL, "--images", "photos", "--json", "--no-qat")
    record = ended(pqk(project, *words, "--set", "workload.sampler.steps=4"), 0, 1, 4).record
    assert len(record["samples"]["head"]) == 4 * len(record["samples"]["backbone"])


def test_toolchains_agree_in_float(project: Path, ran: Outcome) -> None:
    outcome = pqk(project, "parity", "B1", "--backends", "openvino", *MODEL, "--images", "photos", "--json")
    found = json.loads(ended(outcome, 0, 1, 4).out.splitlines()[-1])
    (judged,) = (verdict for verdict in found["verdicts"] if verdict["level"] == "float")
    assert judged["verdict"] == "agree", judged
    for row in found["rows"]:
        if row["level"] == "float" and row["side"] in ("openvino fp32", "reference fp32"):
            assert row["logits.relative"] < 1e-4 and row["refined.relative"] < 1e-4


def test_a_student_does_not_learn_from_what_it_is_judged_on(project: Path) -> None:
    for own in (("--train-images", "photos"), ("--train-scenes", "own/train-5")):
        outcome = pqk(project, "run", "S1", "--backend", "openvino", *MODEL, *own, "--images", "photos", "--json")
        assert "splits share no image" in ended(outcome, 2).sentence


@pytest.mark.slow
@pytest.mark.parametrize("card", ["S1Q", "S2a", "S2b", "S2c", "S3", "A1", "C1", "D1", "E1", "F1"])
def test_every_card_with_a_training_runs(project: Path, card: str) -> None:
    """S1Q holds S1."""
    words = ("run", card, "--backend", "openvino", *MODEL, "--images", "photos", "--json", "--no-rollback", "--no-qat")
    record, known = ended(pqk(project, *words), 0, 1, 4).record, load_card(card, REPOSITORY)
    trained = "+".join(stage for stage in known.recipe if stage != "Q")
    assert (record["exp_id"], record["combo"], record["model"]) == (card, known.combo, f"toy+{trained}")
    assert record["precision"] == ("int8" if "Q" in known.recipe else "f32")
    steps = known.overrides.workload.get("sampler", {}).get("steps", 1)
    assert len(record["samples"]["head"]) == steps * len(record["samples"]["backbone"])


@pytest.mark.slow
def test_the_axes_of_the_family_run(project: Path) -> None:
    """Boxes, of which each attends to all, to the nearest ones or to none; `steps` is run above."""
    words = (
        "run",
        "H1",
        "--axis",
        "boxes",
        "--axis",
        "topology",
        "--backend",
        "openvino",
        *MODEL,
        "--images",
        "photos",
    )
    ended(pqk(project, *words, "--no-qat", "--set", "workload.sampler.boxes=30"), 0, 1, 4)
    for axis in ("boxes", "topology"):
        with (project / "reports" / "ablation" / "H1" / f"{axis}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["status"] for row in rows] == ["ok"] * 3, rows
        assert all(float(row["pairs_per_sec"]) > 0 for row in rows)


def test_wrong_words_are_one_sentence(project: Path) -> None:
    def said(*words: str) -> str:
        return ended(pqk(project, "run", "B1", "--backend", "openvino", *MODEL, *words), 2).sentence

    assert "multiples of 32" in said("--set", "workload.input.shape=[1, 3, 60, 96]")
    assert said("--set", "workload.network.signal_scale=1.0").endswith("give --set workload.network.signal_scale=2.0")
    assert "annotations.json" in said("--scenes", "photos")
    assert "quality_head" in said("--set", "workload.sampler.scores=quality")
    assert "no picture" in said("--images", "models")
