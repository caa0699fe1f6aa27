"""Holds what families of detectors learn alike: the evidence of held-out batches, a Teacher that plays the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pqk.data.detection.sample import DetectionSample
from pqk.errors import PqkError
from pqk.families.contract import Batches, Sample, SampleSet
from pqk.families.detection import scoring
from pqk.families.detection.batches import Images, Pictured, batches_of
from pqk.families.detection.scoring import complete as complete
from pqk.families.detection.settings import Workload
from pqk.settings.training import Training

UNIT = "images"
SOURCE = "images of procedural rooms rendered as they are needed (pqk.data.detection), split 'train'"
REMEDY = "use images with objects"

Scored = list[list[dict[str, Any]]]


def as_exported(parts: Mapping[str, nn.Module], workload: Workload) -> None:
    """Does nothing: no module of a detector holds a size."""


def compiled(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns the parts under torch.compile; what makes their inputs of pictures of many sizes cannot be traced."""
    return {name: torch.compile(part) for name, part in parts.items()}  # type: ignore[misc]


def batches(
    asked: Training,
    device: torch.device,
    *,
    seed: int,
    held_seed: int,
    found: SampleSet | None = None,
    workload: Workload | None = None,
) -> Batches:
    """Returns batches of generated images, or of the user's own set or photographs; see `LearningPart`."""
    return batches_of(asked, device, seed, held_seed, found)


def evidence(found: Sequence[Mapping[str, np.ndarray]], batch: Images) -> Scored:
    """Returns the evidence of each image of a batch, given its detections in pixels of the picture."""
    samples = _samples(batch)
    return [[_scored(one, sample)] for one, sample in zip(found, samples, strict=True)]


def _scored(found: Mapping[str, np.ndarray], sample: Sample) -> dict[str, Any]:
    scored = scoring.score(found, sample, {}, 0)
    assert scored is not None  # the batch is known to have a truth
    return scored


def samples(batch: Images) -> int:
    """Returns the number of images."""
    return len(batch.pictures)


def share(batch: Images, first: int, last: int) -> Images:
    """Returns some of the images, with the noise and the padding that they have in the whole batch."""
    height, width = (max(one.image.shape[axis] for one in batch.pictures) for axis in (0, 1))
    return replace(batch, pictures=batch.pictures[first:last], first=batch.first + first, least=(height, width))


def floor(batch: Images) -> Scored:
    """Returns the evidence of a predictor that ignores its input; see `scoring.floor`."""
    return [[found] for sample in _samples(batch) if (found := scoring.floor(sample, {})) is not None]


def _samples(batch: Images) -> list[Sample]:
    """Returns the images of a batch as they are scored."""
    batch.targets()  # raises PqkError where there is no truth
    samples = []
    for number, one in enumerate(batch.pictures):
        name = ".".join(str(part) for part in (*batch.seed, batch.first + number))
        height, width = one.image.shape[:2]
        ignored = np.zeros(len(one.labels), bool)
        truth = DetectionSample(
            name, Path(name), width, height, one.boxes, one.labels, one.areas, ~one.counted, ignored
        )
        samples.append(Sample(number, name, None, scoring.Truth(truth, batch.classes)))
    return samples


def check_classes(batch: Images, classes: int) -> None:
    """Raises PqkError where a set to learn from has more classes than a network can tell apart."""
    if len(batch.classes) > classes:
        raise PqkError(
            f"the set has {len(batch.classes)} classes ({', '.join(batch.classes[:4])}, ...), and the network tells "
            f"{classes} apart; train on a set with the network's classes"
        )


def taught(batch: Images, found: Sequence[Mapping[str, np.ndarray]], classes: int) -> Images:
    """Returns the images with the Teacher's detections, of a score from `scoring.SURE` on, as their truth.

    found: the best first. Of each class at most as many count as COCO's AP looks at. classes: how many the network has,
    which are named by their numbers.
    """
    pictures = []
    for one, each in zip(batch.pictures, found, strict=True):
        sure = np.flatnonzero(each["scores"] >= scoring.SURE)
        best = [sure[each["labels"][sure] == label][: scoring.MAX_FOUND] for label in range(classes)]
        sure = np.sort(np.concatenate([np.zeros(0, np.int64), *best]))
        boxes = each["boxes"][sure]
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1, dtype=np.float64)
        pictures.append(Pictured(one.image, boxes, each["labels"][sure], areas, np.ones(len(boxes), bool)))
    names = tuple(f"class {label}" for label in range(classes))
    return replace(batch, pictures=pictures, classes=names, truthful=True)
