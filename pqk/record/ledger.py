"""Reads and writes the evidence ledger, one TSV row per evaluation of a fixed checkpoint, and its statistics.

A row holds the training that made the checkpoint (train_seed), the draw that it was evaluated on (eval_seed), the
results, and the digests of everything that decides them. Nothing here runs a model; `pqk.study.ledger_eval` makes the
rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pqk.errors import PqkError, nearest
from pqk.files import clear_write_errors, matching, sha256_file
from pqk.locks import lock
from pqk.paths import shown
from pqk.record.schema import columns, names_of_1_0
from pqk.record.tsv import Kind, Row, header_of, read_table, write_table
from pqk.settings.seeds import seeds_text

_BESIDE = {
    "drop_pct": {"unit": "% of the main metric", "better": "lower"},
    "fps": {"unit": "pairs/s", "better": "higher"},
}
"""Columns with a mean and a spread, in addition to the metrics."""

COLUMNS: dict[str, Kind] = {
    "card": "text",  # task card whose settings were laid over the configs
    "train_seed": "int",
    "eval_seed": "int",
    "main_metric": "text",
    "metrics": "text",  # JSON: unit and direction (`better`) of the family's metrics, which are columns in front of it
    "drop_pct": "float",  # loss of main_metric against the Teacher in f32 on the same scenes, percent
    "fps": "float",  # pairs per second, measured; null where it was not
    "pairs": "int",
    "scenes": "text",  # the draw of the eval seed
    "scenes_sha256": "text",
    "checkpoint": "text",
    "checkpoint_sha256": "text",  # of a quantized result: of its graphs, as hashes.engine of a record
    "float_sha256": "text",  # of a quantized result: the float checkpoint that it came from
    "teacher_sha256": "text",  # the Teacher that drop_pct refers to
    "params": "int",
    "backend": "text",
    "quantizer": "text",
    "device": "text",
    "isa": "text",  # instruction sets that the backend uses there
    "cores": "int",
    "precision": "text",
    "lowered": "text",  # of a quantized result: PTQ, QAT or (joint) PQK
    "measured": "text",  # engine or emulated
    "workload_sha256": "text",  # of the inputs, without seeds
    "eval_sha256": "text",  # of how quality is computed
    "config_sha256": "text",  # of how the engine was made
    "code_sha256": "text",  # of the source that scores
    "settings": "text",  # JSON: values laid over the configs
    "commit": "text",
    "datetime": "text",
    "output": "text",  # folder with the scores of each sample
}
"""The columns of every table; each metric has a column too, under its name. The first line of a table lists them."""
_MAY_BE_NULL = (
    *_BESIDE,
    "metrics",
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
LATER = ("metrics",)
"""Columns that tables of older versions do not have."""
REQUIRED = tuple(name for name in COLUMNS if name not in _MAY_BE_NULL)

_METRIC = re.compile(r"[a-z][a-z0-9_]{0,31}")

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
"""Two rows of a recipe's own result that agree in these are the same run, even with different results. A float result,
as after a stop-loss, has no quantizer and counts for every quantizer."""
VARIANT = ("card", "backend", "quantizer", "precision", "device", "isa", "measured", "config_sha256")
"""Columns that runs must share for a mean over them to be meaningful."""
DIGESTS = ("workload_sha256", "eval_sha256")
"""Columns that runs must share to be in one table at all."""


def identity(row: Mapping[str, object]) -> tuple[object, ...]:
    return tuple(row[name] for name in IDENTITY)


Metrics = Mapping[str, Mapping[str, str]]
"""Unit and direction ('better': lower or higher) of metrics by name."""


@lru_cache(maxsize=64)
def _parsed(text: str) -> Metrics:
    try:
        found: Metrics = json.loads(text)
        if all(about["better"] in ("lower", "higher") and isinstance(about["unit"], str) for about in found.values()):
            return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    like = '{"error": {"unit": "m", "better": "lower"}}'
    raise PqkError(f"metrics must be JSON like {like}, not {text[:60]!r}")


def metrics_of(row: Row) -> Metrics:
    """Returns the metrics of the row's family, with unit and direction. Raises PqkError."""
    return _parsed(row["metrics"])


def about(row: Row, name: str) -> Mapping[str, str]:
    """Returns unit and direction of a column of numbers; a statistic of a metric, NAME_p95, has those of NAME."""
    known = {**metrics_of(row), **_BESIDE}
    whole = max((each for each in known if f"{name}_".startswith(f"{each}_")), key=len, default=None)
    return known[whole] if whole is not None else {"unit": "", "better": "lower"}


