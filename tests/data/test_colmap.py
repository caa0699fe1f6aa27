"""COLMAP models: text and binary, round trips, and one clear sentence for what is malformed."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from pqk.data.scenes.camera import CAMERA_MODELS, Camera
from pqk.data.scenes.colmap import (
    ModelImage,
    model_paths,
    quaternion_to_rotation,
    read_model,
    rotation_to_quaternion,
    safe_name,
    write_text_model,
)
from pqk.errors import PqkError

CAMERAS = "# a comment\n1 PINHOLE 640 480 500 501 320 240\n\n7 SIMPLE_PINHOLE 64 48 50 32 24\n"
IMAGES = (
    "# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME\n"
    "3 1 0 0 0 0.5 -1 2 7 b/second image.jpg\n"
    "10.5 20.5 -1 30 40 12\n"
    "1 0 1 0 0 0 0 0 1 a.jpg\n"
    "\n"
)
finite = st.floats(-1e6, 1e6)


def write(folder, cameras=CAMERAS, images=IMAGES):
    (folder / "cameras.txt").write_text(cameras)
    (folder / "images.txt").write_text(images)
    return folder


def write_binary(folder, n_points=2):
    """A binary model written field by field from the published format, independent of our reader."""
    model_id, params = CAMERA_MODELS["OPENCV"][0], (500.0, 501.0, 320.0, 240.0, 0.1, -0.05, 0.001, 0.002)
    (folder / "cameras.bin").write_bytes(struct.pack("<QiiQQ8d", 1, 5, model_id, 640, 480, *params))
    body = struct.pack("<Q", 2)
    for image_id, name in ((11, "x/one.jpg"), (12, "two.png")):
        body += struct.pack("<i4d3di", image_id, 0.5, -0.5, 0.5, 0.5, 1.0, 2.0, 3.0, 5)
        body += name.encode() + b"\0" + struct.pack("<Q", n_points)
        body += struct.pack("<ddq", 1.5, 2.5, -1) * n_points
    (folder / "images.bin").write_bytes(body)
    return folder


@given(st.lists(finite, min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 1e-3))
def test_quaternions_against_scipy(q):
    rotation = quaternion_to_rotation(np.array(q))
    np.testing.assert_allclose(rotation, Rotation.from_quat([q[1], q[2], q[3], q[0]]).as_matrix(), atol=1e-12)
    back = rotation_to_quaternion(rotation)
    assert back[0] >= 0 and np.linalg.norm(back) == pytest.approx(1)
    np.testing.assert_allclose(quaternion_to_rotation(back), rotation, atol=1e-7)


@given(st.lists(finite, min_size=3, max_size=3), st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_pose_round_trip(translation, vector):
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = Rotation.from_rotvec(vector).as_matrix(), translation
    np.testing.assert_allclose(ModelImage.from_pose(1, pose, 1, "a").world_to_cam, pose, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(CAMERA_MODELS)),
    st.lists(st.floats(1e-3, 1e5), min_size=16, max_size=16),
    st.lists(finite, min_size=7, max_size=7).filter(lambda p: np.linalg.norm(p[:4]) > 1e-3),
    st.lists(st.lists(finite, min_size=3, max_size=3), max_size=4),
)
def test_text_round_trip_is_exact(tmp_path_factory, model, numbers, pose, points):
    folder = tmp_path_factory.mktemp("model")
    pose[:4] = [value / np.linalg.norm(pose[:4]) for value in pose[:4]]
    camera = Camera(4, model, 640, 480, tuple(numbers[: len(CAMERA_MODELS[model][1].split())]))
    images = (
        ModelImage(9, tuple(pose[:4]), tuple(pose[4:]), 4, "f/a b.jpg"),
        ModelImage(2, (1, 0, 0, 0), (0, 0, 0), 4, "c"),
    )
    xyz = np.array(points, dtype=np.float64).reshape(-1, 3)
    write_text_model(folder, [camera], images, xyz, np.full(xyz.shape, 7))
    read = read_model(folder)
    assert read.cameras == {4: camera} and read.images == images
    rows = [line.split() for line in (folder / "points3D.txt").read_text().splitlines() if not line.startswith("#")]
    np.testing.assert_array_equal(np.array([row[1:4] for row in rows], dtype=np.float64).reshape(-1, 3), xyz)
    assert all(row[4:7] == ["7"] * 3 for row in rows)


def test_reads_text(tmp_path):
    model = read_model(write(tmp_path))
    assert [image.name for image in model.images] == ["b/second image.jpg", "a.jpg"]
    assert model.cameras[7].K.tolist() == [[50, 0, 32], [0, 50, 24], [0, 0, 1]]
    np.testing.assert_array_equal(model.images[0].world_to_cam[:3, 3], [0.5, -1, 2])
    np.testing.assert_allclose(model.images[1].world_to_cam[:3, :3], np.diag([1, -1, -1]), atol=1e-15)


@pytest.mark.parametrize("file", ["cameras.txt", "images.txt"])
def test_reads_text_with_a_byte_order_mark(tmp_path, file):
    """As editors on Windows write it, before a comment and before a number."""
    plain = read_model(write(tmp_path))
    for text in ((tmp_path / file).read_text(), (tmp_path / file).read_text().split("\n", 1)[1]):
        (tmp_path / file).write_text(text, encoding="utf-8-sig")
        assert read_model(tmp_path) == plain


def test_binary_wins_over_text(tmp_path):
    """As in COLMAP; text beside it was exported once, and may be out of date. Half a binary model is none."""
    write_binary(write(tmp_path))
    assert [image.name for image in read_model(tmp_path).images] == ["x/one.jpg", "two.png"]
    assert [path.name for path in model_paths(tmp_path)] == ["cameras.bin", "images.bin"]
    (tmp_path / "cameras.bin").unlink()
    assert [image.name for image in read_model(tmp_path).images] == ["b/second image.jpg", "a.jpg"]


def test_rounded_quaternions_are_read(tmp_path):
    model = read_model(write(tmp_path, images="1 0.95 0 0 0 0 0 0 7 a.jpg\n\n"))
    np.testing.assert_allclose(model.images[0].world_to_cam, np.eye(4), atol=1e-15)


def test_reads_binary(tmp_path):
    model = read_model(write_binary(tmp_path))
    assert model.cameras[5] == Camera(5, "OPENCV", 640, 480, (500.0, 501.0, 320.0, 240.0, 0.1, -0.05, 0.001, 0.002))
    assert [(image.image_id, image.name) for image in model.images] == [(11, "x/one.jpg"), (12, "two.png")]
    np.testing.assert_allclose(model.images[0].world_to_cam[:3, :3], Rotation.from_quat([-1, 1, 1, 1]).as_matrix())


@pytest.mark.parametrize("file", ["cameras.bin", "images.bin"])
def test_every_truncation_of_a_binary_file_is_refused(tmp_path, file):
    write_binary(tmp_path)
    whole = (tmp_path / file).read_bytes()
    for length in range(len(whole)):
        (tmp_path / file).write_bytes(whole[:length])
        with pytest.raises(PqkError, match=f"{file}: (ends at byte {length}|the name at byte)"):
            read_model(tmp_path)


def test_absurd_binary_counts_do_not_allocate(tmp_path):
    write_binary(tmp_path)
    (tmp_path / "images.bin").write_bytes(struct.pack("<Q", 2**63) + b"\0" * 64)
    with pytest.raises(PqkError, match=r"images\.bin: the name at byte 72 has no end"):
        read_model(tmp_path)
    (tmp_path / "cameras.bin").write_bytes(struct.pack("<QiiQQ", 1, 5, 99, 640, 480))
    with pytest.raises(PqkError, match=r"cameras.bin byte 8: camera model id 99 is unknown"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    "cameras, message",
    [
        ("1 PINHOLE 640\n", "cameras.txt line 1: expected CAMERA_ID MODEL"),
        ("# x\n1 PINHOLE 640 480 500 501 320\n", "line 2: camera model PINHOLE takes 4 parameters .*, found 3"),
        ("1 PINHOL 640 480 500 501 320 240\n", "'PINHOL' is unknown .did you mean 'PINHOLE'"),
        ("1 PINHOLE 640 480 500 five 320 240\n", "line 1: could not convert string to float: 'five'"),
        ("1 PINHOLE 0 480 500 501 320 240\n", "image size 0x480 must be positive"),
        ("1 PINHOLE 640 480 -5 501 320 240\n", "focal lengths must be positive"),
        ("1 PINHOLE 640 480 nan 501 320 240\n", "must be finite"),
        (CAMERAS + "1 PINHOLE 64 48 50 50 32 24\n", "camera id appears twice"),
        ("1 PINHOLE 640 480 500 501 320 240\n", "image 'b/second image.jpg' uses camera 7"),
    ],
)
def test_malformed_cameras(tmp_path, cameras, message):
    with pytest.raises(PqkError, match=message):
        read_model(write(tmp_path, cameras=cameras))


@pytest.mark.parametrize(
    "images, message",
    [
        ("1 1 0 0 0 0 0 0 1\n", "images.txt line 1: expected IMAGE_ID"),
        ("1 0 0 0 0 0 0 0 1 a.jpg\n\n", "quaternion of 'a.jpg' has length 0, a rotation's is 1"),
        ("1 0.5 0.7 0 0 0 0 0 1 a.jpg\n\n", "line 1: the quaternion of 'a.jpg' has length 0.86"),
        ("1 1 0.5 0 0 0 0 0 1 a.jpg\n\n", "quaternion of 'a.jpg' has length 1.12"),
        ("1 1e200 0 0 0 0 0 0 1 a.jpg\n\n", "quaternion of 'a.jpg' has length 1e\\+200"),
        ("1 1 0 0 0 0 inf 0 1 a.jpg\n\n", "pose of 'a.jpg' must be finite"),
        ("1 1 0 0 0 0 0 0 1 a.jpg\n\n2 1 0 0 0 0 0 0 1 a.jpg\n\n", "'a.jpg' appears twice"),
        ("1 1 0 0 0 0 0 0 1 a.jpg\n2 1 0 0 0 0 0 0 1 b.jpg\n", "line 2: expected keypoints as triples"),
        ("1 1 0 0 0 0 0 0 1 a b c.jpg\n2 1 0 0 0 0 0 0 1 d e f.jpg\n", "line 2: .* were blank lines removed"),
        ("1 1 0 0 0 0 0 0 1 a.jpg\nto be done\n", "line 2: expected keypoints as triples"),
        ("1 1 0 0 0 0 0 0 1 a.jpg\n10.5 20.5 -1 30 40 1.5\n", "line 2: expected keypoints as triples"),
        ("1 1 0 0 0 0 0 0 1 a.jpg\n10.5 20.5 -1 30 40\n", "line 2: expected keypoints as triples"),
        ("1 1 0 0 0 0 0 0 1 ..\\b.jpg\n\n", "must be a relative path"),
        ("1 1 0 0 0 0 0 0 1 ../../etc/passwd\n\n", "line 1: image name '../../etc/passwd' must be a relative path"),
        ("1 1 0 0 0 0 0 0 1 /etc/passwd\n\n", "must be a relative path"),
        ("1 1 0 0 0 0 0 0 1 a/../../b.jpg\n\n", "must be a relative path"),
        ("1 1 0 0 0 0 0 0 1 C:\\a.jpg\n\n", "must be a relative path"),
    ],
)
def test_malformed_images(tmp_path, images, message):
    with pytest.raises(PqkError, match=message):
        read_model(write(tmp_path, images=images))


def test_other_bad_files(tmp_path):
    with pytest.raises(PqkError, match="no COLMAP model here"):
        read_model(tmp_path)
    write(tmp_path)
    (tmp_path / "cameras.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PqkError, match=r"cameras\.txt: not a text file"):
        read_model(tmp_path)
    with pytest.raises(PqkError, match=r"images\.txt: image name"):
        write_text_model(tmp_path / "out", [], [ModelImage(1, (1, 0, 0, 0), (0, 0, 0), 1, "../a")])
    assert not (tmp_path / "out").exists()


@given(st.text())
@example(".")
@example("..")
@example("a/../b")
def test_safe_names_stay_inside(name):
    base = Path("/scene/images")
    try:
        safe_name(name, "x")
    except PqkError:
        return
    assert base in (base / name).resolve().parents or (base / name).resolve() == base
