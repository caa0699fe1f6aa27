"""COCO, LVIS and Objects365 as their files have them, and files that are wrong in many ways."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from detection_toys import coco, lvis, picture, written

from pqk.data.detection.coco import read_coco
from pqk.data.detection.sample import id_order
from pqk.errors import PqkError


def refusal(tmp_path: Path, value: dict[str, Any], kind: Any = "coco") -> str:
    """The sentence with which a file is refused."""
    file = written(tmp_path, value)
    with pytest.raises(PqkError) as caught:
        read_coco(file, tmp_path / "images", kind)
    said = str(caught.value)
    assert said.startswith(str(tmp_path)) and "\n" not in said
    return said


def test_what_the_file_says(tmp_path):
    found = read_coco(written(tmp_path, coco()), tmp_path / "images", name="toys")
    assert (found.name, found.classes, found.category_ids) == ("toys", ("person", "dog", "toothbrush"), (1, 18, 90))
    assert [sample.id for sample in found.samples] == [12, 9007199254740993, "empty"]
    first, second, empty = found.samples
    assert first.image_path == tmp_path / "images" / "sub" / "a.jpg" and (first.width, first.height) == (40, 30)
    assert first.boxes.dtype == np.float32 and first.labels.dtype == np.int64
    assert first.boxes.tolist() == [[1, 2, 11, 7], [0, 0, 40, 30]] and first.labels.tolist() == [2, 0]
    assert first.areas.tolist() == [31.5, 900] and first.crowd.tolist() == [False, True]
    assert first.ids == (1, "x") and not first.ignored.any() and first.absent is None
    assert second.boxes.tolist() == [[3.5, 4.25, 9.5, 11.25]] and second.areas.tolist() == [42]  # without `area`
    assert empty.boxes.shape == (0, 4) and empty.labels.shape == (0,) and empty.crowd.dtype == bool
    assert found.counts() == {"person": 0, "dog": 1, "toothbrush": 1} and found.notes == ()
    assert first.load_image().shape == (30, 40, 3)


def test_ids_sort_by_value_then_as_text():
    assert sorted(["b", 10, "a", 9, -1, 10**30], key=id_order) == [-1, 9, 10, 10**30, "a", "b"]


def test_lvis_says_what_is_absent(tmp_path):
    found = read_coco(written(tmp_path, lvis()), tmp_path / "images", "lvis")
    first, second = found.samples
    assert first.image_path == tmp_path / "images" / "train2017" / "5.jpg"
    assert (first.absent, first.partial) == (frozenset({1}), frozenset({0}))
    assert (second.absent, second.partial, len(second.boxes)) == (frozenset(), frozenset(), 0)


@pytest.mark.parametrize("file", ["patch8/o.jpg", "images/v1/patch8/o.jpg"])
def test_objects365_with_and_without_its_prefix(tmp_path, file):
    value = coco()
    value["images"] = [{"id": 12, "file_name": "images/v1/patch8/o.jpg", "width": 40, "height": 30}]
    value["annotations"] = [{"id": 1, "image_id": 12, "category_id": 1, "bbox": [30, 20, 50, 8.5]}]
    picture(tmp_path / "images" / file)
    found = read_coco(written(tmp_path, value, pictures=False), tmp_path / "images", "objects365")
    assert found.samples[0].image_path == tmp_path / "images" / file
    assert found.samples[0].boxes.tolist() == [[30, 20, 40, 28.5]]  # cut at the border
    assert found.notes == (
        f"{tmp_path}/instances.json: annotations[0]: this box has parts outside the image: cut at its border",
    )


def test_boxes_without_an_area_are_left_out_and_counted(tmp_path):
    """Official COCO has a few, and boxes that stick out by a pixel or two."""
    value = coco()
    value["annotations"][0]["bbox"] = [1, 2, 0, 5]
    value["annotations"][2]["bbox"] = [3, 4, 2, 0]
    value["annotations"][1]["bbox"] = [-1.5, 0, 43, 31]
    found = read_coco(written(tmp_path, value), tmp_path / "images")
    assert [len(sample.boxes) for sample in found.samples] == [1, 0, 0]
    assert found.samples[0].boxes.tolist() == [[-1.5, 0, 41.5, 31]]
    place = f"{tmp_path}/instances.json: annotations[0]"
    assert found.notes == (f"{place}: this and 1 more boxes have no area inside the image: left out",)


@pytest.mark.parametrize(
    ("where", "key", "value", "said"),
    [
        ("annotations", "bbox", [-3, 0, 5, 5], "expected a box inside the image of 40x30 pixels"),
        ("annotations", "bbox", [1, 2, -3, 4], "of which the last two are at least 0"),
        ("annotations", "bbox", [1, 2, math.nan, 4], "bbox is [1, 2, NaN, 4], expected 4 finite numbers"),
        ("annotations", "bbox", [1, 2, 1e400, 4], "expected 4 finite numbers"),
        ("annotations", "bbox", [1, 2, 10**400, 4], "expected 4 finite numbers"),
        ("annotations", "bbox", [1, 2, True, 4], "expected 4 finite numbers"),
        ("annotations", "bbox", [1, 2, 3], "expected 4 finite numbers"),
        ("annotations", "bbox", None, "bbox is null"),
        ("annotations", "image_id", "12", 'image_id is "12", expected the id of one of the images; 12 is there'),
        ("annotations", "image_id", 13, "the id of one of the images"),
        ("annotations", "image_id", 12.0, "expected a whole number or text"),
        ("annotations", "category_id", 2, "category_id is 2, expected the id of one of the categories"),
        ("annotations", "category_id", True, "expected a whole number or text"),
        ("annotations", "iscrowd", 2, "iscrowd is 2, expected 0 or 1"),
        ("annotations", "area", -1, "area is -1, expected a number of square pixels"),
        ("annotations", "id", "x", "which another annotation has already"),
        ("images", "id", 12, 'id is 12, which images[1] has already'),
        ("images", "width", 0, "width is 0, expected a whole number of pixels"),
        ("images", "height", "30", 'height is "30"'),
        ("images", "file_name", "../a.jpg", "a relative path that stays inside the folder of the images"),
        ("images", "file_name", "/etc/passwd", "a relative path that stays inside"),
        ("images", "file_name", "\ud800.jpg", "a relative path that stays inside"),
        ("images", "file_name", "", "expected text"),
        ("categories", "id", 1, "which category 'toothbrush' has already"),
        ("categories", "name", "dog", "name is 'dog', which another category has already"),
        ("categories", "name", 7, "name is 7, expected text"),
    ],
)  # fmt: skip
def test_values_that_cannot_be(tmp_path, where, key, value, said):
    spoilt = coco()
    for image in spoilt["images"]:
        picture(tmp_path / "images" / image["file_name"])
    index = 2 if where == "images" and key == "id" else 0
    spoilt[where][index][key] = value
    (tmp_path / "instances.json").write_text(json.dumps(spoilt))
    with pytest.raises(PqkError) as caught:
        read_coco(tmp_path / "instances.json", tmp_path / "images")
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/instances.json: {where}[")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_and_malformed_lists(tmp_path, key):
    value = coco()
    images = value["images"]
    (tmp_path / "images").mkdir()
    for spoilt, said in (([3], f"{key}[0] is 3, expected an object"), ({}, f"{key} is {{}}, expected a list")):
        value[key] = spoilt
        (tmp_path / "instances.json").write_text(json.dumps(value))
        with pytest.raises(PqkError) as caught:
            read_coco(tmp_path / "instances.json", tmp_path / "images")
        assert said in str(caught.value)
    del value[key]
    (tmp_path / "instances.json").write_text(json.dumps(value))
    with pytest.raises(PqkError, match=f"{key} is missing, expected a list"):
        read_coco(tmp_path / "instances.json", tmp_path / "images")
    assert images


@pytest.mark.parametrize("key", ["bbox", "id", "image_id", "category_id"])
def test_missing_keys_of_an_annotation(tmp_path, key):
    value = coco()
    del value["annotations"][1][key]
    assert f"annotations[1]: {key} is missing, expected" in refusal(tmp_path, value)


@pytest.mark.parametrize("text", ["{", "[" * 100000, "\xff", '{"a": 1', "", "[1]"])
def test_files_that_are_no_annotations(tmp_path, text):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PqkError, match=r"is not JSON|nested too deeply|expected an object"):
        read_coco(tmp_path / "a.json", tmp_path / "images")


def test_a_missing_file_or_folder(tmp_path):
    with pytest.raises(PqkError, match="no such file"):
        read_coco(tmp_path / "none.json", tmp_path)
    with pytest.raises(PqkError, match="the folder of the images is not there"):
        read_coco(written(tmp_path, coco()), tmp_path / "pictures")
    with pytest.raises(PqkError, match="did you mean 'lvis'"):
        read_coco(tmp_path / "none.json", tmp_path, "lvs")  # type: ignore[arg-type]


def test_a_missing_picture(tmp_path):
    file = written(tmp_path, coco())
    (tmp_path / "images" / "b.jpg").rename(tmp_path / "images" / "B.jpg")
    with pytest.raises(PqkError, match=r"images\[0\]: the image 'b.jpg' is not in .*'B.jpg' is there.*skip_missing"):
        read_coco(file, tmp_path / "images")
    found = read_coco(file, tmp_path / "images", skip_missing=True)
    assert [sample.id for sample in found.samples] == [12, "empty"]
    assert found.notes == (f"{tmp_path}/images: 1 of 3 images are not there, such as b.jpg; skipped",)
    for sample in found.samples:
        sample.image_path.unlink()
    with pytest.raises(PqkError, match="none of its images is there"):
        read_coco(file, tmp_path / "images", skip_missing=True)


def test_a_picture_of_another_size_or_a_damaged_one(tmp_path):
    found = read_coco(written(tmp_path, coco()), tmp_path / "images").samples[0]
    picture(found.image_path, 41, 30)
    with pytest.raises(PqkError, match="has 41x30 pixels, its annotation is for 40x30"):
        found.load_image()
    found.image_path.write_bytes(b"no picture")
    with pytest.raises(PqkError, match="not an image"):
        found.load_image()


def test_pictures_are_turned_as_exif_says(tmp_path):
    found = read_coco(written(tmp_path, coco()), tmp_path / "images").samples[0]
    pixels = np.zeros((40, 30, 3), np.uint8)
    pixels[:20] = 255
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(found.image_path, quality=95, exif=exif)
    turned = found.load_image()
    assert turned.shape == (30, 40, 3) and turned[:, 30:].mean() > 240 and turned[:, :10].mean() < 15


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("neg_category_ids", [7], "neg_category_ids is 7, expected the id of one of the categories"),
        ("neg_category_ids", 2, "neg_category_ids is 2, expected a list of category ids"),
        ("not_exhaustive_category_ids", None, "not_exhaustive_category_ids is null, expected a list"),
        ("coco_url", "http://images.cocodataset.org/..", "expected an address that ends with a folder and a file"),
        ("coco_url", "a.jpg", "expected an address that ends with a folder and a file"),
        ("coco_url", 5, "expected text"),
    ],
)
def test_lvis_values_that_cannot_be(tmp_path, key, value, said):
    spoilt = lvis()
    file = written(tmp_path, spoilt)
    spoilt["images"][0][key] = value
    file.write_text(json.dumps(spoilt))
    with pytest.raises(PqkError) as caught:
        read_coco(file, tmp_path / "images", "lvis")
    assert said in str(caught.value) and "images[0]" in str(caught.value)
