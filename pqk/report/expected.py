"""Makes ranges of what a preset gives from the records of measured runs, `ranges_of`, and shows them beside a new run.

The range of a speed goes from the lowest to the highest end of its 95 % intervals over all runs. A metric and a ratio
of sizes go from their lowest to their highest value, widened by MARGIN_PCT of it, and a drop by as many points: all
runs have the same samples, so these numbers repeat but for the rounding of another machine of the same instruction
set. The interval of a drop is no range for them, as it says how other samples would differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from pqk.errors import PqkError
from pqk.report.cells import Record, columns_of, interval_of, value_of
from pqk.settings.preset import Expected, Range

if TYPE_CHECKING:
    from rich.console import Console

MARGIN_PCT = 1.0
SPEEDS = ("speedup_vs_own_f32", "speedup_vs_best_float")
COLUMNS = ("quality_drop_pct", *SPEEDS, "size_ratio")
"""Columns with a range, beside the main metric. Milliseconds have none: they are the machine's."""


@dataclass(frozen=True)
class Compared:
    """A range and what was measured; value: None where it was not."""

    expected: Range
    value: float | None

    @property
    def inside(self) -> bool | None:
        """Returns whether the value lies in the range; None where nothing was measured."""
        return None if self.value is None else self.expected.low <= self.value <= self.expected.high


def key_of(record: Record) -> dict[str, str]:
    """Returns what an expected range is for: card, backend, instruction set, and digests of Teacher and configs.

    Raises PqkError for a record that lacks one of them.
    """
    hashes = record["hashes"] or {}
    found = {
        "card": record["exp_id"],
        "backend": record["backend"],
        "isa": (record["machine"] or {}).get("isa"),
        "teacher_sha256": hashes.get("teacher") or hashes.get("model"),
        "workload_sha256": hashes.get("workload"),
        "eval_sha256": hashes.get("eval"),
    }
    lacking = [name for name, value in found.items() if not isinstance(value, str)]
    if lacking:
        raise PqkError(f"a record of {record['exp_id']} says nothing of {', '.join(lacking)}, so no range can be made")
    return {name: str(value) for name, value in found.items()}


def ranges_of(runs: Sequence[Sequence[Record]]) -> Expected:
    """Returns the ranges of several runs of one card with one preset. runs: the records of each.

    Raises PqkError for none, for runs of unlike cards, configs, Teachers or instruction sets, and without a number.
    """
    if not runs or not all(runs):
        raise PqkError("there is no run to take ranges from")
    last = max((record for run in runs for record in run), key=lambda record: record["datetime"])
    keys = [key_of(record) for run in runs for record in run]
    for name in keys[0]:
        if len({key[name] for key in keys}) > 1:
            raise PqkError(f"ranges are made from runs that are alike, and these differ in {name}")
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for run in runs:
        for record in run:
            for column in dict.fromkeys((record["main_metric"], *COLUMNS)):
                ends = _ends(record, column)
                if ends is not None:
                    found.setdefault((record["role"], record["precision"], column), []).append(ends)
    if not found:
        raise PqkError("these runs measured nothing that a range is made of")
    ranges = [
        Range(
            role=role,  # type: ignore[arg-type]
            precision=precision,
            column=column,
            low=min(low for low, _ in ends),
            high=max(high for _, high in ends),
        )
        for (role, precision, column), ends in found.items()
    ]
    device, day = str(last["device"]), str(last["measured_at"] or last["datetime"])[:10]
    cores = int((last["machine"] or {}).get("cores") or 1)
    about = {"device": device, "cores": cores, "measured": day, "runs": len(runs)}
    return Expected(**keys[0], **about, ranges=tuple(ranges))  # type: ignore[arg-type]


def _ends(record: Record, column: str) -> tuple[float, float] | None:
    value = value_of(record, column)
    by_definition = record["role"] == "teacher" and column != record["main_metric"]  # such as a Teacher's drop of 0
    if value is None or by_definition:
        return None
    ends = interval_of(record, column)
    if ends is not None and column in SPEEDS:
        return ends
    margin = MARGIN_PCT if column == "quality_drop_pct" else abs(value) * MARGIN_PCT / 100
    return value - margin, value + margin


def expected_text(name: str, entries: Iterable[Expected]) -> str:
    """Returns the file of a preset's ranges, as `load_expected` reads it."""
    plain = [entry.model_dump(mode="json") for entry in entries]
    head = f"# v1.0: ranges of the preset {name}, written by `pqk bench expect`; do not edit.\n"
    return head + yaml.safe_dump({"version": "1.0", "expected": plain}, sort_keys=False, allow_unicode=True, width=110)


def matching_entry(records: Sequence[Record], known: Sequence[Expected]) -> tuple[Expected | None, str]:
    """Returns the entry for a run, and why there is none."""
    key = key_of(records[-1])
    names = ("card", "backend", "isa")
    same = [entry for entry in known if all(getattr(entry, name) == key[name] for name in names)]
    for entry in same:
        if all(getattr(entry, name) == value for name, value in key.items()):
            return entry, ""
    if same:
        return None, "the range was measured with other configs, settings or another Teacher"
    return None, f"no range was measured for {key['card']} with {key['backend']} on {key['isa']}"


def compare(records: Sequence[Record], entry: Expected) -> list[Compared]:
    """Returns each range with the value of the row that it is for."""
    rows: dict[tuple[Any, ...], Mapping[str, Any]] = {(row["role"], row["precision"]): row for row in records}
    found = []
    for one in entry.ranges:
        row = rows.get((one.role, one.precision))
        value = None if row is None else value_of(row, one.column)
        found.append(Compared(one, None if value is None else float(value)))
    return found


def print_expected(records: Sequence[Record], entry: Expected, console: Console) -> None:
    """Prints the expected range of every number beside what was measured."""
    from rich import box
    from rich.table import Table

    formats = {column.name: column.format or ".4g" for column in columns_of(records)}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("row", "field"):
        table.add_column(heading, overflow="fold")
    for heading in ("expected", "measured", "in range"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in compare(records, entry):
        ends, form = one.expected, formats.get(one.expected.column, ".4g")
        value = "–" if one.value is None else format(one.value, form)
        said = {True: "[green]yes[/]", False: "[yellow]no[/]", None: "–"}[one.inside]
        row = ends.precision if ends.role == "candidate" else f"{ends.precision} {ends.role}"
        table.add_row(row, ends.column, f"{ends.low:{form}} .. {ends.high:{form}}", value, said)
    console.print(table)
    console.print(
        f"ranges of {entry.runs} run{'s' if entry.runs > 1 else ''}, measured {entry.measured} on {entry.device}, "
        f"{entry.isa}, {entry.cores} core{'s' if entry.cores > 1 else ''}",
        highlight=False,
        markup=False,
    )
