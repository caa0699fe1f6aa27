"""Reads the values of annotation files and refuses those that cannot be right: `Entry`, `Boxes`, `Pictures`.

Every refusal is one sentence with the file, the entry, the key, the value and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pqk.data.detection.sample import Id
from pqk.data.scenes.names import look_alike, stays_inside
from pqk.data.scenes.picture import exif_orientation
from pqk.errors import PqkError, first_line, nearest
from pqk.oserrors import cannot_read

LARGEST = 1e9
"""No number of an annotation may be larger; it also keeps NaN and infinity out."""
OVERHANG = 2.0
"""Pixels by which a box may stick out of its image: official files of COCO and LVIS are rounded that far."""

Corners = tuple[float, float, float, float]


def read_file(path: Path) -> bytes:
    """Returns the bytes of a file. Raises PqkError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise PqkError(cannot_read(path, error)) from None


def parse_json(data: bytes | str, place: str) -> Any:
    """Returns the value of JSON text. Raises PqkError for text that is none."""
    try:
        return json.loads(data)
    except RecursionError:
        raise PqkError(f"{place}: is nested too deeply") from None
    except ValueError as error:
        raise PqkError(f"{place}: is not JSON ({first_line(error)}); copy it again") from None


def in_words(value: Any) -> str:
    """Returns a value as it stands in messages, at most 60 characters of it."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError):  # not of a JSON file, or a whole number of thousands of digits
        text = repr(value) if not isinstance(value, int) else "a number of too many digits"
    return text if len(text) <= 60 else text[:57] + "..."


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a finite number of a size that an annotation may have."""
    return type(value) in (int, float) and abs(value) <= LARGEST


@dataclass
class Entry:
    """A JSON object of an annotation file. place: the file and which of its entries this is, for messages."""

    value: dict[str, Any]
    place: str

    def refuse(self, key: str, expected: str) -> PqkError:
        """Returns the error for a value that is not the expected one."""
        found = in_words(self.value[key]) if key in self.value else "missing"
        return PqkError(f"{self.place}: {key} is {found}, expected {expected}")

    def id(self, key: str = "id") -> Id:
        """Returns an id: a whole number of any size, or text."""
        found = self.value.get(key)
        if (type(found) is int) or (isinstance(found, str) and found):
            return found
        raise self.refuse(key, "a whole number or text")

    def text(self, key: str) -> str:
        """Returns a text that is not empty, without blanks around it."""
        found = self.value.get(key)
        if not isinstance(found, str) or not found.strip():
            raise self.refuse(key, "text")
        return found.strip()

    def path(self, key: str) -> str:
        """Returns a relative path that stays inside the folder of the images."""
        found = self.text(key)
        if not stays_inside(found) or any("\ud800" <= character <= "\udfff" for character in found):
            raise self.refuse(key, "a relative path that stays inside the folder of the images")
        return found

    def side(self, key: str) -> int:
        """Returns a number of pixels, at least 1."""
        found = self.value.get(key)
        if type(found) is not int or not 1 <= found <= LARGEST:
            raise self.refuse(key, "a whole number of pixels, at least 1")
        return found

    def flag(self, key: str) -> bool:
        """Returns whether a flag is set: 0, 1, false or true; a missing one is not."""
        found = self.value.get(key, 0)
        if found not in (0, 1) or not isinstance(found, int):
            raise self.refuse(key, "0 or 1")
        return bool(found)

    def area(self, key: str) -> float | None:
        """Returns an area in square pixels; None where the key is missing."""
        if key not in self.value:
            return None
        found = self.value[key]
        if not is_number(found) or found < 0:
            raise self.refuse(key, "a number of square pixels, at least 0")
        return float(found)

    def known(self, key: str, allowed: Collection[Id], what: str) -> Id:
        """Returns an id that is among the allowed ones, of which `what` says where they are listed."""
        found = self.id(key)
        if found not in allowed:
            raise self.refuse(key, f"{what}{_hint(found, allowed)}")
        return found

    def objects(self, key: str) -> list[dict[str, Any]]:
        """Returns a list of objects."""
        found = self.value.get(key)
        if not isinstance(found, list):
            raise self.refuse(key, "a list")
        for index, item in enumerate(found):
            if not isinstance(item, dict):
                raise PqkError(f"{self.place}: {key}[{index}] is {in_words(item)}, expected an object")
        return found

    def box(self, key: str) -> Corners:
        """Returns the corners x1 y1 x2 y2 of a box that the file has as x, y, width, height; its size may be 0."""
        found = self.value.get(key)
        if not isinstance(found, list) or len(found) != 4 or not all(map(is_number, found)):
            raise self.refuse(key, "4 finite numbers: x, y, width, height")
        x, y, width, height = map(float, found)
        if width < 0 or height < 0:
            raise self.refuse(key, "x, y, width, height, of which the last two are at least 0")
        return x, y, x + width, y + height


