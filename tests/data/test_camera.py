"""Lens models: projections computed by hand, and undistortion of a picture that a distorted camera took."""

from __future__ import annotations

import numpy as np
import pytest

from pqk.data.scenes import camera as camera_module
from pqk.data.scenes.camera import CAMERA_MODELS, Camera, distort, largest_radius, undistort_image, undistort_nearest
from pqk.errors import PqkError

WIDTH, HEIGHT = 160, 120
F = (150.0, 148.0, 82.0, 57.0)
LENSES = [
    Camera(1, "SIMPLE_RADIAL", WIDTH, HEIGHT, (150.0, 82.0, 57.0, -0.15)),
    Camera(1, "RADIAL", WIDTH, HEIGHT, (150.0, 82.0, 57.0, -0.15, 0.05)),
    Camera(1, "OPENCV", WIDTH, HEIGHT, (*F, -0.2, 0.05, 0.003, -0.002)),
    Camera(1, "FULL_OPENCV", WIDTH, HEIGHT, (*F, -0.2, 0.05, 0.003, -0.002, 0.01, 0.1, 0.02, -0.01)),
    Camera(1, "OPENCV_FISHEYE", WIDTH, HEIGHT, (*F, 0.1, -0.05, 0.02, 0.01)),
    Camera(1, "SIMPLE_RADIAL_FISHEYE", WIDTH, HEIGHT, (150.0, 82.0, 57.0, 0.1)),
    Camera(1, "RADIAL_FISHEYE", WIDTH, HEIGHT, (150.0, 82.0, 57.0, 0.1, -0.05)),
    Camera(1, "FISHEYE", WIDTH, HEIGHT, F),
    Camera(1, "THIN_PRISM_FISHEYE", WIDTH, HEIGHT, (*F, 0.21, 0.2, -5e-4, 5e-3, -0.16, 0.4, -8e-3, 9e-3)),
    Camera(1, "FOV", WIDTH, HEIGHT, (*F, 0.8)),
    Camera(1, "SIMPLE_DIVISION", WIDTH, HEIGHT, (150.0, 82.0, 57.0, -0.3)),
    Camera(1, "DIVISION", WIDTH, HEIGHT, (*F, 0.2)),
    Camera(1, "EUCM", WIDTH, HEIGHT, (*F, 0.6, 1.1)),
    Camera(
        1,
        "RAD_TAN_THIN_PRISM_FISHEYE",
        WIDTH,
        HEIGHT,
        (*F, 0.1, -0.05, 0.02, 0.01, -0.01, 0.01, 3e-3, -2e-3, 1e-3, -1e-3, 2e-3, 1e-3),
    ),
]


