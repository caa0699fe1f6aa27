"""Defines `Scene` and `View`: images on disk with the known data of their cameras. Files are decoded on demand."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pqk.data.scenes.camera import Camera, undistort_image, undistort_nearest
from pqk.data.scenes.depth import half_depth, measured_depth
from pqk.data.scenes.picture import read_picture, upright
from pqk.errors import PqkError
from pqk.files import sha256_file
from pqk.oserrors import cannot_read

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class View:
    """One image with the known data of its camera.

    Pixels follow COLMAP: the top-left corner of the image is (0, 0), the centre of the first pixel (0.5, 0.5).
    With `distortion` set, the files on disk belong to that distorted camera, and the three `load_*` functions return
    them resampled to the pinhole camera K of the same size.
    """

    name: str  # file name relative to the image folder, e.g. "000.jpg"
    image_path: Path
    K: np.ndarray | None = None  # (3,3) float64, pinhole
    world_to_cam: np.ndarray | None = None  # (4,4) float64, metres
    depth_path: Path | None = None  # raw little-endian float32, row-major H*W, metres along z; 0 or inf = unmeasured
    mask_path: Path | None = None  # one 8-bit value a pixel, 0 = ignore (or the reverse, see mask_marks_ignored)
    distortion: Camera | None = None
    size: tuple[int, int] | None = None  # (height, width) that the camera file declares
    mask_marks_ignored: bool = False  # ETH3D: any value but 0 = ignore
    depth_factor: float | None = None  # CO3Dv2: the depth file is a PNG of float16 numbers, to be multiplied by this
    foreground_path: Path | None = None  # one 8-bit value a pixel, 255 = certainly the object

    def load_image(self) -> np.ndarray:
        """Returns the image (H,W,3) uint8 RGB. EXIF orientation is applied, except where a calibration belongs to the
        pixels as they are stored.

        Raises PqkError for a file that `read_picture` refuses, for an image of the wrong size, and when undoing the
        lens distortion leaves almost no pixels.
        """
        pixels = np.asarray(self._oriented(*_decode(self.image_path)).convert("RGB"))
        if self.distortion is None:
            return pixels
        try:
            return undistort_image(pixels, self.distortion)
        except PqkError as error:
            raise PqkError(f"{self.image_path}: {error}") from error

    def load_depth(self) -> np.ndarray | None:
        """Returns depth (H,W) float32, metres along the optical axis, 0 = no measurement; None without a depth file.

        Infinite and non-positive values and far planes mean no measurement (`pqk.data.scenes.depth`). Raises PqkError
        when the file is missing, when its size is not 4*H*W bytes, when it holds NaN (no writer of this format uses
        NaN, so it is a sign of a bug), and when its numbers are not lengths in metres. With `depth_factor` the unit is
        that of the scene, NaN means no measurement too, and PqkError is for a damaged PNG or one of another size.
        """
        if self.depth_path is None:
            return None
        if self.depth_factor is not None:
            depth = half_depth(self.depth_path, self.depth_factor)
            self._refuse_size(self.depth_path, "depth map", depth.shape)
            return depth
        height, width = self._stored_shape()
        try:
            raw = self.depth_path.read_bytes()
        except OSError as error:
            raise PqkError(f"{self.depth_path}: cannot read the depth file ({error.strerror})") from error
        if len(raw) != 4 * height * width:
            raise PqkError(
                f"{self.depth_path}: the depth file has {len(raw)} bytes, expected {4 * height * width} "
                f"({width}x{height} float32 values, the size of {self.image_path.name})"
            )
        try:
            depth = measured_depth(np.frombuffer(raw, dtype="<f4").reshape(height, width))
        except PqkError as error:
            raise PqkError(f"{self.depth_path}: {error}") from error
        return depth if self.distortion is None else undistort_nearest(depth, self.distortion)

    def load_mask(self) -> np.ndarray | None:
        """Returns the mask (H,W) bool, False = ignore; None when nothing is ignored.

        In a palette image the indices count, in an RGB image whether any channel is above 0. Where the image was
        undistorted, pixels without a source are ignored too. Raises PqkError for a missing or damaged file, for pixels
        of another kind (such as with transparency) and for a size that is not the image's.
        """
        if self.mask_path is None and self.distortion is None:
            return None
        shape = self._stored_shape()
        keep = np.ones(shape, dtype=bool)
        if self.mask_path is not None:
            values = _mask_values(self.mask_path)
            self._refuse_size(self.mask_path, "mask", values.shape)
            keep = (values == 0) if self.mask_marks_ignored else (values != 0)
        return keep if self.distortion is None else undistort_nearest(keep, self.distortion)

    def load_foreground(self) -> np.ndarray | None:
        """Returns the probability (H,W) float32, 0..1, that a pixel shows the object; None without such a file.

        Raises PqkError for a missing or damaged file, for pixels other than 8-bit grey and for a size that is not the
        image's. Undistorted views have none.
        """
        if self.foreground_path is None:
            return None
        image = _decode(self.foreground_path)[0]
        if image.mode != "L":
            raise PqkError(f"{self.foreground_path}: the pixels are of mode {image.mode}, expected 8-bit grey ones")
        values = np.asarray(image).astype(np.float32) / np.float32(255)
        self._refuse_size(self.foreground_path, "foreground", values.shape)
        return values

    def _refuse_size(self, path: Path, what: str, found: tuple[int, ...]) -> None:
        """Raises PqkError when a file that belongs to the image is not of the image's size, (height, width)."""
        shape = self._stored_shape()
        if found != shape:
            raise PqkError(
                f"{path}: the {what} has {found[1]}x{found[0]} pixels, "
                f"the image {self.image_path.name} has {shape[1]}x{shape[0]}"
            )

    def _oriented(self, image: Image.Image, orientation: int) -> Image.Image:
        """Returns the image in the orientation of its calibration: as stored; without a calibration, as EXIF says."""
        if self.K is None:
            return upright(image, orientation)
        if self.size is None or image.size[::-1] == self.size:
            return image
        turned = upright(image, orientation)
        if turned.size[::-1] == self.size:  # the program that calibrated applied EXIF
            return turned
        raise PqkError(
            f"{self.image_path}: the image has {image.size[0]}x{image.size[1]} pixels, "
            f"its camera is for {self.size[1]}x{self.size[0]}; give the image the calibration was made with"
        )

    def _stored_shape(self) -> tuple[int, int]:
        """Returns (height, width) of the files on disk, from the camera or the image."""
        if self.size is not None:
            return self.size
        width, height = self._oriented(*_decode(self.image_path)).size
        return height, width


