"""The evidence ledger: one TSV row per evaluation of a fixed checkpoint, its statistics, and paired comparisons.

A row says which training made the checkpoint (train_seed), which draw it was evaluated on (eval_seed), what came out,
and the digests of everything that decides it. Nothing here runs a model; `pqk.study.ledger_eval` makes the rows.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqk.errors import PqkError, nearest
from pqk.files import clear_write_errors, matching, sha256_file
from pqk.locks import lock
from pqk.paths import shown
from pqk.record.pair_scores import Scores, paired
from pqk.record.tsv import Kind, Row, read_table, write_table
from pqk.settings.seeds import seeds_text
from pqk.stats.intervals import difference_interval, mean_interval

METRICS = (
    "chamfer",
    "chamfer_accuracy",
    "chamfer_completeness",
    "chamfer_paired",
    "absrel",
    "absrel_p95",
    "rmse",
    "delta1",
    "ause",
    "reproj_px",
)
"""Quality, as `pqk.families.dust3r.scoring.summarise` gives it."""

MEASURED = (*METRICS, "drop_pct", "fps")
"""What has a mean and a spread. drop_pct: see `COLUMNS`."""
HIGHER_IS_BETTER = ("delta1", "fps")
PER_PAIR = tuple(name for name in (*METRICS, "drop_pct") if name != "absrel_p95")
"""What the scores of single pairs add up to."""
NEVER_COMPARED = ("fps",)
"""What the difference of two rows says nothing of: no two rows are timed together."""

COLUMNS: dict[str, Kind] = {
    "card": "text",  # task card whose settings were laid over the configs
    "train_seed": "int",
    "eval_seed": "int",
    "main_metric": "text",
    **dict.fromkeys(METRICS, "float"),
    "drop_pct": "float",  # loss of main_metric against the Teacher in f32 on the same scenes, percent
    "fps": "float",  # pairs per second, measured; null where it was not
    "pairs": "int",
    "scenes": "text",  # what the eval seed drew
    "scenes_sha256": "text",
    "checkpoint": "text",
    "checkpoint_sha256": "text",  # of a quantized result: of its graphs, as hashes.engine of a record
    "float_sha256": "text",  # of a quantized result: the float checkpoint that it came from
    "teacher_sha256": "text",  # whom drop_pct refers to
    "params": "int",
    "backend": "text",
    "quantizer": "text",
    "device": "text",
    "isa": "text",  # instruction sets that the backend uses there
    "cores": "int",
    "precision": "text",
    "lowered": "text",  # of a quantized result: PTQ, QAT or (joint) PQK
    "measured": "text",  # engine or emulated
    "workload_sha256": "text",  # of what is fed, seeds aside
    "eval_sha256": "text",  # of how quality is computed
    "config_sha256": "text",  # of how the engine was made
    "code_sha256": "text",  # of the source that scores
    "settings": "text",  # JSON: values laid over the configs
    "commit": "text",
    "datetime": "text",
    "output": "text",  # folder with the scores of each pair
}
_MAY_BE_NULL = (
    *MEASURED,
    "float_sha256",
    "teacher_sha256",
    "quantizer",
    "isa",
    "cores",
    "lowered",
    "settings",
    "commit",
    "output",
)
LATER = ("chamfer_paired", "ause")
"""Columns that tables of older versions do not have."""
_SAMPLED_APART = ("chamfer", "chamfer_accuracy", "chamfer_completeness")
REQUIRED = tuple(name for name in COLUMNS if name not in _MAY_BE_NULL)

IDENTITY = (
    "train_seed",
    "eval_seed",
    "checkpoint_sha256",
    "card",
    "backend",
    "quantizer",
    "precision",
    "device",
    "isa",
    "workload_sha256",
    "eval_sha256",
    "config_sha256",
)
"""Two rows that agree in all of these are the same run; the newer one replaces the older."""
RESULT = ("card", "train_seed", "eval_seed", "backend", "quantizer", "device", "isa", "settings")
"""Two rows of a recipe's own result that agree in these are the same run, whatever the recipe came to. A result in
float, as a stop-loss leaves, has no quantizer and is that of every quantizer."""
VARIANT = ("card", "backend", "quantizer", "precision", "device", "isa", "measured", "config_sha256")
"""What runs must share before a mean over them says something."""
DIGESTS = ("workload_sha256", "eval_sha256")
"""What runs must share before they may stand in one table at all."""


def identity(row: Mapping[str, object]) -> tuple[object, ...]:
    return tuple(row[name] for name in IDENTITY)


def read_runs(path: Path, columns: Mapping[str, Kind], required: Sequence[str]) -> list[Row]:
    """The rows of a table of runs, as `read_table` does; those of older versions under the names of this one.

    Before chamfer_paired there was only its measurement, and that was called chamfer.
    """
    rows = read_table(path, columns, required, LATER)
    for row in rows:
        if row["chamfer_paired"] is None and row["chamfer"] is not None:
            row |= {"chamfer_paired": row["chamfer"], **dict.fromkeys(_SAMPLED_APART)}
            row["main_metric"] = "chamfer_paired" if row["main_metric"] == "chamfer" else row["main_metric"]
    return rows


def read_rows(path: Path) -> list[Row]:
    """The rows of one TSV file, checked. PqkError as `read_table` raises, and for a run that is there twice."""
    rows = read_runs(path, COLUMNS, REQUIRED)
    seen: dict[tuple[object, ...], int] = {}
    for number, row in enumerate(rows, 2):
        metric = row["main_metric"]
        if metric not in METRICS or row[metric] is None:
            raise PqkError(f"{path}:{number}: main_metric is {metric!r}, and the row has no value of that name")
        first = seen.setdefault(identity(row), number)
        if first != number:
            raise PqkError(f"{path}:{number}: the same run stands in line {first} already")
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows in order: by card, engine, train seed, eval seed. Atomic."""
    write_table(path, COLUMNS, sorted(rows, key=_order))


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*(str(row[name] or "") for name in (*VARIANT, "checkpoint_sha256")), row["train_seed"], row["eval_seed"])


