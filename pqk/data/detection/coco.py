"""Reads annotations in COCO's format, and the two formats that grew out of it, LVIS v1 and Objects365: `read_coco`.

    {"images": [{"id", "file_name", "width", "height"}, ...], "categories": [{"id", "name"}, ...],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height], "area", "iscrowd"}, ...]}

Ids are whole numbers of any size or texts, with gaps; a class is the position of its category in the order of the ids.
LVIS names a picture by `coco_url`, whose last two parts are its folder and file below the folder of the images. It
says of every image which classes are surely absent (`neg_category_ids`) or may have more objects than annotated
(`not_exhaustive_category_ids`). Objects365 writes images/v1/patch8/NAME, where its archives unpack to patch8/NAME. Keys
that are not needed are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, get_args
from urllib.parse import urlsplit

from pqk.data.detection.entries import Boxes, Entry, Pictures, in_words, parse_json, read_file
from pqk.data.detection.sample import DetectionSample, DetectionSet, Id, Objects, id_order, in_order
from pqk.data.scenes.names import stays_inside
from pqk.errors import PqkError, nearest

Kind = Literal["coco", "lvis", "objects365"]
OUTSIDE: dict[str, str] = {"coco": "refuse", "lvis": "refuse", "objects365": "cut"}
"""What happens to boxes that stick far out of their image, see `Boxes`: Objects365 has such boxes."""


def read_coco(
    annotations: Path, images: Path, kind: Kind = "coco", name: str | None = None, skip_missing: bool = False
) -> DetectionSet:
    """Returns the images of an annotation file; images without annotations are among them.

    images: the folder that the file's names are relative to. name: of the set; default: the file's. skip_missing: leave
    out images whose picture is not there, instead of an error. Boxes without an area are left out, those that stick out
    by more than 2 pixels are an error (Objects365: cut); the set's notes count them. Raises PqkError with one sentence
    for a file that is damaged or lacks a key, for a value that cannot be right, and for two entries with one id.
    """
    if kind not in get_args(Kind):
        raise PqkError(f"unknown kind {kind!r}{nearest(kind, get_args(Kind))}; allowed are {', '.join(get_args(Kind))}")
    value = parse_json(read_file(annotations), str(annotations))
    if not isinstance(value, dict):
        raise PqkError(
            f"{annotations}: holds {in_words(value)}, expected an object with images, annotations, categories"
        )
    top, pictures, boxes = Entry(value, str(annotations)), Pictures(images, skip_missing), Boxes(OUTSIDE[kind])
    names, labels = _categories(top)
    entries = _images(top)
    objects = _objects(top, entries, labels, boxes)
    samples = []
    for id, entry in entries.items():
        path = _picture(entry, pictures, kind)
        if path is None:
            continue
        absent, partial = None, frozenset[int]()
        if kind == "lvis":
            absent = _listed(entry, "neg_category_ids", labels)
            partial = _listed(entry, "not_exhaustive_category_ids", labels)
        size = entry.side("width"), entry.side("height")
        samples.append(objects[id].sample(id, path, size, absent, partial))
    notes = (*boxes.notes(), *pictures.notes(len(entries)))
    return DetectionSet(name or annotations.stem, names, tuple(labels), _some(samples, top), notes, (annotations,))


def _some(samples: list[DetectionSample], top: Entry) -> tuple[DetectionSample, ...]:
    if not samples:
        raise PqkError(f"{top.place}: none of its images is there")
    return in_order(samples)


def _categories(top: Entry) -> tuple[tuple[str, ...], dict[Id, int]]:
    """Returns the names of the classes, and the label of each category's id, in the order of the ids."""
    found: dict[Id, str] = {}
    for index, item in enumerate(top.objects("categories")):
        entry = Entry(item, f"{top.place}: categories[{index}]")
        id, name = entry.id(), entry.text("name")
        if id in found:
            raise PqkError(f"{entry.place}: id is {in_words(id)}, which category {found[id]!r} has already")
        if name in found.values():
            raise PqkError(f"{entry.place}: name is {name!r}, which another category has already")
        found[id] = name
    if not found:
        raise top.refuse("categories", "at least one category")
    ordered = sorted(found, key=id_order)
    return tuple(found[id] for id in ordered), {id: label for label, id in enumerate(ordered)}


def _images(top: Entry) -> dict[Id, Entry]:
    """Returns the entries of the images by id."""
    found: dict[Id, Entry] = {}
    for index, item in enumerate(top.objects("images")):
        entry = Entry(item, f"{top.place}: images[{index}]")
        id = entry.id()
        if id in found:
            raise PqkError(f"{entry.place}: id is {in_words(id)}, which {found[id].place.split(': ')[-1]} has already")
        found[id] = entry
    if not found:
        raise top.refuse("images", "at least one image")
    return found


def _objects(top: Entry, images: Mapping[Id, Entry], labels: Mapping[Id, int], boxes: Boxes) -> dict[Id, Objects]:
    """Returns the objects of every image, also of those that have none."""
    found = {id: Objects() for id in images}
    seen: set[Id] = set()
    for index, item in enumerate(top.objects("annotations")):
        entry = Entry(item, f"{top.place}: annotations[{index}]")
        id = entry.id()
        if id in seen:
            raise PqkError(f"{entry.place}: id is {in_words(id)}, which another annotation has already")
        seen.add(id)
        image = entry.known("image_id", images, "the id of one of the images")
        category = entry.known("category_id", labels, "the id of one of the categories")
        size = images[image].side("width"), images[image].side("height")
        box = boxes.placed(entry, "bbox", entry.box("bbox"), *size)
        if box is not None:
            found[image].add(box, labels[category], entry.area("area"), crowd=entry.flag("iscrowd"))
            found[image].ids.append(id)
    return found


def _picture(entry: Entry, pictures: Pictures, kind: Kind) -> Path | None:
    """Returns the file of an image; None for a missing one that is left out."""
    if kind == "lvis" and "file_name" not in entry.value:
        parts = PurePosixPath(urlsplit(entry.text("coco_url")).path).parts[-2:]
        name = "/".join(parts)
        if len(parts) < 2 or not stays_inside(name):
            raise entry.refuse("coco_url", "an address that ends with a folder and a file, .../train2017/NAME.jpg")
        return pictures.find(entry.place, name)
    name = entry.path("file_name")
    parts = PurePosixPath(name).parts
    if kind == "objects365" and parts[0] == "images" and len(parts) > 2:
        return pictures.find(entry.place, "/".join(parts[2:]), name)
    return pictures.find(entry.place, name)


def _listed(entry: Entry, key: str, labels: Mapping[Id, int]) -> frozenset[int]:
    """Returns the labels of a list of category ids."""
    found = entry.value.get(key)
    if not isinstance(found, list):
        raise entry.refuse(key, "a list of category ids")
    one = (Entry({key: id}, entry.place).known(key, labels, "the id of one of the categories") for id in found)
    return frozenset(labels[id] for id in one)
