"""Metrics of a whole set: values of samples by the jackknife, where they are completed; losses of any best value."""

from __future__ import annotations

import contextlib
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pqk.compress.train.judge import Judge
from pqk.errors import PqkError
from pqk.families.contract import Metric, completed
from pqk.measure.scores import drop_of, together
from pqk.measure.scoring import scored
from pqk.record.pair_scores import files_of, scores_here, scores_in
from pqk.stats.intervals import mean_interval
from pqk.stats.jackknife import set_values

NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30)
SHARE = Metric("share", "", "higher", 100.0, drops=True)


# The jackknife


@given(NUMBERS)
def test_of_a_mean_the_values_are_the_samples(values: list[float]) -> None:
    if len(values) == 1:
        assert set_values(values[0], [math.nan]) == values
        return
    without = [(math.fsum(values) - each) / (len(values) - 1) for each in values]
    assert set_values(math.fsum(values) / len(values), without) == pytest.approx(values, abs=1e-7)


@given(NUMBERS, st.floats(-1e3, 1e3))
def test_their_mean_is_the_number_and_their_error_the_jackknifes(without: list[float], whole: float) -> None:
    values = set_values(whole, without)
    count = len(without)
    assert math.fsum(values) / count == pytest.approx(whole, abs=1e-8)
    if count > 1:
        error = math.sqrt((count - 1) / count * np.square(np.array(without) - np.mean(without)).sum())
        assert np.std(values, ddof=1) / math.sqrt(count) == pytest.approx(error, abs=1e-7)


def test_a_sample_without_which_nothing_is_left_changes_nothing() -> None:
    assert set_values(3.0, [math.nan, 3.0, 3.0]) == [3.0, 3.0, 3.0]
    assert set_values(3.0, [math.nan, 2.0, 4.0]) == [3.0, 5.0, 1.0]


# A toy: the share of hits among all tries of a set, which is no mean over samples with unlike numbers of tries


def share(rows: Any) -> float | None:
    tries = sum(row["seen"]["tries"] for row in rows)
    return 100 * sum(row["seen"]["hits"] for row in rows) / tries if tries else None


def complete(evidence: Any) -> list[dict[str, Any]]:
    whole, rest = share(evidence), [share([*evidence[:i], *evidence[i + 1 :]]) for i in range(len(evidence))]
    if whole is None:
        return [{**row, "share": None} for row in evidence]
    values = set_values(whole, [math.nan if each is None else each for each in rest])
    return [{**row, "share": value} for row, value in zip(evidence, values, strict=True)]


PART: Any = SimpleNamespace(complete=complete, summarise=lambda evidence: {"share": share(evidence)})
PLAIN: Any = SimpleNamespace(summarise=lambda evidence: {"error": sum(row["error"] for row in evidence)})


def evidence(hits: int, tries: int) -> dict[str, Any]:
    return {"seen": {"hits": hits, "tries": tries}}


def scores(*counts: tuple[int, int], first: int = 0) -> dict[str, Any]:
    rows = [{"group": f"g{first + place}", "sample": "0", **evidence(*each)} for place, each in enumerate(counts)]
    return {**scored(PART, rows), "groups": [row["group"] for row in rows]}


COUNTS = st.integers(0, 9).flatmap(lambda tries: st.tuples(st.integers(0, tries), st.just(tries)))


@given(st.lists(COUNTS, min_size=2, max_size=9), st.data())
def test_sets_are_completed_and_completed_again_when_they_are_joined(counts: list[Any], data: Any) -> None:
    whole = scores(*counts)
    values = [row["share"] for row in whole["samples"]]
    value = whole["summary"]["share"]
    assert values == [None] * len(counts) if value is None else math.fsum(values) / len(values) == pytest.approx(value)
    cut = data.draw(st.integers(1, len(counts) - 1))
    assert together([scores(*counts[:cut]), scores(*counts[cut:], first=cut)], PART) == whole


def test_a_part_without_complete_keeps_its_evidence() -> None:
    rows = [{"group": 0, "sample": "a", "error": 0.5}, {"group": 1, "sample": "b", "error": 0.25}]
    assert scored(PLAIN, rows) == {"summary": {"error": 0.75}, "samples": rows}
    assert completed(PLAIN, rows) == rows


def test_drops_of_such_a_metric() -> None:
    teacher, mine = scores((4, 4), (8, 10), (3, 6)), scores((3, 4), (8, 10), (1, 6))
    drop = drop_of(SHARE, mine, teacher, truthful=True)
    assert drop is not None and drop.low is not None
    assert drop.value == pytest.approx(100 * (15 - 12) / 15)
    against = drop_of(SHARE, mine, teacher, truthful=False)
    assert against is not None and against.value == pytest.approx(100 - 60)  # percent, not a hundred times as much