def add_row(path: Path, row: Row, same: Sequence[str] = IDENTITY) -> None:
    """Put a row into the file, where it replaces an older one of the same run; other processes may do so as well.

    same: further columns that tell the same run: RESULT.
    Raises PqkError when the file is there and is no ledger, or holds rows of another workload or evaluation.
    """
    with _alone(path.parent):
        rows = read_rows(path) if path.exists() else []
        refuse_mixed([(path, rows), (path, [row])])
        write_rows(path, [*(old for old in rows if not _same_run(old, row, same)), row])


def _same_run(old: Row, row: Row, same: Sequence[str]) -> bool:
    if identity(old) == identity(row):
        return True
    unlike = {name for name in same if old[name] != row[name]}
    return unlike <= ({"quantizer"} if None in (old["quantizer"], row["quantizer"]) else set())


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One writer at a time in a folder: a lock on the folder itself leaves no file behind."""
    with clear_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, folder)
        yield
    finally:
        os.close(handle)


def refuse_mixed(tables: Sequence[tuple[Path, Sequence[Row]]]) -> None:
    """Raise PqkError, naming both files and both digests, when rows differ in workload or evaluation."""
    for name in DIGESTS:
        first: tuple[Path, Row] | None = None
        for path, rows in tables:
            for row in rows:
                first = first or (path, row)
                if row[name] != first[1][name]:
                    raise PqkError(
                        f"{shown(first[0])} and {shown(path)} must not be mixed: {name} is {first[1][name]} in the one "
                        f"and {row[name]} in the other; keep them in folders of their own"
                    )


# Statistics


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation of n values; std is None for one value."""

    mean: float
    std: float | None
    n: int


def stat(values: Sequence[float]) -> Stat:
    """sum(x) / n and sqrt(sum((x - mean)^2) / (n - 1)), correctly rounded sums. Raises PqkError without values."""
    if not values:
        raise PqkError("there is no value to take a mean of")
    mean = statistics.fmean(values)
    return Stat(mean, statistics.stdev(values) if len(values) > 1 else None, len(values))


SUMMARY: dict[str, Kind] = {
    "scope": "text",  # train_seed, file (all of a file), or pooled (all files of this variant)
    "file": "text",
    "file_sha256": "text",
    "train_seed": "int",
    "eval_seeds": "text",
    "checkpoints": "int",
    "n": "int",
    **{f"{name}_{part}": "float" for name in MEASURED for part in ("mean", "std")},
    **{name: COLUMNS[name] for name in (*VARIANT, *DIGESTS)},
}


def read_results(folder: Path) -> list[tuple[Path, list[Row]]]:
    """All ledgers (`*.tsv`) of a folder, by name. Raises PqkError when there is none, or they must not be mixed."""
    if not folder.is_dir():
        raise PqkError(f"no folder {folder}; pqk ledger eval writes results into one")
    files = [path for path in matching(folder, "*.tsv") if not path.name.startswith(".")]
    tables = [(path, read_rows(path)) for path in files]
    if not any(rows for _, rows in tables):
        raise PqkError(f"{folder} holds no results (*.tsv); make some with pqk ledger eval")
    refuse_mixed(tables)
    return tables


