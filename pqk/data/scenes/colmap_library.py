"""Reads the cameras and poses of a COLMAP model with pycolmap, where it is installed (extra `colmap`).

`pqk.data.scenes.colmap` calls it after it has read and checked the same files itself, for reasons found with pycolmap
4.2.1: it hangs on some binary files that were cut off and reads others without an error, and it ends a name in a text
file at the first blank. Hence names come from our reader, and pycolmap gets no other file of the model.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

from pqk.data.scenes.camera import Camera
from pqk.files import temporary_folder


@cache
def pycolmap() -> Any | None:
    """Returns the module, or None where it is not installed or cannot be loaded."""
    try:
        module = importlib.import_module("pycolmap")
    except ImportError:
        return None
    module.logging.minloglevel = 3  # no messages about files that it cannot read: our reader has read them
    return module


Pose = tuple[tuple[float, float, float, float], tuple[float, float, float]]


def read(cameras: Path, images: Path) -> tuple[dict[int, Camera], dict[int, Pose]] | None:
    """Returns cameras by id, and by image id the quaternion (w,x,y,z) and translation of world to camera.

    None where pycolmap is missing or refuses the files, such as for ids that it reserves. The numbers are those in the
    files, bit for bit.
    """
    library = pycolmap()
    if library is None:
        return None
    with temporary_folder("colmap") as folder:
        for path in (cameras, images):
            (folder / path.name).symlink_to(path.resolve())
        # a model without points: their file is needed, and pqk has not checked the one that may be there
        (folder / f"points3D{images.suffix}").write_bytes(bytes(8) if images.suffix == ".bin" else b"")
        found = library.Reconstruction()
        try:
            found.read(str(folder))
        except (ValueError, RuntimeError, IndexError, OverflowError, MemoryError):
            return None
        by_id = {
            number: Camera(number, c.model.name, c.width, c.height, tuple(float(value) for value in c.params))
            for number, c in found.cameras.items()
        }
        return by_id, {number: _pose(image) for number, image in found.images.items()}


def _pose(image: Any) -> Pose:
    pose = image.cam_from_world
    pose = pose() if callable(pose) else pose  # an attribute before pycolmap 3.12
    x, y, z, w = (float(value) for value in pose.rotation.quat)
    tx, ty, tz = (float(value) for value in pose.translation)
    return (w, x, y, z), (tx, ty, tz)