@pytest.mark.parametrize(
    ("metric", "value", "loss", "percent"),
    [
        (Metric("a", "", "lower", 0.0), 0.02, 0.02, 2.0),
        (Metric("a", "", "higher", 1.0), 0.75, 0.25, 25.0),
        (SHARE, 60.0, 40.0, 40.0),
        (SHARE, 102.0, -2.0, -2.0),  # of one sample of a set
        (Metric("a", "", "lower", -4.0), -1.0, 3.0, 75.0),
    ],
)
def test_losses(metric: Metric, value: float, loss: float, percent: float) -> None:
    assert (metric.loss(value), metric.loss_pct(value)) == pytest.approx((loss, percent))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.sampled_from(["lower", "higher"]))
def test_losses_of_ratios_are_what_they_were(values: list[float], better: Any) -> None:
    metric = Metric("a", "", better, float(better == "higher"), drops=True)
    sign, groups = -1 if better == "higher" else 1, range(len(values))
    rows = [{"group": group, "sample": "0", "a": value} for group, value in zip(groups, values, strict=True)]
    was = mean_interval([100 * sign * (value - metric.perfect) for value in values], groups)
    assert drop_of(metric, {"samples": rows}, {"samples": rows}, truthful=False) == was
    assert [metric.loss(value) for value in values] == [abs(value - metric.perfect) for value in values]


# Trainings, and tables of samples


class Batches:
    def __init__(self, *batches: list[tuple[int, int]], truthful: bool = True) -> None:
        self._batches, self.truthful = batches, truthful

    def held_out(self) -> Any:
        return iter(self._batches)


class Toy(nn.Module):
    def __init__(self, lost: int) -> None:
        super().__init__()
        self.lost = lost


def judged(batches: Batches, teacher: nn.Module | None = None) -> Judge:
    def score(out: Any, batch: Any) -> Any:
        return [[evidence(max(hits - out["lost"], 0), tries)] for hits, tries in batch]

    learning = SimpleNamespace(
        UNIT="images",
        REMEDY="annotate them",
        complete=complete,
        parts=lambda model: {"net": model},
        forward=lambda parts, batch, watched: {"lost": parts["net"].lost},
        score=score,
        floor=lambda batch: [[evidence(0, tries)] for _, tries in batch],
        as_truth=lambda batch, out, config: [(hits, hits) for hits, _ in batch],
    )
    settings = SimpleNamespace(METRICS=(SHARE,))
    family: Any = SimpleNamespace(learning_part=lambda: learning, settings_part=lambda: settings)
    given: Any = batches
    return Judge(family, given, contextlib.nullcontext, teacher)


def test_a_training_is_judged_by_the_metric_of_its_whole_set() -> None:
    batches = Batches([(4, 4), (8, 10)], [(3, 6)])
    judge = judged(batches, Toy(0))
    found = judge(Toy(1))
    assert found["share"] == pytest.approx(60) and found["score"] == pytest.approx(40)
    assert set(found) == {"score", "scores", "share", "drop_pct", "drop_low"}
    assert math.fsum(found["scores"]) / 3 == pytest.approx(40) and found["drop_pct"] == pytest.approx(20)
    assert judge.floor() == {"constant_share": 0}
    taught = judged(Batches([(4, 4), (8, 10)], [(3, 6)], truthful=False), Toy(0))(Toy(1))
    assert taught["drop_pct"] == pytest.approx(20) and taught["share"] == pytest.approx(80)  # 12 of 15


def test_a_training_without_anything_to_score_is_refused() -> None:
    judge = judged(Batches([(0, 0)], [(0, 0)]))
    with pytest.raises(PqkError, match="none of the held-out images has anything to score; annotate them"):
        judge(Toy(0))


def test_tables_of_samples_hold_metrics_alone(tmp_path: Any) -> None:
    found = scores((4, 4), (8, 10), (3, 6))
    folder = tmp_path / "outputs" / "store" / "scores" / "abc"
    folder.mkdir(parents=True)
    (folder / "quality.json").write_text(json.dumps(found))
    row = {"output": "outputs/store/scores/abc", "main_metric": "share", "pairs": 3, **found["summary"]}
    wanted = [{name: each[name] for name in ("group", "sample", "share")} for each in found["samples"]]
    assert scores_here(tmp_path)(row) == wanted
    files, missing = files_of([row], tmp_path)
    assert not missing
    (name,) = files
    (tmp_path / "frozen" / name).parent.mkdir(parents=True)
    (tmp_path / "frozen" / name).write_bytes(files[name])
    assert scores_in(tmp_path / "frozen")(row) == wanted
