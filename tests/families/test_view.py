"""What each family says of its predictions, on predictions that are made from known cameras and depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from pqk.data.scenes.open import open_scene
from pqk.errors import NotBuilt, PqkError
from pqk.families.contract import Family, Sample
from pqk.families.metrics.resection import focal_length, resect
from pqk.families.registry import family
from pqk.families.vggt.geometry import extri_intri_to_pose_encoding, unproject_depth
from pqk.recipe.experiment import config_file, config_loaders

REPOSITORY = Path(__file__).parents[2]
SHAPES = {"dust3r": [1, 3, 48, 64], "vggt": [1, 3, 42, 56]}
DRAWN = sorted(SHAPES)
"""The families whose pictures are seen in depth."""
FOCAL = 60.0


def workload(of: Family) -> Any:
    shape = {"input.shape": SHAPES[of.name]}
    return config_loaders(of)["workload"](config_file(REPOSITORY, of, "workload"), shape)


def pictures(folder: Path, count: int) -> Path:
    random = np.random.default_rng(count)
    for place in range(count):
        Image.fromarray(random.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / f"{place}.png")
    return folder


def cameras(count: int) -> np.ndarray:
    """World-to-camera matrices (V,3,4) around a place in front of the first, whose frame is the world."""
    turns = Rotation.from_euler("yx", [(12.0 * k, -4.0 * k) for k in range(count)], degrees=True).as_matrix()
    return np.stack([np.concatenate([r, [[0.2 * k], [-0.1 * k], [0.3 * k]]], axis=1) for k, r in enumerate(turns)])


def truth(count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth (V,H,W), points (V,H,W,3) in the first camera, and the cameras."""
    y, x = np.mgrid[:height, :width] + 0.5
    rays = np.stack([(x - width / 2) / FOCAL, (y - height / 2) / FOCAL, np.ones_like(x)], axis=-1)
    depth = np.stack([3 + np.sin(x / 9 + k) + 0.6 * np.cos(y / 7) for k in range(count)])
    poses = cameras(count)
    points = np.stack([(d[..., None] * rays - p[:, 3]) @ p[:, :3] for d, p in zip(depth, poses, strict=True)])
    return depth, points, poses


def test_pairs_share_the_frame_and_the_scale_of_the_first(tmp_path: Path) -> None:
    """Each pair is predicted at a scale of its own; cameras are found from points and pixels alone."""
    of, count = family("dust3r"), 4
    part = of.view_part()
    fed, samples = part.samples(open_scene(pictures(tmp_path, count)), workload(of), 10)
    assert fed == workload(of)
    assert [sample.name for sample in samples] == ["0.png, 1.png", "0.png, 2.png", "0.png, 3.png"]
    depth, points, poses = truth(count, 48, 64)
    sure = np.ones((48, 64), np.float32)
    predictions = [
        {
            "pts3d_1": np.float32(scale) * points[0].astype(np.float32),
            "pts3d_2": np.float32(scale) * points[k].astype(np.float32),
            "conf_1": sure,
            "conf_2": k * sure,
        }
        for k, scale in ((1, 2.0), (2, 0.5), (3, 1.0))
    ]
    found = part.view(samples, predictions)
    assert found.names == ("0.png", "1.png", "2.png", "3.png")
    np.testing.assert_allclose(found.points, 2 * points, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.depth, 2 * depth, rtol=1e-3)
    np.testing.assert_allclose(found.cameras[:, :, :3], poses[:, :, :3], atol=1e-4)
    np.testing.assert_allclose(found.cameras[:, :, 3], 2 * poses[:, :, 3], atol=1e-3)
    np.testing.assert_array_equal(found.confidence.mean(axis=(1, 2)), [1, 1, 2, 3])
    assert found.images.shape == (4, 48, 64, 3) and found.images.dtype == np.uint8
    behind = [{**predictions[0], "pts3d_1": -predictions[0]["pts3d_1"]}]
    with pytest.raises(PqkError, match="lies in front of its camera"):
        part.view(samples[:1], behind)


