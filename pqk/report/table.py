"""From logs to tables: order, text and best values of records; summary.csv and summary.json; the terminal table."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk import paths
from pqk.errors import EXIT_OK, PqkError
from pqk.files import atomic_path, write_json
from pqk.record.formulas import escape_splits, holds_formula, safe_text
from pqk.record.log import read_records
from pqk.record.schema import Column, columns, load_schema

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pqk.settings.evaluation import Thresholds

Record = Mapping[str, Any]
_Layout = Mapping[str, str]

DASH = "–"
_MODEL_WIDTH = 26
_EXP_WIDTH = 12
_LAYOUTS: tuple[_Layout, ...] = ({"%": " ", "x": " "}, {"%": " ", "x": "\n"}, {"%": "\n", "x": "\n"}, {"%": "\n"})
"""How the terminal shows intervals, the widest first: by unit of the column, what stands between value and interval.
Columns of other units show none: their intervals are of single models and say nothing of a difference."""
_PRECISIONS = ("f32", "tf32", "bf16", "f16", "fp8", "int8", "int4")
_BARE = re.compile(r"[\w.:/%+-]+( [\w.:/%+-]+)*", re.ASCII)  # a CSV cell that needs no quotes


@dataclass(frozen=True)
class Places:
    """Where the reports go: three files and a folder."""

    table: Path
    summary_csv: Path
    summary_json: Path
    plots: Path

    @classmethod
    def in_folder(cls, folder: Path) -> Places:
        """All of them under their usual names in one folder."""
        return cls(folder / "result_table.xlsx", folder / "summary.csv", folder / "summary.json", folder / "plots")

    @classmethod
    def of_project(cls, root: Path) -> Places:
        """As configs/eval.yaml names them in `report`, below the project's root; without that file in reports/."""
        from pqk.settings.evaluation import load_common

        file = paths.configs(root) / "eval.yaml"
        if not file.is_file():
            return cls.in_folder(root / "reports")
        report, _ = load_common(file)
        return cls(root / report.table, root / report.summary_csv, root / report.summary_json, root / report.plots)


def _thresholds(root: Path) -> Thresholds | None:
    """Those of the project's configs/eval.yaml; None where there is no such file."""
    from pqk.settings.evaluation import load_common

    file = paths.configs(root) / "eval.yaml"
    return load_common(file)[1] if file.is_file() else None


def build_reports(
    logs_folder: Path | str,
    reports: Places | Path,
    say: Callable[[str], None] | None = None,
    thresholds: Thresholds | None = None,
) -> list[Path]:
    """Write the summary as CSV and JSON, the workbook and the plots from all logs; return the files written.

    `reports`: the places, or a folder for all of them. `say` is told, in one sentence each, which plots and which of
    their records were left out, and why. `thresholds` are lines in the plots. The same logs give the same bytes of CSV
    and JSON. Raises PqkError before anything is written when a log is invalid or there is no record at all.
    """
    return _write_reports(_all_records(logs_folder), reports, say, thresholds)


def _all_records(logs_folder: Path | str) -> list[Record]:
    records = ordered(item.record for item in read_records(logs_folder))
    if not records:
        raise PqkError(f"no records in {logs_folder}: run an experiment first")
    return records


def _write_reports(
    records: Sequence[Record],
    reports: Places | Path,
    say: Callable[[str], None] | None,
    thresholds: Thresholds | None,
) -> list[Path]:
    from pqk.report.plots import draw_plots
    from pqk.report.workbook import write_workbook

    places = reports if isinstance(reports, Places) else Places.in_folder(reports)
    write_csv(places.summary_csv, records)
    names = [column.name for column in columns()]
    write_json(places.summary_json, [{name: record[name] for name in names} for record in records])
    write_workbook(places.table, records)
    plots, left_out = draw_plots(records, places.plots, thresholds)
    for sentence in left_out:
        if say:
            say(sentence)
    return [places.summary_csv, places.summary_json, places.table, *plots]


def ordered(records: Iterable[Record]) -> list[Record]:
    """Records by experiment (A2 before A10), role (Teacher first), backend, quantizer, precision (f32 first), time.

    A record that lies in two logs, equal in every field, counts once.
    """
    roles = load_schema()["properties"]["role"]["enum"]

    def key(record: Record) -> tuple[Any, ...]:
        words = re.split(r"([0-9]+)", record["exp_id"])
        natural = [(int(word), "") if index % 2 else (-1, word) for index, word in enumerate(words)]
        precision = record["precision"] or ""
        rank = _PRECISIONS.index(precision) if precision in _PRECISIONS else len(_PRECISIONS)
        return (
            natural,
            roles.index(record["role"]),
            record["backend"] or "",
            record["quantizer"] or "",
            (rank, precision),
            record["datetime"],
            json.dumps(record, sort_keys=True),
        )

    unique = {json.dumps(record, sort_keys=True): record for record in records}
    return sorted(unique.values(), key=key)


