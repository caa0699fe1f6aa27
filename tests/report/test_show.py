"""Figures of predictions: what is drawn where, and the numbers in titles and files, on arrays that are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from pqk.data.scenes.ply import read_coloured_points
from pqk.errors import PqkError
from pqk.families.viewing import Geometry
from pqk.report.show.cloud import splat
from pqk.report.show.depth import draw_depth, relative_difference
from pqk.report.show.trajectory import camera_centres, rotation_differences
from pqk.show.show import SURE, Side, compare, draw

FILES = ["depth.png", "cloud.png", "trajectory.png", "show.json", "cloud.ply"]


def geometry(count: int = 3, height: int = 24, width: int = 32) -> Geometry:
    """A wavy wall, seen by cameras that move to the right and turn to it."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / width - 0.5
    depth = np.stack([2 + 0.3 * np.sin(9 * x + k) + 0.2 * y for k in range(count)])
    points = np.stack([np.stack([x * d, y * d, d], axis=-1) for d in depth])
    turns = Rotation.from_euler("y", [[-5.0 * k] for k in range(count)], degrees=True).as_matrix()
    cameras = np.stack([np.concatenate([r, r @ np.array([[-0.3 * k], [0], [0]])], axis=1) for k, r in enumerate(turns)])
    return Geometry(
        tuple(f"{k}.jpg" for k in range(count)),
        random.integers(0, 255, (count, height, width, 3), dtype=np.uint8),
        depth.astype(np.float32),
        points.astype(np.float32),
        random.random((count, height, width)).astype(np.float32) + 1,
        cameras,
    )


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50  # something is drawn
        return image.size


