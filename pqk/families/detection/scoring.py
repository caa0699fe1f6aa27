"""Scores the detections of images against annotated objects, or against a Teacher's detections.

A prediction is a dict of numpy arrays: boxes (D,4) x1 y1 x2 y2 in pixels of the annotated image, scores (D,), labels
(D,), which are positions in the classes, and the network's raw outputs, which only a comparison of runtimes reads. The
metrics are COCO's, 0 to 100 (`pqk.families.metrics.detection_ap`):

| key | AP over the thresholds | of objects |
| --- | --- | --- |
| ap | .50:.05:.95 | all |
| ap50, ap75 | .50, .75 | all |
| ap_small, ap_medium, ap_large | .50:.05:.95 | of up to 32^2, up to 96^2, and more pixels |
| ap_CLASS | .50:.05:.95 | of a class; in the summary alone |

AP is no mean over images. So the evidence of an image holds what its found boxes met (`matches`), and `complete` gives
every image of a set a value of each metric whose mean is that of the set (`pqk.stats.jackknife`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pqk.data.detection.sample import DetectionSample, id_order
from pqk.errors import PqkError
from pqk.families.contract import Sample
from pqk.families.metrics.detection_ap import (
    AREAS,
    MAX_FOUND,
    THRESHOLDS,
    ClassMatches,
    Detections,
    ImageMatches,
    average_precision,
    leave_one_out,
    match_image,
)
from pqk.stats.jackknife import set_values

Prediction = Mapping[str, np.ndarray]
Evidence = dict[str, Any]

LOGITS = "logits"
OUTPUTS: dict[str, Literal["points", "values"]] = {LOGITS: "values", "refined": "values"}
"""Of a prediction, and how those of two runtimes are compared: raw outputs of the last call, (N, K) and (N, 4)."""

COLUMNS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "APs",
    "ap_medium": "APm",
    "ap_large": "APl",
}
"""Metric -> its name in `pqk.families.metrics.detection_ap`."""
MATCHES = "matches"
"""Key of what the found boxes of an image met."""
SURE = 0.5
"""Score from which a Teacher's detection is an object where it plays the truth."""
LONGEST_NAME = 32
"""Characters of a metric's name, as the ledger takes it."""


@dataclass(frozen=True, eq=False)
class Truth:
    """An annotated image, and the names of the classes that its labels count."""

    sample: DetectionSample
    classes: tuple[str, ...]


def score(prediction: Prediction, sample: Sample, options: Mapping[str, Any], seed: int) -> Evidence | None:
    """Returns the evidence of an image, under `MATCHES`; None without a truth.

    An image without objects has evidence too: what is found in it is wrong. Scores count as float32. Raises PqkError
    for missing arrays, shapes that do not belong together, numbers that are not finite, boxes of negative size, and
    labels of no class.
    """
    if sample.truth is None:
        return None
    truth: Truth = sample.truth
    found = _detections(prediction, len(truth.classes), "prediction")
    return {MATCHES: _packed(match_image(truth.sample, found), truth.classes)}


def needs(options: Mapping[str, Any]) -> str:
    """Returns what a sample must hold to be scored, for the end of a sentence."""
    return "annotated boxes"


def as_truth(prediction: Prediction, sample: Sample, config: Mapping[str, Any]) -> Sample:
    """Returns the sample with the Teacher's detections of a score of `SURE` or more in place of the truth.

    Of each class the best `MAX_FOUND` that have an area count, as large as their boxes, none as a crowd: so the Teacher
    itself has an AP of 100, as its less sure detections come behind all others. Classes are named by their numbers, as
    many as the logits have: nothing here knows their names. Raises PqkError as `score` does.
    """
    classes = prediction[LOGITS].shape[1]
    found = _detections(prediction, classes, "reference")
    if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
        raise PqkError("NaN refused: a box or score of the reference is not finite")
    areas = np.prod(found.boxes[:, 2:] - found.boxes[:, :2], 1)
    sure = np.flatnonzero((found.scores >= SURE) & (found.boxes[:, 2:] > found.boxes[:, :2]).all(1))
    sure = sure[np.argsort(-found.scores[sure], kind="stable")]
    kept = np.concatenate([np.zeros(0, np.int64), *(sure[found.labels[sure] == k][:MAX_FOUND] for k in range(classes))])
    none = np.zeros(len(kept), bool)
    truth = DetectionSample(
        sample.name, Path(sample.name), 0, 0, found.boxes[kept], found.labels[kept], areas[kept], none, none
    )  # sides are not known here, and match nothing
    return replace(sample, truth=Truth(truth, tuple(f"class {label}" for label in range(classes))))


def floor(sample: Sample, options: Mapping[str, Any]) -> Evidence | None:
    """Returns the evidence of a predictor that ignores its input: in every image one box of each class, of half the
    image's width and height in its centre, all equally sure. None as `score` does.
    """
    if sample.truth is None:
        return None
    truth: Truth = sample.truth
    width, height, count = truth.sample.width, truth.sample.height, len(truth.classes)
    box = np.array([width / 4, height / 4, 3 * width / 4, 3 * height / 4])
    found = Detections(np.tile(box, (count, 1)), np.full(count, 0.5), np.arange(count))
    return {MATCHES: _packed(match_image(truth.sample, found), truth.classes)}


def complete(evidence: Sequence[Mapping[str, Any]]) -> list[Evidence]:
    """Returns the evidence of all images of a set with a value of each metric for each image.

    Their mean is the metric of the set. A metric for which no object counts in the set is None. The order of the
    evidence plays no part. Raises PqkError as `summarise` does.
    """
    if not evidence:
        return []
    images, classes = _unpacked(evidence)
    whole = average_precision(images, classes).values
    without = leave_one_out(images, classes)
    columns = {
        name: [None] * len(images) if math.isnan(whole[key]) else set_values(whole[key], without[key].tolist())
        for name, key in COLUMNS.items()
    }
    return [{**row, **{name: columns[name][i] for name in COLUMNS}} for i, row in enumerate(evidence)]


