"""Computes the drop of a campaign's recipes with its 95 % interval, and its verdict at a limit: `drop_of`, `Drop`.

If the deliverable holds the scores of every pair, also of the Teacher, the interval is over scenes. Else it is over the
draws of scenes, which do not overlap, by Student's t.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pqk.record.ledger import is_higher_better
from pqk.record.pair_scores import Scores, paired
from pqk.record.tsv import Row
from pqk.report.cells import interval_of
from pqk.stats.intervals import Interval, difference_interval, drop_interval, groups_to_decide, mean_interval


@dataclass(frozen=True)
class Drop:
    """A drop in percent (or a difference of two, in points) and the unit of its interval: 'scenes' or 'draws'."""

    interval: Interval
    unit: str

    @property
    def text(self) -> str:
        """Returns '+0.21 [-0.36, +0.79]', or the value alone."""
        return interval_text(self.interval)

    @property
    def over(self) -> str:
        """Returns '5 draws', '1 scene'."""
        count = self.interval.groups
        return f"{count} {self.unit if count != 1 else self.unit.removesuffix('s')}"

    def judged(self, limit: float) -> str | None:
        """Returns 'pass', 'fail' or 'undecided' at a limit; None without an interval."""
        low, high = self.interval.low, self.interval.high
        if low is None or high is None:
            return None
        return "pass" if high <= limit else "fail" if low > limit else "undecided"

    def sentence(self, limit: float) -> str:
        """Returns a sentence with the drop, its interval, the limit and, if undecided, how many units would decide."""
        found, word = self.interval, self.judged(limit)
        if word is None:
            return f"drop {found.value:+.2f} % (at most {limit:g} %), without an interval"
        said = (
            f"drop {found.value:+.2f} %, 95 % interval {found.low:+.2f} .. {found.high:+.2f} over {self.over} "
            f"(at most {limit:g} %)"
        )
        needed = groups_to_decide(found, limit) if word == "undecided" else None
        return f"{said}; about {needed} {self.unit} would decide" if needed else said


def interval_text(interval: Interval) -> str:
    """Returns '+0.21 [-0.36, +0.79]', or the value alone."""
    if interval.low is None or interval.high is None:
        return f"{interval.value:+.2f}"
    return f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def drop_of(rows: Sequence[Row], teachers: Sequence[Row], scores: Scores) -> Drop | None:
    """Returns the drop over these evaluations of one recipe; None where one has no drop.

    teachers: evaluations of the Teacher in f32. Evaluations of several train seeds on the same scenes are one group,
    so the interval is over scenes and does not cover other trainings.
    """
    if not rows or any(row["drop_pct"] is None for row in rows):
        return None
    by_scenes = {row["scenes_sha256"]: row for row in teachers}
    runs = [(row, by_scenes.get(row["scenes_sha256"])) for row in rows]
    metric = rows[0]["main_metric"]
    if all(teacher is not None for _, teacher in runs):
        found = paired([[row, teacher] for row, teacher in runs if teacher is not None], metric, scores)
        if found is not None:
            (mine, taught), scenes = found
            return Drop(drop_interval(mine, taught, scenes, is_higher_better(rows[0], metric)), "scenes")
    return _over_draws([row["drop_pct"] for row in rows], rows)


def difference_of(rows: Sequence[Row], others: Sequence[Row], teachers: Sequence[Row], scores: Scores) -> Drop | None:
    """Returns by how many points one recipe drops more than another; positive: it is worse.

    Paired by scenes and pairs where scores are available, else by draw. Several train seeds are averaged. None where
    they share no draw, or one has no drop.
    """
    mine, base = _by_draw(rows), _by_draw(others)
    draws = sorted(mine.keys() & base.keys())
    pairs = [(mine[draw], base[draw]) for draw in draws]
    if not pairs or any(row["drop_pct"] is None for both in pairs for side in both for row in side):
        return None
    taught = {row["scenes_sha256"]: row for row in teachers}
    if all(len(a) == len(b) == 1 and draw in taught for draw, (a, b) in zip(draws, pairs, strict=True)):
        metric = rows[0]["main_metric"]
        runs = [[a[0], b[0], taught[draw]] for draw, (a, b) in zip(draws, pairs, strict=True)]
        found = paired(runs, metric, scores)
        if found is not None:
            (one, other, teacher), scenes = found
            return Drop(difference_interval(one, other, teacher, scenes, is_higher_better(rows[0], metric)), "scenes")
    means = [_mean_drop(a) - _mean_drop(b) for a, b in pairs]
    return _over_draws(means, [a[0] for a, _ in pairs])


def _over_draws(values: Sequence[float], rows: Sequence[Row]) -> Drop:
    """Returns the mean with Student's t interval over draws; halves of one list overlap, so they get no interval."""
    interval = mean_interval(values, [row["scenes_sha256"] for row in rows])
    if any(row["scenes"].startswith("half") for row in rows):
        interval = Interval(interval.value, None, None, interval.groups)
    return Drop(interval, "draws")


def _by_draw(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["scenes_sha256"], []).append(row)
    return found


def _mean_drop(rows: Sequence[Row]) -> float:
    return statistics.fmean(row["drop_pct"] for row in rows)


def drop_of_record(record: dict[str, Any]) -> Drop | None:
    """Returns the drop of a record, with its interval if it has one."""
    value = record["quality_drop_pct"]
    if value is None:
        return None
    low, high = interval_of(record, "quality_drop_pct") or (None, None)
    return Drop(Interval(value, low, high, len(record["scenes"] or [])), "scenes")
