"""Checks a deliverable against itself, without a model and offline: `verify`.

| rule | what must hold |
| --- | --- |
| file | every file has the sha256 of `manifest.tsv`, none is missing and none was added; so do the checkpoints' names |
| number | every number follows from what it was computed from (`pqk.record.follows`) |
| seed | every train seed has every eval seed: of its file and engine, of `summary.tsv`, and of `plan.json` |
| record | every record, table and plan can be read and follows its schema |

A number that was edited is found even where `manifest.tsv` was written anew after it. What a deliverable does not hold,
such as scores of samples, is not checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pqk.errors import EXIT_FILE_CHANGED, EXIT_NUMBER_WRONG, EXIT_RECORD_INVALID, EXIT_SEED_MISSING, PqkError
from pqk.files import matching
from pqk.record import follows
from pqk.record.deliverable import MANIFEST, RUNS, changed_files, unlisted_checkpoints
from pqk.record.ledger import VARIANT, grouped, read_runs
from pqk.record.log import read_records
from pqk.record.schema import Contradiction
from pqk.record.tsv import Row
from pqk.settings.seeds import parse_seeds

RULES = {
    "record": EXIT_RECORD_INVALID,
    "seed": EXIT_SEED_MISSING,
    "number": EXIT_NUMBER_WRONG,
    "file": EXIT_FILE_CHANGED,
}
"""Exit codes by rule. The first broken one decides: it says more than a sha256 does of the same change."""

_MEASURED = ("done", "failed", "undecided")  # statuses of a planned run that has a result

Found = TypeVar("Found")


@dataclass(frozen=True)
class Fault:
    """What is wrong, as one sentence, and the rule that it breaks."""

    rule: str
    sentence: str


@dataclass
class Verified:
    """The faults, most telling rule first, and how much was read: runs, those with scores of samples, and records."""

    faults: list[Fault] = field(default_factory=list)
    files: int = 0
    runs: int = 0
    scored: int = 0
    records: int = 0

    @property
    def exit_code(self) -> int:
        """Returns 0, or the code of the most telling rule that is broken."""
        return RULES[self.faults[0].rule] if self.faults else 0


def verify(folder: Path) -> Verified:
    """Checks a deliverable by all rules. Raises PqkError when the folder is no deliverable."""
    found = Verified()

    def fault(rule: str, sentences: Sequence[str]) -> None:
        found.faults += [Fault(rule, sentence) for sentence in sentences]

    changed, stated = _changed(folder)
    found.files = sum(row["kind"] == "file" for row in stated)

    def read(name: str, work: Callable[[], Found]) -> Found | None:
        """Returns what was read; None for a file that is not there or damaged, which its sha256 may tell already."""
        if not (folder / name).is_file():
            return None
        try:
            return work()
        except Contradiction as error:
            fault("number", [_short(error, folder)])
        except PqkError as error:
            if name not in changed or _is_json(folder / name):
                fault("record", [_short(error, folder)])
        return None

    runs = read(RUNS, lambda: read_runs(folder / RUNS, {"file": "text"})) or []
    raw = read(RUNS, lambda: follows.raw_rows(folder / RUNS)) if runs else None
    summary = read(follows.SUMMARY_FILE, lambda: follows.read_summary(folder / follows.SUMMARY_FILE))
    plan = read("plan.json", lambda: _plan(folder / "plan.json"))
    records: dict[str, follows.Dated] = {}
    for path in matching(folder / "records", "*.json"):
        name = f"records/{path.name}"
        records |= read(name, lambda path=path, name=name: _dated(path, name)) or {}  # type: ignore[misc]
    found.runs, found.records = len(runs), len(records)

    missing = _holes(runs, summary or [], plan, records)
    fault("seed", missing)
    found.scored, wrong, unread = follows.scores_of(folder, runs)
    fault("number", wrong)
    fault("record", [_short(error, folder) for name, error in unread.items() if name not in changed])
    fault("number", follows.records(records, runs))
    fault("number", follows.drops(runs))
    if summary is not None and raw is not None:
        fault("number", follows.summary(summary, raw, complete=not missing))
        fault("number", follows.readme(folder / "README.md", summary))
    fault("number", follows.ablations(folder / "ablation"))
    fault("file", [*changed.values(), *(unlisted_checkpoints(stated, runs) if stated and runs else ())])
    found.faults.sort(key=lambda one: list(RULES).index(one.rule))
    return found


def _changed(folder: Path) -> tuple[dict[str, str], list[Row]]:
    """Returns the changed files and the manifest; a manifest that cannot be read is a changed file."""
    if not (folder / MANIFEST).is_file():
        raise PqkError(f"{folder} is not a deliverable: it has no {MANIFEST}")
    try:
        return changed_files(folder)
    except PqkError as error:
        return {MANIFEST: _short(error, folder)}, []


def _dated(path: Path, name: str) -> dict[str, follows.Dated]:
    """Returns the records of a file, by its name and for further ones a number. Raises PqkError."""
    read = read_records(path)
    raw = json.loads(path.read_bytes())
    versions = [str(item["schema_version"]) for item in (raw if isinstance(raw, list) else [raw])]
    if not read:
        raise PqkError(f"{path} holds no record")
    return {
        name if number == 0 else f"{name}, record {number + 1}": follows.Dated(item.record, version)
        for number, (item, version) in enumerate(zip(read, versions, strict=True))
    }


def _short(error: PqkError, folder: Path) -> str:
    """Returns an error whose files are named relative to the deliverable."""
    return str(error).replace(f"{folder}/", "")


def _is_json(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def _plan(path: Path) -> dict[str, Any]:
    """Reads plan.json as `pqk.study.campaign` wrote it. Raises PqkError."""
    try:
        plan = json.loads(path.read_bytes())
        for row in plan["rows"]:
            if not isinstance(row["id"], str) or not all(isinstance(seed, int) for seed in row["eval_seeds"]):
                raise ValueError("a row needs an id and eval_seeds")
            row["card"], row["train_seed"], row["candidate"], row["status"], row["matrix"]
        str(plan["backend"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PqkError(f"{path} is no plan of a campaign: {error!r}") from error
    return dict(plan)


def _holes(
    runs: Sequence[Row], summary: Sequence[Row], plan: Mapping[str, Any] | None, records: Mapping[str, Any]
) -> list[str]:
    """Returns a sentence for every run that is not there, and that the summary, the plan or another train seed has."""
    if not runs:
        return []
    have = {(row["file"], row["train_seed"], row["eval_seed"]) for row in runs}
    wanted: dict[tuple[str, int, int], str] = {}
    for (file, *_), rows in grouped(runs, ("file", *VARIANT)).items():
        evals = {row["eval_seed"] for row in rows}
        for train in {row["train_seed"] for row in rows}:
            for seed in evals:
                wanted.setdefault((str(file), train, seed), "which other train seeds of it have")
    for line in summary:
        if line["scope"] == "train_seed":
            for seed in parse_seeds(line["eval_seeds"]):
                wanted.setdefault((line["file"], line["train_seed"], seed), "which summary.tsv counts")
    for row in (plan or {}).get("rows", ()):
        if row["status"] in _MEASURED and not row["matrix"]:
            wanted |= {
                key: "which plan.json has as run" for key in _planned(row, runs, plan or {}) if key not in wanted
            }
    said = [
        f"{RUNS} lacks train seed {train}, eval seed {seed} of {file}, {why}"
        for (file, train, seed), why in sorted(wanted.items())
        if (file, train, seed) not in have
    ]
    return said + [
        f"{row['candidate']} is missing, which plan.json names as the result of {row['id']}"
        for row in (plan or {}).get("rows", ())
        if row["candidate"] is not None and row["candidate"] not in records
    ]


def _planned(row: Mapping[str, Any], runs: Sequence[Row], plan: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Returns file, train seed and eval seed of the evaluations of a planned run that was made.

    The Teacher has the train seed of its own card: that of the first run in its file.
    """
    file = f"{row['card'] or row['id']}.{plan['backend']}.tsv"
    train = row["train_seed"]
    if train is None:
        train = next((run["train_seed"] for run in runs if run["file"] == file), 0)
    return [(file, train, seed) for seed in row["eval_seeds"]]
