"""Draws the figures of a deliverable, `draw_runs`: a metric of all its runs, with mean and spread."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pqk.record.deliverable import label
from pqk.record.ledger import VARIANT, about, measured_in, telling
from pqk.record.tsv import Row
from pqk.report.style import PALETTE, blank_figure, grid, label_rows, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_runs(runs: Sequence[Row], summary: Sequence[Row], folder: Path) -> list[str]:
    """Draws a figure per metric: mean and sample standard deviation of each line of the summary, and its single runs.

    Returns the names of the files written.
    """
    figures = {f"{metric}.png": partial(_figure, metric, summary, runs) for metric in measured_in(runs)}
    return [name for name, make in figures.items() if write_figure(folder / name, make, 9, 130) is None]


def _figure(metric: str, summary: Sequence[Row], runs: Sequence[Row]) -> Figure | str:
    lines = [line for line in telling(summary) if line.get(f"{metric}_mean") is not None]
    if not lines:
        return "it was not measured"
    figure, (axes,) = blank_figure(7.5, 0.34 * len(lines) + 1.2)
    for place, line in enumerate(lines):
        own = [row[metric] for row in runs if _belongs(row, line)]
        axes.plot(own, [place] * len(own), "|", color="#999999", markersize=9, zorder=1)
        of_seed = line["scope"] == "train_seed"
        axes.errorbar(
            line[f"{metric}_mean"],
            place,
            xerr=line[f"{metric}_std"],
            fmt="o" if of_seed else "D",
            color=PALETTE[0 if of_seed else 1],
            capsize=4,
            zorder=2,
        )
    label_rows(axes, [f" {label(line)} (n = {line['n']})" for line in lines])
    grid(axes, horizontal=False)
    known = about(next(row for row in runs if metric in row), metric)
    unit = f" ({known['unit']})" if known["unit"] else ""
    what = f"{metric}{unit}, {known['better']} is better"
    axes.set_xlabel(f"{what}; mean and sample standard deviation, strokes are single runs")
    return figure


def _belongs(row: Row, line: Row) -> bool:
    """Returns whether a run is one of the runs of a line of the summary."""
    names = [*VARIANT, *(["file"] if line["file"] else []), *(["train_seed"] if line["scope"] == "train_seed" else [])]
    return all(row[name] == line[name] for name in names)
