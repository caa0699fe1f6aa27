"""`pqk bench growth`: what it refuses, and the table and figure that it makes of the records of its runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pqk.bench import growth
from pqk.errors import PqkError


def records(value: int, time: float | None = 10.0) -> SimpleNamespace:
    """Two rows of a run whose time grows with the square of the value, and memory with the value."""
    rows = [
        {
            "role": role,
            "precision": precision,
            "t_pair_p50_ms": None if time is None else time * value**2,
            "ram_GB": 0.5 * value,
            "size_MB": 4.0,
            "disturbed": value == 4,
            "samples": {"pair": [1.0], "first": [1.0 * value, 3.0 * value, 2.0 * value]},
        }
        for role, precision in (("teacher", "f32"), ("candidate", "int8"))
    ]
    return SimpleNamespace(records=rows)


def test_it_writes_a_row_for_every_value_and_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def run(request: Any, *rest: Any) -> SimpleNamespace:
        asked.append(request)
        return records(request.settings["workload.n"])

    monkeypatch.setattr(growth, "run", run)
    monkeypatch.setattr(growth, "asked_experiment", lambda *_: None)
    out = tmp_path / "growth.csv"
    growth.bench_growth("B1", "openvino", "models/m", "workload.n", [1, 2, 4], {"quant.a": 3}, out)
    assert [(r.settings, r.model, r.qat) for r in asked] == [
        ({"quant.a": 3, "workload.n": value}, "models/m", False) for value in (1, 2, 4)
    ]
    rows = list(csv.DictReader(out.open()))
    assert [(row["value"], row["row"], row["p50_ms"], row["first_ms"]) for row in rows[-2:]] == [
        ("4", "teacher f32", "160.0", "8.0"),
        ("4", "candidate int8", "160.0", "8.0"),
    ]
    printed = capsys.readouterr().out.splitlines()
    assert "16.00" in printed[5] and "4.00" in printed[5] and printed[5].endswith("disturbed")
    assert len(json.loads(printed[-1])) == 6
    assert Image.open(out.with_suffix(".png")).size[0] > 600


def test_it_refuses_what_it_cannot_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PqkError, match=r"at least two different values of workload\.n, got 2, 2"):
        growth.bench_growth("B1", "openvino", None, "workload.n", [2, 2], {}, tmp_path / "g.csv")
    monkeypatch.setattr(growth, "run", lambda *_: records(1, time=None))
    with pytest.raises(PqkError, match=r"workload\.pair_graph\.k"):  # the second value, before the first is run
        growth.bench_growth("B1", "trt", None, "workload.pair_graph.k", [2, 100], {}, tmp_path / "g.csv")
    with pytest.raises(PqkError, match="emulated: they have none"):
        growth.bench_growth("B1", "trt", None, "workload.pair_graph.k", [2, 3], {}, tmp_path / "g.csv")
    assert not (tmp_path / "g.csv").exists()


def test_a_value_that_fails_keeps_the_rows_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(request: Any, *rest: Any) -> SimpleNamespace:
        if request.settings["workload.n"] == 4:
            raise PqkError("out of memory")
        return records(request.settings["workload.n"])

    monkeypatch.setattr(growth, "run", run)
    monkeypatch.setattr(growth, "asked_experiment", lambda *_: None)
    out = tmp_path / "growth.csv"
    with pytest.raises(PqkError, match="out of memory"):
        growth.bench_growth("B1", "openvino", None, "workload.n", [1, 2, 4], {}, out)
    assert [row["value"] for row in csv.DictReader(out.open())] == ["1", "1", "2", "2"]
    assert "workload.n=4 failed; the rows before it are in" in capsys.readouterr().out
