"""Chooses detections: the best pairs of box and class, suppression by class, and the way to the picture's size."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pqk.families.diffusiondet.network.boxes import iou_and_union

BLOCK = 128
"""Boxes that are compared with each other and with all kept ones at once. So few that torch starts no threads, which
would wait for those of an engine, and that no more are looked at than are needed.
"""
LARGEST_IOU = 0.5


class Detections(NamedTuple):
    """Detections of one image, the best first: boxes (D, 4) corners in pixels, scores (D,), labels (D,) int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def of(self, index: Tensor | slice) -> Detections:
        """Returns the detections at an index, mask or slice."""
        return Detections(self.boxes[index], self.scores[index], self.labels[index])


def select(scores: Tensor, boxes: Tensor, most: int) -> Detections:
    """Returns the best `most` of all pairs of proposal and class. scores: (N, K), boxes: (N, 4).

    Of equal scores the first proposal, then the first class, comes first. No score is too low.
    """
    classes = scores.shape[1]
    best, index = scores.flatten().sort(descending=True, stable=True)
    best, index = best[:most], index[:most]
    return Detections(boxes[index // classes], best, index % classes)


def joined(parts: list[Detections]) -> Detections:
    """Returns the detections of several steps as one set, in their order."""
    return Detections(*(torch.cat(each) for each in zip(*parts, strict=True)))


def suppress(
    found: Detections, most: float = LARGEST_IOU, enough: Callable[[Detections], bool] | None = None
) -> Detections:
    """Returns the detections without those that overlap a better one of their class by an IoU above `most`.

    Sorted by score, of equal scores the first one first. Boxes are not clipped before; empty ones overlap nothing.
    enough: asked of the best ones that stay; True ends the search, and no later ones are returned.
    """
    found = found.of(found.scores.argsort(descending=True, stable=True))
    kept = torch.zeros(0, dtype=torch.int64, device=found.boxes.device)
    for start in range(0, len(found.scores), BLOCK):
        block = torch.arange(start, min(start + BLOCK, len(found.scores)), device=kept.device)
        block = block[~_overlap(found, kept, block, most).any(dim=0)]
        better = block[:, None] < block[None]  # only a better one suppresses
        inside = _overlap(found, block, block, most) & better
        stays = torch.ones(len(block), dtype=torch.bool, device=kept.device)
        while True:  # a round settles at least one more box, from the best one on
            again = ~(inside & stays[:, None]).any(dim=0)
            if torch.equal(again, stays):
                break
            stays = again
        kept = torch.cat((kept, block[stays]))
        if enough is not None and enough(found.of(kept)):
            break
    return found.of(kept)


def rescale(found: Detections, size: tuple[int, int], output: tuple[int, int]) -> Detections:
    """Returns boxes scaled from a `size` to an `output` (height, width), clipped to it, without empty ones."""
    factor = found.boxes.new_tensor([output[1] / size[1], output[0] / size[0]] * 2)
    limit = found.boxes.new_tensor([output[1], output[0]] * 2)
    boxes = torch.minimum((found.boxes * factor).clamp(min=0), limit)
    return found._replace(boxes=boxes).of((boxes[:, 2:] > boxes[:, :2]).all(dim=1))


def _overlap(found: Detections, one: Tensor, other: Tensor, most: float) -> Tensor:
    """Returns whether detections at `one` and at `other` have one class and an IoU above `most`."""
    iou, _ = iou_and_union(found.boxes[one][:, None], found.boxes[other][None])
    return (iou > most) & (found.labels[one][:, None] == found.labels[other][None])
