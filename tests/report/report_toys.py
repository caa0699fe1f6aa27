"""A small project with records of one run, and with reports beside them, for tests of the HTML report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pqk.report.html.scene import PointMaps, write_points

REPOSITORY = Path(__file__).resolve().parents[2]
ENGINE = "ab" * 32
EVIL = "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'>\" onload=\"window.hacked=3"


def records_of(make_record: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """A Teacher in f32 and an int8 candidate of one run, with raw samples and intervals; the metric is invented."""
    common = {
        "backend": "openvino",
        "model": "toy",
        "device": "a CPU",
        "run_id": "20261130T000000Z-00000000",
        "main_metric": "loss",
        "combo": "Q-only",
        "train_seed": 0,
        "eval_seed": 0,
        "scenes": ["one", "two", "three"],
        "machine": {"device": "a CPU", "cores": 2},
        "versions": {"torch": "2.13.0"},
        "commit": "0" * 40,
    }

    def metric(value: float, half: float) -> dict[str, Any]:
        ends = [value - half, value + half]
        return {"metrics": {"loss": {"value": value, "unit": "", "better": "lower", "interval": ends}}}

    teacher = make_record(
        **common,
        **metric(0.1, 0.01),
        role="teacher",
        precision="f32",
        quality_drop_pct=0.0,
        t_pair_p50_ms=20.0,
        speedup_vs_teacher_f32=1.0,
        speedup_vs_own_f32=1.0,
        speedup_vs_best_float=1.0,
        executed_precision={"f32": 1.0},
        measured="engine",
        size_MB=48.0,
        samples={"pair": [19.0, 20.0, 21.0, 20.5], "first": [8.0, 8.2, 8.1, 8.0], "second": [10.0, 11.0, 12.0, 11.5]},
    )
    candidate = make_record(
        **common,
        **metric(0.1004, 0.011),
        precision="int8",
        quantizer="nncf",
        quality_drop_pct=0.4,
        t_pair_p50_ms=10.0,
        speedup_vs_teacher_f32=2.0,
        speedup_vs_own_f32=2.0,
        speedup_vs_best_float=2.0,
        executed_precision={"int8": 0.9, "f32": 0.1},
        measured="engine",
        size_MB=12.0,
        size_ratio=0.25,
        verdict="pass",
        verdict_reasons=["ok: quality drop 0.4 % (at most 1 %)"],
        intervals={"quality_drop_pct": [-0.1, 0.9], "speedup_vs_teacher_f32": [1.9, 2.1]},
        samples={"pair": [9.0, 10.0, 11.0, 10.5], "first": [4.0, 4.2, 4.1, 4.0], "second": [5.0, 5.5, 6.0, 5.7]},
        hashes={"engine": ENGINE, "model": "cd" * 32},
        notes="calibrated on 8 images",
    )
    return [teacher, candidate]


def project_of(root: Path, records: list[dict[str, Any]], points: bool = True) -> Path:
    """A project whose logs hold the records, with parity, ablation, parts and point maps in reports/."""
    (root / "logs").mkdir(parents=True)
    (root / "configs").mkdir()
    (root / "schedule" / "TaskCards").mkdir(parents=True)
    for name in ("workload.yaml", "eval.yaml"):
        (root / "configs" / name).write_bytes((REPOSITORY / "configs" / name).read_bytes())
    (root / "schedule" / "TaskCards" / "B1.md").write_bytes((REPOSITORY / "schedule/TaskCards/B1.md").read_bytes())
    for number, record in enumerate(records):
        (root / "logs" / f"{number}.json").write_text(json.dumps(record), encoding="utf-8")
    reports = root / "reports"
    for name in ("parity", "parts", "ablation/B1"):
        (reports / name).mkdir(parents=True)
    level = {"level": "float", "verdict": "agree", "sentences": [f"ok: within 1e-7 {EVIL}"]}
    ranked = [{"graph": "first", "name": f"blocks.0 {EVIL}", "of_all": 0.4, "nodes": ["a"]}]
    parity = {
        "card": "B1",
        "metric": "loss",
        "verdicts": [level],
        "rows": [{"level": "float", "side": "openvino f32", "against": "torch", "metric": 0.1, "out.relative": 1e-7}],
        "explanation": {"openvino/nncf": {"sentence": f"blocks.0 {EVIL}", "groups": ranked, "nodes": []}},
    }
    (reports / "parity" / "B1.json").write_text(json.dumps(parity))
    (reports / "parts" / "B1-openvino.csv").write_text(
        "part,kind,params_before,params_after,time_before_ms,time_after_ms\nMLPs,MLPs,100,50,4.5,2.25\n"
    )
    heading = "point,quality_drop_pct,quality_drop_pct_low,quality_drop_pct_high,size_MB\n"
    lines = '"8 images",0.5,0.1,0.9,12.5\n"16 images",0.25,-0.1,0.5,12.5\n'
    (reports / "ablation" / "B1" / "calibration.csv").write_text(heading + lines)
    if points:
        write_points(reports / "show" / "B1.npz", toy_points())
    return root


def toy_points() -> PointMaps:
    """A wall of 2000 points, which the candidate bends; red and blue halves."""
    random = np.random.default_rng(0)
    flat = np.c_[random.uniform(-1, 1, (2000, 2)), np.full(2000, 3.0)].astype(np.float32)
    bent = flat + np.c_[np.zeros((2000, 2)), 0.2 * flat[:, :1] ** 2].astype(np.float32)
    colours = np.where(flat[:, :1] < 0, [[220, 30, 30]], [[30, 30, 220]]).astype(np.uint8)
    error = (100 * np.linalg.norm(bent - flat, axis=1) / 3).astype(np.float32)
    images = random.integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
    about = {
        "engine": ENGINE,
        "labels": ["Teacher f32", f"B1 int8 {EVIL}"],
        "scene": f"one {EVIL}",
        "names": [f"a.png {EVIL}", "b.png"],
        "total": 4000,
        "sure": 20,
        "scale": 1.01,
    }
    maps = np.full((2, 8, 8), np.nan, np.float32)
    maps[0] = 1.5
    return PointMaps(np.stack([flat, bent]), colours, error, images, maps, about)
