"""Implements COLMAP's camera models: their parameters, lens distortion, and resampling to an ideal pinhole camera.

Pixel convention everywhere: the top-left corner of the image is (0, 0), the centre of the first pixel (0.5, 0.5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pqk.errors import PqkError, nearest

# Names and ids of https://colmap.github.io/cameras.html and COLMAP's sensor/models. Parameters are named by their role
# in `distort`: k* and d* are the numerator and denominator of the radial polynomial in r^2, p* tangential, s* thin
# prism. EQUIRECTANGULAR shows the whole sphere and has no pinhole matrix: it can be read but not undistorted.
CAMERA_MODELS: dict[str, tuple[int, str]] = {
    "SIMPLE_PINHOLE": (0, "f cx cy"),
    "PINHOLE": (1, "fx fy cx cy"),
    "SIMPLE_RADIAL": (2, "f cx cy k1"),
    "RADIAL": (3, "f cx cy k1 k2"),
    "OPENCV": (4, "fx fy cx cy k1 k2 p1 p2"),
    "OPENCV_FISHEYE": (5, "fx fy cx cy k1 k2 k3 k4"),
    "FULL_OPENCV": (6, "fx fy cx cy k1 k2 p1 p2 k3 d1 d2 d3"),
    "FOV": (7, "fx fy cx cy omega"),
    "SIMPLE_RADIAL_FISHEYE": (8, "f cx cy k1"),
    "RADIAL_FISHEYE": (9, "f cx cy k1 k2"),
    "THIN_PRISM_FISHEYE": (10, "fx fy cx cy k1 k2 p1 p2 k3 k4 sx1 sy1"),
    "RAD_TAN_THIN_PRISM_FISHEYE": (11, "fx fy cx cy k1 k2 k3 k4 k5 k6 p1 p2 sx1 sx2 sy1 sy2"),
    "SIMPLE_DIVISION": (12, "f cx cy division"),
    "DIVISION": (13, "fx fy cx cy division"),
    "SIMPLE_FISHEYE": (14, "f cx cy"),
    "FISHEYE": (15, "fx fy cx cy"),
    "EUCM": (16, "fx fy cx cy alpha beta"),
    "EQUIRECTANGULAR": (17, "width height"),
}
MODEL_NAMES: dict[int, str] = {number: name for name, (number, _) in CAMERA_MODELS.items()}
PINHOLES = ("SIMPLE_PINHOLE", "PINHOLE")
_LENS = {"k1", "k2", "k3", "k4", "d1", "d2", "d3", "p1", "p2", "sx1", "sy1"}
LEAST_SEEN = 0.25  # of the pixels of an undistorted image must have a source; real lenses keep nearly all
_BAND_ROWS = 256  # undistortion works on this many rows at a time, so that 24-megapixel images stay under 1 GB


@dataclass(frozen=True)
class Camera:
    """One line of cameras.txt: `params` are in COLMAP's order for `model`, width and height in pixels.

    Raises PqkError (one sentence, without a file name) when the model is unknown or its parameters are impossible.
    """

    camera_id: int
    model: str
    width: int
    height: int
    params: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.model not in CAMERA_MODELS:
            known = ", ".join(CAMERA_MODELS)
            raise PqkError(
                f"camera model {self.model!r} is unknown{nearest(self.model, CAMERA_MODELS)}; allowed are {known}"
            )
        names = CAMERA_MODELS[self.model][1].split()
        if len(self.params) != len(names):
            raise PqkError(
                f"camera model {self.model} takes {len(names)} parameters ({' '.join(names)}), found {len(self.params)}"
            )
        if self.width < 1 or self.height < 1:
            raise PqkError(f"image size {self.width}x{self.height} must be positive")
        if not np.isfinite(self.params).all():
            raise PqkError(f"camera parameters must be finite numbers, found {self.params}")
        if any(self.named.get(name, 1.0) <= 0 for name in ("f", "fx", "fy")):
            raise PqkError(f"focal lengths must be positive, found {self.params[:2]}")

    @property
    def named(self) -> dict[str, float]:
        """Returns the parameters by name."""
        return dict(zip(CAMERA_MODELS[self.model][1].split(), self.params, strict=True))

    @property
    def is_pinhole(self) -> bool:
        """Returns whether the images are free of lens distortion."""
        return self.model in PINHOLES

    @property
    def can_undistort(self) -> bool:
        """Returns whether the camera has a pinhole matrix that its images can be resampled to."""
        return "cx" in self.named

    @property
    def K(self) -> np.ndarray:
        """Returns the matrix (3,3) float64 of the pinhole camera with the same focal lengths and principal point."""
        p = self.named
        if "cx" not in p:
            raise PqkError(f"camera model {self.model} has no pinhole matrix")
        fx, fy = p.get("fx", p.get("f", 0.0)), p.get("fy", p.get("f", 0.0))
        return np.array([[fx, 0.0, p["cx"]], [0.0, fy, p["cy"]], [0.0, 0.0, 1.0]])


def distort(camera: Camera, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixel coordinates in the distorted image of the rays (x, y, 1), any shape.

    Formulas: COLMAP sensor/models and https://www.eth3d.net/documentation, after Weng et al., "Camera calibration with
    distortion models and accuracy evaluation", TPAMI 1992. The fisheye models first replace the radius r = tan(theta)
    by the angle theta. FOV, DIVISION and EUCM: `_radial_factor`; RAD_TAN_THIN_PRISM_FISHEYE: `_rad_tan_thin_prism`.
    """
    if camera.model.endswith("FISHEYE"):
        r = np.hypot(x, y)
        shrink = np.divide(np.arctan(r), r, out=np.ones_like(r), where=r > 1e-12)
        x, y = x * shrink, y * shrink
    r2 = x * x + y * y
    if camera.model == "RAD_TAN_THIN_PRISM_FISHEYE":
        u, v = _rad_tan_thin_prism(camera.named, x, y)
    elif camera.named.keys() & {"omega", "division", "alpha"}:
        factor = _radial_factor(camera.named, r2)
        u, v = x * factor, y * factor
    else:
        p = {name: camera.named.get(name, 0.0) for name in _LENS}
        radial = 1 + r2 * (p["k1"] + r2 * (p["k2"] + r2 * (p["k3"] + r2 * p["k4"])))
        if p["d1"] or p["d2"] or p["d3"]:
            radial = radial / (1 + r2 * (p["d1"] + r2 * (p["d2"] + r2 * p["d3"])))
        u = x * radial + 2 * p["p1"] * x * y + p["p2"] * (r2 + 2 * x * x) + p["sx1"] * r2
        v = y * radial + 2 * p["p2"] * x * y + p["p1"] * (r2 + 2 * y * y) + p["sy1"] * r2
    K = camera.K
    return K[0, 0] * u + K[0, 2], K[1, 1] * v + K[1, 2]


