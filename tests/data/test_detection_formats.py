"""VOC, CrowdHuman, and sets by name: as their files have them, and files that are wrong in many ways."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from detection_toys import VOC, coco, crowd_line, crowdhuman, lvis, picture, voc, written

from pqk.data.detection.crowdhuman import read_crowdhuman
from pqk.data.detection.sets import open_set, read_sets
from pqk.data.detection.voc import CLASSES, read_voc
from pqk.errors import PqkError

BOMB = '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY lol "lol"><!ENTITY lol2 "&lol;&lol;">]>'
FOREIGN = '<!doctype annotation SYSTEM "file:///etc/passwd">'


def read(folder: Path, **options):
    listed = folder / "ImageSets" / "Main" / "test.txt"
    return read_voc(folder / "Annotations", folder / "JPEGImages", listed, **options)


# VOC


def test_voc_counts_from_one_and_marks_difficult_ones(tmp_path):
    found = read(voc(tmp_path, "000010", "000009"))
    assert found.classes == CLASSES and len(CLASSES) == 20 and found.name == "test"
    assert [sample.id for sample in found.samples] == ["000009", "000010"]
    sample = found.samples[0]
    assert sample.boxes.tolist() == [[0, 0, 40, 30], [4, 5.5, 20, 30]]  # the part `head` is no object
    assert [CLASSES[label] for label in sample.labels] == ["person", "dog"]
    assert sample.ignored.tolist() == [False, True] and not sample.crowd.any()
    assert found.counts()["person"] == 2 and found.counts()["dog"] == 0
    assert sample.load_image().shape == (30, 40, 3)


def test_voc_without_a_list_reads_every_file(tmp_path):
    voc(tmp_path, "b2", "b10")
    found = read_voc(tmp_path / "Annotations", tmp_path / "JPEGImages", classes=["dog", "person"])
    assert [sample.id for sample in found.samples] == ["b2", "b10"]
    assert found.samples[0].labels.tolist() == [1, 0]


def test_voc_boxes_of_one_pixel_and_missing_pictures(tmp_path):
    voc(tmp_path, "a", "b", text=VOC.replace("<xmin>5</xmin>", "<xmin>21</xmin>").replace("<xmax>20", "<xmax>21"))
    assert read(tmp_path).notes == ()  # from pixel 21 to pixel 21: one pixel wide
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(PqkError, match=r"b\.xml: the image 'b\.jpg' is not in"):
        read(tmp_path)
    found = read(tmp_path, skip_missing=True)
    assert len(found.samples) == 1 and "1 of 2 images are not there" in found.notes[0]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<annotation>", BOMB + "<annotation>", "has a document type"),
        ("<annotation>", FOREIGN + "<annotation>", "has a document type"),
        ("<annotation>", '<?xml version="1.0" encoding="utf-16"?><annotation><', "is not XML"),
        ("annotation>", "annotations>", "the root is <annotations>, expected <annotation>"),
        ("</annotation>", "", "is not XML"),
        ("<size>", "<sizes>", "is not XML"),
        ("<name>dog", "<name>dogg", "object[1].name is 'dogg' (did you mean 'dog'?), expected one of aeroplane"),
        ("<name>dog</name>", "", "object[1].name is missing or empty"),
        ("<difficult>1", "<difficult>2", "object[1].difficult is '2', expected 0 or 1"),
        ("<xmin>5<", "<xmin>nan<", "object[1].bndbox.xmin is 'nan', expected a finite number"),
        ("<xmin>5<", "<xmin>1e999<", "object[1].bndbox.xmin is '1e999', expected a finite number"),
        ("<xmin>5<", "<xmin>1_0<", "object[1].bndbox.xmin is '1_0', expected a finite number"),
        ("<xmin>5</xmin>", "", "object[1].bndbox.xmin is '', expected a finite number"),
        ("<xmin>5<", "<xmin>25<", "expected xmin <= xmax and ymin <= ymax"),
        ("<xmax>40<", "<xmax>43<", "expected a box inside the image of 40x30 pixels"),
        ("<width>40<", "<width>40.5<", "size is 40.5x30, expected whole numbers"),
        ("<width>40<", "<width>0<", "size is 0x30, expected whole numbers"),
        ("{name}.jpg", "../{name}.jpg", "filename is '../a.jpg', expected a relative path"),
        ("{name}.jpg", "/{name}.jpg", "filename is '/a.jpg', expected a relative path"),
    ],
)
def test_voc_files_that_are_wrong(tmp_path, old, new, said):
    assert old in VOC
    with pytest.raises(PqkError) as caught:
        read(voc(tmp_path, "a", text=VOC.replace(old, new)))
    assert said in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/Annotations/a.xml: ")


def test_voc_text_in_another_encoding_is_refused(tmp_path):
    voc(tmp_path, "a")
    (tmp_path / "Annotations" / "a.xml").write_bytes((BOMB + VOC).encode("utf-16"))
    with pytest.raises(PqkError, match="is not UTF-8 text"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("b\n", "test.txt:1: 'b' has no file b.xml"),
        ("a\n\na 1\n", "test.txt:3: 'a' is listed twice"),
        ("\n", "lists no image"),
    ],
)
def test_voc_lists_that_are_wrong(tmp_path, lines, said):
    voc(tmp_path, "a")
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text(lines)
    with pytest.raises(PqkError) as caught:
        read(tmp_path)
    assert said in str(caught.value)


def test_voc_folders_and_classes_that_are_wrong(tmp_path):
    voc(tmp_path, "a")
    with pytest.raises(PqkError, match="no XML file is in this folder"):
        read_voc(tmp_path / "JPEGImages", tmp_path / "JPEGImages")
    with pytest.raises(PqkError, match="each given once"):
        read(tmp_path, classes=["dog", "dog"])


# CrowdHuman


def test_crowdhuman_keeps_hidden_parts_and_marks_regions(tmp_path):
    file = crowdhuman(tmp_path, crowd_line(), crowd_line(ID="1,empty", gtboxes=[]))
    found = read_crowdhuman(file, tmp_path / "Images")
    assert found.classes == ("person",) and [sample.id for sample in found.samples] == ["1,empty", crowd_line()["ID"]]
    sample = found.samples[1]
    assert sample.boxes.tolist() == [[-5, 2, 15, 42], [20, 3, 35, 23]] and sample.crowd.tolist() == [False, True]
    assert (sample.width, sample.height) == (40, 30) and len(found.samples[0].boxes) == 0
    visible = read_crowdhuman(file, tmp_path / "Images", "visible").samples[1]
    assert visible.boxes.tolist() == [[0, 2, 15, 30], [20, 3, 35, 23]]
    head = read_crowdhuman(file, tmp_path / "Images", "head").samples[1]
    assert head.boxes.tolist() == [[2, 3, 7, 8]] and head.crowd.tolist() == [True]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("fbox", [1, 2, -3, 4], "gtboxes[0]: fbox is [1, 2, -3, 4], expected x, y, width, height"),
        ("fbox", None, "gtboxes[0]: fbox is null, expected 4 finite numbers"),
        ("tag", "persons", "tag is \"persons\", expected person or mask (did you mean 'person'?)"),
        ("extra", [], "extra is [], expected an object"),
        ("extra", {"ignore": 3}, "gtboxes[0].extra: ignore is 3, expected 0 or 1"),
    ],
)
def test_crowdhuman_boxes_that_cannot_be(tmp_path, key, value, said):
    line = crowd_line()
    line["gtboxes"][0][key] = value
    with pytest.raises(PqkError) as caught:
        read_crowdhuman(crowdhuman(tmp_path, line), tmp_path / "Images")
    assert said in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/train.odgt:1: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"ID": "../a", "gtboxes": []}', 'ID is "../a", expected a relative path'),
        ('{"ID": "b/a", "gtboxes": []}', 'ID is "b/a", expected the name of a picture'),
        ('{"gtboxes": []}', "ID is missing"),
        ('{"ID": "a"}', "gtboxes is missing, expected a list"),
        ('{"ID": "b", "gtboxes": []}', "the image 'b.jpg' is not in"),
        ("[]", "holds [], expected an object"),
        ("{", "is not JSON"),
    ],
)
def test_crowdhuman_lines_that_are_wrong(tmp_path, text, said):
    picture(tmp_path / "Images" / "a.jpg")
    (tmp_path / "train.odgt").write_text("\n" + text)
    with pytest.raises(PqkError) as caught:
        read_crowdhuman(tmp_path / "train.odgt", tmp_path / "Images")
    assert said in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/train.odgt:2: ")


def test_crowdhuman_the_rest(tmp_path):
    line = crowd_line()
    with pytest.raises(PqkError, match=r"train\.odgt:2: ID is .* which line 1 has already"):
        read_crowdhuman(crowdhuman(tmp_path, line, line), tmp_path / "Images")
    with pytest.raises(PqkError, match="did you mean 'visible'"):
        read_crowdhuman(tmp_path / "train.odgt", tmp_path / "Images", "visibl")  # type: ignore[arg-type]
    (tmp_path / "Images" / f"{line['ID']}.jpg").write_bytes(b"no picture")
    with pytest.raises(PqkError, match="cannot be read as a picture"):
        read_crowdhuman(crowdhuman(tmp_path / "other", line), tmp_path / "Images")


# By name

SETS = """
street: {kind: coco, images: images, annotations: instances.json}
federated: {kind: lvis, images: images, annotations: lvis.json}
voc07-test:
  kind: voc
  images: JPEGImages
  annotations: Annotations
  names: ImageSets/Main/test.txt
  classes: [person, dog]