@dataclass(frozen=True, eq=False)
class Scene:
    """Views of one place, in the natural order of their names, or in the order of a list that comes with the data.

    notes: sentences about files of the folder that could not be used. model_files: files that the cameras were read
    from.
    """

    name: str
    root: Path
    views: tuple[View, ...]
    notes: tuple[str, ...] = ()
    model_files: tuple[Path, ...] = ()

    @property
    def is_calibrated(self) -> bool:
        """Returns whether the cameras are known: the scene is more than a folder of pictures."""
        return bool(self.model_files)

    def content(self, truth: bool = True) -> dict[str, Any]:
        """Returns the names of the views and the sha256 of every file that the readers open, as JSON.

        It contains neither name nor path of the scene, so a renamed or linked copy has the same content. Without
        `truth` depth and masks are left out. Raises PqkError for a file that cannot be read.
        """
        views = []
        for view in self.views:
            paths = [view.image_path, view.depth_path, view.mask_path] if truth else [view.image_path]
            if truth and view.foreground_path is not None:
                paths.append(view.foreground_path)
            views.append([view.name, *(None if path is None else _sha256(path) for path in paths)])
        return {"cameras": [_sha256(path) for path in self.model_files], "views": views}

    @property
    def has_ground_truth(self) -> bool:
        """Returns whether every view has K, pose and depth."""
        return all(v.K is not None and v.world_to_cam is not None and v.depth_path is not None for v in self.views)


class NoPictures(PqkError):
    """Error for a camera model that was found without any of its pictures. Exit code 2."""


def unreadable(error: OSError, path: Path) -> PqkError:
    """Returns the error for a file or folder that the system does not let us read, in one sentence."""
    return PqkError(cannot_read(error.filename or path, error))


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise unreadable(error, path) from error


def _decode(path: Path) -> tuple[Image.Image, int]:
    """Returns the stored pixels and the EXIF orientation of an image file."""
    try:
        return read_picture(path)
    except ValueError as error:
        raise PqkError(str(error)) from error


def _mask_values(path: Path) -> np.ndarray:
    """Returns the mask (H,W), one number a pixel."""
    image = _decode(path)[0]
    if image.mode == "RGB":
        return np.asarray(image).max(axis=2)
    if image.mode not in ("1", "L", "P"):
        raise PqkError(
            f"{path}: a mask is one value a pixel (grey, palette or RGB); pixels of mode {image.mode} are not"
        )
    return np.asarray(image)
