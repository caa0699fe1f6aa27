"""Small detection sets in the official formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(path: Path, width: int = 40, height: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)
    return path


def coco() -> dict[str, Any]:
    """Three images, one of them empty; categories with gaps, out of order; a crowd; ids beyond 32 bits and texts."""
    return {
        "info": {},
        "images": [
            {"id": 9007199254740993, "file_name": "b.jpg", "width": 40, "height": 30},
            {"id": 12, "file_name": "sub/a.jpg", "width": 40, "height": 30},
            {"id": "empty", "file_name": "c.jpg", "width": 40, "height": 30},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 12, "category_id": 90, "bbox": [1, 2, 10, 5], "area": 31.5, "iscrowd": 0},
            {"id": "x", "image_id": 12, "category_id": 1, "bbox": [0, 0, 40, 30], "area": 900, "iscrowd": 1},
            {"id": 3, "image_id": 9007199254740993, "category_id": 18, "bbox": [3.5, 4.25, 6, 7]},
        ],
    }


def lvis() -> dict[str, Any]:
    """Two images, whose classes are not all annotated."""
    address = "http://images.cocodataset.org/train2017/"
    lists = {"neg_category_ids": [2], "not_exhaustive_category_ids": [1]}
    return {
        "images": [
            {"id": 5, "coco_url": address + "5.jpg", "width": 40, "height": 30, **lists},
            {
                "id": 6,
                "coco_url": address + "6.jpg",
                "width": 40,
                "height": 30,
                "neg_category_ids": [],
                "not_exhaustive_category_ids": [],
            },
        ],
        "categories": [{"id": i, "name": name, "frequency": "r"} for i, name in ((1, "cup"), (2, "hat"), (3, "jar"))],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 1, "bbox": [1, 2, 10, 5], "area": 40.0}],
    }


def written(folder: Path, value: dict[str, Any], name: str = "instances.json", pictures: bool = True) -> Path:
    """Writes an annotation file, and its pictures into images/."""
    if pictures:
        for image in value["images"]:
            file = image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:])
            picture(folder / "images" / file)
    (folder / name).write_text(json.dumps(value))
    return folder / name


VOC = """<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename>
<size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>person</name><pose>Left</pose><difficult>0</difficult>
  <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>
  <part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part></object>
<object><name>dog</name><difficult>1</difficult>
  <bndbox><xmin>5</xmin><ymin>6.5</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>
</annotation>"""


def voc(folder: Path, *names: str, text: str = VOC) -> Path:
    """Writes a VOC folder with these images, all in the list test.txt."""
    for name in names:
        picture(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / "Annotations" / f"{name}.xml").write_text(text.replace("{name}", name))
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "test.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def crowd_line(**changes: Any) -> dict[str, Any]:
    boxes = [
        {
            "tag": "person",
            "fbox": [-5, 2, 20, 40],
            "vbox": [0, 2, 15, 28],
            "hbox": [2, 3, 5, 5],
            "extra": {"box_id": 0, "occ": 1},
            "head_attr": {"ignore": 1},
        },
        {"tag": "mask", "fbox": [20, 3, 15, 20], "vbox": [20, 3, 15, 20], "extra": {"ignore": 1}},
    ]
    return {"ID": "273271,c9db000d5146c15", "gtboxes": boxes, **changes}


def crowdhuman(folder: Path, *lines: dict[str, Any]) -> Path:
    """Writes an odgt file, with a picture for every line."""
    for line in lines:
        picture(folder / "Images" / f"{line['ID']}.jpg")
    (folder / "train.odgt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.odgt"
