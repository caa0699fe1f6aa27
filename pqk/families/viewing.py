"""Defines what a family says of its predictions to who looks at them (`ViewPart` of the contract).

`Geometry`: pictures of one scene, seen in depth. `Boxes`: what is found in pictures, each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Geometry:
    """What a model says of V pictures of a scene, in the frame of the first camera (x right, y down, z forward).

    Lengths are in one unit for all pictures, the model's own: a model that is right up to a scale has no metres.
    """

    names: tuple[str, ...]  # of the pictures
    images: np.ndarray  # (V,H,W,3) uint8, as they were fed
    depth: np.ndarray  # (V,H,W) float32, along the axis of each picture's own camera
    points: np.ndarray  # (V,H,W,3) float32
    confidence: np.ndarray  # (V,H,W) float32 of the points, higher is surer, of any scale
    cameras: np.ndarray  # (V,3,4) float64, from the frame of the first camera into each


@dataclass(frozen=True, eq=False)
class BoxedPicture:
    """What a model finds in one picture: D boxes, also those that it is hardly sure of. All numbers are finite."""

    name: str
    image: np.ndarray  # (h,w,3) uint8, as it was fed
    size: tuple[int, int]  # (height, width) of the picture in its file, in pixels
    boxes: np.ndarray  # (D,4), x1 y1 x2 y2 in pixels of the picture in its file, from its top-left corner
    scores: np.ndarray  # (D,), 0 to 1
    labels: np.ndarray  # (D,), numbers of the classes, from 0


@dataclass(frozen=True, eq=False)
class Boxes:
    """What a model finds in pictures."""

    pictures: tuple[BoxedPicture, ...]
