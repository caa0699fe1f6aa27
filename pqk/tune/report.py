"""Shows the results of `pqk tune` in the terminal, and writes them as csv, json and a Pareto plot."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk import paths
from pqk.files import write_json, write_text
from pqk.report.cells import DASH, csv_text
from pqk.report.style import ABOVE, FRONT, PALETTE, THRESHOLD_COLOUR, blank_figure, grid, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from pqk.tune.search import Point, TuneResult
    from pqk.tune.tune_card import Tuned

_SHOWN_UNITS = 3
_AGAIN = "winner, quantized again"


def as_data(tuned: Tuned) -> dict[str, Any]:
    """Returns plain data: limit, units by their share of the error, a row per point, the confirmed one at the end."""
    rows = [_row(tuned, point, "search") for point in tuned.result.points]
    if tuned.confirmed is not None:
        rows.append(_row(tuned, tuned.confirmed, "confirmed"))
    return {
        "card": tuned.card,
        "metric": tuned.metric,
        "max_drop_pct": tuned.result.max_drop,
        "verdict": tuned.verdict,
        "test_drop_pct": tuned.final.value if tuned.final else None,
        "test_drop_interval": tuned.final.ends() if tuned.final else None,
        "quant_yaml": paths.shown(tuned.quant_yaml) if tuned.quant_yaml else None,
        "rows": rows,
        "units": [{"name": u.name, "of_all": u.of_all, "nodes": list(u.nodes)} for u in tuned.units.values()],
        "sentences": list(tuned.sentences),
    }


def _row(tuned: Tuned, point: Point, kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "units": list(point.names),
        "float_nodes": len(tuned.nodes(point)),
        "quality_drop_pct": point.drop_pct if math.isfinite(point.drop_pct) else None,
        "t_pair_p50_ms": point.t_pair_p50_ms,
        "speedup_vs_int8": tuned.plain.t_pair_p50_ms / point.t_pair_p50_ms,
        "front": kind == "search" and point in tuned.result.front,
        "winner": point.names == tuned.result.winner.names if tuned.result.winner else False,
    }


def write_tune(tuned: Tuned, folder: Path) -> list[Path]:
    """Writes CARD.json, .csv and .png; text in the csv cannot start a formula."""
    made = [folder / f"{tuned.card}.{ending}" for ending in ("json", "csv", "png")]
    data = as_data(tuned)
    write_json(made[0], data)
    rows = [{**row, "units": " ".join(row["units"])} for row in data["rows"]]
    write_text(made[1], csv_text([list(rows[0]), *(row.values() for row in rows)]))
    draw_pareto(tuned.result, made[2], {name: unit.nodes for name, unit in tuned.units.items()}, tuned.confirmed)
    return made


def print_tune(tuned: Tuned, console: Console) -> None:
    """Prints a row per measured choice, and the result."""
    from rich.markup import escape
    from rich.table import Table

    data = as_data(tuned)
    total = sum(len(unit.nodes) for unit in tuned.units.values())
    table = Table(
        title=f"{tuned.card}: float nodes for a drop of at most {tuned.result.max_drop:g} %",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    table.add_column("in float", overflow="fold")
    for name in ("nodes", "drop %", "p50 ms", "x int8"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("front", "winner"):
        table.add_column(name, no_wrap=True)
    again_text = "NOT CONFIRMED" if tuned.final is None else "confirmed"
    for row in data["rows"]:
        again = row["kind"] == "confirmed"
        drop = row["quality_drop_pct"]
        table.add_row(
            escape(_AGAIN if again else _units_text(row["units"])),
            f"{row['float_nodes']} of {total}" if total else "0",
            DASH if drop is None else f"{drop:+.2f}",
            f"{row['t_pair_p50_ms']:.1f}",
            f"{row['speedup_vs_int8']:.2f}",
            "yes" if row["front"] else "",
            again_text if again else "winner" if row["winner"] else "",
            style="bold" if row["winner"] else None,
        )
    console.print()
    console.print(table)
    for sentence in tuned.sentences:
        console.print(escape(sentence), highlight=False, soft_wrap=True)


def _units_text(names: list[str]) -> str:
    if not names:
        return "nothing: plain int8"
    more = len(names) - _SHOWN_UNITS
    return "\n".join([*names[:_SHOWN_UNITS], *([f"and {more} more"] if more > 0 else [])])


def draw_pareto(
    result: TuneResult,
    path: Path | str,
    nodes_of: Mapping[str, Collection[str]] | None = None,
    confirmed: Point | None = None,
) -> Path:
    """Draws median time against drop of all points, the front, the limit and the winner, as a PNG.

    nodes_of: the nodes of each ranked name, when a name is a group. confirmed: the winner, measured again.
    """
    write_figure(path, lambda: _pareto(result, nodes_of, confirmed))
    return Path(path)


def _pareto(result: TuneResult, nodes_of: Mapping[str, Collection[str]] | None, confirmed: Point | None) -> Figure:
    figure, (axes,) = blank_figure(8.0, 4.8)
    drawn = [p for p in result.points if math.isfinite(p.drop_pct)]
    grid(axes)
    front = [(p.t_pair_p50_ms, p.drop_pct) for p in result.front if math.isfinite(p.drop_pct)]
    axes.plot([x for x, _ in front], [y for _, y in front], **FRONT, label="Pareto front: no point is better in both")
    axes.plot(
        [p.t_pair_p50_ms for p in drawn],
        [p.drop_pct for p in drawn],
        "o",
        color=PALETTE[0],
        label="measured, with the number of nodes in float",
    )
    for point in drawn:
        axes.annotate(
            str(sum(len(nodes_of[name]) for name in point.names) if nodes_of else len(point.names)),
            (point.t_pair_p50_ms, point.drop_pct),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.axhline(result.max_drop, color=THRESHOLD_COLOUR, linewidth=1.2, label=f"limit {result.max_drop:g} %")
    marked = [(result.winner, "*", PALETTE[1], 16, "winner"), (confirmed, "x", PALETTE[2], 9, _AGAIN)]
    for chosen, marker, colour, size, label in marked:
        if chosen is not None and math.isfinite(chosen.drop_pct):
            place = (chosen.t_pair_p50_ms, chosen.drop_pct)
            axes.plot(*place, marker, color=colour, markersize=size, linestyle="none", label=label)
    axes.set_xlabel("t_pair_p50_ms (ms), lower is better")
    axes.set_ylabel("quality_drop_pct (%), lower is better")
    axes.margins(0.1)
    axes.legend(**ABOVE, ncols=2)
    return figure
