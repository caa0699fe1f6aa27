"""VGGT through the same commands as any family: a small network on a small project."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from run_toys import Outcome, make_project, pqk

pytestmark = pytest.mark.whole

TOY: dict[str, Any] = {
    "img_size": 56,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "init_values": 0.5,
    "dino": {"depth": 1},
    "camera": {"trunk_depth": 1},
    "dpt": {"features": 32, "out_channels": [16, 16, 32, 32]},
}
_STAGES = "  stages:\n    - {size: 112, batch: 2, until: 1.00}\n"
SMALLER = {
    "workload.yaml": {
        r"shape: \[1, 3, 224, 224\]": "shape: [1, 3, 56, 56]",
        r"(  validation: \{source: synthetic), count: \d+": r"\1, count: 2",
        r"(  test: \{source: synthetic), count: \d+": r"\1, count: 2",
        r"images: 512(?=, views_per_scene: 8)": "images: 8",
    },
    "eval.yaml": {
        r"min_rounds: 30": "min_rounds: 4",
        r"min_seconds: 2": "min_seconds: 0",
        r"warmup: 3": "warmup: 1",
        r"max_seconds: 20": "max_seconds: 5",
        r"max_load: 0.25": "max_load: 10000",
    },
    "quant.yaml": {
        r"calibration_images: 512": "calibration_images: 8",
        r"  epochs: 12": "  epochs: 2",
        r"steps_per_epoch: \d+": "steps_per_epoch: 2",
        r"  stages:[^\n]*\n(    - [^\n]*\n)+": _STAGES,
        r"validation: \{size: \d+, pairs: \d+\}": "validation: {size: 112, pairs: 2}",
    },
    "distill.yaml": {
        r"  epochs: \d+": "  epochs: 2",
        r"steps_per_epoch: \d+": "steps_per_epoch: 2",
        r"fold_size: \d+": "fold_size: 56",
        r"  stages:[^\n]*\n(    - [^\n]*\n)+": _STAGES,
        r"validation: \{size: \d+, pairs: \d+\}": "validation: {size: 112, pairs: 2}",
    },
    "prune.yaml": {
        r"  epochs: \d+": "  epochs: 2",
        r"steps_per_epoch: \d+": "steps_per_epoch: 2",
        r"samples: \{pairs: \d+, size: \d+\}": "samples: {pairs: 2, size: 56}",
        r"  pairs: \d+\n  size: \d+": "  pairs: 2\n  size: 56",
        r"  stages:[^\n]*\n(    - [^\n]*\n)+": _STAGES,
        r"validation: \{size: \d+, pairs: \d+\}": "validation: {size: 112, pairs: 2}",
    },
}
MODEL = ("--model", "models/toy")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino")
    import torch

    from pqk.models import build_model, save_model

    root = make_project(tmp_path_factory.mktemp("vggt") / "project")
    for name, edits in SMALLER.items():
        path = root / "configs" / "vggt" / name
        text = path.read_text(encoding="utf-8")
        for old, new in edits.items():
            text, count = re.subn(old, new, text)
            assert count == 1, (name, old)
        path.write_text(text, encoding="utf-8")
    model = build_model("vggt", TOY, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.camera_head.pose_branch.fc2.bias[6:] = 1.0  # a quaternion that turns nothing, fields of view above 0
    save_model(model, root / "models" / "toy")
    return root


def ended(outcome: Outcome, *codes: int) -> Outcome:
    assert outcome.code in (codes or (0,)), outcome.err
    assert "Traceback" not in outcome.err
    return outcome


@pytest.fixture(scope="module")
def ran(project: Path) -> Outcome:
    return ended(pqk(project, "run", "B1", "--backend", "openvino", *MODEL, "--json", "--no-qat"), 0, 1, 4)


def test_a_card_runs(ran: Outcome) -> None:
    record = ran.record
    assert (record["family"], record["model"], record["precision"]) == ("vggt", "toy", "int8")
    assert record["measured"] == "engine" and record["quality_reference"] == "ground_truth"
    assert record["executed_precision"]["int8"] > 0.3
    assert record["pairs"] == 4 and len(record["scenes"]) == 2  # two windows of two frames per scene
    assert set(record["samples"]) == {"pair", "encoder", "aggregator", "camera", "depth", "points"}
    assert {"absrel", "pose_miss30", "auc30", "rra5", "rta15"} <= set(record["metrics"])
    found = record["metrics"]
    assert found["pose_miss30"]["value"] == pytest.approx(1 - found["auc30"]["value"])
    assert found["rot_deg"]["unit"] == "deg" and found["auc30"]["better"] == "higher"
    assert any("pose error" in sentence for sentence in record["verdict_reasons"])


def test_windows_of_a_scene_share_the_tokens_of_a_frame(project: Path) -> None:
    words = ("bench", "scene", *MODEL, "--images", "4", "--rounds", "1")
    (row,) = ended(pqk(project, *words)).record["rows"]
    assert (row["samples"], row["difference"]) == (3, 0.0)  # windows of two frames
    calls = {name: (graph["apart_calls"], graph["scene_calls"]) for name, graph in row["graphs"].items()}
    assert calls.pop("encoder") == (6, 4)
    assert set(calls.values()) == {(3, 3)} and row["limit"] > 1


def test_toolchains_agree_in_float(project: Path, ran: Outcome) -> None:
    outcome = pqk(project, "parity", "B1", "--backends", "openvino", *MODEL, "--json")
    found = json.loads(ended(outcome, 0, 1, 4).out.splitlines()[-1])
    (judged,) = (verdict for verdict in found["verdicts"] if verdict["level"] == "float")
    assert judged["verdict"] == "agree", judged
    for row in found["rows"]:
        if row["level"] == "float" and row["side"] in ("openvino fp32", "reference fp32"):
            assert row["pose_enc.relative"] < 1e-4 and row["world_points.relative"] < 1e-4


def test_less_work_without_training_then_int8(project: Path, ran: Outcome) -> None:
    outcome = pqk(project, "run", "TQ1", "--backend", "openvino", *MODEL, "--json", "--no-qat", "--no-rollback")
    record = ended(outcome, 0, 1, 4).record
    assert (record["model"], record["precision"], record["combo"]) == ("toy+T", "int8", "T→Q")
    assert "T: tail on a quarter of the grid, at most 50 % of the tokens merged" in record["notes"]
    assert {"depth:/depth_head/Resize$", "points:/point_head/Resize$"} <= set(record["keep_list"])
    assert record["flops_G"] < 0.8 * ran.record["flops_G"]
    assert record["executed_precision"]["int8"] > 0.3
    for name in ("chamfer", "delta1"):
        assert any(f"guard metric: {name} " in reason for reason in record["verdict_reasons"])


def test_a_bundle_runs_alone(project: Path, ran: Outcome, tmp_path: Path) -> None:
    ended(pqk(project, "export", "B1", "--backend", "openvino", *MODEL, "-o", "bundle", "--no-qat"), 0, 1, 4)
    manifest = json.loads((project / "bundle" / "manifest.json").read_text())
    assert manifest["frames"] == 2 and manifest["preprocessing"]["mean"] == [0.0, 0.0, 0.0]
    pictures = []
    for number in range(2):
        pictures.append(tmp_path / f"{number}.png")
        pixels = np.random.default_rng(number).integers(0, 255, (80, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures[-1])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "sample.py", *map(str, pictures)]
    done = subprocess.run(command, cwd=project / "bundle", env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "pose_enc (1, 2, 9)" in done.stdout and "world_points (2, 56, 56, 3)" in done.stdout
    fewer = subprocess.run(command[:-1], cwd=project / "bundle", env=env, text=True, capture_output=True)
    assert fewer.returncode == 1 and "python sample.py 1.jpg 2.jpg" in fewer.stderr


def test_photographs_four_at_once_with_ranges_of_patches_alone(project: Path, tmp_path: Path) -> None:
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (80, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    outcome = pqk(project, "run", "B1", "--backend", "openvino", *MODEL, "--json", "--no-qat", "--images", tmp_path,
                  "--set", "workload.input.frames=4", "--set", "quant.ptq.special_tokens=left_out",
                  "--set", "workload.scenes.validation.views=4",
                  "--set", "quant.ptq.keep_list=[LayerNorm, PoseLayers]")  # fmt: skip
    record = ended(outcome, 0, 1, 4).record
    assert record["quality_reference"] == "teacher" and record["pairs"] == 2
    assert record["metrics"]["auc30"]["value"] is not None
    assert record["executed_precision"]["int8"] > 0.3