def summarise_files(tables: Sequence[tuple[Path, Sequence[Row]]]) -> tuple[list[Row], list[str]]:
    """Mean and std per file and train seed, per file, and over all files of a variant; and what was not pooled, why.

    A variant that only one file has gets no pooled line: it would be the file's. A run that stands in several files
    counts once. Raises PqkError when a file holds two checkpoints for the same seeds of a variant, as their mean would
    be of neither.
    """
    summary: list[Row] = []
    notes: list[str] = []
    everywhere: dict[tuple[object, ...], dict[Path, list[Row]]] = {}
    for path, rows in tables:
        for variant, own in _grouped(rows, VARIANT).items():
            everywhere.setdefault(variant, {})[path] = own
            clash = _clash(own)
            if clash:
                raise PqkError(f"{shown(path)}: {clash}; give each recipe a file of its own")
            digest = sha256_file(path)
            by_seed = _grouped(own, ("train_seed",))
            parts = [("train_seed", same) for same in by_seed.values()] + [("file", own)]
            summary += [_line(scope, part) | {"file": path.name, "file_sha256": digest} for scope, part in parts]
    for files in everywhere.values():
        if len(files) < 2:
            continue
        unique = {identity(row): row for rows in files.values() for row in rows}
        clash = _clash(list(unique.values()))
        if clash:
            notes.append(f"not pooled: {', '.join(path.name for path in files)}: {clash}")
        else:
            summary.append(_line("pooled", list(unique.values())))
    return summary, notes


def telling(summary: Sequence[Row]) -> list[Row]:
    """The lines of a summary without those of a file's whole where it has one train seed: they repeat its line."""
    names = ("file", *VARIANT)
    alone = {tuple(line[name] for name in (*names, "n")) for line in summary if line["scope"] == "train_seed"}
    return [
        line for line in summary if line["scope"] != "file" or tuple(line[name] for name in (*names, "n")) not in alone
    ]


def _grouped(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[object, ...], list[Row]]:
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _clash(rows: Sequence[Row]) -> str:
    """What is wrong with taking one mean of these rows; '' when nothing is."""
    for seeds, same in _grouped(rows, ("train_seed", "eval_seed")).items():
        if len(same) > 1:
            names = " and ".join(sorted(f"{row['checkpoint']} ({row['checkpoint_sha256'][:8]})" for row in same)[:2])
            return f"train seed {seeds[0]}, eval seed {seeds[1]} stands there for {names}"
    return ""


def _line(scope: str, rows: Sequence[Row]) -> Row:
    shared = {name: rows[0][name] for name in (*VARIANT, *DIGESTS)}
    line: Row = dict.fromkeys(SUMMARY) | shared | {"scope": scope, "n": len(rows)}
    line["train_seed"] = rows[0]["train_seed"] if scope == "train_seed" else None
    line["eval_seeds"] = seeds_text({row["eval_seed"] for row in rows})
    line["checkpoints"] = len({row["checkpoint_sha256"] for row in rows})
    for name in MEASURED:
        values = [row[name] for row in rows if row[name] is not None]
        if len(values) == len(rows):  # a mean over only some of the runs would pass for one over all
            found = stat(values)
            line |= {f"{name}_mean": found.mean, f"{name}_std": found.std}
    return line


# Comparison


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
        """'absrel: B is better by ...' or '... not distinguishable ...', with the numbers."""
        found = self.interval
        percent = f", {100 * found.mean / self.mean_a:+.2f} % of A" if self.mean_a else ""
        numbers = (
            f"B - A = {found.mean:+.6g}{percent}; 95 % interval {found.low:+.6g} .. {found.high:+.6g} "
            f"over {found.n} {found.unit}, {self.runs} paired runs"
        )
        if not self.distinguishable:
            return f"{self.metric}: not distinguishable ({numbers})"
        better = (found.mean > 0) == (self.metric in HIGHER_IS_BETTER)
        return f"{self.metric}: B is {'better' if better else 'worse'} ({numbers})"


def t_interval(differences: Sequence[float], unit: str = "runs") -> Interval:
    """mean(d) -+ t(0.975, n - 1) s / sqrt(n): the paired t interval (Student, Biometrika 6, 1908), scipy's quantile.

    Right for independent, normal differences. Raises PqkError for fewer than 2.
    """
    from scipy.stats import t

    if len(differences) < 2:
        raise PqkError(
            f"a 95 % interval needs at least 2 pairs, there {'is' if differences else 'are'} {len(differences)}"
        )
    found = stat(differences)
    half = float(t.ppf(0.975, found.n - 1)) * (found.std or 0.0) / math.sqrt(found.n)
    return Interval(found.mean, found.mean - half, found.mean + half, found.n, unit)


