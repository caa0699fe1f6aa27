"""Preprocessing: geometry that follows a resize and crop (the official rule: tests/families/test_vectors.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pqk.data.scenes.preprocess import fit_to_shape, unproject
from pqk.data.scenes.scene import View
from pqk.errors import PqkError
from pqk.families.dust3r.preprocess import official_preprocess


def view_with(folder: Path, image: np.ndarray, depth=None, mask=None, K=None, pose=None) -> View:
    """Write the arrays as files and return the view of them (PNG, so that the pixels are exact)."""
    Image.fromarray(image).save(folder / "a.png")
    if depth is not None:
        depth.astype("<f4").tofile(folder / "a.depth")
    if mask is not None:
        Image.fromarray(mask).save(folder / "a.mask.png")
    return View(
        "a.png",
        folder / "a.png",
        K=K,
        world_to_cam=pose,
        depth_path=None if depth is None else folder / "a.depth",
        mask_path=None if mask is None else folder / "a.mask.png",
        size=image.shape[:2] if K is not None else None,
    )


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_official_refuses_a_sliver():
    with pytest.raises(PqkError, match=r"2000x10 .* no 16-pixel patch"):
        official_preprocess(noise(10, 2000), 512)


@pytest.mark.parametrize("shape", [(100, 64), (64, 0), (-16, 64), (8, 8)])
def test_shape_must_be_multiple_of_16(tmp_path, shape):
    with pytest.raises(PqkError, match="multiples of 16"):
        fit_to_shape(view_with(tmp_path, noise(64, 64)), *shape)


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (10, 201), (201, 10)])
def test_a_strip_is_refused(tmp_path, shape):
    with pytest.raises(PqkError, match=rf"a\.png: the image has {shape[1]}x{shape[0]} pixels; .* at most 20 times"):
        fit_to_shape(view_with(tmp_path, noise(*shape)), 512, 512)


@pytest.mark.parametrize("shape", [(10, 200), (200, 10)])
def test_a_long_picture_is_taken(tmp_path, shape):
    assert fit_to_shape(view_with(tmp_path, noise(*shape)), 32, 32).image.shape == (3, 32, 32)


def test_pure_crop_is_exact(tmp_path):
    image = noise(64, 103)
    depth = np.random.default_rng(1).uniform(1, 9, (64, 103)).astype(np.float32)
    K = np.array([[70.0, 0, 50.25], [0, 71.0, 33.0], [0, 0, 1]])
    pose = np.eye(4)
    frame = fit_to_shape(view_with(tmp_path, image, depth, K=K, pose=pose), 64, 64, scene="room")
    left = 19
    np.testing.assert_array_equal(frame.depth, depth[:, left : left + 64])
    codes = np.rint((frame.image + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(codes.transpose(1, 2, 0), image[:, left : left + 64])
    np.testing.assert_array_equal(frame.K, K - [[0, 0, left], [0, 0, 0], [0, 0, 0]])
    assert frame.scene == "room" and frame.image.dtype == np.float32 and frame.depth.dtype == np.float32
    # The 3D points of the kept pixels did not move.
    np.testing.assert_allclose(unproject(frame.depth, frame.K), unproject(depth, K)[:, left : left + 64], atol=1e-12)


def test_a_jittered_crop_lies_anywhere_and_everything_follows(tmp_path):
    image = noise(64, 67)
    depth = np.random.default_rng(1).uniform(1, 9, (64, 67)).astype(np.float32)
    K = np.array([[70.0, 0, 33.0], [0, 71.0, 33.0], [0, 0, 1]])
    view = view_with(tmp_path, image, depth, K=K, pose=np.eye(4))
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        frame = fit_to_shape(view, 64, 64, jitter=rng)
        left = int(33 - frame.K[0, 2])
        codes = np.rint((frame.image + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
        np.testing.assert_array_equal(codes, image[:, left : left + 64])
        points = unproject(depth, K)[:, left : left + 64]
        np.testing.assert_allclose(unproject(frame.depth, frame.K), points, atol=1e-12)
        seen.add(left)
    assert seen == {0, 1, 2, 3}


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 150), st.integers(20, 150), st.sampled_from([16, 32, 64, 96]), st.sampled_from([16, 48, 80]))
def test_slanted_plane_follows_k(tmp_path_factory, old_height, old_width, height, width):
    """Depth of a plane, evaluated at the new pixel rays, agrees within the nearest neighbour's half source pixel."""
    folder = tmp_path_factory.mktemp("plane")
    K = np.array([[1.1 * old_width, 0, 0.47 * old_width], [0, 1.05 * old_width, 0.52 * old_height], [0, 0, 1]])
    normal = np.array([0.2, -0.1, 1.0])  # n . p = 3

    def plane(K, height, width):
        rays = unproject(np.ones((height, width)), K)
        return 3.0 / (rays @ normal), rays

    depth, _ = plane(K, old_height, old_width)
    frame = fit_to_shape(view_with(folder, noise(old_height, old_width), depth, K=K, pose=np.eye(4)), height, width)
    assert frame.image.shape == (3, height, width) and frame.depth.shape == (height, width)
    expected, _ = plane(frame.K, height, width)
    # d depth / d ray is at most depth^2/3 * |n|; half a source pixel is 0.5/f in the ray, in both axes.
    slack = expected.max() ** 2 / 3 * (0.2 / K[0, 0] + 0.1 / K[1, 1]) * 0.5 * 1.2 + 1e-5
    assert np.abs(frame.depth - expected).max() <= slack


