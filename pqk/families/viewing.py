"""Defines `Geometry`: what a family says of its predictions to who looks at them (`ViewPart` of the contract)."""

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