crowd: {kind: crowdhuman, images: Images, annotations: train.odgt, box: head, skip_missing: true}
"""


def test_sets_open_by_name(tmp_path):
    (tmp_path / "sets.yaml").write_text(SETS)
    written(tmp_path, coco())
    written(tmp_path, lvis(), "lvis.json")
    voc(tmp_path, "a")
    crowdhuman(tmp_path, crowd_line())
    found = {name: open_set(name, tmp_path / "sets.yaml") for name in read_sets(tmp_path / "sets.yaml")}
    assert {name: (each.name, len(each.samples), len(each.classes)) for name, each in found.items()} == {
        "street": ("street", 3, 3),
        "federated": ("federated", 2, 3),
        "voc07-test": ("voc07-test", 1, 2),
        "crowd": ("crowd", 1, 1),
    }
    assert found["federated"].samples[0].absent == frozenset({1})
    assert len(found["crowd"].samples[0].boxes) == 1
    with pytest.raises(PqkError, match=r"has no set 'stret' \(did you mean 'street'\?\); it has street, federated"):
        open_set("stret", tmp_path / "sets.yaml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("kind: coco", "kind: cocoo", "sets.yaml:2: street.kind is 'cocoo' but must be"),
        ("kind: coco", "kind: cocoo", "did you mean 'coco'"),
        ("kind: coco, ", "", "sets.yaml:2: the key 'street.kind' is missing"),
        (
            "images: JPEGImages",
            "image: JPEGImages",
            "sets.yaml:6: unknown key 'voc07-test.image' (did you mean 'images'",
        ),
        ("images: JPEGImages", "images: 7", "sets.yaml:6: voc07-test.images is 7 but must be text"),
        ("kind: lvis,", "kind: lvis, box: head,", "federated.box is for kind crowdhuman only, not lvis"),
        ("kind: lvis,", "kind: lvis, classes: [a],", "federated.classes is for kind voc only, not lvis"),
        ("[person, dog]", "[]", "voc07-test.classes"),
        ("{kind: coco, images: images, annotations: instances.json}", "coco", "street must be a mapping"),
    ],
)
def test_sets_files_that_are_wrong(tmp_path, old, new, said):
    assert old in SETS
    (tmp_path / "sets.yaml").write_text(SETS.replace(old, new, 1))
    with pytest.raises(PqkError) as caught:
        read_sets(tmp_path / "sets.yaml")
    assert said in str(caught.value)


def test_a_sets_file_without_sets(tmp_path):
    (tmp_path / "sets.yaml").write_text("{}")
    with pytest.raises(PqkError, match="names no set"):
        read_sets(tmp_path / "sets.yaml")
