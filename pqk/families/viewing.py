"""Defines what a family says of its predictions to who looks at them: `ViewPart`, and `Geometry`, which is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from pqk.data.scenes.scene import Scene
    from pqk.families.contract import Sample


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


class ViewPart(Protocol):
    """What is drawn of a family's predictions."""

    def samples(self, scene: Scene, workload: Any, most: int) -> tuple[Any, list[Sample]]:
        """Returns samples that together show the first `most` pictures of a scene, and the workload that feeds them.

        The workload is the given one, or differs in how many pictures are fed at once. Raises PqkError for fewer than
        two pictures, and for what their files raise.
        """
        ...

    def view(self, samples: Sequence[Sample], predictions: Sequence[Mapping[str, np.ndarray]]) -> Geometry:
        """Returns what the predictions of `samples` say. Raises PqkError where nothing can be seen in them."""
        ...
