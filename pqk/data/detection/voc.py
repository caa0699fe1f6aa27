"""Reads annotations of PASCAL VOC, one XML file per image: `read_voc`.

    Annotations/000005.xml      <annotation> with filename, size, and an object (name, bndbox, difficult) for each
    JPEGImages/000005.jpg
    ImageSets/Main/test.txt     names without suffix, one a line

The devkit counts pixels from 1 and a box includes its last pixel: xmin ymin xmax ymax become xmin-1 ymin-1 xmax ymax.
Objects that are marked difficult count neither way in the metric. XML is read without a document type: entities that
are expanded, or that name other files, need one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from pqk.data.detection.entries import Boxes, Entry, Pictures, is_number, read_file
from pqk.data.detection.sample import DetectionSample, DetectionSet, Objects
from pqk.data.scenes.names import natural, stays_inside
from pqk.errors import PqkError, first_line, nearest
from pqk.files import matching
from pqk.oserrors import cannot_read

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The 20 classes of VOC 2007 to 2012."""
MAX_BYTES = 10_000_000
"""An annotation file has a few thousand bytes."""


def read_voc(
    annotations: Path,
    images: Path,
    listed: Path | None = None,
    classes: Sequence[str] = CLASSES,
    name: str | None = None,
    skip_missing: bool = False,
) -> DetectionSet:
    """Returns the images of a folder of XML files, in the natural order of their names.

    listed: a file with the names that count, one a line, of which only the first word is read; default: every XML file.
    skip_missing: leave out images whose picture is not there, instead of an error. Boxes without an area are left out;
    the set's notes count them. Raises PqkError with one sentence for what is missing, malformed or unknown.
    """
    if len(set(classes)) < len(classes) or not classes:
        raise PqkError(f"the classes {', '.join(classes) or '()'} must be at least one name, each given once")
    try:
        found = [path.stem for path in matching(annotations, "*.xml")]
    except OSError as error:
        raise PqkError(cannot_read(annotations, error)) from None
    if not found:
        raise PqkError(f"{annotations}: no XML file is in this folder")
    names = found if listed is None else _names(listed, found, annotations)
    pictures, boxes = Pictures(images, skip_missing), Boxes()
    samples = [
        _sample(annotations / f"{each}.xml", each, classes, pictures, boxes) for each in sorted(names, key=natural)
    ]
    there = tuple(sample for sample in samples if sample is not None)
    if not there:
        raise PqkError(f"{annotations}: none of its images is in {images}")
    notes = (*boxes.notes(), *pictures.notes(len(samples)))
    files = (annotations,) if listed is None else (annotations, listed)
    numbers = tuple(range(len(classes)))
    return DetectionSet(name or (listed or annotations).stem, tuple(classes), numbers, there, notes, files)


def _names(listed: Path, found: Sequence[str], annotations: Path) -> list[str]:
    """Returns the names of a list, each of which must have an XML file."""
    try:
        lines = read_file(listed).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise PqkError(f"{listed}: is not UTF-8 text (byte {error.start} cannot be read)") from None
    known, names = set(found), dict[str, None]()
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if words[0] not in known:
            raise PqkError(
                f"{listed}:{number}: {words[0]!r} has no file {words[0]}.xml in {annotations}"
                f"{nearest(words[0], list(found)[:10000])}"
            )
        if words[0] in names:
            raise PqkError(f"{listed}:{number}: {words[0]!r} is listed twice")
        names[words[0]] = None
    if not names:
        raise PqkError(f"{listed}: lists no image")
    return list(names)


def parse_xml(path: Path) -> ElementTree.Element:
    """Returns the root of an XML file in UTF-8 without a document type. Raises PqkError for any other."""
    data = read_file(path)
    if len(data) > MAX_BYTES:
        raise PqkError(f"{path}: is larger than {MAX_BYTES} bytes, the limit for an annotation file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PqkError(f"{path}: is not UTF-8 text (byte {error.start} cannot be read)") from None
    if "<!doctype" in text.lower() or "<!entity" in text.lower():
        raise PqkError(f"{path}: has a document type (<!DOCTYPE ...>), which annotation files have not; take it out")
    try:
        return ElementTree.fromstring(text)  # text: a declared encoding has no effect
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise PqkError(f"{path}: is not XML ({first_line(error)}); copy it again") from None


def _sample(path: Path, name: str, classes: Sequence[str], pictures: Pictures, boxes: Boxes) -> DetectionSample | None:
    """Returns the sample of one XML file; None where its picture is missing and may be left out."""
    root = parse_xml(path)
    if root.tag != "annotation":
        raise PqkError(f"{path}: the root is <{root.tag}>, expected <annotation>")
    file = _text(root, "filename", f"{name}.jpg", path)
    if not stays_inside(file):
        raise PqkError(
            f"{path}: filename is {file!r}, expected a relative path that stays inside the folder of the images"
        )
    image = pictures.find(str(path), file)
    if image is None:
        return None
    size = root.find("size")
    if size is None:
        raise PqkError(f"{path}: size is missing, expected width and height")
    width, height = (_number(size, key, path, "size") for key in ("width", "height"))
    if width < 1 or height < 1 or width % 1 or height % 1:
        raise PqkError(f"{path}: size is {width:g}x{height:g}, expected whole numbers of pixels, at least 1")
    objects = Objects()
    for index, found in enumerate(root.findall("object")):
        where = f"object[{index}]"
        label = _text(found, "name", None, path, where)
        if label not in classes:
            raise PqkError(
                f"{path}: {where}.name is {label!r}{nearest(label, classes)}, expected one of {', '.join(classes)}"
            )
        difficult = _text(found, "difficult", "0", path, where)
        if difficult not in ("0", "1"):
            raise PqkError(f"{path}: {where}.difficult is {difficult!r}, expected 0 or 1")
        corners = found.find("bndbox")
        if corners is None:
            raise PqkError(f"{path}: {where}.bndbox is missing, expected xmin, ymin, xmax, ymax")
        x1, y1, x2, y2 = (_number(corners, key, path, f"{where}.bndbox") for key in ("xmin", "ymin", "xmax", "ymax"))
        if x2 < x1 or y2 < y1:
            raise PqkError(
                f"{path}: {where}.bndbox is {x1:g} {y1:g} {x2:g} {y2:g}, expected xmin <= xmax and ymin <= ymax"
            )
        entry = Entry({"bndbox": [x1, y1, x2, y2]}, f"{path}: {where}")
        box = boxes.placed(entry, "bndbox", (x1 - 1, y1 - 1, x2, y2), int(width), int(height))
        if box is not None:
            objects.add(box, classes.index(label), ignored=difficult == "1")
    return objects.sample(name, image, (int(width), int(height)))


def _text(parent: ElementTree.Element, key: str, default: str | None, path: Path, where: str = "") -> str:
    """Returns the text of an element, without blanks around it."""
    found = (parent.findtext(key) or "").strip() or default
    if found is None:
        raise PqkError(f"{path}: {where}.{key} is missing or empty, expected text")
    return found


def _number(parent: ElementTree.Element, key: str, path: Path, where: str) -> float:
    """Returns the number in an element: official files hold a few that are not whole."""
    text = (parent.findtext(key) or "").strip()
    try:
        found = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        found = math.nan
    if not is_number(found):
        raise PqkError(f"{path}: {where}.{key} is {text[:60]!r}, expected a finite number")
    return found