def test_landmark_stays_under_its_pixel(tmp_path):
    """A bright dot at the projection of a known 3D point is found at the projection with the new K."""
    K = np.array([[200.0, 0, 160.0], [0, 200.0, 120.0], [0, 0, 1]])
    point = np.array([0.31, -0.22, 2.0])
    image = np.zeros((240, 320, 3), np.uint8)
    u, v, w = K @ point
    yy, xx = np.mgrid[0:240, 0:320] + 0.5
    blob = np.exp(-((xx - u / w) ** 2 + (yy - v / w) ** 2) / (2 * 4.0**2))
    image[:] = np.rint(255 * blob)[..., None]
    for height, width in [(96, 96), (128, 224), (480, 480)]:
        frame = fit_to_shape(view_with(tmp_path, image, K=K, pose=np.eye(4)), height, width)
        weight = (frame.image[0].astype(np.float64) + 1) / 2
        weight[weight < 0.05] = 0
        yy, xx = np.mgrid[0:height, 0:width] + 0.5
        found = np.array([(xx * weight).sum(), (yy * weight).sum()]) / weight.sum()
        expected = frame.K @ point
        np.testing.assert_allclose(found, expected[:2] / expected[2], atol=0.1)


def test_mask_is_applied_to_depth(tmp_path):
    mask = np.full((32, 32), 255, np.uint8)
    mask[:, :16] = 0
    view = view_with(tmp_path, noise(32, 32), np.ones((32, 32)), mask, K=np.eye(3), pose=np.eye(4))
    frame = fit_to_shape(view, 16, 16)
    np.testing.assert_array_equal(frame.depth, np.repeat([[0.0] * 8 + [1.0] * 8], 16, axis=0))


def test_view_without_camera(tmp_path):
    frame = fit_to_shape(view_with(tmp_path, noise(20, 30)), 32, 48)
    assert frame.K is None and frame.world_to_cam is None and frame.depth is None
    assert frame.image.min() >= -1 and frame.image.max() <= 1


def test_points_project_onto_their_pixels(tmp_path):
    rng = np.random.default_rng(3)
    depth = rng.uniform(1, 5, (32, 32)).astype(np.float32)
    depth[3, 4] = 0
    K = np.array([[30.0, 0, 15.0], [0, 31.0, 17.0], [0, 0, 1]])
    frame = fit_to_shape(view_with(tmp_path, noise(32, 32), depth, K=K, pose=np.eye(4)), 32, 32)
    points = unproject(frame.depth, frame.K)
    assert (points[3, 4] == 0).all() and (points == 0).sum() == 3
    camera = points[10, 20]
    np.testing.assert_allclose(K @ camera / camera[2], [20.5, 10.5, 1], atol=1e-9)
    assert camera[2] == pytest.approx(float(depth[10, 20]))
