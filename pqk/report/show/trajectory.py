"""Draws the cameras of one or two models from above and from the side: `draw_trajectory`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pqk.report.show.depth import UNIT
from pqk.report.style import PALETTE, blank_figure, grid, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOOKS = 0.09  # of the width of the drawing: how long the axis of a camera is drawn


def camera_centres(cameras: np.ndarray) -> np.ndarray:
    """Returns the centres (V,3) of world-to-camera matrices (V,3,4): -R^T t."""
    return -np.einsum("vji,vj->vi", cameras[:, :, :3], cameras[:, :, 3])


def rotation_differences(cameras: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the angles (V,) in degrees between the rotations of two sets of cameras (V,3,4)."""
    between = cameras[:, :, :3] @ np.swapaxes(others[:, :, :3], 1, 2)
    # the sine from the skew part, the cosine from the trace: exact for small angles too
    skew = np.stack([between[:, i, j] - between[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))], axis=1)
    cosine = np.trace(between, axis1=1, axis2=2) - 1
    return np.degrees(np.arctan2(np.linalg.norm(skew, axis=1), cosine))


def draw_trajectory(
    path: Path, labels: Sequence[str], names: Sequence[str], cameras: Sequence[np.ndarray], title: str
) -> None:
    """Draws where the cameras of each model are and look to: from above (x, z) and from the side (z, y).

    names: (V,) of the pictures, which the legend numbers. cameras: of each model (V,3,4), from the frame of the first
    camera (x right, y down, z forward) into each, in one unit.
    """
    write_figure(path, lambda: _figure(labels, names, cameras, title), font=9)


def _figure(labels: Sequence[str], names: Sequence[str], cameras: Sequence[np.ndarray], title: str) -> Figure:
    figure, panels = blank_figure(9.6, 5.9, 2)
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.16, top=0.76, wspace=0.3)
    figure.suptitle(title, x=0.01, y=0.99, ha="left", va="top", fontsize=10)
    centres = [camera_centres(found) for found in cameras]
    everywhere = np.concatenate(centres)
    size = max(float(np.ptp(everywhere, axis=0).max()), 1e-3)
    for panel, (across, up), words in (
        (panels[0], (0, 2), ("x, right", "z, forward", "from above")),
        (panels[1], (2, 1), ("z, forward", "y, down", "from the side")),
    ):
        for number, (label, found, places) in enumerate(zip(labels, cameras, centres, strict=True)):
            _cameras(panel, label, number, found, places, (across, up), size)
        for number, place in enumerate(centres[0]):
            panel.annotate(
                str(number + 1),
                place[[across, up]],
                xytext=(6, -11 if number % 2 else 5),  # neighbours often lie side by side
                textcoords="offset points",
                fontsize=8,
                zorder=5,
            )
        panel.set(xlabel=f"{words[0]} [{UNIT}]", ylabel=f"{words[1]} [{UNIT}]")
        panel.set_title(words[2], fontsize=9)
        _square(panel, everywhere[:, [across, up]], size)
        grid(panel)
    panels[1].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.0, 0.8), frameon=False, ncols=2
    )
    listed = "   ".join(f"{number + 1} {name}" for number, name in enumerate(names[:8]))
    more = f"   and {len(names) - 8} more" if len(names) > 8 else ""
    figure.text(0.01, 0.05, f"pictures: {listed}{more}", fontsize=8, va="top", wrap=True)
    return figure


def _cameras(
    panel: Axes,
    label: str,
    number: int,
    cameras: np.ndarray,
    centres: np.ndarray,
    axes: tuple[int, int],
    size: float,
) -> None:
    """Draws the cameras of one model: a dot each, a line along the optical axis, and the path between them."""
    colour, chosen = PALETTE[number], list(axes)
    forward = cameras[:, 2, :3]  # the third row of R: the optical axis in the frame of the first camera
    ends = centres + 1.6 * _LOOKS * size * forward
    panel.plot(*centres[:, chosen].T, "--", color=colour, linewidth=0.9, zorder=2)
    for centre, end in zip(centres[:, chosen], ends[:, chosen], strict=True):
        panel.plot(*np.stack([centre, end]).T, "-", color=colour, linewidth=1.8, zorder=3)
    marker, face = ("o", colour) if number == 0 else ("s", "white")
    panel.plot(
        *centres[:, chosen].T, marker, color=colour, markerfacecolor=face, markersize=6, label=f" {label}", zorder=4
    )


def _square(panel: Axes, places: np.ndarray, size: float) -> None:
    """Gives a panel equal axes around the places, wide enough for the drawn optical axes."""
    middle, half = (places.min(axis=0) + places.max(axis=0)) / 2, size * (0.5 + 2.2 * _LOOKS)
    panel.set_xlim(middle[0] - half, middle[0] + half)
    panel.set_ylim(middle[1] - half, middle[1] + half)
    panel.set_aspect("equal")
