"""Shows the parity table in the terminal, and writes it as csv, xlsx, json and markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk.files import atomic_path, write_json, write_text
from pqk.report.cells import DASH, csv_text, printable, value_of
from pqk.report.workbook import put

if TYPE_CHECKING:
    from rich.console import Console

    from pqk.parity.parity import Result, Row

_RECORD_COLUMNS = (
    "status",
    "measured",
    "size_MB",
    "t_pair_p50_ms",
    "t_pair_p95_ms",
    "speedup_vs_own_f32",
    "speedup_vs_best_float",
)
"""Columns from a record; its metrics follow them."""
_COLOURS = {"agree": "green", "differ": "red"}


def as_data(result: Result) -> dict[str, Any]:
    """Returns plain data: the verdicts, and the rows with a column per number (`OUTPUT.relative` and so on)."""
    metrics = dict.fromkeys(name for row in result.rows for name in (row.record or {}).get("metrics") or {})
    return {
        "card": result.card,
        "metric": result.metric,
        "verdicts": [{"level": v.level, "verdict": v.verdict, "sentences": v.sentences} for v in result.verdicts],
        "rows": [_flat(row, metrics) for row in result.rows],
        "explanation": result.explanation,
    }


def _flat(row: Row, metrics: Iterable[str] = ()) -> dict[str, Any]:
    record = row.record or {}
    flat: dict[str, Any] = {"level": row.level, "side": row.side, "against": row.against}
    flat |= {name: record.get(name) for name in _RECORD_COLUMNS}
    flat |= {name: value_of(record, name) if record else None for name in metrics}
    shares = record.get("executed_precision") or {}
    if not record and row.heads:  # a runtime that is compared without a run of the card
        flat["measured"] = "engine"
    flat["executed"] = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()) or None
    flat |= {"metric": row.metric, "metric_drop_pct": row.metric_drop_pct}
    for head, values in (row.heads or {}).items():
        flat |= {f"{head}.{name}": value for name, value in values.items()}
    flat["note"] = row.note
    return flat


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Returns all columns, in the order of the row that has most."""
    fullest = max(rows, key=len)
    return list(fullest)


def write_parity(result: Result, folder: Path) -> list[Path]:
    """Writes CARD.json, .csv, .xlsx and .md; null cells are empty, text cannot start a formula."""
    from openpyxl import Workbook
    from openpyxl.styles import Font
    from openpyxl.utils import get_column_letter

    data = as_data(result)
    rows: list[dict[str, Any]] = data["rows"]
    columns = _columns(rows)
    made = [folder / f"{result.card}.{ending}" for ending in ("json", "csv", "xlsx", "md")]
    write_json(made[0], data)
    lines: list[list[Any]] = [list(columns), *([row.get(name) for name in columns] for row in rows)]
    write_text(made[1], csv_text(lines))
    book = Workbook()
    sheet = book.worksheets[0]
    sheet.title = "parity"
    for number, line in enumerate(lines, start=1):
        for index, value in enumerate(line, start=1):
            put(sheet.cell(number, index), value)
    for index, name in enumerate(columns, start=1):
        sheet.cell(1, index).font = Font(bold=True)
        sheet.column_dimensions[get_column_letter(index)].width = max(12, min(40, len(name) + 2))
    sheet.freeze_panes = "D2"
    verdicts = book.create_sheet("verdicts")
    verdicts.append(["level", "verdict", "why"])
    for v in result.verdicts:
        for sentence in v.sentences or [""]:
            verdicts.append([v.level, v.verdict])
            put(verdicts.cell(verdicts.max_row, 3), sentence)
    with atomic_path(made[2]) as temporary:
        book.save(temporary)
    with atomic_path(made[3]) as temporary:
        temporary.write_text(_markdown(result), encoding="utf-8")
    return made


# The short columns. Markdown shows all of them; the terminal shows two tables that fit into 80 columns.
_AGREEMENT = ("side", "run as", "metric", "drop %", "points rel", "values rel", "moved %")
_SPEED = ("side", "run as", "MB", "p50 ms", "x own f32", "x float", "executed")
_ALL = ("side", "against", *_SPEED[1:], *_AGREEMENT[2:])
_LEFT = ("side", "against", "run as", "executed")
_LEGEND = (
    "points rel, values rel: mean |a - b| / mean |a| of the worst output of points, and of plain values; moved: points "
    "that moved by more than 1 % of the sample's median depth; x own f32, x float: speed against float in the same "
    "interleaved timing, p50 of two sides may be of different ones."
)