def halves_interval(halves: Sequence[float], kept: int, count: int, whole: float | None = None) -> Interval:
    """The mean difference over a list of `count` scenes, from draws of `kept` of them, with its 95 % interval.

    Draws without replacement from one list overlap, and their mean comes close to that of the list, however far that is
    from other scenes. But their spread tells how far: the variance of a draw's mean around the list's is
    S^2 (1/kept - 1/count) (Cochran 1977, Sampling Techniques, theorem 2.2), that of the list's mean S^2/count. This is
    the delete-d jackknife (Shao & Wu, Annals of Statistics 17, 1989). whole: the value over all of the list, where
    that is known; else the mean of the draws stands for it, with the error that it has.
    Raises PqkError for fewer draws than a spread needs: 2, or 1 beside `whole`.
    """
    from scipy.stats import t

    centre = statistics.fmean(halves) if whole is None else whole
    freedom = len(halves) - (whole is None)
    if freedom < 1:
        raise PqkError("a 95 % interval needs at least 2 draws of halves of the list of scenes, there is 1")
    spread = sum((value - centre) ** 2 for value in halves) / freedom
    error = math.sqrt(spread * (kept / (count - kept) + (1 / len(halves) if whole is None else 0)))
    # Two parts of the error of `spread`: few draws, and the list's own variance (Satterthwaite 1946).
    half = float(t.ppf(0.975, 1 / (1 / freedom + 1 / (count - 1)))) * error
    return Interval(centre, centre - half, centre + half, count, "scenes")


def _half_sizes(drawn: str) -> tuple[int, int]:
    """'half: 2 of 5 of the list' -> (2, 5). Raises PqkError for another text."""
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
    """The difference B - A of a metric (default: the main one) over the (train_seed, eval_seed) that both have.

    Where `scores` finds those of every pair, they are compared pair by pair, and the interval is over scenes. Else runs
    are what is compared; those that share a checkpoint, or the scenes of an eval seed, are not independent. So besides
    the interval over runs there is one over the mean difference of each eval seed, and in both cases one over that of
    each train seed, where there are two or more of them; the widest decides. Eval seeds that drew halves of a list of
    scenes overlap; without scores the intervals over runs and over eval seeds give way to that of `halves_interval`.
    Raises PqkError for rows of different workloads or evaluations, runs of one pair that saw other scenes, two rows
    for the same seeds in one file, a metric that is not there, fewer than 2 pairs, and fps.
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
    if metric not in MEASURED:
        raise PqkError(f"unknown metric {metric!r}{nearest(metric, MEASURED)}; there are {', '.join(MEASURED)}")
    if metric in NEVER_COMPARED:
        raise PqkError(
            f"{metric} is not compared: no two rows are timed together, so their difference is also that between two "
            "states of the machine; the speedups in the records of a run are of one interleaved timing"
        )
    pairs = [(by_seeds[0][seeds], by_seeds[1][seeds]) for seeds in common]
    for (train, seed), (left, right) in zip(common, pairs, strict=True):
        if left["scenes_sha256"] != right["scenes_sha256"]:
            raise PqkError(
                f"train seed {train}, eval seed {seed}: the two runs saw other pictures (scenes_sha256 "
                f"{left['scenes_sha256'][:8]} and {right['scenes_sha256'][:8]}): evaluate both on one machine"
            )
        for path, row in ((a[0], left), (b[0], right)):
            if row[metric] is None:
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
        notes.append(f"one train seed ({common[0][0]}): the interval says nothing of other trainings")
    if scores is not None and over_scenes is None and metric in PER_PAIR and len(halves) < len(drawn):
        notes.append("no scores per pair of these runs are here: the interval is over runs, and wider than over scenes")
    if halves:
        notes.append("the eval seeds drew halves of one list of scenes, which overlap: more of them narrow no interval")
    for name, side in zip("AB", zip(*pairs, strict=True), strict=True):
        if any(row["measured"] == "emulated" for row in side):
            notes.append(f"{name} was emulated: another runtime computed in the engine's place")
    if len({row["device"] for pair in pairs for row in pair}) > 1:
        notes.append("the runs are from different devices")
    means = [statistics.fmean(row[metric] for row in side) for side in zip(*pairs, strict=True)]
    return Comparison(metric, means[0], means[1], tuple(intervals), tuple(notes), len(common))


def _over_scenes(pairs: Sequence[tuple[Row, Row]], metric: str, scores: Scores) -> Interval | None:
    """The interval over scenes of B - A, paired pair by pair; None where scores are gone, or there is one scene.

    Of the drop: in points, the difference as a share of A (`difference_interval`), times A's share of the Teacher.
    """
    if metric not in PER_PAIR:
        return None
    name = pairs[0][0]["main_metric"] if metric == "drop_pct" else metric
    found = paired(pairs, name, scores)
    if found is None:
        return None
    (left, right), scenes = found
    if metric == "drop_pct":
        share = 1 + statistics.fmean(row["drop_pct"] for row, _ in pairs) / 100
        interval = difference_interval(right, left, left, scenes, name in HIGHER_IS_BETTER)
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
        for train, own in sorted(_grouped(rows, ("train_seed",)).items(), key=str)
    ]
    return ", ".join(parts) or "no rows"
