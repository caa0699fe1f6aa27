"""Compares scored models: drops with their intervals, and several sets of scenes taken together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pqk.errors import PqkError
from pqk.families.dust3r.scoring import summarise
from pqk.stats.intervals import LEVEL, Interval, drop_interval, mean_interval

HIGHER_IS_BETTER = frozenset({"delta1"})
_WITHOUT_TRUTH = ("absrel", "delta1")  # metrics whose distance from a perfect score is a drop
_NAMES = ("scene", "first", "second")
Scores = Mapping[str, Any]
"""What `stages.quality` returns: pairs (a row of metrics each, with its scene), summary, scenes, and more."""


def drop_of(metric: str, mine: Scores, teacher: Scores, truthful: bool, level: float = LEVEL) -> Interval | None:
    """Gives the drop of a metric in percent against the Teacher with its interval over scenes.

    truthful: both were scored against ground truth; else the Teacher's output was the truth, and the drop is the error
    against it. None where the metric was not measured or does not tell a drop. Raises PqkError when the two were
    scored on other pairs.
    """
    values, groups = _column(mine, metric), [row["scene"] for row in mine["pairs"]]
    if values is None:
        return None
    higher = metric in HIGHER_IS_BETTER
    if not truthful:
        if metric not in _WITHOUT_TRUTH:
            return None
        return mean_interval([100 * ((1 - v) if higher else v) for v in values], groups, level)
    base = _column(teacher, metric)
    if base is None:
        return None
    _refuse_others(mine, teacher)
    try:
        return drop_interval(values, base, groups, higher, level)
    except ValueError as error:
        raise PqkError(f"{metric}: {error}") from error


def rise_of(metric: str, mine: Scores, teacher: Scores) -> Interval | None:
    """Gives by how much a metric is above the Teacher's, with its interval over scenes; None where it was not measured.

    Raises PqkError when the two were scored on other pairs.
    """
    values, base = _column(mine, metric), _column(teacher, metric)
    if values is None or base is None:
        return None
    _refuse_others(mine, teacher)
    differences = [value - other for value, other in zip(values, base, strict=True)]
    return mean_interval(differences, [row["scene"] for row in mine["pairs"]])


def metric_intervals(scores: Scores, metrics: Sequence[str]) -> dict[str, list[float]]:
    """Gives [low, high] of the mean of each metric over scenes; a metric that was not measured is left out."""
    groups = [row["scene"] for row in scores["pairs"]]
    found: dict[str, list[float]] = {}
    for metric in metrics:
        values = _column(scores, metric)
        ends = mean_interval(values, groups).ends() if values is not None else None
        if ends is not None:
            found[metric] = ends
    return found


def together(parts: Sequence[Scores]) -> dict[str, Any]:
    """Joins the scores of one variant on several sets of scenes; what is no score is that of the first."""
    if len(parts) == 1:
        return dict(parts[0])
    pairs = [row for part in parts for row in part["pairs"]]
    plain = [{name: value for name, value in row.items() if name not in _NAMES} for row in pairs]
    scenes = [name for part in parts for name in part["scenes"]]
    return {**parts[0], "pairs": pairs, "scenes": scenes, "summary": summarise(plain)}


def _column(scores: Scores, metric: str) -> list[float] | None:
    values = [row.get(metric) for row in scores["pairs"]]
    return None if any(value is None for value in values) else values


def _refuse_others(mine: Scores, teacher: Scores) -> None:
    if _pairs(mine) != _pairs(teacher):
        raise PqkError("a drop compares scores on the same pairs, and these two models were scored on different ones")


def _pairs(scores: Scores) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in _NAMES) for row in scores["pairs"]]
