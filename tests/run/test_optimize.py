"""`pqk optimize`: the order of its points, what it leaves out, and a whole search on a toy."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from run_toys import TINY, Outcome, pqk

from backends.base import Precision
from backends.openvino.engine import best_float
from pqk.bench.predict_speed import Unpredictable
from pqk.cli.run_output import seconds_of
from pqk.errors import PqkError
from pqk.models import build_model, save_model
from pqk.optimize import search
from pqk.optimize.points import LETTERS, Found, Point, front, needless, points_of, predicted, too_slow
from pqk.optimize.report import as_data, print_optimized
from pqk.optimize.search import implausible, judge
from pqk.recipe.request import Request
from pqk.settings.recipe import check_stages
from pqk.stats.intervals import Interval

T50, TAIL, Q = Point(("T",), 0.5), Point(("T",), 0.0), Point(("Q",))


def found(point: Point, drop: float, speed: float, half: float = 0.1, **guards: float) -> Found:
    fast = Interval(speed, speed - 0.05, speed + 0.05, 30)
    lost = {name: Interval(value, value - half, value + half, 8) for name, value in guards.items()}
    return Found(point, Interval(drop, drop - half, drop + half, 8), fast, fast, lost, 100 / speed)


@given(st.sets(st.sampled_from(LETTERS), min_size=1))
def test_every_recipe_of_the_letters_is_a_point_once_and_parts_come_first(letters: set[str]) -> None:
    points = points_of(sorted(letters))
    assert len(set(points)) == len(points)
    assert {point.letters for point in points} == {
        check_stages(recipe) for recipe in _subsets(["P", "K", "T", "Q"]) if recipe and set(recipe) <= letters
    }
    for place, point in enumerate(points):
        assert all(part in points[: place + 1] for part in point.parts)
        trained = [other for other in points[place:] if not {"P", "K"} & set(other.letters)]
        assert not trained or not {"P", "K"} & set(point.letters)  # what trains comes last


def _subsets(letters: Sequence[str]) -> list[tuple[str, ...]]:
    if not letters:
        return [()]
    rest = _subsets(letters[1:])
    return rest + [(letters[0], *others) for others in rest]


def test_what_its_parts_rule_out_is_not_measured() -> None:
    known = {one.point: one for one in (found(TAIL, 0.4, 1.2), found(T50, 0.2, 1.9), found(Q, 0.1, 1.5))}
    both, best = Point(("T", "Q"), 0.5), found(Point(("T", "Q"), 0.0), 0.5, 1.7)
    assert predicted(both, known) == pytest.approx(1.9 * 1.5)
    assert needless(both, known, best, 1.0, 5.0) is None
    assert needless(both, known, found(both, 0.5, 3.0), 1.0, 5.0) == (
        "its parts predict 2.85x, and T→Q, tail and 50 % of the tokens has 3.00x"
    )
    known[Q] = found(Q, 1.3, 1.5)
    assert needless(both, known, None, 1.0, 5.0) == "Q alone drops 1.30 %"
    trained = Point(("K", "T", "Q"), 0.5)  # a student may bring back what the others lose
    assert needless(trained, known, None, 1.0, 5.0) is None
    assert needless(trained, {**known, trained.parts[0]: found(trained.parts[0], 2.0, 1.5)}, None, 1.0, 5.0) == (
        "K alone drops 2.00 %"
    )
    known[Q] = found(Q, 0.1, 1.5, chamfer=9.0)
    assert needless(both, known, None, 1.0, 5.0) == "Q alone loses 9.0 % in chamfer"
    assert needless(T50, {TAIL: found(TAIL, 3.0, 1.2)}, None, 1.0, 5.0) == "T, tail alone drops 3.00 %"
    assert needless(TAIL, {T50: found(T50, 3.0, 1.2)}, None, 1.0, 5.0) is None  # fewer merged tokens may lose less


def test_what_a_prediction_rules_out() -> None:
    """Only what is too slow even where the prediction errs by all of its 15 percent."""
    best = found(TAIL, 0.4, 2.0)
    assert too_slow(1.7, best, 15.0) == ("1.70x is predicted, 1.95x with its error of 15 %, and T, tail has 2.00x")
    assert too_slow(1.74, best, 15.0) is None and too_slow(1.7, best, 20.0) is None
    assert too_slow(0.1, None, 15.0) is None and too_slow(None, best, 15.0) is None


@given(st.lists(st.tuples(st.floats(-2, 5), st.floats(0.5, 4)), min_size=1, max_size=8))
def test_no_point_of_the_front_is_beaten(values: list[tuple[float, float]]) -> None:
    points = [found(Point(("T",), float(n)), drop, speed) for n, (drop, speed) in enumerate(values)]
    best = front(points)
    assert best
    for one in points:
        beaten = any(
            other.drop.value <= one.drop.value
            and other.speedup.value >= one.speedup.value
            and (other.drop.value, other.speedup.value) != (one.drop.value, one.speedup.value)
            for other in points
        )
        assert not beaten if one in best else True
        assert beaten or any((b.drop.value, b.speedup.value) == (one.drop.value, one.speedup.value) for b in best)


def record(drop: float, half: float, speed: float, **more: Any) -> list[dict[str, Any]]:
    """The records of a run: a Teacher of 100 ms and 80 GFLOP, and a candidate."""
    pair = [100.0, 101.0, 99.0, 100.5, 99.5, 100.2, 100.1, 99.8]
    teacher = {"role": "teacher", "samples": {"pair": pair}, "flops_G": 80.0}
    mine = {
        "role": "candidate",
        "precision": "int8",
        "quality_drop_pct": drop,
        "intervals": {"quality_drop_pct": [drop - half, drop + half]},
        "scenes": ["a", "b"],
        "samples": {"pair": [ms / speed for ms in pair]},
        "speedup_vs_teacher_f32": speed,
        "flops_G": 40.0,
        "verdict_reasons": [],
        **more,
    }
    return [teacher, mine]


def test_verdicts() -> None:
    assert judge(record(0.4, 0.2, 2.0), 1.0)[0] == "accept"
    assert judge(record(0.9, 0.2, 2.0), 1.0)[0] == "undecided"
    assert judge(record(1.4, 0.2, 2.0), 1.0)[0] == "regression"
    assert judge(record(0.4, 0.2, 0.9), 1.0)[0] == "regression"
    lost = ["FAILED: guard metric: chamfer +9 % against the Teacher (at most +5 %)"]
    assert judge(record(0.4, 0.2, 2.0, verdict_reasons=lost), 1.0) == ("regression", [*_reasons(), *lost])
    assert implausible(record(0.4, 0.2, 2.0)) is None
    assert "faster than its FLOPs can be (20.0x)" in str(implausible(record(0.4, 0.2, 21.0)))
    assert "faster than its FLOPs can be (3.0x)" in str(implausible(record(0.4, 0.2, 3.1, precision="f32")))
    assert "better than the Teacher" in str(implausible(record(-9.0, 1.0, 2.0)))


def _reasons() -> list[str]:
    return judge(record(0.4, 0.2, 2.0), 1.0)[1]


def test_budgets() -> None:
    assert [seconds_of(text) for text in ("90s", "30m", "1.5h")] == [90, 1800, 5400]
    with pytest.raises(PqkError, match="--budget 30: write it as 90s, 30m or 2h"):
        seconds_of("30")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, begun: Callable[[Path], Path]) -> Path:
    """A project with a toy that has DPT heads, whose points lie in front of the camera."""
    import torch

    root = begun(tmp_path_factory.mktemp("optimize") / "project")
    dpt = {"feature_dim": 32, "last_dim": 16, "layer_dims": [16, 32, 32, 32]}
    sizes = {**TINY, "head_type": "dpt", "dec_depth": 3, "dpt": dpt}
    net = build_model("dust3r", sizes, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for head in (net.downstream_head1, net.downstream_head2):
            head.dpt.head["4"].bias[2] += 1.5
    save_model(net, root / "models" / "toy")
    return root


def optimized(root: Path, *more: str) -> Outcome:
    return pqk(root, "optimize", "models/toy", "--backend", "openvino", "--letters", "T", "--json", *more)


def test_a_search_from_checkpoint_to_bundle(project: Path) -> None:
    """A second call finds all of it in the store."""
    outcome = optimized(project, "--max-drop", "50", "--set", "eval.thresholds.guard_drop_pct=5", "-o", "bundle")
    data = json.loads(outcome.out.splitlines()[-1])
    shares = [row["settings"]["reduce.tokens"] for row in data["points"]]
    ruled_out = [row for row in data["not_measured"] if row["status"] == "ruled out by prediction"]
    assert shares[0] == 0.5 and {*shares, *(row["settings"]["reduce.tokens"] for row in ruled_out)} == {0.5, 0.3, 0.0}
    assert all(row["predicted_speedup"] > 0 for row in (*data["points"], *ruled_out))
    within = [row for row in data["points"] if row["within"] and row["speedup_vs_best_float"] > 1]
    if not within:  # T in f32 need not be faster than bf16
        assert best_float() is Precision.BF16 and data["verdict"] == "infeasible" and outcome.code == 1
        assert data["winner"] is None and not (project / "bundle").exists()
        return
    assert data["verdict"] in ("accept", "undecided", "regression"), outcome.err
    assert outcome.code == {"accept": 0, "undecided": 4}.get(data["verdict"], 1)
    assert data["winner"] == max(within, key=lambda row: row["speedup_vs_teacher_f32"])
    assert data["test"]["combo"] == "T-only" and data["test"]["quality_drop_pct"] is not None
    manifest = json.loads((project / "bundle" / "manifest.json").read_text())
    assert manifest["recipe"] == ["T"] and (project / "bundle" / "sample.py").is_file()
    for ending in ("json", "csv", "png"):
        assert (project / "reports" / "optimize" / f"toy.{ending}").stat().st_size > 0
    again = optimized(project, "--max-drop", "50", "--set", "eval.thresholds.guard_drop_pct=5")
    assert json.loads(again.out.splitlines()[-1])["points"] == data["points"] and "… " not in again.err


class Foretelling:
    """A predictor whose speeds are given, by the share of merged tokens."""

    def __init__(self, speeds: dict[float, float | None], disturbed: bool = False) -> None:
        self._speeds, self.disturbed = speeds, disturbed

    def speedup(self, experiment: Any) -> float:
        speed = self._speeds[experiment.reduce.tokens]
        if speed is None:
            raise Unpredictable("nobody knows")
        return speed


@pytest.mark.parametrize("disturbed", [False, True])
def test_a_point_that_is_predicted_to_be_slow_is_passed_over_and_told(
    project: Path, monkeypatch: pytest.MonkeyPatch, disturbed: bool
) -> None:
    """Not by parts that were timed under load, and not where there is no prediction."""
    measured = {0.5: 2.0, 0.3: 1.6, 0.0: 1.2}
    foretelling = Foretelling({0.5: None, 0.3: 1.5, 0.0: 2.5}, disturbed)
    candidate = SimpleNamespace(trained=[], metric="absrel", teacher=SimpleNamespace(name="toy"))
    monkeypatch.setattr(search, "_predictor", lambda *_: foretelling)
    monkeypatch.setattr(search, "make", lambda *_: SimpleNamespace(candidate=candidate))
    monkeypatch.setattr(search, "_measured", lambda point, _: found(point, 0.1, measured[point.tokens]))
    monkeypatch.setattr(search, "_verified", lambda *_: ({}, "accept", []))
    said: list[str] = []
    asked = Request("AUTO", "openvino", model=str(project / "models" / "toy"))
    result = search.optimize(asked, ["T"], 1.0, 60.0, None, None, project, lambda *_: None, said.append)
    data = as_data(result)
    assert "T, tail and 50 % of the tokens: no prediction, nobody knows" in said
    shares = [row["settings"]["reduce.tokens"] for row in data["points"]]
    why = "1.50x is predicted, 1.72x with its error of 15 %, and T, tail and 50 % of the tokens has 2.00x"
    if disturbed:
        assert shares == [0.5, 0.3, 0.0] and not data["not_measured"]
        assert any(line.startswith(f"T, tail and 30 % of the tokens: {why}, but its parts") for line in said)
        return
    assert shares == [0.5, 0.0]
    assert [row["predicted_speedup"] for row in data["points"]] == [None, 2.5]
    (left,) = data["not_measured"]
    assert left == {
        "recipe": ["T"],
        "settings": {"reduce.tokens": 0.3},
        "status": "ruled out by prediction",
        "why": why,
        "predicted_speedup": 1.5,
    }
    console = Console(file=io.StringIO(), width=300)
    print_optimized(result, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"T, tail and 30 % of the tokens: ruled out by prediction: {why}" in shown


def test_nothing_is_within_an_impossible_limit(project: Path) -> None:
    outcome = optimized(project, "--max-drop", "-90", "--budget", "2m")
    data = json.loads(outcome.out.splitlines()[-1])
    assert (outcome.code, data["verdict"], data["winner"], data["test"]) == (1, "infeasible", None, None)
    assert "nothing is within a drop of -90 %" in data["why"][0]
    assert all("alone drops" in row["why"] for row in data["not_measured"])


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--letters", "T,X"), 2, "--letters must hold letters out of T, Q, K, P, and 'X' is not one"),
        (("--budget", "soon"), 2, "--budget soon: write it as 90s, 30m or 2h"),
        (("--letters", "T,T"), 2, "--letters holds T twice"),
    ],
)
def test_bad_input(project: Path, arguments: tuple[str, ...], code: int, sentence: str) -> None:
    outcome = pqk(project, "optimize", "models/toy", "--backend", "openvino", *arguments)
    assert (outcome.code, outcome.sentence) == (code, sentence)