def _hint(found: Id, allowed: Collection[Id]) -> str:
    """Returns which ids there are: the same one of the other type, else a similar text, else the first few."""
    other: Id | None = str(found) if type(found) is int else None
    if isinstance(found, str) and found.isascii() and found.isdigit() and len(found) < 20:
        other = int(found)
    if other is not None and other in allowed:
        return f"; {in_words(other)} is there, but {in_words(found)} is another id"
    near = nearest(str(found), [str(each) for each in allowed][:10000])
    first = ", ".join(in_words(each) for each in list(allowed)[:5])
    return near or f" ({first}{', ...' if len(allowed) > 5 else ''})"


@dataclass
class Boxes:
    """Decides about boxes that lie in no image as they should, and counts what it left out or changed.

    outside: what happens to a box that sticks out of its image by more than `OVERHANG` pixels: it is an error
    ("refuse"), it is cut at the image's border ("cut"), or it stays, as it includes hidden parts ("keep"). A box
    without an area is left out, as official files hold a few; so is one that is cut to nothing.
    """

    outside: str = "refuse"
    empty: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    def placed(self, entry: Entry, key: str, box: Corners, width: int, height: int) -> Corners | None:
        """Returns the box as it counts in an image of this size; None for one that is left out. Raises PqkError."""
        x1, y1, x2, y2 = box
        if x2 <= x1 or y2 <= y1:
            self.empty.append(entry.place)
            return None
        if self.outside == "keep":
            return box
        over = max(-x1, -y1, x2 - width, y2 - height)
        if over <= OVERHANG:
            return box
        if self.outside == "refuse":
            raise entry.refuse(key, f"a box inside the image of {width}x{height} pixels, to {OVERHANG:g} pixels")
        inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
        if inside[2] <= inside[0] or inside[3] <= inside[1]:
            self.empty.append(entry.place)
            return None
        self.cut.append(entry.place)
        return inside

    def notes(self) -> list[str]:
        """Returns a sentence for each kind of box that was left out or cut, with how many there were."""
        return [
            f"{found[0]}: {'this box has' if len(found) == 1 else f'this and {len(found) - 1} more boxes have'} {what}"
            for found, what in (
                (self.empty, "no area inside the image: left out"),
                (self.cut, "parts outside the image: cut at its border"),
            )
            if found
        ]


@dataclass
class Pictures:
    """Finds the pictures of a set below one folder. skip_missing: leave out images whose file is not there."""

    folder: Path
    skip_missing: bool = False
    missing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise PqkError(f"{self.folder}: the folder of the images is not there")

    def find(self, place: str, *names: str) -> Path | None:
        """Returns the first of these files that is there; None for a missing one that may be left out.

        Raises PqkError for a missing picture otherwise. place: the file and entry that name it.
        """
        for name in names:
            if (self.folder / name).is_file():
                return self.folder / name
        if not self.skip_missing:
            raise PqkError(
                f"{place}: the image {names[0]!r} is not in {self.folder}{look_alike(self.folder, names[0])}; "
                "copy it there, or set skip_missing to leave such images out"
            )
        self.missing.append(names[0])
        return None

    def notes(self, total: int) -> list[str]:
        """Returns a sentence on the missing pictures, or none."""
        if not self.missing:
            return []
        return [
            f"{self.folder}: {len(self.missing)} of {total} images are not there, such as {self.missing[0]}; skipped"
        ]


def picture_size(path: Path) -> tuple[int, int]:
    """Returns (width, height) of a picture, turned as its EXIF says, from its header. Raises PqkError."""
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF")) as image:
            width, height = image.size
            return (height, width) if exif_orientation(image) >= 5 else (width, height)
    except Exception as error:  # what Pillow raises for a damaged file is not limited to a few kinds
        raise PqkError(f"{path}: cannot be read as a picture ({first_line(error)})") from None
