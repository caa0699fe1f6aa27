"""Draws depth maps of one or two models beside the pictures, and where and how much they differ: `draw_depth`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pqk.report.style import write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNIT = "model units"
"""A model is right up to a scale, so its lengths are no metres."""
MOST_ROWS = 12
"""Pictures in one figure: more make it unreadable."""
_DEPTHS, _ERRORS, _NOTHING = "viridis", "magma", "#BBBBBB"  # of pixels without a depth
_SIDE = 2.3  # inches of a panel
_HEAD = 0.95  # inches above the panels


def relative_difference(depth: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns |other - depth| / depth of every pixel; NaN where one is not finite, or `depth` is not above 0."""
    usable = np.isfinite(depth) & np.isfinite(other) & (depth > 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(usable, np.abs(other - depth) / depth, np.nan)


def draw_depth(
    path: Path,
    labels: Sequence[str],
    names: Sequence[str],
    images: np.ndarray,
    depths: Sequence[np.ndarray],
    title: str,
) -> None:
    """Draws a row per picture: the picture, the depth of each model, and of two their relative difference.

    labels: of one or two models. names: (V,) of the pictures, of which the first `MOST_ROWS` are drawn. images:
    (V,H,W,3) uint8. depths: of each model (V,H,W), in one unit; all share one colour scale, from the 2nd to the 98th
    percentile of the first model's. The differences have a scale of their own, from 0 to their 98th percentile.
    """
    rows = min(len(names), MOST_ROWS)
    write_figure(path, lambda: _figure(labels, names[:rows], images[:rows], [d[:rows] for d in depths], title), font=9)


def _figure(
    labels: Sequence[str], names: Sequence[str], images: np.ndarray, depths: Sequence[np.ndarray], title: str
) -> Figure:
    from matplotlib.figure import Figure

    errors = relative_difference(depths[0], depths[1]) if len(depths) > 1 else None
    columns = 1 + len(depths) + (errors is not None)
    height, width = images.shape[1:3]
    tall = _SIDE * height / width
    figure = Figure(figsize=(columns * (_SIDE + 0.12) + 0.5, len(names) * (tall + 0.1) + _HEAD + 0.75))
    figure.suptitle(title, x=0.01, y=0.995, ha="left", va="top", fontsize=10)
    grid = figure.add_gridspec(
        len(names),
        columns,
        left=0.06,
        right=0.99,
        top=1 - _HEAD / figure.get_figheight(),
        bottom=0.75 / figure.get_figheight(),
        wspace=0.05,
        hspace=0.05,
    )
    low, high = _range(depths[0])
    panels: list[list[Axes]] = []
    for row, name in enumerate(names):
        axes = [figure.add_subplot(grid[row, column]) for column in range(columns)]
        panels.append(axes)
        axes[0].imshow(images[row])
        axes[0].set_ylabel(short(name), fontsize=8)
        for place, depth in enumerate(depths):
            shown = axes[1 + place].imshow(_masked(depth[row]), cmap=_colours(_DEPTHS), vmin=low, vmax=high)
        if errors is not None:
            most = _most(errors)
            wrong = axes[-1].imshow(100 * _masked(errors[row]), cmap=_colours(_ERRORS), vmin=0, vmax=100 * most)
            mean = 100 * float(np.nanmean(errors[row])) if np.isfinite(errors[row]).any() else float("nan")
            axes[-1].text(
                0.03, 0.97, f"mean {mean:.3g} %", transform=axes[-1].transAxes, va="top", fontsize=8, color="white",
                bbox={"facecolor": "black", "alpha": 0.6, "pad": 2, "linewidth": 0},
            )  # fmt: skip
        for panel in axes:
            panel.set_xticks([])
            panel.set_yticks([])
    heads = ["picture", *(f"depth, {short(label, 30)}" for label in labels)]
    for panel, head in zip(panels[0], [*heads, "relative difference"], strict=False):
        panel.set_title(head, fontsize=9)
    _bar(figure, panels[-1][1 : 1 + len(depths)], shown, f"depth [{UNIT}]", "both")
    if errors is not None:
        _bar(figure, panels[-1][-1:], wrong, "difference [%]", "max")
    return figure


def _bar(figure: Figure, above: Sequence[Axes], shown: Any, label: str, extend: str) -> None:
    """Draws a colour bar below the last row of panels, as wide as these."""
    boxes = [axes.get_position() for axes in above]
    tall = figure.get_figheight()
    place = (boxes[0].x0, boxes[0].y0 - 0.2 / tall, boxes[-1].x1 - boxes[0].x0, 0.1 / tall)
    figure.colorbar(shown, cax=figure.add_axes(place), orientation="horizontal", extend=extend).set_label(label)


def _range(depth: np.ndarray) -> tuple[float, float]:
    usable = depth[np.isfinite(depth) & (depth > 0)]
    if not usable.size:
        return 0.0, 1.0
    low, high = np.percentile(usable, (2, 98))
    return float(low), float(max(high, low * 1.001))


def _most(errors: np.ndarray) -> float:
    usable = errors[np.isfinite(errors)]
    return max(float(np.percentile(usable, 98)), 1e-6) if usable.size else 1.0


def _masked(values: np.ndarray) -> np.ma.MaskedArray[Any, Any]:
    return np.ma.masked_invalid(values)


def _colours(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name].with_extremes(bad=_NOTHING)


def short(text: str, most: int = 24) -> str:
    """Returns a text cut in the middle."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"
