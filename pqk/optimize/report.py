"""Shows what `pqk optimize` found: a table in the terminal, the verdict as JSON, points as CSV, the front as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk import paths
from pqk.files import write_json, write_text
from pqk.optimize.points import Found, front
from pqk.optimize.search import Optimized
from pqk.report.cells import csv_text
from pqk.report.style import PALETTE, THRESHOLD_COLOUR, blank_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

_COLOURS = {"accept": "green", "regression": "red", "infeasible": "red"}


def as_data(found: Optimized) -> dict[str, Any]:
    """Returns everything as plain JSON. Drops of points are of validation samples, `test` is the look at the test."""
    winner = None if found.winner is None else _row(found.winner, found)
    return {
        "verdict": found.verdict,
        "why": list(found.why),
        "model": found.model,
        "backend": found.backend,
        "main_metric": found.metric,
        "max_drop_pct": found.max_drop,
        "guard_drop_pct": found.guard_limit,
        "winner": winner,
        "test": found.final,
        "bundle": None if found.bundle is None else str(found.bundle),
        "points": [_row(one, found) for one in found.found],
        "not_measured": [
            {
                "recipe": list(one.point.letters),
                "settings": one.point.settings,
                "status": str(one.status),
                "why": one.why,
                "predicted_speedup": one.foretold,
            }
            for one in found.skipped
        ],
        "seconds": round(found.seconds, 1),
    }


def _row(one: Found, found: Optimized) -> dict[str, Any]:
    return {
        "recipe": list(one.point.letters),
        "settings": one.point.settings,
        "name": one.point.name,
        "validation_drop_pct": one.drop.value,
        "validation_drop_interval": one.drop.ends(),
        "guard_drops_pct": {name: lost.value for name, lost in one.guards.items()},
        "speedup_vs_teacher_f32": one.speedup.value,
        "predicted_speedup": one.foretold,
        "speedup_interval": one.speedup.ends(),
        "speedup_vs_best_float": one.faster.value,
        "t_pair_p50_ms": one.ms,
        "within": one.within(found.max_drop, found.guard_limit),
        "front": one in front(found.found),
    }


def write_optimized(found: Optimized, folder: Path) -> list[Path]:
    """Writes MODEL.json, MODEL.csv and MODEL.png; returns their paths. Without a measured point the JSON alone."""
    name = found.model.replace(":", "-")
    made = [folder / f"{name}.{ending}" for ending in ("json", "csv", "png")]
    data = as_data(found)
    write_json(made[0], data)
    if not found.found:
        return made[:1]
    heads = (
        "name",
        "validation_drop_pct",
        "speedup_vs_teacher_f32",
        "predicted_speedup",
        "speedup_vs_best_float",
        "t_pair_p50_ms",
        "within",
        "front",
    )
    write_text(made[1], csv_text([list(heads), *([row[head] for head in heads] for row in data["points"])]))
    write_figure(made[2], lambda: _front_figure(found))
    return made


def print_optimized(found: Optimized, console: Console) -> None:
    """Prints a row per measured recipe, what was left out, and the verdict."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"{found.model} on {found.backend}, on validation samples", title_justify="left", title_style="bold"
    )
    table.box, table.pad_edge = None, False
    table.add_column("recipe", overflow="fold")
    for name in ("drop %", "x f32", "predicted", "x best float", "guards %"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("within", "front", ""):
        table.add_column(name, no_wrap=True)
    best = front(found.found)
    for one in found.found:
        half = "" if one.drop.half is None else f" ±{one.drop.half:.2f}"
        table.add_row(
            escape(one.point.name),
            f"{one.drop.value:+.2f}{half}",
            f"{one.speedup.value:.2f}",
            "–" if one.foretold is None else f"{one.foretold:.2f}",
            f"{one.faster.value:.2f}",
            f"{max((lost.value for lost in one.guards.values()), default=0):+.1f}",
            "yes" if one.within(found.max_drop, found.guard_limit) else "",
            "yes" if one in best else "",
            "winner" if one is found.winner else "",
            style="bold" if one is found.winner else None,
        )
    console.print()
    if found.found:
        console.print(table)
    for left in found.skipped:
        said = escape(f"{left.point.name}: {left.status}: {left.why}")
        console.print(f"[dim]{said}[/]", highlight=False, soft_wrap=True)
    colour = _COLOURS.get(found.verdict, "yellow")
    console.print(f"verdict: [bold {colour}]{found.verdict}[/]")
    for why in found.why:
        console.print(f"  {escape(why)}", highlight=False, soft_wrap=True)
    if found.bundle is not None:
        console.print(f"bundle: {escape(str(paths.shown(found.bundle)))}", highlight=False, soft_wrap=True)


def _front_figure(found: Optimized) -> Figure:
    figure, (axes,) = blank_figure(8.0, 4.8)
    best = front(found.found)
    for one in found.found:
        chosen = one is found.winner
        ends = one.drop.ends() or [one.drop.value] * 2
        axes.errorbar(
            one.speedup.value,
            one.drop.value,
            yerr=[[one.drop.value - ends[0]], [ends[1] - one.drop.value]],
            fmt="*" if chosen else "o",
            markersize=11 if chosen else 6,
            color=PALETTE[0] if one in best else "0.6",
            linewidth=1,
            capsize=2,
        )
        axes.annotate(
            one.point.short,
            (one.speedup.value, one.drop.value),
            textcoords="offset points",
            xytext=(5, 6),
            fontsize=8,
            rotation=35,
        )
    axes.plot([one.speedup.value for one in best], [one.drop.value for one in best], color=PALETTE[0], linewidth=1)
    axes.axhline(found.max_drop, color=THRESHOLD_COLOUR, linewidth=1.2, label=f"limit {found.max_drop:g} %")
    axes.margins(x=0.2)
    axes.set_xlabel("times as fast as the Teacher in f32")
    axes.set_ylabel(f"drop of {found.metric} on validation samples, percent")
    axes.set_title(f"{found.model} on {found.backend}")
    axes.legend(loc="best", fontsize=8)
    return figure
