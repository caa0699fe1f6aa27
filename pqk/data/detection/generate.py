"""Writes generated detection sets in COCO's format for `pqk data make --kind detection`: `make_set`.

    <out>/<split>-<seed>/images/000000.jpg
    <out>/<split>-<seed>/annotations.json       read by `read_coco`
    <out>/<split>-<seed>/set.json               how it was made, and what is in it

The image of an index is that of `split_seed(split, seed, index)`, so no two splits share one, and the first images of a
longer set are those of a shorter one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pqk.cores import allowed_cores
from pqk.data.detection.compose import CLASSES, LEAST_PIXELS, LEAST_SHARE, LEAST_SIDE, render_picture
from pqk.data.render.pool import in_processes, is_made
from pqk.data.render.synthetic import texture_bank
from pqk.errors import PqkError, nearest
from pqk.files import sha256_file, whole_folder
from pqk.settings.seeds import INDICES, LIMIT, SPLITS, split_seed

ANNOTATIONS, IMAGES, ABOUT = "annotations.json", "images", "set.json"
JPEG_QUALITY = 95
FILLINGS = ("usual", "crowded", "usual", "usual", "empty", "usual", "usual", "crowded", "usual", "usual")
"""Image i is filled as entry i modulo 10: one in ten is empty, two are crowded."""
MEDIUM, LARGE = 32**2, 96**2  # visible pixels from which COCO calls an object medium and large
WORTH = 32  # images; fewer take less time than the start of a process


@dataclass(frozen=True)
class SetPlan:
    """The settings of one generated set. width, height: pixels of its images. first: number of its first image."""

    split: str
    seed: int
    images: int
    width: int = 320
    height: int = 240
    first: int = 0

    @property
    def name(self) -> str:
        return f"{self.split}-{self.seed}"

    @property
    def indices(self) -> range:
        """Numbers of the images."""
        return range(self.first, self.first + self.images)


def make_set(out: Path, plan: SetPlan, jobs: int | None = None, done: Callable[[int], None] | None = None) -> Path:
    """Renders the planned set into `out`/<split>-<seed>, which is written whole or not at all; one that is there stays.

    jobs: number of processes, by default one for each core that this process may use, and for fewer than `WORTH` images
    this process alone. done: called with the number of images so far. Returns the folder. Raises PqkError for a plan
    with an impossible value, a folder that cannot be written, one that holds something else, and a process that was
    killed.
    """
    _check(plan)
    if jobs is not None and jobs < 1:
        raise PqkError(f"the number of jobs must be at least 1, got {jobs}")
    if out.exists() and not out.is_dir():
        raise PqkError(f"cannot write a set into {out}: it is a file, not a folder")
    target = out / plan.name
    if is_made(target, ABOUT, asdict(plan), "set"):
        return target
    jobs = min(jobs or (allowed_cores() if plan.images >= WORTH else 1), plan.images)
    with whole_folder(target) as folder:
        (folder / IMAGES).mkdir()
        found: list[dict[str, Any]] = []
        for index, (data, objects) in zip(plan.indices, _rendered(plan, jobs), strict=True):
            (folder / IMAGES / _file(index)).write_bytes(data)
            found.append(objects)
            if done:
                done(len(found))
        _write(folder / ANNOTATIONS, _coco(plan, found))
        _write(folder / ABOUT, {**asdict(plan), **_about(found, sha256_file(folder / ANNOTATIONS))}, indent=2)
    return target


def _check(plan: SetPlan) -> None:
    if plan.split not in SPLITS:
        raise PqkError(f"unknown split {plan.split!r}{nearest(plan.split, SPLITS)}; allowed are {', '.join(SPLITS)}")
    for name, value, low, high in (
        ("seed of a set", plan.seed, 0, LIMIT - 1),
        ("number of the first image", plan.first, 0, INDICES - 1),
        ("number of images", plan.images, 1, INDICES - plan.first),
        ("width of an image", plan.width, 64, 2048),
        ("height of an image", plan.height, 64, 2048),
    ):
        if not low <= value <= high:
            raise PqkError(f"the {name} must be from {low} to {high}, got {value}")


def _file(index: int) -> str:
    return f"{index:06d}.jpg"


def _rendered(plan: SetPlan, jobs: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields file and objects of every image in order."""
    if jobs == 1:
        yield from (render_image(plan, index) for index in plan.indices)
        return
    yield from in_processes(partial(render_image, plan), plan.indices, jobs, "images", chunk=8)


def render_image(plan: SetPlan, index: int) -> tuple[bytes, dict[str, Any]]:
    """Returns the JPEG file of one image of a set, and `labels`, `boxes` and `areas` of its objects as lists.

    boxes: x1, y1, x2, y2 in pixels. areas: visible pixels.
    """
    filling = FILLINGS[index % len(FILLINGS)]
    seed = split_seed(plan.split, plan.seed, index)
    picture = render_picture(seed, filling, plan.width, plan.height, texture_bank())
    buffer = io.BytesIO()
    Image.fromarray(picture.pixels).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    labels = [CLASSES.index(picture.names[k]) for k in picture.seen]
    return buffer.getvalue(), {"labels": labels, "boxes": picture.boxes.tolist(), "areas": picture.areas.tolist()}


def _coco(plan: SetPlan, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the annotations: ids count from 1, boxes are x, y, width, height, areas are visible pixels."""
    images = [{"id": i + 1, "file_name": _file(i), "width": plan.width, "height": plan.height} for i in plan.indices]
    annotations: list[dict[str, Any]] = []
    for i, objects in zip(plan.indices, found, strict=True):
        for label, (x1, y1, x2, y2), area in zip(objects["labels"], objects["boxes"], objects["areas"], strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _about(found: list[dict[str, Any]], annotations_sha256: str) -> dict[str, Any]:
    """Returns what the set holds: classes, sizes as COCO calls them, empty images, and what counts as visible."""
    labels = np.array([label for objects in found for label in objects["labels"]], np.int64)
    areas = np.array([area for objects in found for area in objects["areas"]], np.int64)
    counts = [len(objects["labels"]) for objects in found]
    sizes = np.bincount((areas > MEDIUM).astype(int) + (areas > LARGE), minlength=3)
    return {
        "objects": len(labels),
        "classes": dict(zip(CLASSES, np.bincount(labels, minlength=len(CLASSES)).tolist(), strict=True)),
        "sizes": dict(zip(("small", "medium", "large"), sizes.tolist(), strict=True)),
        "empty_images": counts.count(0),
        "most_objects": max(counts),
        "visible": {"pixels": LEAST_PIXELS, "side": LEAST_SIDE, "share": LEAST_SHARE},
        "annotations_sha256": annotations_sha256,
    }


def _write(path: Path, value: dict[str, Any], indent: int | None = None) -> None:
    path.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n", encoding="utf-8")
