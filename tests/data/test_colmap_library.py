"""pqk's reader of COLMAP models against pycolmap, on every camera model that pycolmap can write."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from pqk.data.scenes import colmap, colmap_library
from pqk.data.scenes.camera import CAMERA_MODELS, Camera, distort
from pqk.data.scenes.colmap import Model, read_model, write_text_model
from pqk.errors import PqkError

pycolmap = pytest.importorskip("pycolmap", reason="pycolmap (extra colmap) is not installed")
MODELS = [name for name in pycolmap.CameraModelId.__members__ if name != "INVALID"]


def lens(name: str) -> list[float]:
    """Plausible parameters: COLMAP's own start values, and a little of every distortion."""
    camera = pycolmap.Camera.create_from_model_name(1, name, 500.0, 640, 480)
    values = [float(value) for value in camera.params]
    draw = random.Random(name)
    extra = {"FOV": [0.7], "EUCM": [0.6, 1.1]}.get(name) or [
        draw.uniform(-0.02, 0.05) for _ in camera.extra_params_idxs()
    ]
    for index, value in zip(camera.extra_params_idxs(), extra, strict=True):
        values[index] = value
    return values


@pytest.fixture(scope="module", params=["binary", "text"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an image of each camera, its keypoints and points, as pycolmap writes it."""
    folder = tmp_path_factory.mktemp("model")
    made = pycolmap.Reconstruction()
    draw = random.Random(0)
    for number, name in enumerate(MODELS, start=1):
        camera = pycolmap.Camera.create_from_model_name(number, name, 500.0, 640, 480)
        camera.params = lens(name)
        made.add_camera_with_trivial_rig(camera)
        points = pycolmap.Point2DList([pycolmap.Point2D(xy=(draw.uniform(0, 640), 20.0)) for _ in range(number % 3)])
        image = pycolmap.Image(name=f"a/{name}.jpg", camera_id=number, image_id=number, points2D=points)
        turn = np.array([draw.gauss(0, 1) for _ in range(4)])
        pose = pycolmap.Rigid3d(pycolmap.Rotation3d(turn / np.linalg.norm(turn)), [draw.gauss(0, 3) for _ in range(3)])
        made.add_image_with_trivial_frame(image, pose)
    track = pycolmap.Track([pycolmap.TrackElement(2, 0), pycolmap.TrackElement(4, 0)])
    made.add_point3D(np.array([1.0, 2.0, 3.0]), track, np.array([7, 7, 7], np.uint8))
    (made.write_binary if request.param == "binary" else made.write_text)(str(folder))
    return folder


def with_and_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Model]:
    answers = []

    def reading(cameras: Path, images: Path) -> object:
        answers.append(read(cameras, images))
        return answers[-1]

    read = colmap_library.read
    monkeypatch.setattr(colmap_library, "read", reading)
    by_library = read_model(folder)
    assert answers[-1] is not None, "pycolmap refused the model"
    monkeypatch.setattr(colmap_library, "read", lambda cameras, images: None)
    return by_library, read_model(folder)


def test_both_readers_give_the_same_model(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_library, own = with_and_without(written, monkeypatch)
    assert by_library == own
    assert [camera.model for camera in own.cameras.values()] == MODELS
    assert sorted(image.name for image in own.images) == sorted(f"a/{name}.jpg" for name in MODELS)


def test_both_readers_give_the_same_model_of_our_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pycolmap ends a name in a text file at its first blank; the names come from our reader."""
    cameras = [Camera(n, name, 640, 480, tuple(lens(name))) for n, name in enumerate(MODELS, start=1)]
    image = colmap.ModelImage(4, (0.1, -0.2, 0.3, 0.927361850549570), (0.1, 1e-17, -3e5), 3, "f/a b.jpg")
    write_text_model(tmp_path, cameras, [image])
    by_library, own = with_and_without(tmp_path, monkeypatch)
    assert by_library == own and own.images == (image,)


def test_our_table_has_every_camera_model() -> None:
    assert {name: int(number) for name, number in pycolmap.CameraModelId.__members__.items() if name != "INVALID"} == {
        name: number for name, (number, _) in CAMERA_MODELS.items()
    }


@pytest.mark.parametrize("name", [name for name in MODELS if name != "EQUIRECTANGULAR"])
def test_distortion_is_pycolmaps(name: str) -> None:
    camera = pycolmap.Camera.create_from_model_name(1, name, 500.0, 640, 480)
    camera.params = lens(name)
    grid = np.stack(np.meshgrid(np.linspace(-0.6, 0.6, 7), np.linspace(-0.4, 0.4, 6)), axis=-1).reshape(-1, 2)
    expected = [camera.img_from_cam(np.array([x, y, 1.0])) for x, y in grid]
    ours = distort(Camera(1, name, 640, 480, tuple(lens(name))), grid[:, 0], grid[:, 1])
    np.testing.assert_allclose(np.stack(ours, axis=1), expected, rtol=0, atol=1e-9)


def test_damaged_files_never_reach_pycolmap(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pycolmap 4.2.1 hangs on some binary files that were cut off."""
    if not (written / "images.bin").exists():
        pytest.skip("text files are cut in test_colmap.py")
    reached = []
    monkeypatch.setattr(colmap_library, "read", lambda cameras, images: reached.append(images))
    for name in ("cameras.bin", "images.bin"):
        other = "images.bin" if name == "cameras.bin" else "cameras.bin"
        os.link(written / other, tmp_path / other)
        whole = (written / name).read_bytes()
        for length in range(0, len(whole), 7):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(PqkError, match=name):
                read_model(tmp_path)
        (tmp_path / name).unlink()
        (tmp_path / other).unlink()
    assert not reached


def test_what_pycolmap_refuses_our_reader_reads(tmp_path: Path) -> None:
    """A byte order mark, as editors on Windows write it."""
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 640 480 500 501 320 240\n", encoding="utf-8-sig")
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 0 1 a.jpg\n\n")
    assert colmap_library.read(tmp_path / "cameras.txt", tmp_path / "images.txt") is None
    assert read_model(tmp_path).images[0].name == "a.jpg"
