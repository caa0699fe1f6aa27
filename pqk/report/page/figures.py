"""The figures of a campaign's page: quality against size and time, and the drop of each recipe with its runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pqk.files import atomic_path
from pqk.report.plots import MARKERS, PALETTE, THRESHOLD_COLOUR, blank_figure, error_bar, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pqk.report.page.page import Recipe

_DPI = 90  # a figure stays below 100 KB


def draw(recipes: Sequence[Recipe], folder: Path) -> list[Path]:
    """Write tradeoff.png and drop.png, each where it has something to show; returns the files. One that has nothing to
    show any more is removed.
    """
    import matplotlib

    written = []
    for name, make in (("tradeoff", _tradeoff), ("drop", _drop)):
        path = folder / f"{name}.png"
        with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure = make(recipes)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
        written.append(path)
    return written


def _tradeoff(recipes: Sequence[Recipe]) -> Figure | None:
    """Drop against file size and against time, both relative to the Teacher in f32; the Teacher is at (1, 0)."""
    panels = [
        (title, [(r, found) for r in recipes if r.drop is not None and (found := r.ratios(name)) is not None])
        for name, title in (("size_MB", "file size / Teacher f32"), ("t_pair_p50_ms", "time of a pair / Teacher f32"))
    ]
    panels = [(title, points) for title, points in panels if points]
    if not panels:
        return None
    figure, axes = blank_figure(5.4 * len(panels), 4.4, len(panels))
    for axis, (title, points) in zip(axes, panels, strict=True):
        places = [(1.0, 0.0), *((x.mean, r.drop.interval.value) for r, x in points if r.drop)]
        front = [places[index] for index in pareto_front(places)]
        axis.plot(*zip(*front, strict=True), "--", color="#777777", linewidth=1.1, zorder=1)
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
        _grid(axis)
        axis.set_xlabel(f"{title}, lower is better")
        axis.set_xlim(left=0)
        for limit in sorted({r.planned[0]["drop_limit_pct"] for r, _ in points} - {None}):
            axis.axhline(limit, color=THRESHOLD_COLOUR, linewidth=1.1, linestyle=":", zorder=1.6)
    axes[0].set_ylabel("drop of the main metric (%), with its 95 % interval")
    axes[0].set_title("hollow: its record failed; dashed: Pareto front; dotted: limits", fontsize=9, loc="left")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0)
    figure.tight_layout()
    return figure


def _drop(recipes: Sequence[Recipe]) -> Figure | None:
    """The drop of each recipe with its 95 % interval, every run, and the limit of its verdict."""
    shown = [recipe for recipe in recipes if recipe.drop is not None]
    if not shown:
        return None
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
    axis.set_yticks(range(len(shown)), [f"{r.card} {r.combo} {r.precision} ({_over(r)})" for r in shown])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.axvline(0.0, color="#333333", linewidth=0.8)
    _grid(axis)
    axis.set_xlabel(
        "drop of the main metric against the Teacher (%), lower is better\n"
        "bars: 95 % interval; strokes: single runs; orange: at most this much"
    )
    return figure


def _over(recipe: Recipe) -> str:
    return recipe.drop.over if recipe.drop else ""


def _grid(axis: Axes) -> None:
    axis.grid(True, color="#DDDDDD", linewidth=0.7)
    axis.set_axisbelow(True)
