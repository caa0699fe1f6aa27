"""`pqk bench sampling`: many scenes of few views against few scenes of many, at equal cost."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_toys import pqk

pytest.importorskip("nncf")


def test_designs_cost_what_they_say(tmp_path: Path, begun: Callable[[Path], Path], tiny_model: Path) -> None:
    root = begun(tmp_path / "project")
    words = ["bench", "sampling", "B1", "--views", "2", "--scenes", "2", "--model", str(tiny_model)]
    outcome = pqk(root, *words, "-o", "reports/sampling.csv")
    assert outcome.code == 0, outcome.err
    two, six = json.loads(outcome.out.splitlines()[-1])
    assert (two["views"], two["pairs"], six["views"]) == (2, 1, 6)  # six: the budget is 8 scenes of 6 views
    assert six["cost"] == pytest.approx(1) and six["affordable"] == 8
    assert 0 < two["cost"] < six["cost"] and two["affordable"] > 8
    with (root / "reports" / "sampling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["half"]) for row in rows] == [two["half"], six["half"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--views", "2;3"), "--views 2;3: give whole numbers separated by commas, such as 2,3,4,6"),
        (("--views", "1,2"), "bench sampling needs at least 2 scenes of at least 2 views"),
    ],
)
def test_wrong_numbers_are_one_sentence(project: Path, words: tuple[str, str], said: str) -> None:
    outcome = pqk(project, "bench", "sampling", *words)
    assert (outcome.code, outcome.sentence) == (2, said)
