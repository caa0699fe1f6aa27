"""Reads annotations of CrowdHuman, one JSON object per line (odgt): `read_crowdhuman`.

    {"ID": "273271,c9db000d5146c15", "gtboxes": [{"tag": "person", "fbox": [x, y, width, height], "vbox": [...],
     "hbox": [...], "extra": {"ignore": 0}}, ...]}

The image of an ID is ID.jpg. There is one class, person. A box with the tag mask, and one whose `ignore` is 1 in
`extra` (for heads: in `head_attr`), marks a region in which what is found counts neither way, by the share of the found
box that lies inside: the same rule as COCO's crowds. Boxes of whole bodies include hidden parts, and so reach out of
the image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pqk.data.detection.entries import Boxes, Entry, Pictures, in_words, parse_json, picture_size, read_file
from pqk.data.detection.sample import DetectionSample, DetectionSet, Id, Objects, in_order
from pqk.errors import PqkError, nearest

Box = Literal["full", "visible", "head"]
KEYS = {"full": "fbox", "visible": "vbox", "head": "hbox"}
TAGS = ("person", "mask")


def read_crowdhuman(
    annotations: Path, images: Path, box: Box = "full", name: str | None = None, skip_missing: bool = False
) -> DetectionSet:
    """Returns the images of an odgt file.

    images: the folder of the pictures, whose headers are read for their sizes, as the file has none. box: which of the
    three boxes of a person counts. skip_missing: leave out images whose picture is not there, instead of an error.
    Boxes without an area are left out; the set's notes count them. Raises PqkError with one sentence for what is
    missing, malformed or unknown, and for two lines with one ID.
    """
    if box not in get_args(Box):
        raise PqkError(f"unknown box {box!r}{nearest(box, get_args(Box))}; allowed are {', '.join(get_args(Box))}")
    pictures, boxes = Pictures(images, skip_missing), Boxes("keep" if box == "full" else "cut")
    samples: list[DetectionSample] = []
    lines: dict[Id, int] = {}
    for number, line in enumerate(read_file(annotations).splitlines(), 1):
        if not line.strip():
            continue
        value = parse_json(line, f"{annotations}:{number}")
        if not isinstance(value, dict):
            raise PqkError(f"{annotations}:{number}: holds {in_words(value)}, expected an object with ID and gtboxes")
        entry = Entry(value, f"{annotations}:{number}")
        id = entry.path("ID")
        if "/" in id or "\\" in id:
            raise entry.refuse("ID", "the name of a picture without its suffix")
        if id in lines:
            raise PqkError(f"{entry.place}: ID is {id!r}, which line {lines[id]} has already")
        lines[id] = number
        path = pictures.find(entry.place, f"{id}.jpg")
        if path is not None:
            size = picture_size(path)
            samples.append(_objects(entry, box, boxes, size).sample(id, path, size))
    if not samples:
        raise PqkError(f"{annotations}: none of its images is there")
    notes = (*boxes.notes(), *pictures.notes(len(lines)))
    return DetectionSet(name or annotations.stem, ("person",), (1,), in_order(samples), notes, (annotations,))


def _objects(line: Entry, box: Box, boxes: Boxes, size: tuple[int, int]) -> Objects:
    """Returns the persons and the ignored regions of one line."""
    found, key = Objects(), KEYS[box]
    for index, item in enumerate(line.objects("gtboxes")):
        entry = Entry(item, f"{line.place}: gtboxes[{index}]")
        tag = entry.text("tag")
        if tag not in TAGS:
            raise entry.refuse("tag", f"person or mask{nearest(tag, TAGS)}")
        if box == "head" and tag == "mask" and key not in item:
            continue
        region = tag == "mask" or _ignored(entry, "head_attr" if box == "head" else "extra")
        placed = boxes.placed(entry, key, entry.box(key), *size)
        if placed is not None:
            found.add(placed, 0, crowd=region)
    return found


def _ignored(entry: Entry, key: str) -> bool:
    """Returns the flag `ignore` of an object inside the entry, which may be missing."""
    inner = entry.value.get(key, {})
    if not isinstance(inner, dict):
        raise entry.refuse(key, "an object")
    return Entry(inner, f"{entry.place}.{key}").flag("ignore")