def _radial_factor(p: dict[str, float], r2: np.ndarray) -> np.ndarray:
    """Returns distorted over ideal radius, for the models that have it in closed form; 0 where a ray has no image.

    FOV: atan(2 r tan(omega / 2)) / omega (Devernay and Faugeras, "Straight lines have to be straight", 2001).
    DIVISION: the inverse of r = r_d / (1 + k r_d^2) (Fitzgibbon, CVPR 2001).
    EUCM: 1 / (alpha sqrt(beta r^2 + 1) + 1 - alpha) (Khomutenko et al., "An enhanced unified camera model", 2016).
    """
    if "omega" in p:
        omega, r = p["omega"], np.sqrt(r2)
        if abs(omega) < 1e-6:
            return np.ones_like(r2)
        slope = 2 * np.tan(omega / 2)
        return np.divide(np.arctan(slope * r), omega * r, out=np.full_like(r, slope / omega), where=r > 1e-12)
    if "division" in p:
        inside = 1 - 4 * p["division"] * r2
        return np.where(inside >= 0, 2 / (1 + np.sqrt(np.maximum(inside, 0))), 0.0)
    below = p["alpha"] * np.sqrt(np.maximum(p["beta"] * r2 + 1, 0)) + 1 - p["alpha"]
    return np.divide(1.0, below, out=np.zeros_like(r2), where=below > 0)