def write_csv(path: Path | str, records: Sequence[Record]) -> None:
    """Writes one row per record, one column per field; null is empty, lists and objects are JSON, numbers are exact.

    Behind a column that any record has an interval of come its two ends, NAME_low and NAME_high.
    """
    shown, rows = with_ends(records)
    names = [column.name for column in shown]
    with atomic_path(path) as temporary:
        temporary.write_bytes(csv_text([names, *([row[name] for name in names] for row in rows)]).encode())


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Gives rows as CSV: null is empty, text cannot start a formula (see `safe_text`), everything else is JSON."""
    return "".join(",".join(_quoted(_csv_cell(value)) for value in row) + "\n" for row in rows)


def _quoted(text: str) -> str:
    """Quotes all but plain words and numbers, more than RFC 4180 asks for: readers differ in what splits a cell."""
    return text if not text or _BARE.fullmatch(text) else '"' + text.replace('"', '""') + '"'


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return safe_text(value)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return escape_splits(text) if holds_formula(text) else text


def cell_text(value: Any, column: Column) -> str:
    """A value for people: numbers in the column's format, shares as 'int8 91 % / bf16 7 %', null as a dash."""
    if value is None or value == {} or value == []:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format(int(value) if column.format == "d" else value, column.format)
    if column.name == "executed_precision":
        return shares_text(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def interval_of(record: Record, name: str) -> tuple[float, float] | None:
    """Gives the 95 % interval (low, high) of a record's column; None where there is none."""
    ends = (record["intervals"] or {}).get(name)
    return None if ends is None else (min(ends), max(ends))


def interval_text(record: Record, column: Column) -> str:
    """Gives an interval for people: '±0.48', or '[+0.10, +1.62]' where its halves differ; '' for none."""
    value, ends = record[column.name], interval_of(record, column.name)
    if ends is None or not isinstance(value, int | float):
        return ""
    halves = [format(half, column.format.removeprefix("+")) for half in (value - ends[0], ends[1] - value)]
    if halves[0] == halves[1]:
        return f"±{halves[0]}"
    return f"[{ends[0]:{column.format}}, {ends[1]:{column.format}}]"


def value_text(record: Record, column: Column) -> str:
    """Gives a record's value with its interval, for people: '+0.77 ±0.48'."""
    return f"{cell_text(record[column.name], column)} {interval_text(record, column)}".rstrip()


def with_ends(records: Sequence[Record]) -> tuple[list[Column], list[Record]]:
    """Adds, behind each column of numbers that any record has an interval of, its ends as NAME_low and NAME_high."""
    known = {name for record in records for name in record["intervals"] or {}}
    shown: list[Column] = []
    for column in columns():
        shown.append(column)
        if column.name in known and column.kind in ("number", "integer"):
            shown += [
                replace(
                    column,
                    name=f"{column.name}_{end}",
                    better="",
                    short="",
                    format=column.format if column.kind == "number" else "",
                    description=f"{word} end of the 95 % interval of {column.name}.",
                )
                for end, word in (("low", "Lower"), ("high", "Upper"))
            ]
    rows: list[Record] = []
    for record in records:
        ends: dict[str, float | None] = {}
        for name in known:
            ends[f"{name}_low"], ends[f"{name}_high"] = interval_of(record, name) or (None, None)
        rows.append({**record, **ends})
    return shown, rows


def shares_text(shares: Mapping[str, float]) -> str:
    """'int8 91 % / bf16 7 %', the largest first; a share above zero that rounds to it reads '<1 %'."""
    parts = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    return " / ".join(
        f"{name} {'<1' if share < 0.005 else f'{share:.0%}'[:-1]} %" for name, share in parts if share > 0
    )


def best_rows(records: Sequence[Record]) -> dict[str, set[int]]:
    """For each column that has a better direction, the indices of the rows with the best value.

    Only runs that ended well compete, and only with those on the same scenes, evaluated in the same way. A column in
    which fewer than two rows compete, or in which all are equal, has no best.
    """
    fields: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        if record["status"] == "ok":
            fields.setdefault(_judged_on(record), []).append(index)
    best: dict[str, set[int]] = {}
    for column in columns():
        if not column.better:
            continue
        for indices in fields.values():
            values = {i: records[i][column.name] for i in indices if records[i][column.name] is not None}
            if len(set(values.values())) > 1:
                target = (min if column.better == "lower" else max)(values.values())
                best.setdefault(column.name, set()).update(i for i, value in values.items() if value == target)
    return best


def _hash(record: Record, name: str) -> str:
    return str((record["hashes"] or {}).get(name, ""))


def _judged_on(record: Record) -> str:
    """What two records must share for their figures to be comparable."""
    reference = record["quality_reference"]
    truth = [reference, record["model"], _hash(record, "model")] if reference == "teacher" else [reference]
    return json.dumps([record["scenes"], _hash(record, "scenes"), _hash(record, "eval"), *truth])


def told_apart(records: Sequence[Record], name: str) -> list[str] | None:
    """Each record's 'model' or 'scenes' in a few words, or None when they share it.

    Different ones of one name get the first digits of their sha256: 'mine 1f3a90'.
    """
    found = []
    for record in records:
        value = record[name]
        if isinstance(value, list):
            value = value[0] + (f" +{len(value) - 1}" if len(value) > 1 else "") if value else None
        found.append((json.dumps(record[name]), value or DASH, _hash(record, name)))
    if len({(whole, digest) for whole, _, digest in found}) < 2:
        return None
    kinds: dict[str, set[tuple[str, str]]] = {}
    for whole, text, digest in found:
        kinds.setdefault(text, set()).add((whole, digest))
    return [f"{text} {digest[:6]}".strip() if len(kinds[text]) > 1 else text for _, text, digest in found]


def tool_text(record: Record) -> str:
    """'openvino/nncf', 'openvino', or '' when nothing is known."""
    return "/".join(record[key] for key in ("backend", "quantizer") if record[key])


def row_label(record: Record) -> str:
    """A record in a few words for a plot or a message: 'B1 candidate int8 openvino/nncf'."""
    words = [record["exp_id"], record["role"], record["precision"], tool_text(record)]
    return printable(" ".join(word for word in words if word))


def printable(text: str) -> str:
    """Replace control characters: a log must not move the cursor or colour the terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def print_table(records: Iterable[Record], console: Console) -> None:
    """Print records for people: one table when the console is wide enough, else quality and speed/size in two.

    Shown are the columns with a heading (`x-short`) in the schema and those named as main metric, if any row has a
    value there, and model and scenes where the rows differ in them. Best values are bold, null is a dash, a row that
    was emulated or did not end well says so. Drops and speeds have their 95 % interval, the latter where it fits.
    """
    rows = ordered(records)
    if not rows:
        console.print("no records")
        return
    metrics = {record["main_metric"] for record in rows}
    shown = [
        column
        for column in columns()
        if column.group != "identity"
        and (column.short or column.name in metrics)
        and any(record[column.name] not in (None, {}) for record in rows)
    ]
    best = best_rows(rows)
    judged = [column for column in shown if column.name == "verdict"]
    measured = [column for column in shown if column.name != "verdict"]
    labels, scenes = _row_labels(rows), told_apart(rows, "scenes")

    def table(part: Sequence[Column], layouts: Sequence[_Layout], title: str | None = None) -> tuple[Table, bool]:
        """The first layout that fits into the console, else the last one; and whether it fits."""
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
        if part or title == "quality":
            console.print()
            console.print(table([*part, *(judged if title == "quality" else [])], layouts, title)[0])


def _row_labels(rows: Sequence[Record]) -> list[str]:
    """Role, precision, model where rows differ in it, toolchain and state, a line each.

    Equal ones of unlike settings get the hash of these.
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
    hashes = [_hash(record, "quant") for record in rows]
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
            text = cell_text(record[column.name], column)
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
    """Merge a folder of logs into reports and print the table; returns the exit code. `root`: of the project."""
    parser = argparse.ArgumentParser(description="Merge all logs into one table (CSV, JSON, XLSX) and its plots.")
    parser.add_argument("--logs", type=Path, help="folder of log files; default: logs/")
    parser.add_argument("--reports", type=Path, help="folder to write to; default: the places in configs/eval.yaml")
    options = parser.parse_args(arguments)
    from rich.console import Console

    try:
        logs = options.logs or root / "logs"
        records = _all_records(logs)
        written = _write_reports(records, options.reports or Places.of_project(root), print, _thresholds(root))
        print_table(records, Console())
    except PqkError as error:
        print(f"pqk: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    for path in written:
        print(paths.shown(path))
    return EXIT_OK