def test_frames_are_moved_into_the_first_camera(tmp_path: Path) -> None:
    of, count = family("vggt"), 3
    part = of.view_part()
    fed, samples = part.samples(open_scene(pictures(tmp_path, count)), workload(of), 3)
    assert fed.together == 3 and workload(of).together == 2
    assert [sample.name for sample in samples] == ["0.png, 1.png, 2.png"]
    height, width = SHAPES["vggt"][2:]
    depth = truth(count, height, width)[0]
    world = np.concatenate([Rotation.from_euler("z", 30, degrees=True).as_matrix(), [[0.1], [0.2], [0.3]]], axis=1)
    poses = cameras(count)
    placed = np.concatenate([poses[:, :, :3] @ world[:, :3], poses[:, :, :3] @ world[:, 3:] + poses[:, :, 3:]], axis=2)
    intrinsics = np.tile(np.array([[FOCAL, 0, width / 2], [0, FOCAL, height / 2], [0, 0, 1]]), (count, 1, 1))
    encoding = extri_intri_to_pose_encoding(torch.from_numpy(placed), torch.from_numpy(intrinsics), (height, width))
    prediction = {
        "pose_enc": encoding.numpy().astype(np.float32),
        "depth": depth.astype(np.float32),
        "depth_conf": np.ones_like(depth, np.float32),
        "world_points": unproject_depth(depth, placed, intrinsics).astype(np.float32),
        "world_points_conf": 2 * np.ones_like(depth, np.float32),
    }
    found = part.view(samples, [prediction])
    np.testing.assert_allclose(found.cameras, poses, atol=1e-5)
    np.testing.assert_array_equal(found.depth, prediction["depth"])
    np.testing.assert_allclose(found.points, unproject_depth(depth, poses, intrinsics), atol=1e-4)
    seen = np.einsum("vij,vhwj->vhwi", found.cameras[:, :, :3], found.points) + found.cameras[:, None, None, :, 3]
    np.testing.assert_allclose(seen[..., 2], found.depth, atol=1e-4)
    assert (found.confidence == 2).all()
    with pytest.raises(PqkError, match="shown from one sample, not from 2"):
        part.view(samples * 2, [prediction] * 2)


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_come_back_as_they_were_fed(tmp_path: Path, name: str) -> None:
    of = family(name)
    fed = workload(of)
    height, width = SHAPES[name][2:]
    Image.new("RGB", (width, height), (0, 128, 255)).save(tmp_path / "a.png")
    Image.new("RGB", (width, height), (255, 7, 1)).save(tmp_path / "b.png")
    _, samples = of.view_part().samples(open_scene(tmp_path), fed, 2)
    depth, points, _ = truth(2, height, width)
    flat = np.ones((2, height, width), np.float32)
    encoding = np.zeros((2, 9), np.float32)
    encoding[:, 6], encoding[:, 7:] = 1, 1
    predictions: dict[str, list[dict[str, np.ndarray]]] = {
        "dust3r": [{"pts3d_1": points[0], "pts3d_2": points[1], "conf_1": flat[0], "conf_2": flat[1]}],
        "vggt": [
            {
                "pose_enc": encoding,
                "depth": depth,
                "depth_conf": flat,
                "world_points": points.astype(np.float32),
                "world_points_conf": flat,
            }
        ],
    }
    images = of.view_part().view(samples, predictions[name]).images
    np.testing.assert_array_equal(images[0], np.broadcast_to([0, 128, 255], images[0].shape))
    np.testing.assert_array_equal(images[1], np.broadcast_to([255, 7, 1], images[1].shape))


@pytest.mark.parametrize("name", DRAWN)
def test_one_picture_is_too_few(tmp_path: Path, name: str) -> None:
    of = family(name)
    (tmp_path / "one").mkdir()
    with pytest.raises(PqkError, match="needs at least 2 images, found 1"):
        of.view_part().samples(open_scene(pictures(tmp_path / "one", 1)), workload(of), 4)
    with pytest.raises(PqkError, match="needs at least 2 images, 1 of its 3 asked for"):
        of.view_part().samples(open_scene(pictures(tmp_path, 3)), workload(of), 1)


def test_a_family_without_a_view_says_so() -> None:
    with pytest.raises(NotBuilt, match="predictions of the family toy cannot be drawn here: it has no view part"):
        Family("toy", *["toy_family"] * 5).view_part()
    assert Sample(0, "a", None).truth is None


@settings(max_examples=15)
@given(
    st.lists(st.floats(-40, 40), min_size=3, max_size=3),
    st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    st.floats(0.01, 100),
    st.integers(0, 1000),
)
def test_a_camera_is_found_from_points(angles: list[float], shift: list[float], unit: float, seed: int) -> None:
    """Of any turn below 40 degrees about each axis, in any unit, with a tenth of the points wrong but hardly sure."""
    height, width = 36, 48
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] + 0.5
    rays = np.stack([(x - width / 2) / FOCAL, (y - height / 2) / FOCAL, np.ones_like(x)], axis=-1)
    local = random.uniform(2, 6, (height, width, 1)) * rays
    points = unit * ((local - shift) @ turn)
    weights = np.ones((height, width))
    wrong = random.random((height, width)) < 0.1
    points[wrong] += unit * random.normal(size=(wrong.sum(), 3))
    weights[wrong] = 1e-9
    found = resect(points, FOCAL, weights)
    np.testing.assert_allclose(found[:, :3], turn, atol=2e-3)
    np.testing.assert_allclose(found[:, 3], unit * np.array(shift), atol=1e-2 * unit)


def test_a_focal_length_is_found_from_points() -> None:
    points = truth(1, 48, 64)[1][0]
    weights = np.ones((48, 64))
    assert focal_length(points, weights) == pytest.approx(FOCAL, rel=1e-6)
    points[::9, ::7] *= [3, 1, 1]
    assert focal_length(points, weights) == pytest.approx(FOCAL, rel=0.01)
    points[:5], weights[5:9] = np.nan, 0
    assert focal_length(points, weights) == pytest.approx(FOCAL, rel=0.01)
    with pytest.raises(PqkError, match="too few points of a picture are finite"):
        resect(np.full((4, 4, 3), np.nan), FOCAL, np.ones((4, 4)))
