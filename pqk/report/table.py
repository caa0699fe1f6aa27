"""Prints the table of records in the terminal, `print_table`, and runs `pqk table`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pqk import paths
from pqk.errors import EXIT_OK, PqkError
from pqk.record.schema import Column
from pqk.report.cells import (
    Record,
    best_rows,
    cell_text,
    columns_of,
    hash_of,
    interval_text,
    ordered,
    printable,
    told_apart,
    tool_text,
    value_of,
)
from pqk.report.files import Places, all_records, thresholds_of, write_reports

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_Layout = Mapping[str, str]

_MODEL_WIDTH = 26
_EXP_WIDTH = 12
_LAYOUTS: tuple[_Layout, ...] = ({"%": " ", "x": " "}, {"%": " ", "x": "\n"}, {"%": "\n", "x": "\n"}, {"%": "\n"})
"""Layouts of intervals in the terminal, the widest first: by unit of the column, the separator between value and
interval. Columns of other units show no interval: theirs are of single models and do not describe a difference."""


def print_table(records: Iterable[Record], console: Console) -> None:
    """Prints records for people: one table when the console is wide enough, else quality and speed/size in two.

    It shows the columns with a heading (`x-short`) in the schema and the main metrics, if any row has a value there,
    and model and scenes where the rows differ in them. Best values are bold, null is a dash, rows that were emulated or
    have a status other than ok are marked. Drops and speeds have their 95 % interval, speeds only where it fits.
    """
    rows = ordered(records)
    if not rows:
        console.print("no records")
        return
    metrics = {record["main_metric"] for record in rows}
    shown = [
        column
        for column in columns_of(rows)
        if column.group != "identity"
        and (column.short or column.name in metrics)
        and any(value_of(record, column.name) not in (None, {}) for record in rows)
    ]
    best = best_rows(rows)
    judged = [column for column in shown if column.name == "verdict"]
    measured = [column for column in shown if column.name != "verdict"]
    labels, scenes = _row_labels(rows), told_apart(rows, "scenes")

    def table(part: Sequence[Column], layouts: Sequence[_Layout], title: str | None = None) -> tuple[Table, bool]:
        """Returns the first layout that fits into the console, else the last one; and whether it fits."""
        for layout in layouts:
            made = _terminal_table(rows, part, best, labels, scenes, layout, title)
            width = console.measure(made, options=console.options.update(max_width=10_000)).maximum
            if width <= console.width:
                return made, True
        return made, False

    with_intervals = any(record["intervals"] for record in rows)
    layouts = _LAYOUTS if with_intervals else _LAYOUTS[-1:]
    if table([*measured, *judged], layouts[-2:-1] or layouts)[1]:
        console.print(table([*measured, *judged], layouts[:-1] or layouts)[0])
        return
    for title, groups in (("quality", ("quality",)), ("speed and size", ("efficiency", "resources", "edge"))):
        part = [column for column in measured if column.group in groups]
        if title != "quality":
            if part:
                console.print()
                console.print(table(part, layouts, title)[0])
            continue
        made, fits = table([*part, *judged], layouts, title)
        left_out: list[str] = []
        for column in _least_first(part, rows, metrics):
            if fits:
                break
            part.remove(column)
            left_out.insert(0, column.name)
            made, fits = table([*part, *judged], layouts, title)
        console.print()
        console.print(made)
        if left_out:
            console.print(f"also in the record: {', '.join(map(printable, left_out))}", highlight=False)


def _least_first(part: Sequence[Column], rows: Sequence[Record], mains: Collection[str]) -> list[Column]:
    """Returns the metrics that a narrow table can leave out: in the order of the records, the last ones first."""
    order = {name: place for record in rows for place, name in enumerate(record["metrics"] or {})}
    loose = [column for column in part if column.metric and column.name not in mains and column.name in order]
    return sorted(loose, key=lambda column: -order[column.name])


def _row_labels(rows: Sequence[Record]) -> list[str]:
    """Returns for each record role, precision, model where rows differ in it, toolchain and state, a line each.

    Equal labels with different settings get the hash of the settings.
    """
    labels = []
    models = told_apart(rows, "model") or [""] * len(rows)
    for record, model in zip(rows, models, strict=True):
        shown = model if len(model) <= _MODEL_WIDTH else model[: _MODEL_WIDTH - 1] + "…"
        lines = [f"{record['role']} {record['precision'] or ''}".rstrip(), shown, tool_text(record)]
        if record["measured"] == "emulated":
            lines.append("emulated")
        if record["status"] != "ok":
            lines.append(record["status"])
        labels.append("\n".join(printable(line) for line in lines if line))
    settings: dict[tuple[str, str], set[str]] = {}
    hashes = [hash_of(record, "quant") for record in rows]
    keys = [(record["exp_id"], label) for record, label in zip(rows, labels, strict=True)]
    for key, digest in zip(keys, hashes, strict=True):
        settings.setdefault(key, set()).add(digest)
    return [
        f"{label}\nquant {printable(digest[:6])}" if len(settings[key]) > 1 else label
        for key, label, digest in zip(keys, labels, hashes, strict=True)
    ]


def _terminal_table(
    rows: Sequence[Record],
    shown: Sequence[Column],
    best: Mapping[str, set[int]],
    labels: Sequence[str],
    scenes: Sequence[str] | None,
    layout: _Layout,
    title: str | None = None,
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Text objects, not strings: rich would read "[...]" in a string as markup.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, title=title, title_justify="left")
    table.add_column("exp", overflow="fold", max_width=_EXP_WIDTH)
    table.add_column("row", no_wrap=True)
    if scenes:
        table.add_column("scenes", overflow="fold", max_width=_EXP_WIDTH)
    for column in shown:
        numeric = column.kind in ("number", "integer")
        heading = Text(printable(column.short or column.name))
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for index, record in enumerate(rows):
        cells = [Text(printable(record["exp_id"])), Text(labels[index])]
        cells += [Text(printable(scenes[index]))] if scenes else []
        for column in shown:
            text = cell_text(value_of(record, column.name), column)
            if column.name == "executed_precision":
                text = "\n".join(printable(part) for part in text.split(" / "))
            else:
                text = printable(text)
                interval = interval_text(record, column) if layout.get(column.unit) else ""
                text += f"{layout[column.unit]}{interval}" if interval else ""
            cells.append(Text(text, style="bold" if index in best.get(column.name, ()) else ""))
        table.add_row(*cells)
    return table


def main(arguments: Sequence[str] | None = None, root: Path = Path()) -> int:
    """Merges a folder of logs into reports and prints the table; returns the exit code. `root`: of the project."""
    parser = argparse.ArgumentParser(description="Merge all logs into one table (CSV, JSON, XLSX) and its plots.")
    parser.add_argument("--logs", type=Path, help="folder of log files; default: logs/")
    parser.add_argument("--reports", type=Path, help="folder to write to; default: the places in configs/eval.yaml")
    options = parser.parse_args(arguments)
    from rich.console import Console

    try:
        logs = options.logs or root / "logs"
        records = all_records(logs)
        written = write_reports(records, options.reports or Places.of_project(root), print, thresholds_of(root))
        print_table(records, Console())
    except PqkError as error:
        print(f"pqk: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    for path in written:
        print(paths.shown(path))
    return EXIT_OK