def _shown(row: Row) -> dict[str, str]:
    """Returns the short columns as text; of several outputs of points, or of plain values, those of the worst."""
    flat = _flat(row)

    def worst(points: bool, value: str) -> float | None:
        # only points can move
        found = [head[value] for head in (row.heads or {}).values() if (head["moved"] is not None) == points]
        return max((x for x in found if x is not None), default=None)

    moved = worst(True, "moved")
    return {
        "side": row.side,
        "against": row.against or DASH,
        "run as": flat["measured"] or DASH,
        "executed": flat["executed"] or DASH,
        "MB": _number(flat["size_MB"], ".1f"),
        "p50 ms": _number(flat["t_pair_p50_ms"], ".1f"),
        "x own f32": _number(flat["speedup_vs_own_f32"], ".2f"),
        "x float": _number(flat["speedup_vs_best_float"], ".2f"),
        "metric": _number(row.metric, ".4f"),
        "drop %": _number(row.metric_drop_pct, "+.2f"),
        "points rel": _number(worst(True, "relative"), ".1e"),
        "values rel": _number(worst(False, "relative"), ".1e"),
        "moved %": _number(None if moved is None else 100 * moved, ".2f"),
    }


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else format(value, form)


def print_parity(result: Result, console: Console) -> None:
    """Prints per level the differences of the outputs and the verdict; then size and speed of the sides with a record.

    Every table fits into 80 columns as long as names do.
    """
    from rich.padding import Padding
    from rich.text import Text

    def line(text: str, style: str = "") -> None:
        console.print(Padding(Text(text, style=style), (0, 0, 0, 2), expand=False))

    for v in result.verdicts:
        rows = [row for row in result.rows if row.level == v.level]
        against = ", ".join(dict.fromkeys(row.against for row in rows if row.against))
        title = f"{v.level}, errors against {against}" if against else v.level
        console.print()
        _print_table(title, _AGREEMENT, [row for row in rows if row.heads or row.record], result.metric, console)
        for row in rows:
            if row.note and row.note not in v.sentences:
                line(f"{row.side}: {row.note}", "dim")
        console.print(f"{v.level}: [bold {_COLOURS.get(v.verdict, 'yellow')}]{v.verdict}[/]")
        for sentence in v.sentences:
            line(sentence)
    console.print()
    _print_table("size and speed", _SPEED, [row for row in result.rows if row.record], result.metric, console)
    line(_LEGEND, "dim")
    if result.explanation is not None:
        console.print("\n[bold]explained[/]")
        for text in _explained(result.explanation):
            line(text)


def _print_table(title: str, columns: tuple[str, ...], rows: list[Row], metric: str, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(Text(_heading(name, metric)), justify="left" if name in _LEFT else "right", overflow="fold")
    for row in rows:
        shown = _shown(row)
        table.add_row(*(Text(printable(shown[name]).replace(", ", "\n")) for name in columns))
    console.print(table)


def _heading(name: str, metric: str) -> str:
    return metric if name == "metric" else name


SHOWN_NODES = 5


def _explained(explanations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the findings of --explain in lines: where runtimes differ, the worst parts and nodes, and the proof."""
    lines = []
    for side, found in explanations.items():
        for graph, sentence in (found.get("parted") or {}).items():
            lines.append(f"{side}, {graph}, float: {sentence or 'agrees with ONNX Runtime at every output'}")
        for kind, title in (("groups", "parts of the model"), ("nodes", "single nodes of the worst parts")):
            if found.get(kind):
                lines.append(f"{side}, {title} and their part of the final error (about 1 % is rounding noise):")
                lines += [f"  {100 * r['of_all']:5.1f} %  {r['graph']} {r['name']}" for r in found[kind][:SHOWN_NODES]]
        lines.append(f"{side}: {found['sentence']}")
    return lines


def _flat_text(text: str) -> str:
    """Returns one line with markdown's own markup escaped."""
    return " ".join(re.sub(r"([\\`*<>#\[\]])", r"\\\1", text).split())


def _markdown(result: Result) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(_flat_text(cell).replace("|", "\\|") for cell in cells) + " |"

    headings = [_heading(name, result.metric) for name in _ALL]
    parts = [f"# Parity of {result.card}\n"]
    for v in result.verdicts:
        rows = [row for row in result.rows if row.level == v.level]
        parts.append(f"## {v.level}: {v.verdict}\n")
        parts += [f"- {_flat_text(sentence)}" for sentence in v.sentences]
        parts += ["", line(headings), line(["---"] * len(headings))]
        parts += [line([shown[name] for name in _ALL]) for shown in map(_shown, rows)]
        parts += [""] + [f"- {row.side}: {_flat_text(row.note)}" for row in rows if row.note] + [""]
    if result.explanation is not None:
        parts += ["## Explained\n", *(f"- {_flat_text(text)}" for text in _explained(result.explanation)), ""]
    parts.append(_LEGEND + "\n")
    return "\n".join(parts)
