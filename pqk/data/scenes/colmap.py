"""Reads COLMAP's sparse models, text and binary, and writes text (https://colmap.github.io/format.html).

Keypoint observations and tracks are skipped when reading: the bench needs cameras, poses and perhaps the points.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pqk.data.scenes import colmap_library
from pqk.data.scenes.camera import CAMERA_MODELS, MODEL_NAMES, Camera
from pqk.data.scenes.names import stays_inside
from pqk.errors import PqkError
from pqk.files import write_text

UNIT = (0.9, 1.1)  # accepted lengths of a quaternion: rounded digits pass, columns in another order do not


@dataclass(frozen=True)
class ModelImage:
    """One image of a model: quaternion (w,x,y,z) and translation take world points to the camera."""

    image_id: int
    quaternion: tuple[float, float, float, float]
    translation: tuple[float, float, float]
    camera_id: int
    name: str

    @staticmethod
    def from_pose(image_id: int, world_to_cam: np.ndarray, camera_id: int, name: str) -> ModelImage:
        """Builds from a (4,4) world-to-camera matrix."""
        w, x, y, z = (float(value) for value in rotation_to_quaternion(world_to_cam[:3, :3]))
        tx, ty, tz = (float(value) for value in world_to_cam[:3, 3])
        return ModelImage(image_id, (w, x, y, z), (tx, ty, tz), camera_id, name)

    @property
    def world_to_cam(self) -> np.ndarray:
        """Returns the matrix (4,4) float64 from world to camera."""
        matrix = np.eye(4)
        matrix[:3, :3] = quaternion_to_rotation(np.array(self.quaternion))
        matrix[:3, 3] = self.translation
        return matrix


@dataclass(frozen=True)
class Model:
    """Cameras by id, and images in the order of the file."""

    cameras: dict[int, Camera]
    images: tuple[ModelImage, ...]


def quaternion_to_rotation(quaternion: np.ndarray) -> np.ndarray:
    """Returns the rotation (3,3) of a quaternion (4,), (w,x,y,z) of any length but zero. Euler-Rodrigues formula."""
    w, x, y, z = np.asarray(quaternion, dtype=np.float64) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotation_to_quaternion(rotation: np.ndarray) -> np.ndarray:
    """Returns the unit quaternions (...,4), (w,x,y,z) with w >= 0, of rotations (...,3,3).

    The quaternion is the eigenvector of the largest eigenvalue of a symmetric 4x4 matrix (Bar-Itzhack, "New method
    for extracting the quaternion from a rotation matrix", J. Guidance 2000): no case distinction, and stable.
    """
    r = np.moveaxis(np.asarray(rotation, dtype=np.float64), (-2, -1), (0, 1))
    o = np.zeros_like(r[0, 0])
    k = np.array(
        [
            [r[0, 0] + r[1, 1] + r[2, 2], o, o, o],
            [r[2, 1] - r[1, 2], r[0, 0] - r[1, 1] - r[2, 2], o, o],
            [r[0, 2] - r[2, 0], r[0, 1] + r[1, 0], r[1, 1] - r[0, 0] - r[2, 2], o],
            [r[1, 0] - r[0, 1], r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], r[2, 2] - r[0, 0] - r[1, 1]],
        ]
    )
    quaternion = np.linalg.eigh(np.moveaxis(k, (0, 1), (-2, -1)), UPLO="L")[1][..., -1]
    return np.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def safe_name(name: str, source: str) -> str:
    """Returns `name` if it stays inside the folder it is relative to; else PqkError naming `source`.

    Colons and backslashes are parts of names here, but a name that would leave the folder where a backslash separates
    folders is refused too.
    """
    if not stays_inside(name):
        raise PqkError(f"{source}: image name {name!r} must be a relative path that stays inside the image folder")
    check_utf8(name, source)
    return name


def check_utf8(name: str, source: str) -> None:
    """Raises PqkError naming `source` when `name` holds bytes that are not UTF-8 (as surrogates, from the system)."""
    if any("\ud800" <= character <= "\udfff" for character in name):
        place = source.encode("utf-8", "backslashreplace").decode()
        raise PqkError(f"{place}: the name {name!a} is not UTF-8; rename it")


def model_paths(folder: Path) -> tuple[Path, ...]:
    """Returns the files of cameras and images of the folder's model; () without one. Binary comes first, as in COLMAP.

    COLMAP writes binary files and exports text on demand, so text beside binary may be out of date.
    """
    for ending in (".bin", ".txt"):
        paths = (folder / f"cameras{ending}", folder / f"images{ending}")
        if all(path.is_file() for path in paths):
            return paths
    return ()


def has_model(folder: Path) -> bool:
    """Returns whether the folder holds a text or a binary model."""
    return bool(model_paths(folder))


def read_model(folder: Path | str) -> Model:
    """Reads cameras and images from the files of `model_paths`; the numbers come from pycolmap where it is installed.

    Raises PqkError that names the file and the line (text) or the byte (binary) for anything malformed, for an image
    whose camera is missing, for quaternions whose length is not about 1, and for image names that leave the image
    folder or are not UTF-8.
    """
    folder = Path(folder)
    paths = model_paths(folder)
    if not paths:
        raise PqkError(f"{folder}: no COLMAP model here; cameras.txt and images.txt (or both as .bin) are needed")
    cameras_file, images_file = paths
    binary = images_file.suffix == ".bin"
    cameras = list((_cameras_from_binary if binary else _cameras_from_text)(cameras_file))
    images = list((_images_from_binary if binary else _images_from_text)(images_file))
    by_id = {camera.camera_id: camera for camera in cameras}
    if len(by_id) != len(cameras):
        raise PqkError(f"{folder}: a camera id appears twice in the cameras file")
    names: set[str] = set()
    for image in images:
        if image.camera_id not in by_id:
            raise PqkError(f"{images_file}: image {image.name!r} uses camera {image.camera_id}, which is not defined")
        if image.name in names:
            raise PqkError(f"{images_file}: image {image.name!r} appears twice")
        names.add(image.name)
    reread = colmap_library.read(cameras_file, images_file)
    if reread is not None and reread[0].keys() == by_id.keys() and reread[1].keys() == {i.image_id for i in images}:
        by_id, poses = reread
        images = [ModelImage(i.image_id, *poses[i.image_id], i.camera_id, i.name) for i in images]
    return Model(by_id, tuple(images))


def write_text_model(
    folder: Path | str,
    cameras: Iterable[Camera],
    images: Iterable[ModelImage],
    points: np.ndarray | None = None,
    colours: np.ndarray | None = None,
) -> None:
    """Writes cameras.txt, images.txt and points3D.txt; numbers survive reading back bit for bit.

    points: (N,3) world coordinates; colours: (N,3) uint8, grey 128 when absent. Each file is whole or absent; raises
    PqkError when the folder cannot be written.
    """
    folder = Path(folder)
    camera_lines = ["# CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]"]
    for c in cameras:
        camera_lines.append(f"{c.camera_id} {c.model} {c.width} {c.height} {_numbers(c.params)}")
    image_lines = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME", "# POINTS2D[] as (X, Y, POINT3D_ID)"]
    for i in images:
        name = safe_name(i.name, str(folder / "images.txt"))
        pose = _numbers((*i.quaternion, *i.translation))
        image_lines += [f"{i.image_id} {pose} {i.camera_id} {name}", ""]
    point_lines = ["# POINT3D_ID X Y Z R G B ERROR TRACK[] as (IMAGE_ID, POINT2D_IDX)"]
    xyz = np.zeros((0, 3)) if points is None else np.asarray(points, dtype=np.float64)
    rgb = np.full(xyz.shape, 128, np.uint8) if colours is None else np.asarray(colours, dtype=np.uint8)
    for index, (point, colour) in enumerate(zip(xyz.tolist(), rgb.tolist(), strict=True), start=1):
        point_lines.append(f"{index} {_numbers(point)} {colour[0]} {colour[1]} {colour[2]} 0")
    write_text(folder / "cameras.txt", "\n".join(camera_lines) + "\n")
    write_text(folder / "images.txt", "\n".join(image_lines) + "\n")
    write_text(folder / "points3D.txt", "\n".join(point_lines) + "\n")


def _numbers(values: Iterable[float]) -> str:
    return " ".join(repr(float(value)) for value in values)


def _lines(path: Path, keep_blank: bool = False) -> Iterator[tuple[int, str]]:
    """Yields numbered lines without comments (and without blank lines unless `keep_blank`)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PqkError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from error
    except OSError as error:
        raise PqkError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if not stripped.startswith("#") and (stripped or keep_blank):
            yield number, stripped


def _cameras_from_text(path: Path) -> Iterator[Camera]:
    for number, line in _lines(path):
        words = line.split()
        try:
            if len(words) < 4:
                raise ValueError("expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]")
            yield Camera(
                int(words[0]), words[1], int(words[2]), int(words[3]), tuple(float(word) for word in words[4:])
            )
        except (ValueError, PqkError) as error:
            raise PqkError(f"{path} line {number}: {error}") from error


def _images_from_text(path: Path) -> Iterator[ModelImage]:
    lines = _lines(path, keep_blank=True)
    for number, line in lines:
        if not line:
            continue
        where = f"{path} line {number}"
        words = line.split(maxsplit=9)
        try:
            if len(words) < 10:
                raise ValueError("expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME")
            yield _image(int(words[0]), [float(word) for word in words[1:8]], int(words[8]), words[9], where)
        except ValueError as error:
            raise PqkError(f"{where}: {error}") from error
        # Every image has a second line with its keypoints, blank when there are none. A file whose blank lines were
        # stripped would lose every other image unnoticed, hence the check.
        number, observations = next(lines, (number + 1, ""))
        if not _are_keypoints(observations.split()):
            raise PqkError(
                f"{path} line {number}: expected keypoints as triples X Y POINT3D_ID (or a blank line) after each "
                "image; were blank lines removed from this file?"
            )


def _are_keypoints(words: list[str]) -> bool:
    """Returns whether the words are triples of two numbers and a whole number."""
    try:
        for word in words[::3] + words[1::3]:
            float(word)
        for word in words[2::3]:
            int(word)
    except ValueError:
        return False
    return len(words) % 3 == 0


def _image(image_id: int, pose: list[float], camera_id: int, name: str, where: str) -> ModelImage:
    if not np.isfinite(pose).all():
        raise PqkError(f"{where}: the pose of {name!r} must be finite numbers, found {pose}")
    length = math.hypot(*pose[:4])
    if not UNIT[0] <= length <= UNIT[1]:
        raise PqkError(f"{where}: the quaternion of {name!r} has length {length:.3g}, a rotation's is 1")
    w, x, y, z, tx, ty, tz = pose
    return ModelImage(image_id, (w, x, y, z), (tx, ty, tz), camera_id, safe_name(name, where))


class _Bytes:
    """Little-endian fields of a binary file, with its name in the error when it ends too early."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        try:
            self.data = path.read_bytes()
        except OSError as error:
            raise PqkError(f"{path}: cannot be read ({error.strerror})") from error

    def take(self, layout: str) -> tuple:
        end = self.offset + struct.calcsize("<" + layout)
        if end > len(self.data):
            raise PqkError(f"{self.path}: ends at byte {len(self.data)}, at least {end} are needed; copy it again")
        values = struct.unpack_from("<" + layout, self.data, self.offset)
        self.offset = end
        return values

    def skip(self, count: int) -> None:
        if self.offset + count > len(self.data):
            raise PqkError(f"{self.path}: ends at byte {len(self.data)}, {self.offset + count} are needed")
        self.offset += count

    def text(self) -> str:
        end = self.data.find(b"\0", self.offset)
        if end < 0:
            raise PqkError(f"{self.path}: the name at byte {self.offset} has no end; copy it again")
        raw, self.offset = self.data[self.offset : end], end + 1
        return raw.decode("utf-8", errors="surrogateescape")


def _cameras_from_binary(path: Path) -> Iterator[Camera]:
    data = _Bytes(path)
    for _ in range(data.take("Q")[0]):
        start = data.offset
        camera_id, model_id, width, height = data.take("iiQQ")
        if model_id not in MODEL_NAMES:
            raise PqkError(f"{path} byte {start}: camera model id {model_id} is unknown; allowed are 0 to 17")
        model = MODEL_NAMES[model_id]
        params = data.take(f"{len(CAMERA_MODELS[model][1].split())}d")
        try:
            yield Camera(camera_id, model, width, height, params)
        except PqkError as error:
            raise PqkError(f"{path} byte {start}: {error}") from error


def _images_from_binary(path: Path) -> Iterator[ModelImage]:
    data = _Bytes(path)
    for _ in range(data.take("Q")[0]):
        where = f"{path} byte {data.offset}"
        image_id, *pose, camera_id = data.take("i7di")
        name = data.text()
        data.skip(24 * data.take("Q")[0])  # x, y (double) and point id (int64) of each keypoint
        yield _image(image_id, list(pose), camera_id, name, where)
