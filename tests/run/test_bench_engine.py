"""`pqk bench engine`: every way in which a model runs here, each in a process of its own, beside the ceilings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_toys import pqk

from pqk.bench.engine import BASE, LAYERS, Child

pytest.importorskip("openvino")

WORDS = ("bench", "engine", "B1", "--rounds", "6")


def test_variants_are_timed_beside_the_ceilings(copy_of: Callable[[], Path], tiny_model: Path) -> None:
    root = copy_of()
    done = pqk(root, *WORDS, "--model", tiny_model, "--only", "pqk int8,eager")
    assert done.code == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    assert json.loads((root / "reports" / "engine.json").read_text()) == found
    assert list(found["variants"]) == ["torch eager f32", BASE, "pqk int8"]
    for name, row in found["variants"].items():
        assert len(row["samples_ms"]) == 6 and min(row["samples_ms"]) > 0 and row["reason"] is None
        ratio = row["speedup"]
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
        if name == BASE:
            assert ratio == {"value": 1, "low": 1, "high": 1}
        assert row["gflops_per_s"] == pytest.approx(found["gflop"] / row["p50_ms"] * 1000)
        assert 0 < row["share_of_ceiling"] < 1
    ceilings = found["ceilings_gflops_per_s"]
    assert {"f32", "int8"} <= ceilings.keys() and all(set(rates) == set(LAYERS) for rates in ceilings.values())
    table = done.out.splitlines()
    assert table[0].startswith("tiny, ") and any(line.startswith("pqk int8 ") for line in table)


def test_what_cannot_run_says_why(tmp_path: Path) -> None:
    asked = {"kind": "ceilings", "layers": ["matmul"]}
    with Child({**asked, "precisions": ["f3"]}, tmp_path) as child:
        assert child.error
    with Child({**asked, "precisions": ["f32"]}, tmp_path) as child:
        assert child.error is None and json.loads(child.notes)["f32"]["matmul"] > 1 and child.run() >= 0


def test_what_is_asked_wrongly_is_refused(copy_of: Callable[[], Path], tiny_model: Path) -> None:
    root = copy_of()
    refused = pqk(root, *WORDS, "--model", tiny_model, "--only", "tensorrt")
    assert refused.code == 2 and "--only tensorrt: no variant has that in its name: torch eager f32" in refused.sentence
    assert pqk(root, "bench", "engine", "B1", "--rounds", "5").code == 2
    assert not (root / "reports" / "engine.json").exists()