def test_one_side(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cloud-against.ply").touch()  # of an older drawing of two
    drawn = draw("a scene", [Side("float", geometry())], tmp_path / "out")
    assert [path.name for path in drawn.files] == FILES and drawn.comparison is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    for name in FILES[:3]:
        assert min(size(tmp_path / "out" / name)) > 400
    about = json.loads((tmp_path / "out" / "show.json").read_text())
    expected = {"scene": "a scene", "pictures": ["0.jpg", "1.jpg", "2.jpg"], "models": ["float"], "comparison": None}
    assert about == expected
    points, colours = read_coloured_points(tmp_path / "out" / "cloud.ply")
    assert colours is not None and len(points) == pytest.approx((1 - SURE / 100) * 3 * 24 * 32, abs=2)


def test_two_sides_up_to_a_scale(tmp_path: Path) -> None:
    """The second side is the first, twice as large, with one picture 10 % too far: the median undoes the scale."""
    first = geometry()
    factor = np.array([2.0, 2.0, 2.2], np.float32)[:, None, None]
    turned = first.cameras.copy()
    turned[:, :, 3] *= 2
    turned[1, :, :3] = Rotation.from_euler("x", 4.0, degrees=True).as_matrix() @ turned[1, :, :3]
    second = replace(first, depth=factor * first.depth, points=2 * first.points, cameras=turned)
    drawn = draw("a scene", [Side("float", first), Side("int4 $x$", second)], tmp_path)
    found = drawn.comparison
    assert found is not None and found.mean is not None
    ratio = found.scale * factor.ravel()
    assert found.depth == pytest.approx(np.abs(ratio - 1), abs=1e-6)
    assert found.mean == pytest.approx(np.abs(ratio - 1).mean(), abs=1e-6) and 0.02 < found.mean < 0.05
    assert 0.47 < found.scale <= 0.5
    assert found.rotation == pytest.approx([0, 4, 0], abs=1e-6)
    about = json.loads((tmp_path / "show.json").read_text())
    assert about["models"] == ["float", "int4 $x$"]
    assert about["comparison"]["depth_mean_relative_difference"] == found.mean
    assert about["comparison"]["rotation_difference_deg"][1] == pytest.approx(4)
    mine, theirs = (read_coloured_points(tmp_path / name) for name in ("cloud.ply", "cloud-against.ply"))
    np.testing.assert_allclose(theirs[0], 2 * found.scale * mine[0], rtol=1e-5)
    np.testing.assert_array_equal(mine[1], theirs[1])


def test_a_model_against_itself() -> None:
    scaled, found = compare(geometry(), geometry())
    assert (found.scale, found.mean, found.rotation) == (1.0, 0.0, (0.0, 0.0, 0.0))
    np.testing.assert_array_equal(scaled.points, geometry().points)


def test_pixels_without_a_depth_are_left_out(tmp_path: Path) -> None:
    first = geometry()
    depth = first.depth.copy()
    depth[0, :12], depth[1, 0, 0], depth[2] = np.nan, -1, np.inf
    points = first.points.copy()
    points[0, :12] = np.nan
    broken = replace(first, depth=depth, points=points)
    _, found = compare(first, broken)
    assert found.depth[2] is None and found.depth[0] == 0
    assert found.depth[1] == pytest.approx((first.depth[1, 0, 0] + 1) / first.depth[1, 0, 0] / (24 * 32), rel=1e-5)
    assert found.mean == pytest.approx(found.depth[1] / 2)
    draw("a", [Side("one", first), Side("two", broken)], tmp_path)
    assert np.isfinite(read_coloured_points(tmp_path / "cloud-against.ply")[0]).all()
    with pytest.raises(PqkError, match="no valid pixel"):
        compare(first, replace(first, depth=0 * depth))


def test_other_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PqkError, match=r"the two models show other pictures: \(3, 24, 32\) of 0\.jpg, 1\.jpg"):
        draw("a", [Side("one", geometry()), Side("two", geometry(2))], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_relative_difference() -> None:
    depth = np.array([1.0, 2.0, 0.0, np.nan, 4.0, -1.0])
    other = np.array([1.5, 1.0, 1.0, 1.0, np.inf, -2.0])
    np.testing.assert_array_equal(relative_difference(depth, other), [0.5, 0.5, np.nan, np.nan, np.nan, np.nan])


def test_many_pictures_and_long_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqk.report.show.depth.MOST_ROWS", 2)
    many = geometry(4, 20, 60)
    names = [f"{name} {'long ' * 12}" for name in many.names]
    label = "a label that is far too long for the head of one panel"
    draw_depth(tmp_path / "many.png", [label], names, many.images, [many.depth], "title")
    draw_depth(tmp_path / "few.png", [label], names[:2], many.images[:2], [many.depth[:2]], "title")
    assert size(tmp_path / "many.png") == size(tmp_path / "few.png")


@settings(max_examples=25)
@given(st.lists(st.floats(-180, 180), min_size=3, max_size=3), st.floats(0, 179.9), st.integers(0, 100))
def test_rotation_differences(start: list[float], angle: float, seed: int) -> None:
    axis = np.random.default_rng(seed).normal(size=3)
    first = Rotation.from_euler("xyz", start, degrees=True).as_matrix()
    second = Rotation.from_rotvec(np.radians(angle) * axis / np.linalg.norm(axis)).as_matrix() @ first
    shift = np.zeros((3, 1))
    found = rotation_differences(*(np.concatenate([r, shift], axis=1)[None] for r in (first, second)))
    assert found[0] == pytest.approx(angle, abs=1e-6)


def test_camera_centres() -> None:
    cameras = geometry().cameras
    np.testing.assert_allclose(camera_centres(cameras), [[0.3 * k, 0, 0] for k in range(3)], atol=1e-12)


def test_the_nearest_point_is_seen() -> None:
    points = np.array([[1.5, 1.5, 3.0], [1.5, 1.5, 2.0], [5.5, 2.5, 1.0], [-50, 0, 1], [1e12, 0, 1]])
    colours = np.array([[10, 0, 0], [20, 0, 0], [30, 0, 0], [40, 0, 0], [50, 0, 0]], np.uint8)
    image = splat(points, colours, np.zeros(2), 1.0, (5, 7))
    assert image.shape == (5, 7, 4)
    drawn = np.zeros((5, 7), int)
    drawn[1:3, 1:3], drawn[2:4, 5:7] = 20, 30
    np.testing.assert_array_equal(image[..., 0], drawn)
    np.testing.assert_array_equal(image[..., 3], 255 * (drawn > 0))
