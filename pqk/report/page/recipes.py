"""Collects the recipes of a campaign, with planned runs, records and evaluations of each: `recipes_of`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pqk.record.ledger import Stat, stat
from pqk.record.pair_scores import Scores
from pqk.record.tsv import Row
from pqk.report.cells import value_of
from pqk.report.drops import Drop, drop_of, drop_of_record
from pqk.stats.intervals import Interval

Record = dict[str, Any]
ONE_RUN_S = 300
"""For records without run_id, as in schema 1.0: the records of one run were written within this time, so a Teacher's
record further away is from another timing."""


@dataclass(frozen=True)
class Recipe:
    """A card in one precision: its planned runs, the records of their candidates, and its evaluations.

    runs: (planned run, candidate's record, the Teacher's f32 record of the same run or None), by train seed.
    teachers: evaluations of the Teacher in f32. scores: finds the scores of the pairs of an evaluation.
    """

    card: str
    combo: str
    precision: str
    planned: list[dict[str, Any]]
    runs: list[tuple[dict[str, Any], Record, Record | None]]
    rows: list[Row]
    teachers: list[Row]
    scores: Scores

    def over_runs(self, name: str) -> Stat | None:
        """Returns mean and std of a column over the evaluations; None where one of them lacks it."""
        return mean_of([row.get(name) for row in self.rows])

    def over_records(self, name: str) -> Stat | None:
        """Returns mean and std of a column over the train seeds; None where one of them lacks it."""
        return mean_of([value_of(record, name) for _, record, _ in self.runs])

    def ratios(self, name: str) -> Stat | None:
        """Returns candidate over Teacher, within each run."""
        return mean_of([record[name] / base[name] if base and base[name] and record[name] else None
                      for _, record, base in self.runs])  # fmt: skip

    @property
    def drop(self) -> Drop | None:
        """Returns the drop over the evaluations in the ledger; without any, the drop of the records."""
        if self.rows:
            return drop_of(self.rows, self.teachers, self.scores)
        if len(self.runs) == 1:
            return drop_of_record(self.runs[0][1])
        found = self.over_records("quality_drop_pct")
        return None if found is None else Drop(Interval(found.mean, None, None, found.n), "records")

    def drop_of_run(self, run: dict[str, Any], record: Record | None) -> Drop | None:
        """Returns the drop over the evaluations of one train seed; without any, the drop of its record."""
        own = [row for row in self.rows if row["train_seed"] == run["train_seed"]]
        if own:
            return drop_of(own, self.teachers, self.scores)
        return None if record is None else drop_of_record(record)

    @property
    def int8_share(self) -> Stat | None:
        return mean_of([(record["executed_precision"] or {}).get("int8") for _, record, _ in self.runs])


def mean_of(values: Sequence[float | None]) -> Stat | None:
    """Returns mean and std of the values; None where one of them is unknown, or there is none."""
    known = [value for value in values if value is not None]
    return stat(known) if known and len(known) == len(values) else None


def recipes_of(plan: dict[str, Any], records: dict[str, Record], rows: Sequence[Row], scores: Scores) -> list[Recipe]:
    """Returns the measured recipes of a plan, in its order.

    A recipe whose train seeds ended in different precisions, as after a stop-loss, is split by precision; a recipe made
    by several quantizers is split by quantizer.
    """
    found = []
    teachers = {record["hashes"]["model"] for record in records.values() if record["role"] == "teacher"}
    teachers |= {row["teacher_sha256"] for row in rows}
    taught = [row for row in rows if row["checkpoint_sha256"] in teachers and row["precision"] == "f32"]
    taught = [row for row in taught if row["backend"] == plan["backend"] and row["settings"] is None]
    for card in dict.fromkeys(run["card"] for run in plan["rows"] if run["card"] and not run["matrix"]):
        planned = [run for run in plan["rows"] if run["card"] == card]
        runs = [(run, records[run["candidate"]], _teacher(run, records)) for run in planned if run["candidate"]]
        seeds = {(run["train_seed"], seed) for run in planned for seed in run["eval_seeds"]}
        own = [
            row
            for row in rows
            if row["card"] == card
            and row["backend"] == plan["backend"]
            and row["teacher_sha256"] is not None  # a recipe's own result, and no other checkpoint
            and (row["train_seed"], row["eval_seed"]) in seeds
            and row["settings"] is None  # the card without changes
        ]
        kinds = [(found["precision"], found["quantizer"]) for found in (*(record for _, record, _ in runs), *own)]
        for kind in dict.fromkeys(kinds):
            chosen = [run for run in runs if (run[1]["precision"], run[1]["quantizer"]) == kind]
            evaluated = [row for row in own if (row["precision"], row["quantizer"]) == kind]
            several = len({precision for precision, _ in kinds}) < len(set(kinds))
            precision = f"{kind[0]} {kind[1]}" if several and kind[1] else kind[0]
            found.append(Recipe(card, planned[0]["combo"], precision, planned, chosen, evaluated, taught, scores))
    return found


def _teacher(run: dict[str, Any], records: dict[str, Record]) -> Record | None:
    """Returns the Teacher's f32 record of the same run, which has its run_id; None where there is none.

    A candidate without run_id is paired by date with a Teacher without one; a note on the page states this.
    """
    mine = records[run["candidate"]]
    teachers = [records[path] for path in run["teachers"] if records[path]["precision"] == "f32"]
    same = (record for record in teachers if record["run_id"] == mine["run_id"])
    if mine["run_id"] is not None:
        return next(same, None)
    return next((record for record in same if abs(_time(record) - _time(mine)) < ONE_RUN_S), None)


def _time(record: Record) -> float:
    return datetime.fromisoformat(record["datetime"].replace("Z", "+00:00")).timestamp()
