"""Reads the annotation files of CO3Dv2 (https://github.com/facebookresearch/co3d): frames, sequences and set lists.

    <root>/<category>/frame_annotations.jgz                 gzip of a JSON list, one object per frame
    <root>/<category>/sequence_annotations.jgz              the same, one object per sequence
    <root>/<category>/set_lists/set_lists_<subset>.json     {list: [[sequence, frame number, image path], ...]}

Keys that are not needed are ignored. A frame's values are checked when the frame is asked for, so that one bad frame
does not block its category.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pqk.data.scenes.names import stays_inside
from pqk.errors import PqkError, first_line, nearest
from pqk.oserrors import cannot_read

FRAMES, SEQUENCES = "frame_annotations.jgz", "sequence_annotations.jgz"
SUBSETS = ("fewview_dev", "fewview_test", "fewview_train")
"""Set lists that scenes are taken from; the first one that is there counts."""
LISTS = ("test", "val", "train")
"""Lists of a set list; a sequence's frames are those of the first list that has any of it."""
ISOTROPIC, PER_AXIS = "ndc_isotropic", "ndc_norm_image_bounds"
EXPORTED = "/large_experiments/p3/replay/datasets/co3d/co3d45k_220512/export_v23/"
"""Prefix that some paths of point clouds have in the official files."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One annotated frame of a sequence. Paths are relative to the folder of the data set, and never leave it.

    Pixels follow COLMAP: the top-left corner of the image is (0, 0), the centre of the first pixel (0.5, 0.5).
    """

    category: str
    sequence: str
    number: int  # frame_number, which is not the number in the file's name
    image: str
    size: tuple[int, int]  # (height, width) of the image
    K: np.ndarray | None  # (3,3) float64, pixels; None where the annotation has no camera
    world_to_cam: np.ndarray | None  # (4,4) float64, OpenCV axes, in the sequence's own unit; None with K
    depth: str | None
    depth_factor: float  # scale_adjustment: number in the depth file * this = depth in the sequence's unit
    depth_mask: str | None
    foreground: str | None


@dataclass(frozen=True)
class SequenceInfo:
    """One annotated sequence. quality: viewpoint_quality_score, None where it is unknown."""

    name: str
    quality: float | None
    point_cloud: str | None  # path relative to the folder of the data set


def open_category(folder: Path) -> Category:
    """Returns the annotations of a category's folder; those of the last two categories are kept in memory.

    Raises PqkError for files that are missing or malformed.
    """
    files = [folder / FRAMES, folder / SEQUENCES, *(folder / "set_lists").glob("*.json")]
    stamps = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files if path.is_file())
    return _open_category(folder, stamps)


