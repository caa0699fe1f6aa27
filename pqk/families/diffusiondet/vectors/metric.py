"""Runs the case of the metric: AP of found boxes, of every class, and the mean over runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pqk.data.detection.sample import DetectionSample, Objects
from pqk.families.metrics.detection_ap import METRICS, Detections, average_precision, match_image
from pqk.families.vectors import BadCase, Case, Compared, compare

MARK = 1e-6


def coco_metric(case: Case) -> Iterator[Compared]:
    """AP on the scale from 0 to 100 from gt.json and dt.json, NaN without truth; mean and spread of runs."""
    truth, found = (_json(case, name) for name in ("gt.json", "dt.json"))
    categories = sorted(truth["categories"], key=lambda each: each["id"])
    label = {each["id"]: place for place, each in enumerate(categories)}
    matches = [
        match_image(
            _sample(case, image, truth, label), _detections([f for f in found if f["image_id"] == image["id"]], label)
        )
        for image in truth["images"]
    ]
    scores = average_precision(matches, [each["name"] for each in categories])
    stats, per_class = case.need("stats"), case.need("per_class_AP")
    for name in METRICS:
        yield compare(f"stats.{name}", scores.values[name], _number(stats[name]), MARK)
    for name, value in scores.per_class.items():
        yield compare(f"per_class_AP.{name}", value, _number(per_class[name]), MARK)
    runs = np.array(case.need("runs_ap"), np.float64)
    yield compare("runs_flat_mean", runs.mean(), case.need("runs_flat_mean"), MARK)
    yield compare("runs_flat_std", runs.std(), case.need("runs_flat_std"), MARK)
    yield compare("runs_group_mean", runs.mean(1), case.need("runs_group_mean"), MARK)
    yield compare("runs_group_std", runs.std(1), case.need("runs_group_std"), MARK)


def _json(case: Case, name: str) -> Any:
    try:
        return json.loads((case.path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCase(f"{case.path / name} is missing or no JSON: {error}") from error


def _sample(
    case: Case, image: Mapping[str, Any], truth: Mapping[str, Any], label: Mapping[Any, int]
) -> DetectionSample:
    """Returns an image's truth; the case has no pictures, and the metric needs none."""
    objects = Objects()
    for each in truth["annotations"]:
        if each["image_id"] == image["id"]:
            x, y, width, height = each["bbox"]
            objects.add((x, y, x + width, y + height), label[each["category_id"]], each["area"], bool(each["iscrowd"]))
    return objects.sample(image["id"], case.path / image["file_name"], (image["width"], image["height"]))


def _detections(found: list[Mapping[str, Any]], label: Mapping[Any, int]) -> Detections:
    boxes = np.array([each["bbox"] for each in found], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.array([each["score"] for each in found], np.float64)
    return Detections(boxes, scores, np.array([label[each["category_id"]] for each in found], np.int64))


def _number(value: float | None) -> float:
    return np.nan if value is None else value


KINDS = {"diffusiondet_coco_metric": coco_metric}
