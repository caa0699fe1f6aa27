"""Compares two ledgers, `compare`: the difference of a metric, paired by seeds and samples, with its 95 % interval."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pqk.errors import PqkError, nearest
from pqk.paths import shown
from pqk.record.ledger import grouped, is_higher_better, measured_in, metrics_of, refuse_mixed, stat
from pqk.record.pair_scores import Scores, paired
from pqk.record.tsv import Row
from pqk.settings.seeds import seeds_text
from pqk.stats.intervals import difference_interval, mean_interval, t_quantile

NEVER_COMPARED = ("fps",)
"""Columns whose difference is meaningless: no two rows are timed together."""


@dataclass(frozen=True)
class Interval:
    """Mean difference with a 95 % confidence interval over `n` units: runs, train seeds, eval seeds or scenes."""

    mean: float
    low: float
    high: float
    n: int
    unit: str


@dataclass(frozen=True)
class Comparison:
    """B minus A over `runs` paired runs; `interval` is the widest of those in `intervals`."""

    metric: str
    higher_is_better: bool
    mean_a: float
    mean_b: float
    intervals: tuple[Interval, ...]
    notes: tuple[str, ...]
    runs: int

    @property
    def interval(self) -> Interval:
        return max(self.intervals, key=lambda i: i.high - i.low)

    @property
    def distinguishable(self) -> bool:
        return not self.interval.low <= 0 <= self.interval.high

    @property
    def sentence(self) -> str:
        """Returns 'METRIC: B is better ...' or '... not distinguishable ...', with the numbers."""
        found = self.interval
        percent = f", {100 * found.mean / self.mean_a:+.2f} % of A" if self.mean_a else ""
        numbers = (
            f"B - A = {found.mean:+.6g}{percent}; 95 % interval {found.low:+.6g} .. {found.high:+.6g} "
            f"over {found.n} {found.unit}, {self.runs} paired runs"
        )
        if not self.distinguishable:
            return f"{self.metric}: not distinguishable ({numbers})"
        better = (found.mean > 0) == self.higher_is_better
        return f"{self.metric}: B is {'better' if better else 'worse'} ({numbers})"


def t_interval(differences: Sequence[float], unit: str = "runs") -> Interval:
    """Returns the paired t interval, mean(d) -+ t(0.975, n - 1) s / sqrt(n) (Student, Biometrika 6, 1908).

    Correct for independent, normal differences. Raises PqkError for fewer than 2.
    """
    if len(differences) < 2:
        raise PqkError(
            f"a 95 % interval needs at least 2 pairs, there {'is' if differences else 'are'} {len(differences)}"
        )
    found = stat(differences)
    half = t_quantile(0.975, found.n - 1) * (found.std or 0.0) / math.sqrt(found.n)
    return Interval(found.mean, found.mean - half, found.mean + half, found.n, unit)


def halves_interval(halves: Sequence[float], kept: int, count: int, whole: float | None = None) -> Interval:
    """Returns the mean difference over a list of `count` scenes, from draws of `kept` of them, with its 95 % interval.

    Draws without replacement from one list overlap. Their mean is close to that of the list, even when the list's mean
    is far from that of other scenes. Their spread shows how far: the variance of a draw's mean around the list's is
    S^2 (1/kept - 1/count) (Cochran 1977, Sampling Techniques, theorem 2.2), that of the list's mean S^2/count. This is
    the delete-d jackknife (Shao & Wu, Annals of Statistics 17, 1989). whole: the value over all of the list, where
    that is known; else the mean of the draws is used instead, with its error.
    Raises PqkError for fewer draws than a spread needs: 2, or 1 with `whole`.
    """
    centre = statistics.fmean(halves) if whole is None else whole
    freedom = len(halves) - (whole is None)
    if freedom < 1:
        raise PqkError("a 95 % interval needs at least 2 draws of halves of the list of scenes, there is 1")
    spread = sum((value - centre) ** 2 for value in halves) / freedom
    error = math.sqrt(spread * (kept / (count - kept) + (1 / len(halves) if whole is None else 0)))
    # Two parts of the error of `spread`: few draws, and the list's own variance (Satterthwaite 1946).
    half = t_quantile(0.975, 1 / (1 / freedom + 1 / (count - 1))) * error
    return Interval(centre, centre - half, centre + half, count, "scenes")


def _half_sizes(drawn: str) -> tuple[int, int]:
    """Reads 'half: 2 of 5 of the list' as (2, 5). Raises PqkError for another text."""
    found = re.fullmatch(r"half: (\d+) of (\d+) of the list", drawn)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise PqkError(f"cannot read what an eval seed drew: {drawn[:60]!r} should be like 'half: 2 of 5 of the list'")
    return int(found[1]), int(found[2])


def compare(
    a: tuple[Path, Sequence[Row]],
    b: tuple[Path, Sequence[Row]],
    metric: str | None = None,
    scores: Scores | None = None,
) -> Comparison:
    """Returns B - A of a metric (default: the main one) over the (train_seed, eval_seed) that both have.

    Where `scores` finds the scores of all samples, they are compared sample by sample, and the interval is over scenes.
    Otherwise runs are compared. Runs that share a checkpoint, or the scenes of an eval seed, are not independent. So in
    addition to the interval over runs there is one over the mean difference of each eval seed, and in both cases one
    over that of each train seed, where there are two or more of them; the widest decides. Eval seeds that drew halves
    of a list of scenes overlap; without scores, `halves_interval` then replaces the intervals over runs and over eval
    seeds.
    Raises PqkError for rows of different workloads or evaluations, runs of one pair on different scenes, two rows for
    the same seeds in one file, an unknown metric, fewer than 2 pairs, and fps.
    """
    refuse_mixed([a, b])
    by_seeds = [_by_seeds(*table) for table in (a, b)]
    common = sorted(by_seeds[0].keys() & by_seeds[1].keys())
    if len(common) < 2:
        have = " and ".join(f"{shown(path)} has {_seeds_of(rows)}" for path, rows in (a, b))
        raise PqkError(
            f"a comparison needs at least 2 equal pairs of train and eval seed, there are {len(common)}: {have}"
        )
    names = {row["main_metric"] for own in by_seeds for row in own.values()}
    if metric is None and len(names) > 1:
        raise PqkError(f"the rows have different main metrics ({', '.join(sorted(names))}); choose one with --metric")
    metric = metric or names.pop()
    first = by_seeds[0][common[0]]
    known = measured_in(row for own in by_seeds for row in own.values())
    if metric not in known:
        raise PqkError(f"unknown metric {metric!r}{nearest(metric, known)}; there are {', '.join(known)}")
    if metric in NEVER_COMPARED:
        raise PqkError(
            f"{metric} is not compared: no two rows are timed together, so their difference is also that between two "
            "states of the machine; the speedups in the records of a run are of one interleaved timing"
        )
    pairs = [(by_seeds[0][seeds], by_seeds[1][seeds]) for seeds in common]
    for (train, seed), (left, right) in zip(common, pairs, strict=True):
        if left["scenes_sha256"] != right["scenes_sha256"]:
            raise PqkError(
                f"train seed {train}, eval seed {seed}: the two runs used different pictures (scenes_sha256 "
                f"{left['scenes_sha256'][:8]} and {right['scenes_sha256'][:8]}): evaluate both on one machine"
            )
        for path, row in ((a[0], left), (b[0], right)):
            if row.get(metric) is None:
                raise PqkError(f"{shown(path)}: train seed {train}, eval seed {seed} has no {metric}")
    difference = {seeds: right[metric] - left[metric] for seeds, (left, right) in zip(common, pairs, strict=True)}
    drawn = {seeds[1]: left["scenes"] for seeds, (left, _) in zip(common, pairs, strict=True)}
    halves = [seed for seed in drawn if drawn[seed].startswith("half")]
    over_scenes = None if scores is None else _over_scenes(pairs, metric, scores)
    intervals = [] if halves else [t_interval(list(difference.values()))]
    intervals = intervals if over_scenes is None else [over_scenes]
    for place, unit in enumerate(("train seeds", "eval seeds")):
        if over_scenes is not None and unit == "eval seeds":
            continue
        groups: dict[int, list[float]] = {}
        for seeds, value in difference.items():
            groups.setdefault(seeds[place], []).append(value)
        own = {seed: statistics.fmean(values) for seed, values in groups.items()}
        if halves and unit == "eval seeds":
            whole = next((value for seed, value in own.items() if seed not in halves), None)
            intervals.insert(0, halves_interval([own[seed] for seed in halves], *_half_sizes(drawn[halves[0]]), whole))
        elif 1 < len(groups) < len(common):
            intervals.append(t_interval(list(own.values()), unit))
    left_out = [len(own) - len(common) for own in by_seeds]
    notes = [
        f"runs of {name} without a partner, left out: {count}"
        for count, name in zip(left_out, "AB", strict=True)
        if count
    ]
    if len({seeds[0] for seeds in common}) == 1:
        notes.append(f"one train seed ({common[0][0]}): the interval does not cover other trainings")
    if scores is not None and over_scenes is None and _per_sample(first, metric) and len(halves) < len(drawn):
        why = "the scores per sample of these runs are missing"
        notes.append(f"{why}: the interval is over runs, and wider than over scenes")
    if halves:
        notes.append("the eval seeds drew halves of one list of scenes, which overlap: more of them narrow no interval")
    for name, side in zip("AB", zip(*pairs, strict=True), strict=True):
        if any(row["measured"] == "emulated" for row in side):
            notes.append(f"{name} was emulated: another runtime computed in the engine's place")
    if len({row["device"] for pair in pairs for row in pair}) > 1:
        notes.append("the runs are from different devices")
    means = [statistics.fmean(row[metric] for row in side) for side in zip(*pairs, strict=True)]
    better = is_higher_better(first, metric)
    return Comparison(metric, better, means[0], means[1], tuple(intervals), tuple(notes), len(common))


def _per_sample(row: Row, metric: str) -> bool:
    """Returns whether single samples have this score; they have none of a statistic such as a percentile."""
    return metric in metrics_of(row) or metric == "drop_pct"


def _over_scenes(pairs: Sequence[tuple[Row, Row]], metric: str, scores: Scores) -> Interval | None:
    """Returns the interval over scenes of B - A, sample by sample; None where scores are missing, or for one scene.

    For the drop: in points, the difference as a share of A (`difference_interval`), times A's share of the Teacher.
    """
    if not _per_sample(pairs[0][0], metric):
        return None
    name = pairs[0][0]["main_metric"] if metric == "drop_pct" else metric
    found = paired(pairs, name, scores)
    if found is None:
        return None
    (left, right), scenes = found
    if metric == "drop_pct":
        share = 1 + statistics.fmean(row["drop_pct"] for row, _ in pairs) / 100
        interval = difference_interval(right, left, left, scenes, is_higher_better(pairs[0][0], name))
    else:
        share = 1.0
        interval = mean_interval([b - a for a, b in zip(left, right, strict=True)], scenes)
    if interval.low is None or interval.high is None:
        return None
    return Interval(share * interval.value, share * interval.low, share * interval.high, interval.groups, "scenes")


def _by_seeds(path: Path, rows: Sequence[Row]) -> dict[tuple[int, int], Row]:
    found: dict[tuple[int, int], Row] = {}
    for row in rows:
        other = found.setdefault((row["train_seed"], row["eval_seed"]), row)
        if other is not row:
            told = [f"{r['precision']} of {r['checkpoint']} ({r['checkpoint_sha256'][:8]})" for r in (other, row)]
            raise PqkError(
                f"{shown(path)} has two rows of train seed {row['train_seed']}, eval seed {row['eval_seed']}: "
                f"{' and '.join(told)}; a comparison needs files with one recipe each"
            )
    return found


def _seeds_of(rows: Sequence[Row]) -> str:
    parts = [
        f"train seed {train[0]} with eval seeds {seeds_text(row['eval_seed'] for row in own)}"
        for train, own in sorted(grouped(rows, ("train_seed",)).items(), key=str)
    ]
    return ", ".join(parts) or "no rows"
