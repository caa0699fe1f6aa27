"""Compares scored models: drops with their intervals (`drop_of`), also over several sets of groups together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pqk.errors import PqkError
from pqk.families.contract import Metric, ScoringPart
from pqk.measure.scoring import PLACE, scored
from pqk.stats.intervals import LEVEL, Interval, drop_interval, mean_interval

Scores = Mapping[str, Any]
"""The result of `stages.quality`: samples (a row of evidence each, with its group), summary, groups, and more."""


def drop_of(metric: Metric, mine: Scores, teacher: Scores, truthful: bool, level: float = LEVEL) -> Interval | None:
    """Returns the drop of a metric in percent against the Teacher with its interval over groups.

    truthful: both were scored against ground truth; else the Teacher's output was the truth, and the drop is the error
    against it. None where the metric was not measured, or where its error is not a drop (`Metric.drops`). Raises
    PqkError when the two were scored on different samples.
    """
    values, groups = _column(mine, metric.name), [row["group"] for row in mine["samples"]]
    if values is None:
        return None
    if not truthful:
        if not metric.drops:
            return None
        return mean_interval([metric.loss_pct(value) for value in values], groups, level)
    base = _column(teacher, metric.name)
    if base is None:
        return None
    _refuse_others(mine, teacher)
    try:
        return drop_interval(values, base, groups, metric.better == "higher", level)
    except ValueError as error:
        raise PqkError(f"{metric.name}: {error}") from error


def rise_of(metric: str, mine: Scores, teacher: Scores) -> Interval | None:
    """Returns the metric minus the Teacher's, with its interval over groups; None where it was not measured.

    Raises PqkError when the two were scored on different samples.
    """
    values, base = _column(mine, metric), _column(teacher, metric)
    if values is None or base is None:
        return None
    _refuse_others(mine, teacher)
    differences = [value - other for value, other in zip(values, base, strict=True)]
    return mean_interval(differences, [row["group"] for row in mine["samples"]])


def metric_intervals(scores: Scores, metrics: Sequence[str]) -> dict[str, list[float]]:
    """Returns [low, high] of the mean of each metric over groups; a metric that was not measured is left out."""
    groups = [row["group"] for row in scores["samples"]]
    found: dict[str, list[float]] = {}
    for metric in metrics:
        values = _column(scores, metric)
        ends = mean_interval(values, groups).ends() if values is not None else None
        if ends is not None:
            found[metric] = ends
    return found


def together(parts: Sequence[Scores], scoring: ScoringPart) -> dict[str, Any]:
    """Joins the scores of one variant on several sets of groups; other values are taken from the first set."""
    if len(parts) == 1:
        return dict(parts[0])
    rows = [row for part in parts for row in part["samples"]]
    groups = [name for part in parts for name in part["groups"]]
    return {**parts[0], "groups": groups, **scored(scoring, rows)}


def _column(scores: Scores, metric: str) -> list[float] | None:
    values = [row.get(metric) for row in scores["samples"]]
    return None if any(value is None for value in values) else values


def _refuse_others(mine: Scores, teacher: Scores) -> None:
    if _places(mine) != _places(teacher):
        raise PqkError("a drop compares scores on the same samples, and these two models were scored on different ones")


def _places(scores: Scores) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in PLACE) for row in scores["samples"]]
