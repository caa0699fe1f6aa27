"""Splits that share a folder, a file or a picture are refused; splits apart pass."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pqk.data.scenes.open import open_scene
from pqk.data.scenes.overlap import refuse_overlap
from pqk.data.scenes.scene import Scene
from pqk.errors import PqkError


def scene(folder: Path, *greys: int) -> Scene:
    """A scene of pictures of one colour each."""
    folder.mkdir(parents=True)
    for k, grey in enumerate(greys):
        Image.new("RGB", (32, 32), (grey, grey, grey)).save(folder / f"{k}.bmp")  # all of one size
    return open_scene(folder)


def test_splits_apart_pass(tmp_path: Path) -> None:
    test = [scene(tmp_path / "data" / "a", 1, 2), scene(tmp_path / "data" / "b", 3, 4)]
    validation = [scene(tmp_path / "data" / "c", 5, 6)]
    refuse_overlap({"test": test, "validation": validation, "calibration": [scene(tmp_path / "d", 7, 7)]})
    refuse_overlap({"test": [*test, test[0]], "train": []})  # a split may hold a picture twice


@pytest.mark.parametrize("linked", [False, True])
def test_one_folder_in_two_splits(tmp_path: Path, linked: bool) -> None:
    test = scene(tmp_path / "a", 1, 2)
    if linked:
        (tmp_path / "b").symlink_to("a")
    other = open_scene(tmp_path / ("b" if linked else "a"))
    with pytest.raises(
        PqkError, match=rf"^splits test and calibration share a folder: test has {test.root}, .*{other.root};"
    ):
        refuse_overlap({"validation": [scene(tmp_path / "c", 3)], "test": [test], "calibration": [other]})


def test_pictures_of_one_folder_in_two_scenes(tmp_path: Path) -> None:
    scene(tmp_path / "pictures", 1, 2)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "images").symlink_to(tmp_path / "pictures")
    with pytest.raises(PqkError, match=r"share a folder: test has \S*a/images, validation has \S*b/images"):
        refuse_overlap({"test": [open_scene(tmp_path / "a")], "validation": [open_scene(tmp_path / "b")]})


@pytest.mark.parametrize("how", ["copy", "link", "hard link"])
def test_one_picture_in_two_splits(tmp_path: Path, how: str) -> None:
    test, other = scene(tmp_path / "a", 1, 2, 3), tmp_path / "b" / "other name.bmp"
    scene(tmp_path / "b", 4, 5)
    {"copy": shutil.copy, "link": os.symlink, "hard link": os.link}[how](tmp_path / "a" / "1.bmp", other)
    with pytest.raises(PqkError) as caught:
        refuse_overlap({"validation": [test], "calibration": [open_scene(tmp_path / "b")]})
    assert str(caught.value) == (
        f"splits validation and calibration share a picture: validation has {tmp_path / 'a' / '1.bmp'}, "
        f"calibration has {other}, which is the same; give each picture to one split"
    )


def test_a_picture_that_is_gone(tmp_path: Path) -> None:
    test, other = scene(tmp_path / "a", 1), scene(tmp_path / "b", 2)
    (tmp_path / "b" / "0.bmp").unlink()
    with pytest.raises(PqkError, match=r"cannot read \S*b/0\.bmp: no such file"):
        refuse_overlap({"test": [test], "validation": [other]})
