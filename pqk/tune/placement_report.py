"""Shows the results of `pqk tune --for speed` in the terminal, and writes them as csv, json and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk import paths
from pqk.files import write_json, write_text
from pqk.report.cells import csv_text
from pqk.report.style import PALETTE, THRESHOLD_COLOUR, blank_figure, grid, label_rows, write_figure
from pqk.tune.placement import spoken

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from pqk.stats.intervals import Interval
    from pqk.tune.placement import Placed, Timed


def as_data(placed: Placed) -> dict[str, Any]:
    """Returns plain data: a row per choice in the order of timing, regions with their nodes, and the result."""
    return {
        "card": placed.card,
        "metric": placed.metric,
        "max_drop_pct": placed.max_drop,
        "verdict": placed.verdict,
        "validation_drop_pct": placed.drop,
        "test_drop_pct": placed.final.value if placed.final else None,
        "test_drop_interval": placed.final.ends() if placed.final else None,
        "quant_yaml": paths.shown(placed.quant_yaml),
        "attention_in_int8": None
        if placed.attention is None
        else {
            **_numbers("speedup_vs_int8", placed.attention.faster),
            "validation_drop_pct": placed.attention.drop,
            "taken": placed.attention.taken,
        },
        "rows": [
            {
                "regions": list(one.regions),
                "float_nodes": sum(len(placed.regions[name]) for name in one.regions),
                **_numbers("speedup_vs_int8", one.faster),
                "winner": one is placed.winner,
            }
            for one in placed.tried
        ],
        "again": _numbers("speedup_vs_int8", placed.again),
        "best_float": placed.best_float,
        "against_float": _numbers("speedup_vs_float", placed.against_float),
        "regions": {name: list(nodes) for name, nodes in placed.regions.items()},
        "sentences": list(placed.sentences),
    }


def _numbers(name: str, found: Interval | None) -> dict[str, Any]:
    return {name: found.value if found else None, f"{name}_interval": found.ends() if found else None}


def write_placed(placed: Placed, folder: Path) -> list[Path]:
    """Writes CARD.speed.json, .csv and .png; text in the csv cannot start a formula."""
    made = [folder / f"{placed.card}.speed.{ending}" for ending in ("json", "csv", "png")]
    data = as_data(placed)
    write_json(made[0], data)
    names = ("regions", "float_nodes", "speedup_vs_int8", "low", "high", "winner")
    rows: list[list[Any]] = [list(names)]
    if (found := data["attention_in_int8"]) is not None:
        low, high = found["speedup_vs_int8_interval"] or ("", "")
        rows.append(["attention in int8", 0, found["speedup_vs_int8"], low, high, found["taken"]])
    for row in data["rows"]:
        low, high = row["speedup_vs_int8_interval"] or ("", "")
        rows.append([" ".join(row["regions"]), row["float_nodes"], row["speedup_vs_int8"], low, high, row["winner"]])
    write_text(made[1], csv_text(rows))
    write_figure(made[2], lambda: _figure(placed))
    return made


def print_placed(placed: Placed, console: Console) -> None:
    """Prints a row per choice, the fastest first, and the result."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"{placed.card}: regions in float, against plain int8",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    table.add_column("in float", overflow="fold")
    table.add_column("nodes", justify="right", no_wrap=True)
    table.add_column("x int8", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for one in sorted(placed.tried, key=lambda one: -one.faster.value):
        nodes = sum(len(placed.regions[name]) for name in one.regions)
        mark = "winner" if one is placed.winner else "faster" if one.sure else ""
        bold = "bold" if one is placed.winner else None
        table.add_row(escape("\n".join(one.regions)), str(nodes), spoken(one.faster), mark, style=bold)
    console.print()
    console.print(table)
    for sentence in placed.sentences:
        console.print(escape(sentence), highlight=False, soft_wrap=True)


def _figure(placed: Placed) -> Figure:
    rows: list[tuple[str, Interval, bool, Timed | None]] = [
        (one.regions[0] if len(one.regions) == 1 else f"{len(one.regions)} regions together", one.faster, one.sure, one)
        for one in sorted(placed.tried, key=lambda one: -one.faster.value)
    ]
    if placed.attention is not None:
        found = placed.attention
        rows.insert(0, ("both products of attention, in int8", found.faster, found.drop is not None, None))
    figure, (axes,) = blank_figure(7.0, 1.2 + 0.3 * len(rows))
    grid(axes, horizontal=False)
    for place, (_, faster, sure, one) in enumerate(rows):
        ends = faster.ends() or [faster.value, faster.value]
        colour = PALETTE[2] if sure else PALETTE[0]
        best = one is placed.winner if one is not None else placed.winner is None and sure
        axes.plot(ends, [place, place], "-", color=colour, linewidth=1.5)
        axes.plot(faster.value, place, "*" if best else "o", color=colour, markersize=7)
    label_rows(axes, [name for name, *_ in rows])
    axes.axvline(1.0, color=THRESHOLD_COLOUR, linewidth=1.2)
    axes.set_xlabel("times as fast as plain int8, with the 95 % interval; regions are back in float")
    return figure
