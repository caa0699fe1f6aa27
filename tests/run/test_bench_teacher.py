"""The Teacher's own scores on the test scenes are those of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_toys import written

from pqk.bench.teacher import bench_teacher
from pqk.cli.legacy_scripts import baseline
from pqk.errors import PqkError

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.mark.slow
def test_the_figures_are_those_of_a_run(project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    found = bench_teacher(str(tiny_model), False, "x")
    assert baseline(["--ckpt", str(tiny_model), "--backend", "reference"]) == 0
    (record,) = written(project)
    assert record["precision"] == "f32" and record["role"] == "teacher"
    names = ("absrel", "rmse", "delta1", "chamfer", "reproj_px", "pairs")
    assert [found[name] for name in names] == [record[name] for name in names]
    assert found["intervals"]["absrel"] == record["intervals"]["absrel"]
    assert found["floor"]["absrel"] > 0
    scenes = [p for p in (project / "outputs" / "store" / "scenes").iterdir() if p.is_dir()]
    assert len(scenes) == 2  # validation and test, rendered once for both

    card = tiny_model.parent / "card"
    card.mkdir()
    with pytest.raises(PqkError, match=r"model_card\.json is missing"):
        bench_teacher(str(card), True, "x")


def test_pairs_with_too_little_truth_are_an_error(
    project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    file = project / "configs" / "eval.yaml"
    file.write_text(file.read_text().replace("min_valid_pixels: 100", f"min_valid_pixels: {64 * 64 + 1}"))
    with pytest.raises(PqkError, match=r"valid depth pixels \(quality\.min_valid_pixels\)"):
        bench_teacher(str(tiny_model), False, json.dumps({}))
