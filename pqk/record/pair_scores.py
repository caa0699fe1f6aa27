"""Reads the scores of every sample of a row of the ledger, from store or deliverable, and pairs them: `paired`.

A row names the folder of its scores (`output`); a deliverable keeps them as scores/NAME.tsv, NAME being the last part
of that folder, which is the hash of all their inputs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pqk import paths
from pqk.errors import PqkError
from pqk.files import matching
from pqk.oserrors import cannot_read
from pqk.record.tsv import Kind, Row, header_of, read_table, table_text

SCORES = "scores"
_FILE = "quality.json"
_PLACE = ("group", "sample")
_PAIR = ("scene", "first", "second")  # of scores that were kept before samples had one name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")

Scores = Callable[[Row], list[Row] | None]
"""Returns the scores of a row's samples: group (its place in the draw), sample (its name), and each metric. None where
they are missing, or are not those that the row was computed from."""


def scores_here(root: Path) -> Scores:
    """Returns a function that finds scores in the project's store or, if they were deleted there, in a deliverable."""
    deliverables = [path for path in matching(root / "deliverables", "*") if (path / SCORES).is_dir()]

    def find(row: Row) -> list[Row] | None:
        found = _stored(row, root)
        for folder in [] if found is not None else deliverables:
            found = found if found is not None else scores_in(folder)(row)
        return found

    return find


def scores_in(deliverable: Path) -> Scores:
    """Returns a function that finds scores in a deliverable."""

    def find(row: Row) -> list[Row] | None:
        samples = samples_in(deliverable, row)
        return None if samples is None else _checked(row, samples, deliverable / str(scores_name(row)))

    return find


def samples_in(deliverable: Path, row: Row) -> list[Row] | None:
    """Returns the scores that a deliverable has under a row's name, whether or not they give the row's numbers."""
    name = scores_name(row)
    path = None if name is None else deliverable / name
    return None if path is None or not path.is_file() else _read(path)


def files_of(rows: Sequence[Row], root: Path) -> tuple[dict[str, bytes], list[str]]:
    """Returns the scores of rows as files of a deliverable, by relative name, and a sentence if some are missing."""
    files: dict[str, bytes] = {}
    find, gone = scores_here(root), 0
    for row in rows:
        name = scores_name(row)
        found = find(row) if name is not None else None
        if name is None or found is None:
            gone += 1
        elif name not in files:
            metrics = [key for key in found[0] if key not in _PLACE]
            columns: dict[str, Kind] = {**dict.fromkeys(_PLACE, "text"), **dict.fromkeys(metrics, "float")}
            files[name] = table_text(columns, found, name).encode()
    if not gone:
        return files, []
    return files, [
        f"scores per sample of {gone} of {len(rows)} runs are not in outputs/store, or have another mean than the row: "
        "the deliverable lacks them, and its intervals are wider; evaluate these runs again (pqk ledger eval -o NEW)"
    ]


def paired(runs: Sequence[Sequence[Row]], metric: str, scores: Scores) -> tuple[list[list[float]], list[str]] | None:
    """Returns a metric of the same samples in each of several evaluations, and the group of each sample.

    runs: for each draw of scenes the rows that were evaluated on it. Halves of a list are left out: the draw of the
    whole list has all their scenes. None where scores are missing, or are of different samples, or nothing is left.
    """
    runs = [rows for rows in runs if not rows[0]["scenes"].startswith("half")]
    values: list[list[float]] = []
    scenes: list[str] = []
    for rows in runs:
        tables: list[dict[tuple[str, ...], float]] = []
        for row in rows:
            found = scores(row)
            if found is None or any(one.get(metric) is None for one in found):
                return None
            tables.append({tuple(one[name] for name in _PLACE): one[metric] for one in found})
        if any(table.keys() != tables[0].keys() for table in tables):
            return None
        values = values or [[] for _ in rows]
        for own, table in zip(values, tables, strict=True):
            own += [table[key] for key in tables[0]]
        scenes += [f"{rows[0]['scenes_sha256']}/{key[0]}" for key in tables[0]]
    return (values, scenes) if values else None


def scores_name(row: Mapping[str, Any]) -> str | None:
    """Returns the name of a row's scores in a deliverable; None where the row names none."""
    name = Path(row["output"] or "").name
    return f"{SCORES}/{name}.tsv" if _NAME.fullmatch(name) else None


def _stored(row: Row, root: Path) -> list[Row] | None:
    """Reads the scores that a row names in the project's store, and nowhere else."""
    store = paths.store(root).resolve()
    try:
        folder = (root / (row["output"] or "")).resolve()
    except (ValueError, OSError, RuntimeError):  # a null character, a loop of links
        return None
    path = folder / _FILE
    if not folder.is_relative_to(store) or not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        samples = stored["pairs"] if "pairs" in stored else stored["samples"]
    except OSError as error:
        raise PqkError(cannot_read(path, error)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PqkError(f"{path} holds no scores of samples") from error
    return _checked(row, samples, path)


def _read(path: Path) -> list[Row]:
    names = header_of(path)
    place = _PAIR if _PAIR[0] in names else _PLACE
    return read_table(path, {name: "text" if name in place else "float" for name in (*place, *names)}, place)


def _checked(row: Row, samples: Any, path: Path) -> list[Row] | None:
    """Returns the samples when their number and mean are those of the row; else None, as they belong to another row.

    Raises PqkError for data without scores.
    """
    metric, where = row["main_metric"], paths.shown(path)
    if not isinstance(samples, list) or not all(isinstance(one, dict) and _placed(one) for one in samples):
        raise PqkError(f"{where} holds no scores of samples")
    values = [one.get(metric) for one in samples]
    if not samples or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise PqkError(f"{where}: not every sample has a {metric}")
    mean = math.fsum(values) / len(values)
    if len(samples) != row["pairs"] or not math.isclose(mean, row[metric], rel_tol=1e-9):
        return None
    return [_named(one) for one in samples]


def _placed(sample: Mapping[str, Any]) -> bool:
    return set(_PLACE) <= set(sample) or set(_PAIR) <= set(sample)


def _named(sample: Mapping[str, Any]) -> Row:
    """Returns a sample with group, name and metrics; for a pair that was kept by its two images, the name has both.

    What is no number is not for a table: a metric of the whole set is computed from it (`ScoringPart.complete`).
    """
    if _PLACE[0] in sample:
        place = {name: str(sample[name]) for name in _PLACE}
    else:
        place = {"group": str(sample["scene"]), "sample": f"{sample['first']}, {sample['second']}"}
    metrics = {name: value for name, value in sample.items() if name not in (*_PLACE, *_PAIR)}
    return {**place, **{name: value for name, value in metrics.items() if isinstance(value, int | float | None)}}