def pattern(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth colour for every ray direction (x, y, 1)."""
    waves = [np.sin(9 * x + 4 * y), np.cos(7 * y - 3 * x), np.sin(6 * x) * np.cos(8 * y)]
    return np.rint(127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def rays(camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    v, u = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    return (u - camera.K[0, 2]) / camera.K[0, 0], (v - camera.K[1, 2]) / camera.K[1, 1]


def undistorted_rays(camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Rays of the distorted camera's pixels, by fixed-point inversion of `distort`."""
    target_x, target_y = rays(camera)
    x, y = target_x.copy(), target_y.copy()
    for _ in range(200):
        u, v = distort(camera, x, y)
        x += 0.7 * (target_x - (u - camera.K[0, 2]) / camera.K[0, 0])
        y += 0.7 * (target_y - (v - camera.K[1, 2]) / camera.K[1, 1])
    u, v = distort(camera, x, y)
    assert np.abs(u - 0.5 - np.arange(WIDTH)).max() < 1e-6 and np.abs(v.T - 0.5 - np.arange(HEIGHT)).max() < 1e-6
    return x, y


def test_model_ids_are_colmaps():
    assert [number for number, _ in CAMERA_MODELS.values()] == list(range(18))
    counts = {name: len(params.split()) for name, (_, params) in CAMERA_MODELS.items()}
    assert counts["THIN_PRISM_FISHEYE"] == counts["FULL_OPENCV"] == 12 and counts["RAD_TAN_THIN_PRISM_FISHEYE"] == 16


def test_distortion_by_hand():
    """One ray through each family, worked out with plain arithmetic."""
    x, y = np.array(0.3), np.array(-0.2)
    r2 = 0.13
    u, v = distort(Camera(1, "OPENCV", 64, 48, (100.0, 200.0, 32.0, 24.0, 0.1, 0.2, 0.01, 0.02)), x, y)
    radial = 1 + 0.1 * r2 + 0.2 * r2**2
    assert u == pytest.approx(32 + 100 * (0.3 * radial + 2 * 0.01 * 0.3 * -0.2 + 0.02 * (r2 + 2 * 0.09)))
    assert v == pytest.approx(24 + 200 * (-0.2 * radial + 2 * 0.02 * 0.3 * -0.2 + 0.01 * (r2 + 2 * 0.04)))

    theta = np.arctan(np.sqrt(r2))
    u, v = distort(Camera(1, "OPENCV_FISHEYE", 64, 48, (100.0, 200.0, 32.0, 24.0, 0.1, 0.2, 0.3, 0.4)), x, y)
    bent = theta * (1 + 0.1 * theta**2 + 0.2 * theta**4 + 0.3 * theta**6 + 0.4 * theta**8)
    assert u == pytest.approx(32 + 100 * bent * 0.3 / np.sqrt(r2))
    assert v == pytest.approx(24 + 200 * bent * -0.2 / np.sqrt(r2))

    params = (100.0, 200.0, 32.0, 24.0, 0.1, 0.2, 0.01, 0.02, 0.3, 0.4, 0.05, 0.06)
    u, v = distort(Camera(1, "THIN_PRISM_FISHEYE", 64, 48, params), x, y)
    a, b = theta * 0.3 / np.sqrt(r2), theta * -0.2 / np.sqrt(r2)
    factor = bent / theta
    assert u == pytest.approx(
        32 + 100 * (a * factor + 2 * 0.01 * a * b + 0.02 * (theta**2 + 2 * a * a) + 0.05 * theta**2)
    )
    assert v == pytest.approx(
        24 + 200 * (b * factor + 2 * 0.02 * a * b + 0.01 * (theta**2 + 2 * b * b) + 0.06 * theta**2)
    )

    full = Camera(1, "FULL_OPENCV", 64, 48, (100.0, 100.0, 0.0, 0.0, 0.1, 0.2, 0.0, 0.0, 0.3, 0.4, 0.5, 0.6))
    u, _ = distort(full, x, y)
    top, bottom = 1 + 0.1 * r2 + 0.2 * r2**2 + 0.3 * r2**3, 1 + 0.4 * r2 + 0.5 * r2**2 + 0.6 * r2**3
    assert u == pytest.approx(100 * 0.3 * top / bottom)


@pytest.mark.parametrize("camera", LENSES, ids=lambda camera: camera.model)
def test_undistorting_a_distorted_picture_gives_the_pinhole_picture(camera, monkeypatch):
    monkeypatch.setattr(camera_module, "_BAND_ROWS", 50)  # several bands, the last one shorter
    distorted = pattern(*undistorted_rays(camera))
    expected = pattern(*rays(camera))
    result = undistort_image(distorted, camera)
    u, v = distort(camera, *rays(camera))
    inside = (u > 1) & (u < WIDTH - 1) & (v > 1) & (v < HEIGHT - 1)
    assert inside.mean() > 0.8
    assert np.abs(result.astype(int) - expected)[inside].max() <= 2  # bilinear interpolation of a smooth pattern
    assert np.abs(distorted.astype(int) - expected)[inside].max() > 10  # there was something to undo
    outside = (u < 0) | (u >= WIDTH) | (v < 0) | (v >= HEIGHT)
    assert (result[outside] == 0).all()


@pytest.mark.parametrize("camera", LENSES, ids=lambda camera: camera.model)
def test_nearest_depth_of_a_slanted_plane(camera):
    """Depth along z is the same number in both images; only its pixel moves, by at most half a source pixel."""
    x, y = undistorted_rays(camera)
    plane = 3.0 / (1 + 0.2 * x - 0.1 * y)
    result = undistort_nearest(plane.astype(np.float32), camera)
    x, y = rays(camera)
    expected = 3.0 / (1 + 0.2 * x - 0.1 * y)
    seen = result > 0
    assert seen.mean() > 0.8
    assert np.abs(result - expected)[seen].max() < 0.01  # half a pixel is 1/300 in the ray, times 0.3 * 3 * 1.1


def test_pinhole_resampling_is_the_identity():
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    plain = Camera(1, "OPENCV", WIDTH, HEIGHT, (*F, 0.0, 0.0, 0.0, 0.0))
    np.testing.assert_array_equal(undistort_image(image, plain), image)
    np.testing.assert_array_equal(undistort_nearest(image[..., 0], plain), image[..., 0])
    assert largest_radius(plain) == float("inf")


def test_folded_rays_are_left_black():
    """With k1 = -1 the radius r (1 - r^2) turns back at 1/sqrt(3); beyond it the picture would repeat itself."""
    camera = Camera(1, "SIMPLE_RADIAL", WIDTH, HEIGHT, (80.0, 80.0, 60.0, -1.0))
    assert largest_radius(camera) == pytest.approx(1 / np.sqrt(3), abs=0.01)
    result = undistort_nearest(np.ones((HEIGHT, WIDTH)), camera)
    x, y = rays(camera)
    assert (result[np.hypot(x, y) > 0.6] == 0).all() and (result[np.hypot(x, y) < 0.5] == 1).all()


def test_refusals():
    with pytest.raises(PqkError, match="EQUIRECTANGULAR has no pinhole matrix"):
        _ = Camera(1, "EQUIRECTANGULAR", 64, 32, (64.0, 32.0)).K
    with pytest.raises(PqkError, match="the camera is for 160x120 pixels, the image has 10x20"):
        undistort_nearest(np.ones((20, 10)), LENSES[0])
    assert not Camera(1, "EQUIRECTANGULAR", 64, 32, (64.0, 32.0)).can_undistort


def test_rays_that_a_lens_cannot_see_are_left_black():
    """r = r_d / (1 + k r_d^2) grows to 1 / (2 sqrt(k)) only: here to 0.5."""
    camera = Camera(1, "SIMPLE_DIVISION", WIDTH, HEIGHT, (30.0, 80.0, 60.0, 1.0))
    assert largest_radius(camera) == pytest.approx(0.5, abs=0.01)
    result = undistort_nearest(np.ones((HEIGHT, WIDTH)), camera)
    x, y = rays(camera)
    assert (result[np.hypot(x, y) > 0.51] == 0).all() and (result[np.hypot(x, y) < 0.49] == 1).all()


@pytest.mark.parametrize("model, params", [("FOV", (0.0,)), ("DIVISION", (0.0,)), ("EUCM", (0.0, 1.0))])
def test_a_lens_without_distortion_is_a_pinhole(model, params):
    x, y = np.array([0.0, 0.3]), np.array([0.0, -0.2])
    u, v = distort(Camera(1, model, WIDTH, HEIGHT, (*F, *params)), x, y)
    np.testing.assert_array_equal(u, F[0] * x + F[2])
    np.testing.assert_array_equal(v, F[1] * y + F[3])
