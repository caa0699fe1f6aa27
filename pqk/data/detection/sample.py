"""Holds images with annotated objects in one form, whatever file they came from: `DetectionSample`, `DetectionSet`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pqk.data.scenes.picture import read_picture, upright
from pqk.errors import PqkError

Id = int | str
"""An id as the file has it: 7 and "7" are two ids."""


@dataclass(frozen=True, eq=False)
class DetectionSample:
    """One image with its N annotated objects; an image may have none.

    boxes (N,4) float32: x1 y1 x2 y2 in pixels. The top-left corner of the image is (0, 0), so the box of its first
    pixel is 0 0 1 1. labels (N,) int64: positions in the set's `classes`. areas (N,) float64 square pixels, by which
    the metric calls an object small or large: that of the object's mask where the file has it, else of the box.
    crowd (N,) bool: the region holds objects that are not annotated singly; what is found inside counts neither way.
    ignored (N,) bool: a single object that counts neither way, such as VOC's difficult ones.
    ids: of the annotations, () where the format has none. absent: labels that are known to have no object here, and
    partial: labels of which there may be more objects than annotated (LVIS); absent is None where every class is
    annotated in every image.
    """

    id: Id
    image_path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray
    ids: tuple[Id, ...] = ()
    absent: frozenset[int] | None = None
    partial: frozenset[int] = frozenset()

    def load_image(self) -> np.ndarray:
        """Returns the image (H,W,3) uint8 RGB, turned as its EXIF says.

        Raises PqkError for a file that is missing, damaged or no picture, and for one of another size than annotated.
        """
        try:
            image = upright(*read_picture(self.image_path))
        except ValueError as error:
            raise PqkError(str(error)) from None
        if image.size != (self.width, self.height):
            raise PqkError(
                f"{self.image_path}: the image has {image.size[0]}x{image.size[1]} pixels, its annotation is for "
                f"{self.width}x{self.height}; give the image that was annotated"
            )
        return np.asarray(image.convert("RGB"))


@dataclass(frozen=True, eq=False)
class DetectionSet:
    """Annotated images in the order of their ids, and the classes that their labels count.

    category_ids: the id that the file has for each class, in the order of `classes`. notes: sentences on what was left
    out or changed, and how often. files: the annotation files that were read.
    """

    name: str
    classes: tuple[str, ...]
    category_ids: tuple[Id, ...]
    samples: tuple[DetectionSample, ...]
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def counts(self) -> dict[str, int]:
        """Returns how many objects each class has, without crowds and ignored ones."""
        counted = [sample.labels[~(sample.crowd | sample.ignored)] for sample in self.samples]
        labels = np.concatenate([np.zeros(0, np.int64), *counted])
        return dict(zip(self.classes, np.bincount(labels, minlength=len(self.classes)).tolist(), strict=True))


@dataclass
class Objects:
    """Collects the objects of one image while its file is read."""

    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    ignored: list[bool] = field(default_factory=list)
    ids: list[Id] = field(default_factory=list)

    def add(
        self,
        box: tuple[float, float, float, float],
        label: int,
        area: float | None = None,
        crowd: bool = False,
        ignored: bool = False,
    ) -> None:
        """Adds one object; without an area, the box's counts."""
        self.boxes.append(box)
        self.labels.append(label)
        self.areas.append((box[2] - box[0]) * (box[3] - box[1]) if area is None else area)
        self.crowd.append(crowd)
        self.ignored.append(ignored)

    def sample(
        self,
        id: Id,
        image_path: Path,
        size: tuple[int, int],
        absent: frozenset[int] | None = None,
        partial: frozenset[int] = frozenset(),
    ) -> DetectionSample:
        """Returns the sample of an image of this size, (width, height)."""
        return DetectionSample(
            id,
            image_path,
            *size,
            np.array(self.boxes, np.float32).reshape(-1, 4),
            np.array(self.labels, np.int64),
            np.array(self.areas, np.float64),
            np.array(self.crowd, bool),
            np.array(self.ignored, bool),
            tuple(self.ids),
            absent,
            partial,
        )


def id_order(id: Id) -> tuple[bool, int, str]:
    """Returns a sort key of ids: numbers by value come before texts."""
    return (True, 0, id) if isinstance(id, str) else (False, id, "")


def in_order(samples: Sequence[DetectionSample]) -> tuple[DetectionSample, ...]:
    """Returns samples in the order of their ids, which is the order in which COCO's metric takes them."""
    return tuple(sorted(samples, key=lambda sample: id_order(sample.id)))
