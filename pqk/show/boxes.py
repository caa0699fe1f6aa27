"""Draws what one or two models find in pictures, `draw_found`, and says how far two agree, `agreement`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pqk.errors import PqkError
from pqk.families.metrics.boxes import paired_overlaps
from pqk.families.viewing import BoxedPicture, Boxes
from pqk.files import write_json
from pqk.report.show.boxes import Panel, draw_boxes
from pqk.report.show.depth import MOST_ROWS, short

LEAST_SCORE = 0.3
"""Boxes that a model is less sure of are left out."""
LEAST_IOU = 0.5
"""Intersection over union from which boxes of one class are the same to two models."""


@dataclass(frozen=True)
class Agreement:
    """How far two models find the same: for each picture how many boxes they have, and the IoU of those they share."""

    boxes: tuple[tuple[int, int], ...]
    shared: tuple[tuple[float, ...], ...]

    @property
    def shares(self) -> tuple[float | None, float | None]:
        """Returns the share of the first model's boxes that the second has too, and the reverse; None without boxes."""
        pairs = sum(map(len, self.shared))
        first, second = (sum(counts) for counts in zip(*self.boxes, strict=True))
        return pairs / first if first else None, pairs / second if second else None

    @property
    def mean_iou(self) -> float | None:
        """Returns the mean over all shared boxes; None without any."""
        return _mean([iou for each in self.shared for iou in each])

    @property
    def sentence(self) -> str:
        """Returns the agreement in words."""
        first, second = (sum(counts) for counts in zip(*self.boxes, strict=True))
        iou = "" if self.mean_iou is None else f", their mean IoU is {self.mean_iou:.3g}"
        return f"{sum(map(len, self.shared))} boxes are shared, of {first} and {second}{iou}"


def agreement(first: Boxes, second: Boxes) -> Agreement:
    """Returns how far two models agree on the same pictures. Raises PqkError for other pictures."""
    seen = [[(picture.name, picture.size) for picture in side.pictures] for side in (first, second)]
    if seen[0] != seen[1]:
        names = [", ".join(name for name, _ in each) for each in seen]
        raise PqkError(f"the two models show other pictures: {names[0]}, and {names[1]}")
    pairs = list(zip(first.pictures, second.pictures, strict=True))
    return Agreement(
        tuple((len(one.boxes), len(other.boxes)) for one, other in pairs),
        tuple(paired_overlaps(a.boxes, a.labels, b.boxes, b.labels, LEAST_IOU) for a, b in pairs),
    )


def draw_found(
    scene: str, labels: Sequence[str], sides: Sequence[Boxes], out: Path
) -> tuple[tuple[Path, ...], Agreement | None]:
    """Writes boxes.png, the first pictures with the boxes of one or two models, and show.json, with those of all.

    Boxes of a score below `LEAST_SCORE` count nowhere. Returns the files, and the agreement of two sides. Raises
    PqkError for sides of other pictures.
    """
    sides = [Boxes(tuple(map(_sure, side.pictures))) for side in sides]
    found = agreement(*sides) if len(sides) > 1 else None
    files = (out / "boxes.png", out / "show.json")
    left_out = len(sides[0].pictures) - MOST_ROWS
    more = f" ({left_out} more pictures are not drawn)" if left_out > 0 else ""
    title = f"{scene}: {' against '.join(labels)}\nclass and score of boxes with a score of {LEAST_SCORE} or more{more}"
    if found is not None:
        title += f"\n{found.sentence}"
    rows = zip(*(side.pictures[:MOST_ROWS] for side in sides), strict=True)
    draw_boxes(files[0], [_panel(*each, len(sides)) for row in rows for each in zip(row, labels, strict=True)], title)
    write_json(files[1], _numbers(scene, labels, sides, found))
    return files, found


def _sure(picture: BoxedPicture) -> BoxedPicture:
    kept = picture.scores >= LEAST_SCORE
    return replace(picture, boxes=picture.boxes[kept], scores=picture.scores[kept], labels=picture.labels[kept])


def _panel(picture: BoxedPicture, label: str, sides: int) -> Panel:
    count = len(picture.boxes)
    beside = f", {short(label)}" if sides > 1 else ""
    head = f"{short(picture.name)}{beside}: {count or 'no'} {'box' if count == 1 else 'boxes'}"
    return Panel(head, picture.image, picture.size, picture.boxes, picture.scores, picture.labels)


def _numbers(scene: str, labels: Sequence[str], sides: Sequence[Boxes], found: Agreement | None) -> dict[str, Any]:
    """Returns what show.json holds."""
    pictures = sides[0].pictures
    return {
        "scene": scene,
        "pictures": [picture.name for picture in pictures],
        "sizes": [[picture.size[1], picture.size[0]] for picture in pictures],
        "models": list(labels),
        "least_score": LEAST_SCORE,
        "found": [[_boxes(picture) for picture in side.pictures] for side in sides],
        "comparison": None
        if found is None
        else {
            "least_iou": LEAST_IOU,
            "share_of_first_in_second": found.shares[0],
            "share_of_second_in_first": found.shares[1],
            "mean_iou": found.mean_iou,
            "boxes": [list(counts) for counts in found.boxes],
            "shared": [len(each) for each in found.shared],
            "mean_ious": [_mean(each) for each in found.shared],
        },
    }


def _boxes(picture: BoxedPicture) -> list[dict[str, Any]]:
    rows = zip(picture.labels.tolist(), picture.scores.tolist(), picture.boxes.tolist(), strict=True)
    return [{"class": label, "score": score, "box": box} for label, score, box in rows]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
