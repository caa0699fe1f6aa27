"""Shows the results of a matrix of ablations: per axis a table in the terminal, csv, markdown and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk.files import write_text
from pqk.record.schema import Column, columns
from pqk.report.cells import DASH, csv_text, headline, value_text, with_ends
from pqk.report.plots import bars_of
from pqk.report.style import PALETTE, blank_figure, label_rows, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from pqk.recipe.matrix import MatrixResult

_DROP = "quality_drop_pct"
_BESIDE = ("speedup_vs_own_f32", "t_pair_p50_ms", "size_MB", "flops_G", "verdict", "status")
_DRAWN = (_DROP, "speedup_vs_own_f32")
Points = Mapping[str, Mapping[str, Any] | None]


def _shown(points: Points) -> list[Column]:
    """Returns the columns of the table: drop, headline metrics, speed, size, verdict."""
    known = {column.name: column for column in columns()}
    metrics = headline([record for record in points.values() if record])
    return [known[_DROP], *metrics, *(known[name] for name in _BESIDE)]


def rows_of(points: Points) -> list[list[str]]:
    """Returns the heading and one row per point, as text; a point that failed has dashes."""
    shown = _shown(points)
    rows = [["point", *(column.short or column.name for column in shown)]]
    for label, record in points.items():
        values = [value_text(record, column) if record else DASH for column in shown]
        if record is None:
            values[-1] = "failed"
        rows.append([label, *values])
    return rows


def _csv_rows(points: Points) -> list[list[Any]]:
    """Returns the heading and a row per point with exact values; the ends of an interval follow its column."""
    shown, records = with_ends([record for record in points.values() if record])
    known = {column.name for column in shown}
    names = [f"{c.name}{end}" for c in _shown(points) for end in ("", "_low", "_high") if f"{c.name}{end}" in known]
    names.insert(names.index("size_MB"), "pairs_per_sec")  # for which a terminal has no room
    found = iter(records)
    rows = [[label, *map((next(found) if record else {}).get, names)] for label, record in points.items()]
    return [["point", *names], *rows]


def print_matrix(result: MatrixResult, console: Console) -> None:
    """Prints two tables per axis, quality and speed, that fit 80 columns; and a sentence for each failed point."""
    from rich.markup import escape
    from rich.table import Table

    for axis, points in result.records.items():
        heading, *rows = rows_of(points)
        split = len(heading) - len(_BESIDE)
        for name, shown in (("quality", range(1, split)), ("speed and size", range(split, len(heading)))):
            table = Table(title=f"{result.card.id} {axis}: {name}", title_justify="left", box=None)
            table.add_column(heading[0], min_width=min(24, max(len(row[0]) for row in rows)), overflow="fold")
            for place in shown:
                table.add_column(heading[place], justify="right", no_wrap=True)
            for row in rows:
                table.add_row(*map(escape, (row[0], *(row[place] for place in shown))))
            console.print(table)
    for (axis, point), why in result.failures.items():
        console.print(f"{escape(axis)}: {escape(point)} failed: {escape(why)}", highlight=False)


def write_matrix(result: MatrixResult, folder: Path) -> list[Path]:
    """Writes AXIS.csv, AXIS.md and, where a point has a figure to draw, AXIS.png into `folder`; returns the files."""
    written = []
    for axis, points in result.records.items():
        rows = rows_of(points)
        write_text(folder / f"{axis}.csv", csv_text(_csv_rows(points)))
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        lines.insert(1, "|" + " --- |" * len(rows[0]))
        write_text(folder / f"{axis}.md", f"# {result.card.id} {axis}\n\n" + "\n".join(lines) + "\n")
        written += [folder / f"{axis}.csv", folder / f"{axis}.md"]
        picture = folder / f"{axis}.png"
        if write_figure(picture, partial(_draw, f"{result.card.id} {axis}", points)) is None:
            written.append(picture)
    return written


def _draw(title: str, points: Points) -> Figure | str:
    """Draws bars per point: the drop, and the speedup within the point's own interleaved run.

    Returns the figure, or the reason why there is nothing to draw.
    """
    known = {column.name: column for column in columns()}
    drawn = [known[name] for name in _DRAWN if any(record and record[name] is not None for record in points.values())]
    if not drawn:
        return "no point has a drop or a speedup"
    figure, axes = blank_figure(9.0, max(1.8, 0.42 * len(points) + 1.1), len(drawn))
    for number, (axis, column) in enumerate(zip(axes, drawn, strict=True)):
        bars_of(axis, list(points.values()), column, PALETTE[number])
        label_rows(axis, list(points) if number == 0 else [""] * len(points))
    axes[0].set_title(title, fontsize=10, loc="left")
    return figure