@lru_cache(maxsize=2)
def _open_category(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> Category:
    """Reads the files again when one of their stamps (name, time, size) has changed."""
    return Category(folder)


class Category:
    """The annotations of one category. Raises PqkError when what it is asked for is missing or malformed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name, self.root = folder, folder.name, folder.parent
        self.frames_file = folder / FRAMES
        self._frames: dict[str, dict[int, _Object]] = {}
        for item in _objects(self.frames_file):
            sequence, number = _sequence_name(item), item.whole("frame_number")
            item.value.pop("meta", None)  # most of the memory, and not used
            item.place = f"{self.frames_file}: {sequence} frame {number}"
            if number in self._frames.setdefault(sequence, {}):
                raise PqkError(f"{item.place}: the frame appears twice")
            self._frames[sequence][number] = item
        self._lists: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
        self._sequences: dict[str, SequenceInfo] | None = None

    @property
    def annotated(self) -> list[str]:
        """Returns the names of all sequences with annotated frames, in the order of the file."""
        return list(self._frames)

    @property
    def subset(self) -> str | None:
        """Returns the first of SUBSETS that has a set list here; None without any."""
        return next((subset for subset in SUBSETS if self.set_list_file(subset).is_file()), None)

    def set_list_file(self, subset: str) -> Path:
        """Returns where the set list of a subset lies."""
        return self.folder / "set_lists" / f"set_lists_{subset}.json"

    def sequences(self) -> dict[str, SequenceInfo]:
        """Returns the annotated sequences by name, in the order of sequence_annotations.jgz."""
        if self._sequences is None:
            path, found = self.folder / SEQUENCES, {}
            for item in _objects(path):
                name = _sequence_name(item)
                item.place = f"{path}: {name}"
                if name in found:
                    raise PqkError(f"{item.place}: the sequence appears twice")
                cloud = item.inner("point_cloud")
                found[name] = SequenceInfo(
                    name,
                    item.number("viewpoint_quality_score") if item.has("viewpoint_quality_score") else None,
                    None if cloud is None else cloud.path("path", EXPORTED),
                )
            self._sequences = found
        return self._sequences

    def set_list(self, subset: str) -> dict[str, dict[str, tuple[int, ...]]]:
        """Returns list -> sequence -> frame numbers of a subset's set list, in its order."""
        if subset not in self._lists:
            self._lists[subset] = self._read_set_list(subset)
        return self._lists[subset]

    def _read_set_list(self, subset: str) -> dict[str, dict[str, tuple[int, ...]]]:
        path = self.set_list_file(subset)
        lists = _json(path, _read(path))
        if not isinstance(lists, dict):
            raise PqkError(f"{path}: expected one JSON object with the lists {', '.join(LISTS)}")
        found: dict[str, dict[str, list[int]]] = {}
        for name, entries in lists.items():
            if not isinstance(entries, list):
                raise PqkError(f"{path}: {name} is {_shown(entries)}, expected a list")
            numbers = found.setdefault(name, {})
            for index, entry in enumerate(entries):
                match entry:
                    case [str(sequence), int(number), *_] if not isinstance(number, bool):
                        numbers.setdefault(sequence, []).append(number)
                    case _:
                        raise PqkError(
                            f"{path}: {name}[{index}] is {_shown(entry)}, expected [sequence, frame number, image path]"
                        )
        return {name: {key: tuple(each) for key, each in numbers.items()} for name, numbers in found.items()}

    def frames(self, sequence: str, subset: str | None, listed: str) -> list[Frame]:
        """Returns the frames that a list of a subset has of a sequence, in its order; [] when it has none.

        Without a subset, all annotated frames by number. Raises PqkError for a frame without an annotation.
        """
        known = self._frames.get(sequence, {})
        numbers = sorted(known) if subset is None else self.set_list(subset).get(listed, {}).get(sequence, ())
        for number in numbers:
            if number not in known:
                raise PqkError(
                    f"{self.set_list_file(str(subset))}: {listed} has frame {number} of {sequence}, "
                    f"which {FRAMES} has not"
                )
        return [self._frame(known[number], sequence, number) for number in numbers]

    def _frame(self, item: _Object, sequence: str, number: int) -> Frame:
        image = item.need("image")
        path, (height, width) = image.path("path"), image.wholes("size", 2)
        folder = f"{self.name}/{sequence}/"
        if not path.startswith(folder):
            raise image.refuse("path", f"a path in {folder}")
        camera, depth, mask = item.inner("viewpoint"), item.inner("depth"), item.inner("mask")
        K, world_to_cam = (None, None) if camera is None else _camera(camera, height, width)
        return Frame(
            self.name,
            sequence,
            number,
            path,
            (height, width),
            K,
            world_to_cam,
            None if depth is None else depth.path("path"),
            1.0 if depth is None else depth.positive("scale_adjustment"),
            None if depth is None or not depth.has("mask_path") else depth.path("mask_path"),
            None if mask is None else mask.path("path"),
        )


def opencv_camera(
    rotation: np.ndarray,
    translation: np.ndarray,
    focal: np.ndarray,
    centre: np.ndarray,
    size: tuple[int, int],
    kind: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns K (3,3) in pixels and world-to-camera (4,4) in OpenCV axes of a PyTorch3D camera, float64.

    rotation (3,3), translation (3,): X_cam = X_world R + T as row vectors, x left, y up, z forward; so with
    F = diag(-1, -1, 1) the matrix is [F R^T | F T]. focal, centre (2,): in PyTorch3D's normalised coordinates, x left
    and y up from the image's centre; f_px = f s and c_px = h - p s with h = (width / 2, height / 2), where s = min(h)
    for both axes (kind ndc_isotropic) or s = h (ndc_norm_image_bounds). size: (height, width) in pixels, whose corner
    is at 0. Source: https://pytorch3d.org/docs/cameras.
    """
    flip = np.diag([-1.0, -1.0, 1.0])
    world_to_cam = np.eye(4)
    world_to_cam[:3, :3], world_to_cam[:3, 3] = flip @ rotation.T, flip @ translation
    half = np.array([size[1] / 2, size[0] / 2])
    scale = np.full(2, half.min()) if kind == ISOTROPIC else half
    (fx, fy), (cx, cy) = focal * scale, half - centre * scale
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]), world_to_cam


def _camera(item: _Object, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    kind = item.value.get("intrinsics_format") or PER_AXIS
    if kind not in (ISOTROPIC, PER_AXIS):
        known = f"{ISOTROPIC} or {PER_AXIS}"
        raise item.refuse("intrinsics_format", f"{known}{nearest(str(kind), (ISOTROPIC, PER_AXIS))}")
    rotation, focal = item.numbers("R", 3, 3), item.numbers("focal_length", 2)
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 0.01 or np.linalg.det(rotation) < 0:
        raise item.refuse("R", "a rotation: orthonormal rows and determinant 1")
    if (focal <= 0).any():
        raise item.refuse("focal_length", "positive numbers")
    translation, centre = item.numbers("T", 3), item.numbers("principal_point", 2)
    return opencv_camera(rotation, translation, focal, centre, (height, width), kind)


@dataclass
class _Object:
    """A JSON object of an annotation file. place: file and entry, for errors; within: the keys that lead to it."""

    value: dict[str, Any]
    place: str
    within: str = ""

    def refuse(self, key: str, expected: str) -> PqkError:
        """Returns the error for a value that is not the expected one."""
        found = _shown(self.value[key]) if key in self.value else "missing"
        return PqkError(f"{self.place}: {self.within}{key} is {found}, expected {expected}")

    def has(self, key: str) -> bool:
        """Returns whether the key is there and not null."""
        return self.value.get(key) is not None

    def inner(self, key: str) -> _Object | None:
        """Returns an object inside this one; None for null."""
        return self.need(key) if self.has(key) else None

    def need(self, key: str) -> _Object:
        """Returns an object inside this one."""
        if not isinstance(self.value.get(key), dict):
            raise self.refuse(key, "an object")
        return _Object(self.value[key], self.place, f"{self.within}{key}.")

    def text(self, key: str) -> str:
        """Returns a string that is not empty."""
        found = self.value.get(key)
        if not isinstance(found, str) or not found:
            raise self.refuse(key, "text")
        return found

    def path(self, key: str, prefix: str = "") -> str:
        """Returns a relative path that stays inside the folder of the data set, without the prefix if it has it."""
        found = self.text(key).removeprefix(prefix)
        if not stays_inside(found) or any("\ud800" <= character <= "\udfff" for character in found):
            raise self.refuse(key, "a relative path that stays inside the folder of the data set")
        return found

    def whole(self, key: str) -> int:
        """Returns a whole number of 0 or more."""
        found: Any = self.value.get(key)
        if not _whole(found) or found < 0:
            raise self.refuse(key, "a whole number of 0 or more")
        return found

    def wholes(self, key: str, count: int) -> Sequence[int]:
        """Returns positive whole numbers."""
        found = self.value.get(key)
        if not isinstance(found, list) or len(found) != count or not all(_whole(each) and each > 0 for each in found):
            raise self.refuse(key, f"{count} positive whole numbers")
        return found

    def numbers(self, key: str, *shape: int) -> np.ndarray:
        """Returns finite numbers of a shape, float64."""
        try:
            found = np.asarray(self.value.get(key))
        except ValueError:  # rows of different lengths
            found = np.zeros(0)
        if found.shape != shape or found.dtype.kind not in "iuf" or not np.isfinite(found).all():
            raise self.refuse(key, f"{' x '.join(map(str, shape))} finite numbers" if shape else "a finite number")
        return found.astype(np.float64)

    def number(self, key: str) -> float:
        """Returns a finite number."""
        return float(self.numbers(key))

    def positive(self, key: str) -> float:
        """Returns a finite number above 0."""
        found = self.number(key)
        if found <= 0:
            raise self.refuse(key, "a number above 0")
        return found


def _sequence_name(item: _Object) -> str:
    """Returns the name of the sequence, which is that of a folder."""
    name = item.path("sequence_name")
    if "/" in name or "\\" in name or name == ".":
        raise item.refuse("sequence_name", "the name of a folder")
    return name


def _objects(path: Path) -> list[_Object]:
    """Returns the objects of a gzipped JSON list."""
    packed = _read(path)
    try:
        data = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise PqkError(f"{path}: damaged or no gzip file ({first_line(error)}); copy it again") from error
    items = _json(path, data)
    if not isinstance(items, list):
        raise PqkError(f"{path}: expected one JSON list of objects")
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise PqkError(f"{path}: entry {index} is {_shown(item)}, expected an object")
    return [_Object(item, f"{path}: entry {index}") for index, item in enumerate(items)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PqkError(cannot_read(path, error)) from error


def _json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PqkError(f"{path}: not valid JSON ({first_line(error)})") from error


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
