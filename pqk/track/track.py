"""Sends the records of a run to experiment trackers, `track`; what a tracker must offer is `Tracker`.

The records in logs/ are the results: they are written before, and a tracker that fails costs a warning, nothing else.
A tracker is a module of this room with `check` and `log`; its library is imported when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from pqk.errors import NotBuilt, PqkError, first_line, nearest
from pqk.record.log import record_filename
from pqk.record.schema import columns

Record = Mapping[str, Any]

_MODULES = {"mlflow": "mlflow_tracker", "trackio": "trackio_tracker"}
_NUMBERS = ("quality", "efficiency", "resources", "edge")  # groups of the schema that are measured
_NAMES = ("identity", "method")
_MORE = (
    "verdict",
    "quality_reference",
    "measured",
    "best_float",
    "workload_version",
    "eval_version",
    "commit",
    "run_id",
)


@dataclass(frozen=True)
class Tracked:
    """A record as a tracker takes it. Nothing here is null: what was not measured is left out.

    name: of the record. group: shared by the records of one `pqk run`. params: what it was made from and how. metrics:
    every measured number, with NAME_low and NAME_high, its 95 % interval. files: the record and the reports of the run.
    """

    name: str
    group: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    files: Sequence[Path]


class Tracker(Protocol):
    """A tracker, opened for a place; see `open_tracker`."""

    def check(self) -> None:
        """Raises ImportError when the library is missing, PqkError for a place that it cannot use. Writes nothing."""

    def log(self, run: Tracked) -> str:
        """Writes a run, whole, and returns where it is. May raise anything."""


def open_tracker(asked: str, root: Path) -> Tracker:
    """Returns the tracker of `mlflow`, `mlflow:URI`, `trackio` or `trackio:PROJECT`, checked but with nothing written.

    Without a place, results go to outputs/ of the project. Raises PqkError for an unknown one, NotBuilt without its
    library.
    """
    name, _, place = asked.partition(":")
    if name not in _MODULES:
        raise PqkError(f"--track {asked}: a tracker is one of {', '.join(_MODULES)}{nearest(name, _MODULES)}")
    tracker: Tracker = import_module(f"pqk.track.{_MODULES[name]}").Tracker(place, root)
    try:
        tracker.check()
    except ImportError as error:
        raise NotBuilt(
            f"--track {name} needs {first_line(error).removeprefix('No module named ')}: pip install 'pqk[{name}]'"
        ) from None
    return tracker


def tracked(record: Record, files: Sequence[Path]) -> Tracked:
    """Returns what a tracker gets of a record."""
    known = columns()
    own = {column.name: record[column.name] for column in known}
    shown = [column.name for column in known if column.group in _NAMES] + list(_MORE)
    params = {name: _text(own[name]) for name in shown if own[name] is not None}
    params = {name: text for name, text in params.items() if text}
    params |= {f"hash_{name}": digest for name, digest in (record["hashes"] or {}).items()}
    numbers = {column.name: own[column.name] for column in known if column.group in _NUMBERS}
    numbers |= {name: about["value"] for name, about in (record["metrics"] or {}).items()}
    for name, ends in (record["intervals"] or {}).items():
        numbers |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
    numbers |= {f"executed_{name}": share for name, share in (record["executed_precision"] or {}).items()}
    measured = {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}
    name = record_filename(dict(record)).removesuffix(".json")
    return Tracked(name, record["run_id"] or name, params, measured, files)


def track(
    trackers: Mapping[str, Tracker],
    records: Iterable[Record],
    root: Path,
    say: Callable[[str], None],
    reports: Sequence[Path] = (),
) -> None:
    """Sends records that are in logs/ already to every tracker. Never raises: a failure is a warning.

    trackers: by what was asked for. reports: further files of the run, beside each record's own.
    """
    runs = []
    for record in records:
        file = root / "logs" / record_filename(dict(record))
        runs.append(tracked(record, [path for path in (file, *reports) if path.is_file()]))
    for name, tracker in trackers.items():
        try:
            places = [tracker.log(run) for run in runs]
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            say(f"warning: {name} did not take all records ({why}); those in logs/ are complete")
            continue
        say(f"{len(runs)} records in {name}" + (f": {places[-1]}" if places else ""))


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def safe_key(name: str) -> str:
    """Returns a name that every tracker takes: letters, digits, '_', '-', '.', ' ' and '/' stay, others become '_'."""
    return re.sub(r"[^\w\-. /]", "_", name)
