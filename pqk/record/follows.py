"""Computes the numbers of a deliverable again from what they were computed from, and says which differ.

| number | follows from |
| --- | --- |
| metrics of `runs.tsv` | the scores of the samples of the run, where they are there: their mean; of NAME_p95 the tail |
| drop of `runs.tsv` and of a record | main metric of the Teacher in f32 on the same samples |
| metrics of a record | the row of `runs.tsv` with the same model and seeds |
| times and speeds of a record, with their intervals | its raw samples, and those of the rows of the same run |
| sizes of a record | the Teacher's; params_M is params in millions |
| `summary.tsv`, the table of README.md | `runs.tsv`; `summary.tsv` |
| `ablation/NAME.md` | `ablation/NAME.csv` |
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pqk.errors import PqkError
from pqk.files import matching
from pqk.oserrors import cannot_read
from pqk.record.deliverable import label, mean_std
from pqk.record.ledger import COLUMNS, SUMMARY, VARIANT, grouped, identity, is_higher_better, metrics_of, stat, telling
from pqk.record.pair_scores import samples_in, scores_name
from pqk.record.tsv import Kind, Row, header_of, markdown_cell, read_table
from pqk.settings.seeds import parse_seeds
from pqk.stats.intervals import median_interval
from pqk.stats.latency import percentile, speedup

SUMMARY_FILE = "summary.tsv"
_EXACT = 1e-9
"""Relative difference of two sums of the same numbers in another order."""
_ROUNDED_MS = 1e-4
"""Raw times are kept with four decimals, in milliseconds."""


@dataclass(frozen=True)
class Dated:
    """A record as it is read now, and the version of the schema that it was written in."""

    record: Mapping[str, Any]
    version: str

    @property
    def is_old(self) -> bool:
        """Returns whether speeds may be ratios of medians, as they were before version 2."""
        return self.version.startswith("1.")


def raw_rows(path: Path) -> list[Row]:
    """Reads a table of runs with its columns as they stand in the file, also those of older versions."""
    return read_table(path, {name: {"file": "text", **COLUMNS}.get(name, "float") for name in header_of(path)})


def read_summary(path: Path) -> list[Row]:
    """Reads a summary. Raises PqkError."""
    names = [*SUMMARY, *(name for name in header_of(path) if re.search(r"_(mean|std)$", name))]
    columns: dict[str, Kind] = {name: SUMMARY.get(name, "float") for name in names}
    rows = read_table(path, columns, ("scope", "n", "eval_seeds"))
    for row in rows:
        parse_seeds(row["eval_seeds"])
    return rows


def scores_of(folder: Path, runs: Sequence[Row]) -> tuple[int, list[str], dict[str, PqkError]]:
    """Returns how many runs have the scores of their samples, a sentence for each number that these do not give, and
    the errors of tables that cannot be read, by name."""
    found, said, unread = 0, list[str](), dict[str, PqkError]()
    for number, row in enumerate(runs, 1):
        try:
            scores = samples_in(folder, row)
        except PqkError as error:
            unread[scores_name(row) or ""] = error
            continue
        if not scores:
            continue
        found += 1
        where = _where(number, row)
        if len(scores) != row["pairs"]:
            said.append(f"{where}: pairs is {row['pairs']}, its scores are of {len(scores)} samples")
            continue
        for name in [name for name in scores[0] if name in row and name not in ("group", "sample")]:
            values = [one[name] for one in scores if one[name] is not None]
            if not values and row[name] is None:
                continue
            if len(values) < len(scores) or row[name] is None:
                said.append(f"{where}: {name} is {row[name]}, and {len(values)} of {len(scores)} samples have a score")
                continue
            said += _unequal(where, name, row[name], math.fsum(values) / len(values), "the mean of its scores")
            if row.get(f"{name}_p95") is not None:
                tail = float(np.percentile(values, 95))
                said += _unequal(where, f"{name}_p95", row[f"{name}_p95"], tail, "that of its scores")
    return found, said, unread


def drops(runs: Sequence[Row]) -> list[str]:
    """Returns a sentence for each drop that is not 100 (own / Teacher's - 1) percent, signed so that worse is above 0.

    A Teacher that was evaluated in several ways, such as with 1 and 4 steps, must give the drop in one of them.
    """
    floats = [row for row in runs if row["precision"] in ("f32", "fp32") and row["quantizer"] is None]
    same = ("scenes_sha256", "eval_seed", "eval_sha256")
    teachers = grouped(floats, ("checkpoint_sha256", *same))
    said = []
    for number, row in enumerate(runs, 1):
        metric = row["main_metric"]
        bases = [base[metric] for base in teachers.get((row["teacher_sha256"], *(row[name] for name in same)), ())]
        if row["drop_pct"] is None or row.get(metric) is None or not all(bases):
            continue
        found = [_drop(row[metric], base, is_higher_better(row, metric)) for base in bases]
        off = [
            _unequal(_where(number, row), "drop_pct", row["drop_pct"], drop, "that of the Teacher's run", 1e-6)
            for drop in found
        ]
        said += off[0] if all(off) and off else []
    return said


def records(found: Mapping[str, Dated], runs: Sequence[Row]) -> list[str]:
    """Returns a sentence for each number of a record that its samples, its run or its row of runs.tsv do not give."""
    names = ("checkpoint_sha256", "train_seed", "eval_seed", "precision", "backend")
    rows = {tuple(row[name] for name in names): row for row in runs}
    said: list[str] = []
    for name, dated in found.items():
        record = dated.record
        run = [other.record for other in found.values() if _same_run(other.record, record)]
        said += _sizes(name, record, run)
        said += _quality(name, record, run, rows)
        said += _times(name, dated, run)
    return said


def _same_run(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Returns whether two records were measured together; of schema 1.0, without run_id, whether all else is equal."""
    names = ("exp_id", "train_seed", "eval_seed", "backend", "device", "scenes", "run_id")
    of = ("workload", "eval", "card", "scenes")
    return all(a[name] == b[name] for name in names) and all(
        (a["hashes"] or {}).get(name) == (b["hashes"] or {}).get(name) for name in of
    )


def _teacher(run: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    found = [record for record in run if record["role"] == "teacher" and record["precision"] == "f32"]
    return found[0] if len(found) == 1 else None


def _sizes(name: str, record: Mapping[str, Any], run: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if record["params"] is not None and record["params_M"] is not None:
        yield from _unequal(name, "params_M", record["params_M"], record["params"] / 1e6, "params in millions")
    teacher = _teacher(run)
    if teacher is not None and teacher["size_MB"] and record["size_MB"] and record["size_ratio"] is not None:
        ratio = record["size_MB"] / teacher["size_MB"]
        yield from _unequal(name, "size_ratio", record["size_ratio"], ratio, "size_MB by the Teacher's")


def _quality(
    name: str, record: Mapping[str, Any], run: Sequence[Mapping[str, Any]], rows: Mapping[tuple[Any, ...], Row]
) -> Iterator[str]:
    hashes, metrics, main = record["hashes"] or {}, record["metrics"] or {}, record["main_metric"]
    seeds = (record["train_seed"], record["eval_seed"], record["precision"], record["backend"])
    lowered = record["quantizer"] is not None
    row = rows.get((hashes.get("engine" if lowered else "model"), *seeds))
    for metric, about in metrics.items():
        if row is None or metric not in metrics_of(row) or row.get(metric) is None or about["value"] is None:
            continue
        yield from _unequal(name, metric, about["value"], row[metric], f"that of its run in {row['file']}")
    teacher = _teacher(run)
    base = None if teacher is None else (teacher["metrics"] or {}).get(main, {}).get("value")
    mine, drop = metrics.get(main, {}), record["quality_drop_pct"]
    if base and mine.get("value") is not None and drop is not None and record["quality_reference"] == "ground_truth":
        higher = mine["better"] == "higher"
        yield from _unequal(
            name, "quality_drop_pct", drop, _drop(mine["value"], base, higher), "that of the Teacher's record", 1e-6
        )


def _times(name: str, dated: Dated, run: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    record = dated.record
    samples = record["samples"] or {}
    own = samples.get("pair")
    if not own or min(map(min, filter(None, samples.values()))) <= 0:
        return
    medians = {"t_pair_p50_ms": "pair", "t_pair_device_p50_ms": "device"}
    medians |= {f"t_{graph}_p50_ms": graph for graph in samples if graph not in ("pair", "device")}
    for column, of in medians.items():
        if record.get(column) is not None and samples.get(of):
            yield from _off(name, column, record[column], percentile(samples[of], 50), _ROUNDED_MS)
    if record["t_pair_p95_ms"] is not None:
        yield from _off(name, "t_pair_p95_ms", record["t_pair_p95_ms"], percentile(own, 95), _ROUNDED_MS)
    if record["pairs_per_sec"] is not None:
        rate = 1000 * len(own) / sum(own)
        yield from _off(name, "pairs_per_sec", record["pairs_per_sec"], rate, rate * _ROUNDED_MS / min(own))
    intervals = record["intervals"] or {}
    if "t_pair_p50_ms" in intervals and (ends := median_interval(own).ends()) is not None:
        yield from _ends(name, "t_pair_p50_ms", intervals, ends, _ROUNDED_MS)
    for column, base in _bases(record, run).items():
        other = (base["samples"] or {}).get("pair") if base is not None else None
        if record[column] is None or not other or len(other) != len(own) or min(other) <= 0 or base is record:
            continue
        found = speedup(other, own)
        slack = found.value * 2 * _ROUNDED_MS / min(*own, *other)
        ratio = percentile(other, 50) / percentile(own, 50)
        if dated.is_old and abs(record[column] - ratio) <= slack:
            continue
        yield from _off(name, column, record[column], found.value, slack)
        if column in intervals and (ends := found.ends()) is not None:
            yield from _ends(name, column, intervals, ends, slack)


def _bases(record: Mapping[str, Any], run: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any] | None]:
    """Returns the row that each speed of a record refers to: None where the deliverable does not hold it."""
    model = (record["hashes"] or {}).get("model")
    floats = {
        other["precision"]: other
        for other in run
        if other["quantizer"] is None and (other["hashes"] or {}).get("model") == model
    }
    return {
        "speedup_vs_teacher_f32": _teacher(run),
        "speedup_vs_own_f32": floats.get("f32"),
        "speedup_vs_best_float": floats.get(record["best_float"]),
    }


def summary(lines: Sequence[Row], rows: Sequence[Row], complete: bool) -> list[str]:
    """Returns a sentence for each mean and deviation that the runs do not give, and each line that is not there.

    rows: of `raw_rows`. complete: no run is missing; else a line of another number of runs is passed over, as that was
    said already.
    """
    said = []
    for line in lines:
        own = [row for row in rows if _belongs(row, line)]
        if line["scope"] == "pooled":
            own = list({identity(row): row for row in own}.values())
        where = f"{SUMMARY_FILE}, {label(line)}"
        if line["n"] != len(own):
            said += [f"{where}: n is {line['n']}, runs.tsv has {len(own)}"] if complete else []
            continue
        for name in [name.removesuffix("_mean") for name in line if name.endswith("_mean")]:
            values = [row[name] for row in own if row.get(name) is not None]
            found = stat(values) if values and len(values) == len(own) else None
            for part in ("mean", "std"):
                value, again = line.get(f"{name}_{part}"), getattr(found, part, None)
                if (value is None) != (again is None):
                    said.append(f"{where}: {name}_{part} is {value}, its runs give {again}")
                elif value is not None and again is not None:
                    said += _unequal(where, f"{name}_{part}", value, again, "that of its runs")
    have = {(line["file"], line["train_seed"]) for line in lines if line["scope"] == "train_seed"}
    lacking = sorted({(row["file"], row["train_seed"]) for row in rows} - have)
    return said + [f"{SUMMARY_FILE} lacks a line of {file}, train seed {seed}" for file, seed in lacking]


def _belongs(row: Row, line: Row) -> bool:
    same = all(row[name] == line[name] for name in VARIANT)
    return (
        same
        and (line["scope"] == "pooled" or row["file"] == line["file"])
        and (line["scope"] != "train_seed" or row["train_seed"] == line["train_seed"])
    )


def readme(path: Path, lines: Sequence[Row]) -> list[str]:
    """Returns a sentence for each line of the summary that the table of README.md lacks, or has with other numbers."""
    text = _text(path)
    table = {row[0]: row for row in _markdown_rows(text)}
    head = table.get("runs")
    if head is None:
        return []  # such as one that was written by hand
    said = []
    for line in telling(lines):
        name = markdown_cell(label(line))
        row = table.get(name)
        if row is None or len(row) != len(head):
            said.append(f"README.md lacks the line {name}")
            continue
        want = [str(line["n"]), *(mean_std(line, cell.partition(",")[0]) for cell in head[2:])]
        said += [
            f"README.md, {name}: {what} is {have}, {SUMMARY_FILE} gives {again}"
            for what, have, again in zip(head[1:], row[1:], want, strict=True)
            if have != again
        ]
    return said


def ablations(folder: Path) -> list[str]:
    """Returns a sentence for each number of a table in Markdown that is no rounding of one in its .csv."""
    said = []
    for path in matching(folder, "*.csv"):
        page = path.with_suffix(".md")
        if not page.is_file():
            continue
        exact = {row[0]: row[1:] for row in csv.reader(_text(path).splitlines()) if row}
        for point, *cells in _markdown_rows(_text(page))[1:]:
            numbers = [float(cell) for cell in exact.get(point, ()) if _is_number(cell)]
            said += [
                f"{folder.name}/{page.name}, {point}: {cell} is no rounding of a number in {path.name}"
                for cell in cells
                if _is_number(cell) and not any(_rounds_to(number, cell) for number in numbers)
            ]
    return said


def _markdown_rows(text: str) -> list[list[str]]:
    """Returns the cells of the first table of a page, without the line below its head."""
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("|")), len(lines))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return [row for row in rows if row and set("".join(row)) != {"-"}]


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", text) is not None


def _rounds_to(number: float, text: str) -> bool:
    digits = len(text.partition(".")[2])
    return abs(number - float(text)) <= 0.5 * 10.0**-digits * (1 + 1e-6) + 1e-12


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise PqkError(cannot_read(path, error)) from error


def _where(number: int, row: Row) -> str:
    return f"runs.tsv, row {number} ({row['file']}, train seed {row['train_seed']}, eval seed {row['eval_seed']})"


def _drop(own: float, teacher: float, higher: bool) -> float:
    return 100 * (-1 if higher else 1) * (own / teacher - 1)


def _unequal(where: str, name: str, value: float, again: float, what: str, slack: float = 0.0) -> list[str]:
    """Returns a sentence when two numbers differ by more than rounding; slack: absolute difference that may be."""
    if math.isclose(value, again, rel_tol=_EXACT, abs_tol=max(slack, 1e-12)):
        return []
    return [f"{where}: {name} is {value:.10g}, {what} is {again:.10g}"]


def _off(where: str, name: str, value: float, again: float, slack: float) -> list[str]:
    if abs(value - again) <= slack:
        return []
    return [f"{where}: {name} is {value:.8g}, its raw samples give {again:.8g}"]


def _ends(
    where: str, name: str, intervals: Mapping[str, Sequence[float]], again: Sequence[float], slack: float
) -> list[str]:
    pairs = zip(("lower", "upper"), intervals[name], again, strict=True)
    return [
        text for end, value, other in pairs for text in _off(where, f"the {end} end of {name}", value, other, slack)
    ]