def _rad_tan_thin_prism(p: dict[str, float], x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distorts fisheye coordinates as Project Aria's Fisheye624 does: radial first, then tangential and prism."""
    r2 = x * x + y * y
    radial = 1 + r2 * (p["k1"] + r2 * (p["k2"] + r2 * (p["k3"] + r2 * (p["k4"] + r2 * (p["k5"] + r2 * p["k6"])))))
    x, y = x * radial, y * radial
    r2 = x * x + y * y
    tangential = 2 * (p["p1"] * x + p["p2"] * y)
    u = x + x * tangential + r2 * (p["p1"] + p["sx1"] + r2 * p["sx2"])
    v = y + y * tangential + r2 * (p["p2"] + p["sy1"] + r2 * p["sy2"])
    return u, v


def largest_radius(camera: Camera) -> float:
    """Returns the radius (x, y of a ray with z = 1) up to which the distortion polynomial is one-to-one.

    Beyond it the polynomial folds back and would show parts of the image a second time. It is found by moving outwards
    in 16 directions to the image corner's radius and stopping where the distorted radius no longer grows.
    """
    K = camera.K
    corners = np.array([[x, y, 1.0] for x in (0, camera.width) for y in (0, camera.height)]) @ np.linalg.inv(K).T
    radii = np.linspace(0, float(np.hypot(corners[:, 0], corners[:, 1]).max()), 513)
    angle = np.arange(16)[:, None] * (2 * np.pi / 16)
    u, v = distort(camera, np.cos(angle) * radii, np.sin(angle) * radii)
    grows = np.diff(np.hypot((u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1]), axis=1) > 0
    stops = np.where(grows.all(axis=1), len(radii) - 1, np.argmin(grows, axis=1))
    first = int(stops.min())
    return float("inf") if first == len(radii) - 1 else float(radii[first])


def undistort_image(image: np.ndarray, camera: Camera) -> np.ndarray:
    """Resamples (H,W,3) uint8 of the distorted camera to the same size, as seen by the pinhole camera `camera.K`
    (bilinear).

    Pixels without a source are black. Raises PqkError (one sentence, without a file name) when the share of pixels with
    a source is below LEAST_SEEN: the picture would be nearly black, and the camera's parameters are wrong.
    """
    from scipy.ndimage import map_coordinates  # slow to import, and rarely needed

    out, seen_pixels = np.zeros_like(image), 0
    for rows, u, v, seen in _sources(camera, image.shape):
        seen_pixels += int(seen.sum())
        for c in range(3):
            value = map_coordinates(image[..., c], [v - 0.5, u - 0.5], np.float32, order=1, mode="nearest")
            out[rows, :, c] = np.where(seen, np.rint(value), 0)
    share = seen_pixels / (image.shape[0] * image.shape[1])
    if share < LEAST_SEEN:
        raise PqkError(
            f"undoing the lens distortion of its camera leaves {100 * share:.2g} % of the picture, at least "
            f"{100 * LEAST_SEEN:.0f} % are needed; check the parameters of camera {camera.camera_id} ({camera.model} "
            f"{' '.join(f'{value:g}' for value in camera.params)})"
        )
    return out


def undistort_nearest(values: np.ndarray, camera: Camera) -> np.ndarray:
    """Resamples (H,W) of the distorted camera to the pinhole camera's view, nearest neighbour, 0 without source.

    Depth along the optical axis keeps its value: undistortion moves a point in the image, not in space.
    """
    out = np.zeros_like(values)
    for rows, u, v, seen in _sources(camera, values.shape):
        row, column = v[seen].astype(np.int64), u[seen].astype(np.int64)
        out[rows][seen] = values[row, column]
    return out


def _sources(camera: Camera, shape: tuple[int, ...]) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields bands of rows of the pinhole image: the rows, source pixel coordinates u, v, and whether they exist."""
    height, width = shape[:2]
    if (width, height) != (camera.width, camera.height):
        raise PqkError(f"the camera is for {camera.width}x{camera.height} pixels, the image has {width}x{height}")
    K, limit = camera.K, largest_radius(camera)
    x = (np.arange(width) + 0.5 - K[0, 2]) / K[0, 0]
    for start in range(0, height, _BAND_ROWS):
        rows = slice(start, min(start + _BAND_ROWS, height))
        y = (np.arange(rows.start, rows.stop)[:, None] + 0.5 - K[1, 2]) / K[1, 1]
        grid_x, grid_y = np.broadcast_arrays(x, y)
        u, v = distort(camera, grid_x, grid_y)
        seen = (u >= 0) & (u < width) & (v >= 0) & (v < height) & (np.hypot(grid_x, grid_y) <= limit)
        yield rows, u, v, seen