def summarise(evidence: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns the metrics of a set of images, and ap_CLASS of each class; None where no object counts.

    Raises PqkError for no evidence, and for images of other classes than the first one's.
    """
    if not evidence:
        raise PqkError("nothing to summarise: no image was scored")
    images, classes = _unpacked(evidence)
    found = average_precision(images, class_metrics(classes))
    values = {**{name: found.values[key] for name, key in COLUMNS.items()}, **found.per_class}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def class_metrics(classes: Sequence[str]) -> tuple[str, ...]:
    """Returns the name of the metric of each class: ap_ and the class in lower case, of letters a to z, digits and _.

    At most 32 characters; a name that is another's already, or that nothing is left of, ends with the class's number.
    """
    names: list[str] = []
    for label, name in enumerate(classes):
        plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        own = f"ap_{plain}"[:LONGEST_NAME]
        if not plain or own in COLUMNS or own in names:
            end = f"_{label}"
            own = f"ap_{plain or 'class'}"[: LONGEST_NAME - len(end)] + end
        names.append(own)
    return tuple(names)


def _detections(prediction: Prediction, classes: int, name: str) -> Detections:
    """Raises PqkError for a missing array, shapes that do not belong together, and labels of no class."""
    for key in ("boxes", "scores", "labels"):
        if key not in prediction:
            raise PqkError(f"the {name} has no {key}; it has {', '.join(prediction) or 'nothing'}")
    boxes, labels = np.asarray(prediction["boxes"], np.float64), np.asarray(prediction["labels"])
    scores = np.asarray(prediction["scores"], np.float32)
    if scores.ndim != 1 or boxes.shape != (len(scores), 4) or labels.shape != scores.shape:
        raise PqkError(
            f"the {name} has boxes {boxes.shape}, scores {scores.shape} and labels {labels.shape}, "
            "expected (D, 4), (D,) and (D,)"
        )
    strange = labels[~((labels >= 0) & (labels < classes) & (labels == np.floor(labels)))]
    if len(strange):
        raise PqkError(f"the {name} has the label {strange[0]}, expected a class from 0 to {classes - 1}")
    return Detections(boxes, scores, labels.astype(np.int64))


def _packed(image: ImageMatches, classes: Sequence[str]) -> Evidence:
    """Returns the matches of an image as plain JSON, about 50 bytes for each found box.

    labels, scores: of the found boxes, by class, best first; scores are the shortest decimals that float32 tells apart.
    matched, ignored: 10 hexadecimal digits for each of them, bits of 4 ranges of areas by 10 thresholds. objects: how
    many count in each range, by label.
    """
    parts = image.classes
    scores = np.concatenate([np.zeros(0), *(part.scores for part in parts.values())]).astype(np.float32)
    return {
        "image": image.id,
        "classes": list(classes),
        "labels": [label for label, part in parts.items() for _ in part.scores],
        "scores": [float(str(score)) for score in scores],
        "matched": "".join(_hex(part.matched) for part in parts.values()),
        "ignored": "".join(_hex(part.ignored) for part in parts.values()),
        "objects": {str(label): part.objects.tolist() for label, part in parts.items() if part.objects.any()},
    }


def _hex(marks: np.ndarray) -> str:
    """Returns the digits of marks (A,T,D)."""
    return np.packbits(np.moveaxis(marks, -1, 0).reshape(-1, len(AREAS) * len(THRESHOLDS)), 1).tobytes().hex()


def _marks(digits: str) -> np.ndarray:
    """Returns marks (A,T,D), which `_hex` wrote."""
    size = len(AREAS) * len(THRESHOLDS)
    packed = np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(-1, size // 8)
    return np.moveaxis(np.unpackbits(packed, 1).astype(bool).reshape(-1, len(AREAS), len(THRESHOLDS)), 0, -1)


def _unpacked(evidence: Sequence[Mapping[str, Any]]) -> tuple[list[ImageMatches], tuple[str, ...]]:
    """Returns the matches of images, numbered from 0, and the names of the classes.

    Numbers follow ids, as equal scores do, and what was found where sets that were joined count ids alike: so the order
    of the evidence plays no part. Raises PqkError for images of other classes than the first one's.
    """
    packed = [row[MATCHES] for row in evidence]
    classes = packed[0]["classes"]
    if any(each["classes"] != classes for each in packed):
        raise PqkError("AP needs the same classes for all images of a set, and these were scored with different ones")
    order = sorted(range(len(packed)), key=lambda i: (id_order(packed[i]["image"]), json.dumps(packed[i])))
    number = {place: rank for rank, place in enumerate(order)}
    return [_image(number[place], each) for place, each in enumerate(packed)], tuple(classes)


def _image(number: int, packed: Mapping[str, Any]) -> ImageMatches:
    labels, scores = np.array(packed["labels"], np.int64), np.array(packed["scores"], np.float64)
    matched, ignored = _marks(packed["matched"]), _marks(packed["ignored"])
    objects = {int(label): np.array(counts, np.int64) for label, counts in packed["objects"].items()}
    none = np.zeros(len(AREAS), np.int64)
    found = {}
    for label in sorted({*labels.tolist(), *objects}):
        mine = labels == label
        found[label] = ClassMatches(scores[mine], matched[..., mine], ignored[..., mine], objects.get(label, none))
    return ImageMatches(number, found)
