"""Draws the points of one or two models as two views of a solid scene, without a display: `draw_cloud`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pqk.report.show.depth import UNIT
from pqk.report.style import write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PIXELS = (120, 420)  # side of a drawn view, between these: so that points, each 2x2 pixels, cover surfaces
_WIDE = 4.0  # inches of a panel
_HEAD = 0.95  # inches above the panels
_INSIDE = (1, 99)  # percentiles: the views show what lies between them, with a margin of 5 %


def draw_cloud(path: Path, labels: Sequence[str], clouds: Sequence[tuple[np.ndarray, np.ndarray]], title: str) -> None:
    """Draws a column per model: its points from the front and from above, in parallel projection.

    clouds: points (N,3) of each model, x right, y down, z forward, in one unit, and their colours (N,3) uint8. All have
    the axes of the first. Points that are not finite are left out.
    """
    write_figure(path, lambda: _figure(labels, clouds, title), font=9)


def _figure(labels: Sequence[str], clouds: Sequence[tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    from matplotlib.figure import Figure

    finite = [(points[good], colours[good]) for points, colours in clouds for good in [np.isfinite(points).all(axis=1)]]
    low, high = _limits(finite[0][0])
    across, down, forward = high - low
    tall = [float(np.clip(_WIDE * extent / across, 1.2, 6.0)) for extent in (down, forward)]
    width, height = (_WIDE + 0.8) * len(clouds), sum(tall) + _HEAD + 1.6
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, x=0.01, y=0.995, ha="left", va="top", fontsize=10)
    places = figure.add_gridspec(
        2,
        len(clouds),
        height_ratios=tall,
        left=0.7 / width,
        right=1 - 0.1 / width,
        top=1 - _HEAD / height,
        bottom=0.5 / height,
        hspace=2 * 0.8 / sum(tall),
        wspace=0.8 / _WIDE,
    )
    for column, (label, (points, colours)) in enumerate(zip(labels, finite, strict=True)):
        front, above = (figure.add_subplot(places[row, column]) for row in (0, 1))
        _view(front, points, colours, (0, 1, 2), low, high)
        front.set(xlabel=f"x, right [{UNIT}]", ylabel=f"y, down [{UNIT}]")
        front.set_title(f"{label}, from the front", fontsize=9)
        _view(above, points, colours, (0, 2, 1), low, high)
        above.set(xlabel=f"x, right [{UNIT}]", ylabel=f"z, forward [{UNIT}]")
        above.invert_yaxis()
        above.set_title(f"{label}, from above", fontsize=9)
    return figure


def _limits(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corners of the box that is shown."""
    if not len(points):
        return np.zeros(3), np.ones(3)
    low, high = np.percentile(points, _INSIDE, axis=0)
    margin = 0.05 * np.maximum(high - low, 1e-6 * np.abs(high).max() + 1e-12)
    return low - margin, high + margin


def _view(
    axes: Axes, points: np.ndarray, colours: np.ndarray, order: tuple[int, int, int], low: np.ndarray, high: np.ndarray
) -> None:
    """Draws a picture of points with equal axes. order: the axes across, down, and away from the eye."""
    across, down, _ = order
    size = max(high[across] - low[across], high[down] - low[down])
    step = size / np.clip(np.sqrt(len(points) / 2), *_PIXELS)
    shape = (max(1, round((high[down] - low[down]) / step)), max(1, round((high[across] - low[across]) / step)))
    image = splat(points[:, list(order)], colours, np.array([low[across], low[down]]), step, shape)
    extent = (low[across], low[across] + shape[1] * step, low[down] + shape[0] * step, low[down])
    axes.imshow(image, extent=extent, interpolation="nearest", zorder=2)
    axes.set_facecolor("white")
    axes.grid(True, color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)


def splat(
    points: np.ndarray, colours: np.ndarray, corner: np.ndarray, step: float, shape: tuple[int, int]
) -> np.ndarray:
    """Returns a picture (H,W,4) uint8 of points: of those in a pixel the one with the least third coordinate is seen.

    points: (N,3): across, down, away from the eye. corner: (2,) of the picture's top left. step: length of a pixel. A
    point covers 2x2 pixels, so that surfaces have no holes; what no point covers is transparent.
    """
    height, width = shape
    image = np.zeros((height * width, 4), np.uint8)
    nearest = np.argsort(-points[:, 2], kind="stable")  # the farthest first: the last one written is seen
    places = np.floor((points[nearest, :2] - corner) / step - 0.5)
    shown = (np.abs(places) < 1e9).all(axis=1)
    places, seen = places[shown].astype(np.int64), colours[nearest][shown]
    # every pixel of a point in one pass, the farthest point first
    offsets = np.array([(0, 0), (1, 0), (0, 1), (1, 1)])
    covered = (places[:, None, :] + offsets).reshape(-1, 2)
    inside = ((covered >= 0) & (covered < (width, height))).all(axis=1)
    index = covered[inside, 1] * width + covered[inside, 0]
    last = len(index) - 1 - np.unique(index[::-1], return_index=True)[1]
    image[index[last], :3] = np.repeat(seen, 4, axis=0)[inside][last]
    image[index[last], 3] = 255
    return image.reshape(height, width, 4)