def is_higher_better(row: Row, name: str) -> bool:
    return about(row, name)["better"] == "higher"


def measured_in(rows: Iterable[Row]) -> list[str]:
    """Returns the columns of these rows with a mean and a spread: metrics and their statistics, drop_pct, fps."""
    return [*dict.fromkeys(name for row in rows for name in row if name not in COLUMNS and name != "file"), *_BESIDE]


def columns_of(rows: Sequence[Row]) -> dict[str, Kind]:
    """Returns the columns of a table of these rows, with those of its metrics behind main_metric."""
    found: dict[str, Kind] = {}
    for name, kind in COLUMNS.items():
        found[name] = kind
        if name == "main_metric":
            found |= dict.fromkeys((each for each in measured_in(rows) if each not in _BESIDE), "float")
    return found


def headline(rows: Sequence[Row]) -> list[str]:
    """Returns those of the following that these rows have: main metric, drop, metrics in the table of records, fps."""
    hidden = {column.name for column in columns() if column.metric and not column.short}
    shown = [name for row in rows for name in metrics_of(row) if name not in hidden]
    names = dict.fromkeys([*(row["main_metric"] for row in rows), "drop_pct", *shown, "fps"])
    return [name for name in names if any(row.get(name) is not None for row in rows)]


def read_runs(path: Path, extra: Mapping[str, Kind] | None = None) -> list[Row]:
    """Returns the rows of a table of runs; rows of older versions get the current names.

    extra: further columns, also required. Any other column is a metric. Raises PqkError as `read_table`.
    """
    names = [name for name in header_of(path) if name not in COLUMNS and name not in (extra or {})]
    columns: dict[str, Kind] = {**(extra or {}), **COLUMNS}
    for name in names:
        if not _METRIC.fullmatch(name):
            raise PqkError(f"{path}:1: unknown column {name[:60]!r}{nearest(name, columns)}")
    rows = read_table(path, {**columns, **dict.fromkeys(names, "float")}, [*(extra or {}), *REQUIRED], LATER)
    for number, row in enumerate(rows, 2):
        if row["metrics"] is None:
            _upgrade(row)
        try:
            metrics_of(row)
        except PqkError as error:
            raise PqkError(f"{path}:{number}: {error}") from None
    return rows


def _upgrade(row: Row) -> None:
    """Adds to a row of an older version its metrics, with units and directions from the schema of records.

    A table from before schema 1.1 has some of them under their former names (`names_of_1_0`).
    """
    known = {column.name: column for column in columns() if column.metric}
    before = {name: was for name, was in names_of_1_0().items() if name in known}
    if any(was in row and name not in row for name, was in before.items()):
        row |= {name: None if was is None else row[was] for name, was in before.items()}
        row["main_metric"] = {was: name for name, was in before.items()}.get(row["main_metric"], row["main_metric"])
    described = {
        name: {"unit": "" if column.unit == "1" else column.unit, "better": column.better}
        for name, column in known.items()
        if name in row
    }
    row["metrics"] = json.dumps(described)


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of one TSV file, checked. Raises PqkError as `read_table` does, and for a run in two lines."""
    rows = read_runs(path)
    seen: dict[tuple[object, ...], int] = {}
    for number, row in enumerate(rows, 2):
        metric = row["main_metric"]
        if metric not in metrics_of(row) or row.get(metric) is None:
            raise PqkError(f"{path}:{number}: main_metric is {metric!r}, and the row has no value of that name")
        first = seen.setdefault(identity(row), number)
        if first != number:
            raise PqkError(f"{path}:{number}: the same run is already in line {first}")
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows in order: by card, engine, train seed, eval seed. Atomic."""
    rows = sorted(rows, key=_order)
    write_table(path, columns_of(rows), rows, REQUIRED)


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*(str(row[name] or "") for name in (*VARIANT, "checkpoint_sha256")), row["train_seed"], row["eval_seed"])


