"""Chooses detections: the best pairs of box and class, suppression by class, and the way to the picture's size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pqk.families.diffusiondet.network.boxes import A, areas, joined, library_of

BLOCK = 128
"""Boxes that are compared with each other and with all kept ones at once. So few that torch starts no threads, which
would wait for those of an engine, and that no more are looked at than are needed.
"""
LARGEST_IOU = 0.5


class Detections(NamedTuple):
    """Detections of one image, the best first: boxes (D, 4) corners in pixels, scores (D,), labels (D,) int64.

    Tensors, or arrays of numpy.
    """

    boxes: Any
    scores: Any
    labels: Any

    def of(self, index: Any) -> Detections:
        """Returns the detections at an index, mask or slice."""
        return Detections(self.boxes[index], self.scores[index], self.labels[index])


def select(scores: A, boxes: A, most: int) -> Detections:
    """Returns the best `most` of all pairs of proposal and class. scores: (N, K), boxes: (N, 4).

    Of equal scores the first proposal, then the first class, comes first. No score is too low.
    """
    classes, flat = scores.shape[1], scores.reshape(-1)
    index = _best_first(flat)[:most]
    return Detections(boxes[index // classes], flat[index], index % classes)


def _best_first(scores: A) -> A:
    """Returns the order of scores from the best on, of equal ones the first one first."""
    return (-scores).argsort(stable=True)


def pooled(parts: list[Detections]) -> Detections:
    """Returns the detections of several steps as one set, in their order."""
    return Detections(*(joined(each, 0) for each in zip(*parts, strict=True)))


def suppress(
    found: Detections, most: float = LARGEST_IOU, enough: Callable[[Detections], bool] | None = None
) -> Detections:
    """Returns the detections without those that overlap a better one of their class by an IoU above `most`.

    Sorted by score, of equal scores the first one first. Boxes are not clipped before; empty ones overlap nothing.
    enough: asked of the best ones that stay; True ends the search, and no later ones are returned.
    """
    of, device = library_of(found.boxes), found.boxes.device
    found = found.of(_best_first(found.scores))
    kept = of.zeros(0, dtype=of.int64, device=device)
    for start in range(0, len(found.scores), BLOCK):
        block = of.arange(start, min(start + BLOCK, len(found.scores)), device=device)
        if len(kept):
            block = block[~_overlap(found, kept, block, most).any(0)]
        better = block[:, None] < block[None]  # only a better one suppresses
        inside = _overlap(found, block, block, most) & better
        stays = of.ones(len(block), dtype=of.bool, device=device)
        while True:  # a round settles at least one more box, from the best one on
            again = ~(inside & stays[:, None]).any(0)
            if bool((again == stays).all()):
                break
            stays = again
        kept = joined((kept, block[stays]), 0)
        if enough is not None and enough(found.of(kept)):
            break
    return found.of(kept)


def rescale(found: Detections, size: tuple[int, int], output: tuple[int, int]) -> Detections:
    """Returns boxes scaled from a `size` to an `output` (height, width), clipped to it, without empty ones."""
    of = library_of(found.boxes)
    factor, limit = (
        of.asarray(two * 2, dtype=found.boxes.dtype, device=found.boxes.device)
        for two in ([output[1] / size[1], output[0] / size[0]], [output[1], output[0]])
    )
    boxes = of.minimum((found.boxes * factor).clip(0), limit)
    return found._replace(boxes=boxes).of((boxes[:, 2:] > boxes[:, :2]).all(1))


def _overlap(found: Detections, one: A, other: A, most: float) -> Any:
    """Returns whether detections at `one` and at `other` have one class and an IoU above `most`.

    The IoU is that of `iou_and_union`, of each coordinate by itself: arrays of numpy with a last axis of 2 take twice
    the time.
    """
    of, mine, others = library_of(found.boxes), found.boxes[one], found.boxes[other]
    left, top, right, bottom = (
        pick(mine[:, None, side], others[None, :, side])
        for side, pick in enumerate((of.maximum, of.maximum, of.minimum, of.minimum))
    )
    shared = (right - left).clip(0) * (bottom - top).clip(0)
    union = areas(mine)[:, None] + areas(others)[None] - shared
    real = union > 0
    over = real & (shared / of.where(real, union, 1.0) > most)
    return over & (found.labels[one][:, None] == found.labels[other][None])
