"""The figures of a campaign's page: quality against size and time, and the drop of each recipe with its runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pqk.files import atomic_path
from pqk.report.plots import MARKERS, PALETTE, blank_figure, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pqk.report.page import Recipe

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
        places = [(1.0, 0.0), *((x.mean, r.drop.mean) for r, x in points if r.drop)]
        front = [places[index] for index in pareto_front(places)]
        axis.plot(*zip(*front, strict=True), "--", color="#777777", linewidth=1.1, zorder=1)
        axis.plot(1.0, 0.0, "*", color="#333333", markersize=13, label=" Teacher f32")
        for recipe, x in points:
            assert recipe.drop is not None
            number = list(recipes).index(recipe)
            failed = any(record["verdict"] == "fail" for _, record, _ in recipe.runs)
            colour = PALETTE[number % len(PALETTE)]
            axis.errorbar(
                x.mean,
                recipe.drop.mean,
                yerr=recipe.drop.std,
                fmt=MARKERS[number % len(MARKERS)],
                color=colour,
                markerfacecolor="white" if failed else colour,
                markersize=8,
                capsize=3,
                label=f" {recipe.card} {recipe.combo} {recipe.precision}",
            )
        _grid(axis)
        axis.set_xlabel(f"{title}, lower is better")
        axis.set_xlim(left=0)
    axes[0].set_ylabel("drop of the main metric (%), mean ± std")
    axes[0].set_title("hollow: failed its verdict; dashed: Pareto front", fontsize=9, loc="left")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0)
    figure.tight_layout()
    return figure


def _drop(recipes: Sequence[Recipe]) -> Figure | None:
    """The drop of each recipe: mean, sample standard deviation, every run, and the limit of its verdict."""
    shown = [recipe for recipe in recipes if recipe.drop is not None]
    if not shown:
        return None
    figure, (axis,) = blank_figure(7.5, 0.42 * len(shown) + 1.3)
    for place, recipe in enumerate(shown):
        assert recipe.drop is not None
        runs = [row["drop_pct"] for row in recipe.rows]
        axis.plot(runs, [place] * len(runs), "|", color="#999999", markersize=11, zorder=1)
        limit = recipe.planned[0]["drop_limit_pct"]
        axis.plot([limit, limit], [place - 0.35, place + 0.35], color="#D55E00", linewidth=2, zorder=1)
        axis.errorbar(recipe.drop.mean, place, xerr=recipe.drop.std, fmt="o", color=PALETTE[0], capsize=4, zorder=2)
    axis.set_yticks(range(len(shown)), [f"{r.card} {r.combo} {r.precision} (n = {_n(r)})" for r in shown])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.axvline(0.0, color="#333333", linewidth=0.8)
    _grid(axis)
    axis.set_xlabel(
        "drop of the main metric against the Teacher (%), lower is better\n"
        "mean ± std; strokes: single runs; orange: at most this much"
    )
    return figure


def _n(recipe: Recipe) -> int:
    return recipe.drop.n if recipe.drop else 0


def _grid(axis: Axes) -> None:
    axis.grid(True, color="#DDDDDD", linewidth=0.7)
    axis.set_axisbelow(True)