def add_row(path: Path, row: Row, same: Sequence[str] = IDENTITY) -> None:
    """Writes a row into the file, where it replaces an older row of the same run; safe with several processes.

    same: further columns that identify a run: RESULT.
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
    """Locks a folder for one writer at a time. A lock on the folder itself leaves no file behind."""
    with clear_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, folder)
        yield
    finally:
        os.close(handle)


def refuse_mixed(tables: Sequence[tuple[Path, Sequence[Row]]]) -> None:
    """Raises PqkError, naming both files and both digests, when rows differ in workload or evaluation."""
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
    """Returns sum(x) / n and sqrt(sum((x - mean)^2) / (n - 1)), sums correctly rounded. Raises PqkError without any."""
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
    **{name: COLUMNS[name] for name in (*VARIANT, *DIGESTS)},
}
"""The columns of every summary, which also has NAME_mean and NAME_std of each metric."""


def write_summary(path: Path, summary: Sequence[Row]) -> None:
    """Writes a summary, atomically."""
    measured = dict.fromkeys(name for line in summary for name in line if name not in SUMMARY)
    found: dict[str, Kind] = {}
    for name, kind in SUMMARY.items():
        found |= dict.fromkeys(measured, "float") if name == VARIANT[0] else {}
        found[name] = kind
    write_table(path, found, summary)


def read_results(folder: Path) -> list[tuple[Path, list[Row]]]:
    """Reads all ledgers (`*.tsv`) of a folder, by name. Raises PqkError for none, or some that must not be mixed."""
    if not folder.is_dir():
        raise PqkError(f"no folder {folder}; pqk ledger eval writes results into one")
    files = [path for path in matching(folder, "*.tsv") if not path.name.startswith(".")]
    tables = [(path, read_rows(path)) for path in files]
    if not any(rows for _, rows in tables):
        raise PqkError(f"{folder} holds no results (*.tsv); make some with pqk ledger eval")
    refuse_mixed(tables)
    return tables


def summarise_files(tables: Sequence[tuple[Path, Sequence[Row]]]) -> tuple[list[Row], list[str]]:
    """Returns mean and std per file and train seed, per file, over a variant's files; and why some were not pooled.

    A variant in only one file gets no pooled line: it would equal the file's. A run in several files counts once.
    Raises PqkError when a file holds two checkpoints for the same seeds of a variant, as a mean over both would be
    meaningless.
    """
    summary: list[Row] = []
    notes: list[str] = []
    everywhere: dict[tuple[object, ...], dict[Path, list[Row]]] = {}
    for path, rows in tables:
        for variant, own in grouped(rows, VARIANT).items():
            everywhere.setdefault(variant, {})[path] = own
            clash = _clash(own)
            if clash:
                raise PqkError(f"{shown(path)}: {clash}; give each recipe a file of its own")
            digest = sha256_file(path)
            by_seed = grouped(own, ("train_seed",))
            parts = [("train_seed", same) for same in by_seed.values()] + [("file", own)]
            summary += [line_of(scope, part) | {"file": path.name, "file_sha256": digest} for scope, part in parts]
    for files in everywhere.values():
        if len(files) < 2:
            continue
        unique = {identity(row): row for rows in files.values() for row in rows}
        clash = _clash(list(unique.values()))
        if clash:
            notes.append(f"not pooled: {', '.join(path.name for path in files)}: {clash}")
        else:
            summary.append(line_of("pooled", list(unique.values())))
    return summary, notes


def telling(summary: Sequence[Row]) -> list[Row]:
    """Returns a summary without lines of whole files that have one train seed: they repeat the line of that seed."""
    names = ("file", *VARIANT)
    alone = {tuple(line[name] for name in (*names, "n")) for line in summary if line["scope"] == "train_seed"}
    return [
        line for line in summary if line["scope"] != "file" or tuple(line[name] for name in (*names, "n")) not in alone
    ]


def grouped(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[object, ...], list[Row]]:
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _clash(rows: Sequence[Row]) -> str:
    """Returns why one mean over these rows would be wrong; '' when it is fine."""
    for seeds, same in grouped(rows, ("train_seed", "eval_seed")).items():
        if len(same) > 1:
            names = " and ".join(sorted(f"{row['checkpoint']} ({row['checkpoint_sha256'][:8]})" for row in same)[:2])
            return f"train seed {seeds[0]}, eval seed {seeds[1]} has two checkpoints: {names}"
    return ""


def line_of(scope: str, rows: Sequence[Row]) -> Row:
    """Returns mean and sample standard deviation of every metric over the runs of one variant."""
    shared = {name: rows[0][name] for name in (*VARIANT, *DIGESTS)}
    line: Row = dict.fromkeys(SUMMARY) | shared | {"scope": scope, "n": len(rows)}
    line["train_seed"] = rows[0]["train_seed"] if scope == "train_seed" else None
    line["eval_seeds"] = seeds_text({row["eval_seed"] for row in rows})
    line["checkpoints"] = len({row["checkpoint_sha256"] for row in rows})
    for name in measured_in(rows):
        values = [row[name] for row in rows if row.get(name) is not None]
        # no mean over only some of the runs: it would look like one over all
        found = stat(values) if len(values) == len(rows) else None
        line |= {f"{name}_mean": found and found.mean, f"{name}_std": found and found.std}
    return line
