"""Draws the figures of a campaign's page: quality against size and time, and the drop of each recipe with its runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pqk.report.page.recipes import Recipe
from pqk.report.plots import pareto_front
from pqk.report.style import (
    BESIDE,
    FRONT,
    MARKERS,
    PALETTE,
    THRESHOLD_COLOUR,
    blank_figure,
    error_bar,
    grid,
    label_rows,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 90  # a figure stays below 100 KB


def draw(recipes: Sequence[Recipe], folder: Path) -> list[Path]:
    """Writes tradeoff.png and drop.png where there is data for them; returns the files. An old file without data is
    removed.
    """
    drawings = {folder / "tradeoff.png": _tradeoff, folder / "drop.png": _drop}
    return [p for p, make in drawings.items() if write_figure(p, partial(make, recipes), 9, _DPI) is None]


def _tradeoff(recipes: Sequence[Recipe]) -> Figure | str:
    """Draws drop against file size and against time, both relative to the Teacher in f32; the Teacher is at (1, 0)."""
    panels = [
        (title, [(r, found) for r in recipes if r.drop is not None and (found := r.ratios(name)) is not None])
        for name, title in (("size_MB", "file size / Teacher f32"), ("t_pair_p50_ms", "time of a pair / Teacher f32"))
    ]
    panels = [(title, points) for title, points in panels if points]
    if not panels:
        return "no recipe has a drop beside a size or a time"
    figure, axes = blank_figure(5.4 * len(panels), 4.4, len(panels))
    for axis, (title, points) in zip(axes, panels, strict=True):
        places = [(1.0, 0.0), *((x.mean, r.drop.interval.value) for r, x in points if r.drop)]
        front = [places[index] for index in pareto_front(places)]
        axis.plot(*zip(*front, strict=True), **FRONT)
        axis.plot(1.0, 0.0, "*", color="#333333", markersize=13, label=" Teacher f32")
        for recipe, x in points:
            assert recipe.drop is not None
            drop = recipe.drop.interval
            number = list(recipes).index(recipe)
            failed = any(record["verdict"] == "fail" for _, record, _ in recipe.runs)
            colour = PALETTE[number % len(PALETTE)]
            if drop.low is not None and drop.high is not None:
                error_bar(axis, x.mean, (drop.low, drop.high), colour, upright=True)
            axis.plot(
                x.mean,
                drop.value,
                MARKERS[number % len(MARKERS)],
                color=colour,
                markerfacecolor="white" if failed else colour,
                markersize=8,
                linestyle="none",
                label=f" {recipe.card} {recipe.combo} {recipe.precision}",
            )
        grid(axis)
        axis.set_xlabel(f"{title}, lower is better")
        axis.set_xlim(left=0)
        for limit in sorted({r.planned[0]["drop_limit_pct"] for r, _ in points} - {None}):
            axis.axhline(limit, color=THRESHOLD_COLOUR, linewidth=1.1, linestyle=":", zorder=1.6)
    axes[0].set_ylabel("drop of the main metric (%), with its 95 % interval")
    axes[0].set_title("hollow: its record failed; dashed: Pareto front; dotted: limits", fontsize=9, loc="left")
    axes[-1].legend(**BESIDE)
    figure.tight_layout()
    return figure


def _drop(recipes: Sequence[Recipe]) -> Figure | str:
    """Draws the drop of each recipe with its 95 % interval, every run, and the limit of its verdict."""
    shown = [recipe for recipe in recipes if recipe.drop is not None]
    if not shown:
        return "no recipe has a drop"
    figure, (axis,) = blank_figure(7.5, 0.42 * len(shown) + 1.3)
    for place, recipe in enumerate(shown):
        assert recipe.drop is not None
        runs = [row["drop_pct"] for row in recipe.rows]
        axis.plot(runs, [place] * len(runs), "|", color="#999999", markersize=11, zorder=1)
        limit = recipe.planned[0]["drop_limit_pct"]
        if limit is not None:
            axis.plot([limit, limit], [place - 0.35, place + 0.35], color=THRESHOLD_COLOUR, linewidth=2, zorder=1)
        found = recipe.drop.interval
        if found.low is not None and found.high is not None:
            error_bar(axis, place, (found.low, found.high), PALETTE[0])
        axis.plot(found.value, place, "o", color=PALETTE[0], zorder=2)
    label_rows(axis, [f"{r.card} {r.combo} {r.precision} ({r.drop.over if r.drop else ''})" for r in shown])
    axis.axvline(0.0, color="#333333", linewidth=0.8)
    grid(axis)
    axis.set_xlabel(
        "drop of the main metric against the Teacher (%), lower is better\n"
        "bars: 95 % interval; strokes: single runs; orange: at most this much"
    )
    return figure
