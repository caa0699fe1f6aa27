"""What `pqk tune` found: in the terminal, and as csv, json and a Pareto plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk import paths
from pqk.files import write_json, write_text
from pqk.report.table import DASH, csv_text

if TYPE_CHECKING:
    from rich.console import Console

    from pqk.run.tune import Point
    from pqk.run.tune_card import Tuned

_SHOWN_UNITS = 3


def as_data(tuned: Tuned) -> dict[str, Any]:
    """Plain data: limit, units by their share of the error, a row per point, and the confirmed row at the end."""
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
    """Write CARD.json, .csv and .png; text in the csv cannot start a formula."""
    from pqk.run.tune import draw_pareto

    made = [folder / f"{tuned.card}.{ending}" for ending in ("json", "csv", "png")]
    data = as_data(tuned)
    write_json(made[0], data)
    rows = [{**row, "units": " ".join(row["units"])} for row in data["rows"]]
    write_text(made[1], csv_text([list(rows[0]), *(row.values() for row in rows)]))
    draw_pareto(tuned.result, made[2], {name: unit.nodes for name, unit in tuned.units.items()}, tuned.confirmed)
    return made


def print_tune(tuned: Tuned, console: Console) -> None:
    """One table with a row per measured choice, and what came of it."""
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
            escape("winner, quantized anew" if again else _units_text(row["units"])),
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
