"""Pictures of coloured rectangles with their boxes, and batches of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pqk.families.detection.batches import Drawn, Images, Pictured
from pqk.settings.training import TrainSpec

COLOURS = np.array([[230, 30, 30], [30, 230, 30], [30, 30, 230]], np.uint8)
"""Of the objects, by label."""


def rectangles(seed: int, width: int = 96, height: int = 64, most: int = 3) -> Pictured:
    """A grey picture with one rectangle of each label, none over another, in a third of the width each."""
    random = np.random.default_rng(seed)
    image = np.full((height, width, 3), 128, np.uint8)
    labels = np.arange(most) % 3
    boxes = []
    for place, label in enumerate(labels):
        left, room = place * width // most, width // most
        w, h = random.integers(room // 3, room - 4), random.integers(height // 4, height * 3 // 4)
        x, y = left + random.integers(1, room - w), random.integers(1, height - h)
        image[y : y + h, x : x + w] = COLOURS[label]
        boxes.append([x, y, x + w, y + h])
    array = np.array(boxes, np.float32)
    areas = np.prod(array[:, 2:] - array[:, :2], axis=1).astype(np.float64)
    return Pictured(image, array, labels.astype(np.int64), areas, np.ones(most, bool))


def shapes_batch(count: int, classes: tuple[str, ...] = ("red", "green", "blue"), held: bool = False) -> Images:
    return Images([rectangles(k) for k in range(count)], classes, (0, 0), torch.device("cpu"), held)


def asked(pairs: int = 3, size: int = 96, steps: int = 2, **changes: Any) -> TrainSpec:
    """The settings of a short training."""
    return TrainSpec.model_validate(
        {
            "model": "toy",
            "steps": steps,
            "stages": [{"size": size, "batch": 2, "until": 1.0}],
            "validation": {"size": size, "pairs": pairs, "every": 1},
            **changes,
        }
    )


class Shapes:
    """A source of pictures that counts how often it was asked."""

    def __init__(self, count: int, width: int = 96, height: int = 64) -> None:
        self.count, self.width, self.height, self.asked = count, width, height, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pictured:
        self.asked += 1
        return rectangles(index, self.width, self.height)


def drawn(spec: TrainSpec, count: int = 8, seed: int = 0) -> Drawn:
    sources = Shapes(count), Shapes(count)
    return Drawn(spec, torch.device("cpu"), seed, 5, sources, ("red", "green", "blue"))
