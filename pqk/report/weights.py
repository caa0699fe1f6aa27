"""Draws a study of weight quantization: six charts (`draw_study`), or four (`draw_comparison`).

rows: as `pqk.study.weights.result` defines them, the float model first. Every bar starts at 0, and a value that was not
measured is a dash, so that no difference looks larger than it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk.report.cells import DASH
from pqk.report.style import MARKERS, PALETTE, error_bar, grid, label_rows, logarithmic, plain_numbers, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_MIB = 2**20


def draw_study(path: Path, rows: Sequence[Row], title: str) -> None:
    """Writes six charts: size, compression, time, error of the main map, relative error and PSNR of every output."""

    def make() -> Figure:
        panels = [_size, _compression, _time, _map_error, _relative_errors, _psnr]
        return _figure(panels, rows, title, columns=3)

    write_figure(path, make, font=9)


def draw_comparison(path: Path, rows: Sequence[Row], title: str) -> None:
    """Writes four charts: size, time, compression, error of the main map."""
    write_figure(path, lambda: _figure([_size, _time, _compression, _map_error], rows, title, columns=2), font=9)


def main_map(rows: Sequence[Row]) -> str | None:
    """Returns the first output that has maps: depth, or the first point map (its z)."""
    compared: Mapping[str, Any] = next((row["outputs"] for row in rows if row["outputs"]), {})
    return next((name for name, found in compared.items() if found["ssim"] is not None), None)


def _figure(
    panels: Sequence[Callable[[Axes, Sequence[Row]], None]], rows: Sequence[Row], title: str, columns: int
) -> Figure:
    from matplotlib.figure import Figure

    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, lines * (0.3 * len(rows) + 1.5)), layout="constrained")
    figure.suptitle(title)
    for number, draw in enumerate(panels):
        axes = figure.add_subplot(lines, columns, number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        grid(axes, horizontal=False)
        label_rows(axes, [row["name"].replace("_", " ") for row in rows] if number % columns == 0 else [""] * len(rows))
        draw(axes, rows)
    return figure


def _bars(
    axes: Axes,
    values: Sequence[float | None],
    label: str,
    text: Callable[[float], str],
    colour: str,
    intervals: Sequence[tuple[float, float] | None] | None = None,
) -> None:
    """Draws bars from 0 with their values as text; None is a dash."""
    ends = intervals or [None] * len(values)
    for place, (value, interval) in enumerate(zip(values, ends, strict=True)):
        axes.barh([place], [value or 0.0], color=colour, height=0.62)
        if interval is not None:
            error_bar(axes, place, interval, "#333333")
        most = max(value or 0.0, *(interval or ()), 0.0)
        axes.annotate(
            DASH if value is None else text(value),
            (most, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    high = max([value for value in values if value is not None] + [end[1] for end in ends if end], default=0.0)
    axes.set_xlim(0.0, 1.3 * high if high > 0 else 1.0)
    axes.set_xlabel(label)
    plain_numbers(axes.xaxis)


def _size(axes: Axes, rows: Sequence[Row]) -> None:
    _bars(axes, [row["size_bytes"] / _MIB for row in rows], "size on disk (MiB)", lambda v: f"{v:.3g}", PALETTE[0])


def _compression(axes: Axes, rows: Sequence[Row]) -> None:
    _bars(
        axes, [row["compression"] for row in rows], "float size / own size (ratio)", lambda v: f"{v:.2f}x", PALETTE[2]
    )


def _time(axes: Axes, rows: Sequence[Row]) -> None:
    """Draws the time of every engine: one kind of marker for each runtime, one line for each row."""
    timed = [(place, engine) for place, row in enumerate(rows) for engine in row["engines"] if engine["p50_ms"]]
    runtimes = list(dict.fromkeys(engine["runtime"] for _, engine in timed))
    for number, runtime in enumerate(runtimes):
        own = [(place, engine) for place, engine in timed if engine["runtime"] == runtime]
        shift = 0.5 * ((number + 0.5) / len(runtimes) - 0.5)  # one above the other, so that no marker hides another
        colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        for place, engine in own:
            error_bar(axes, place + shift, (engine["p25_ms"], engine["p75_ms"]), colour)
        x, y = [engine["p50_ms"] for _, engine in own], [place + shift for place, _ in own]
        axes.plot(x, y, linestyle="none", marker=marker, color=colour, markersize=4, label=runtime)
    axes.set_xlim(left=0.0, right=1.15 * max((engine["p75_ms"] for _, engine in timed), default=1.0))
    axes.set_xlabel("time of a sample (ms, p50; bar: p25 to p75)")
    plain_numbers(axes.xaxis)
    if timed:
        _legend(axes)
    else:
        axes.set_xticks([])
        axes.annotate("nothing was timed", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center")


def _map_error(axes: Axes, rows: Sequence[Row]) -> None:
    name = main_map(rows)
    values = [row["outputs"][name]["mae"] if name and row["outputs"] else None for row in rows]
    _bars(axes, values, f"MAE of {name} (unit of the output)", lambda v: f"{v:.3g}", PALETTE[3])


def _relative_errors(axes: Axes, rows: Sequence[Row]) -> None:
    _dots(axes, rows, "relative_error", 100.0, "relative error of each output (%)")
    values = [
        100 * found["relative_error"] for row in rows for found in row["outputs"].values() if found["relative_error"]
    ]
    if values and max(values) / min(values) > 20:
        logarithmic(axes)
    else:
        axes.set_xlim(left=0.0)
    _legend(axes)


def _psnr(axes: Axes, rows: Sequence[Row]) -> None:
    _dots(axes, rows, "psnr", 1.0, "PSNR of each output (dB, higher is closer)")
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Places the legend above the panel, where it hides no marker."""
    count = len(axes.get_legend_handles_labels()[0])
    if count:
        columns = count if count <= 3 else math.ceil(count / 2)
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": columns}
        axes.legend(**place, frameon=False, handletextpad=0.1, columnspacing=1.0, borderaxespad=0.2)


def _dots(axes: Axes, rows: Sequence[Row], metric: str, factor: float, label: str) -> None:
    """Draws a metric of every output: one kind of marker for each, one line for each row."""
    names = list(next((row["outputs"] for row in rows if row["outputs"]), {}))
    for number, name in enumerate(names):
        points = [
            (factor * row["outputs"][name][metric], place)
            for place, row in enumerate(rows)
            if row["outputs"] and row["outputs"][name][metric] is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
            axes.plot(x, y, linestyle="none", marker=marker, color=colour, markersize=5, label=name)
    axes.set_xlabel(label)
    plain_numbers(axes.xaxis)
