"""Defines the style of all figures: colours, markers, blank figures, bars, and writing as PNG (`write_figure`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color), distinct with every common colour blindness; the yellow
# is left out, it is too faint on white. Seven colours and nine markers give 63 different pairs.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
THRESHOLD_COLOUR = PALETTE[1]
FRONT: dict[str, Any] = {"linestyle": "--", "color": "#777777", "linewidth": 1.2, "zorder": 1}
"""Line style of a Pareto front."""
BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False, "borderaxespad": 0.0}
ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "frameon": False}
"""Places of a legend: outside the panel, right of it or above it."""


def write_figure(path: Path | str, make: Callable[[], Figure | str], font: float = 10, dpi: int = 150) -> str | None:
    """Draws a figure without a display and writes it as PNG, atomically.

    make: returns the figure, or the reason why there is nothing to draw; then an older file of that name is removed.
    font: size of text in points. Returns None, or that reason.
    """
    import matplotlib

    # A label is data: "$" in it does not start a formula.
    with matplotlib.rc_context({"text.parse_math": False, "font.size": font}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = make()
        if isinstance(figure, str):
            Path(path).unlink(missing_ok=True)
            return figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    return None


def blank_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Returns a figure (inches) with panels side by side; numbers beside an axis are whole, without a common offset."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    figure.subplots_adjust(wspace=0.25)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        for axis in (panel.xaxis, panel.yaxis):
            plain_numbers(axis)
    return figure, axes


def plain_numbers(axis: Axis) -> None:
    """Writes every number beside an axis in full: 0.1149, not 9e-5 with +1.148e-1 in a corner."""
    from matplotlib.ticker import FuncFormatter

    def text(value: float, _: int | None) -> str:
        low, high = axis.get_view_interval()
        return f"{0.0 if abs(value) < 1e-9 * abs(high - low) else value:.6g}"

    axis.set_major_formatter(FuncFormatter(text))


def logarithmic(axes: Axes) -> None:
    """Makes the x axis logarithmic, with plain numbers at 1, 2 and 5 of each power of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    plain_numbers(axes.xaxis)


def grid(axes: Axes, horizontal: bool = True) -> None:
    """Draws faint lines behind everything; without `horizontal` only vertical ones."""
    axes.grid(True, axis="both" if horizontal else "x", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Places labelled rows beside an axis, the first on top, at the heights 0, 1, 2 ..."""
    axes.set_yticks(range(len(labels)), list(labels))
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def error_bar(axes: Axes, place: float, interval: tuple[float, float], colour: str, upright: bool = False) -> None:
    """Draws an interval with caps at `place` of the other axis; the value may be anywhere in it."""
    middle, half = (interval[0] + interval[1]) / 2, (interval[1] - interval[0]) / 2
    if upright:
        axes.errorbar([place], [middle], yerr=[half], fmt="none", ecolor=colour, capsize=3, linewidth=1.2, zorder=2)
    else:
        axes.errorbar([middle], [place], xerr=[half], fmt="none", ecolor=colour, capsize=3, linewidth=1.2, zorder=2)
