"""Draws boxes over pictures: `draw_boxes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pqk.report.style import PALETTE, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDE, _GAP = 4.2, 0.15  # inches of a panel, and between panels
_HEAD, _LINE = 0.26, 0.18  # inches of a panel's head, and of a line of the title
_LABEL = 0.45, 0.16  # inches, width and height
_SHAPES = (0.3, 1.2)  # height by width of a panel: pictures beyond are drawn smaller


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture and the boxes over it. image (h,w,3) uint8; size: (height, width) that the boxes' pixels count.

    boxes (D,4) x1 y1 x2 y2, scores (D,), labels (D,) numbers of classes.
    """

    head: str
    image: np.ndarray
    size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def draw_boxes(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Draws panels in two columns, a single one alone. A box has the colour of its class, and "class: score" at it."""
    write_figure(path, lambda: _figure(panels, title), font=9)


def _figure(panels: Sequence[Panel], title: str) -> Figure:
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    shapes = [max(panel.size[0] / panel.size[1] for panel in row) for row in rows]
    talls = [_WIDE * float(np.clip(shape, *_SHAPES)) for shape in shapes]
    above = _GAP + _LINE * len(title.splitlines())
    wide, tall = columns * (_WIDE + _GAP) + _GAP, above + sum(talls) + len(rows) * (_HEAD + _GAP)
    figure = Figure(figsize=(wide, tall))
    figure.suptitle(title, x=_GAP / wide, y=1 - 0.05 / tall, ha="left", va="top", fontsize=10)
    bottom = tall - above
    for row, height in zip(rows, talls, strict=True):
        bottom -= _HEAD + height
        for column, panel in enumerate(row):
            left = _GAP + column * (_WIDE + _GAP)
            _draw(figure.add_axes((left / wide, bottom / tall, _WIDE / wide, height / tall)), panel, height)
        bottom -= _GAP
    return figure


def _draw(axes: Axes, panel: Panel, tall: float) -> None:
    """Draws a panel into axes of `_WIDE` x `tall` inches."""
    height, width = panel.size
    scale = min(_WIDE / width, tall / height)  # inches of a pixel
    axes.imshow(panel.image, extent=(0, width, height, 0), interpolation="bilinear")
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.set_title(panel.head, fontsize=8, loc="left", pad=3)
    for place in np.argsort(panel.scores, kind="stable"):  # the surest on top
        x1, y1, x2, y2 = panel.boxes[place]
        colour = PALETTE[panel.labels[place] % len(PALETTE)]
        axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=colour, linewidth=1.4, solid_joinstyle="miter")
        inside, at_right = scale * y1 < _LABEL[1], scale * (width - x1) < _LABEL[0]  # or it would leave the picture
        axes.annotate(
            f"{panel.labels[place]}: {panel.scores[place]:.2f}",
            (x2 if at_right else x1, y1),
            xytext=(0, -1.7 if inside else 1.7),
            textcoords="offset points",
            ha="right" if at_right else "left",
            va="top" if inside else "bottom",
            fontsize=6.5,
            color="white",
            bbox={"facecolor": colour, "alpha": 0.85, "pad": 1, "linewidth": 0},
        )
