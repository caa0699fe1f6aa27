"""Where detectors get their images from: generated sets, folders of COCO's form, named sets, photographs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pqk.errors import PqkError
from pqk.families.contract import Given, SampleSet
from pqk.families.detection import data
from pqk.families.detr.settings import Workload
from pqk.families.diffusiondet import settings as diffusiondet

BASE = {
    "version": "1.0",
    "input": {"shape": [1, 3, 96, 128]},
    "sets": {
        "validation": {"source": "synthetic", "images": 2, "seed": 2},
        "test": {"source": "synthetic", "images": 3, "seed": 0},
    },
    "calibration": {"source": "synthetic", "images": 2, "seed": 0},
    "seeds": {"train": 0, "eval": 0},
}


def workload(shape=(96, 128), **sets) -> Workload:
    calibration = sets.pop("calibration", BASE["calibration"])
    values = {**BASE, "input": {"shape": [1, 3, *shape]}, "sets": {**BASE["sets"], **sets}, "calibration": calibration}
    return Workload.model_validate(values)


class Maker:
    """Makes every set anew in a folder of its own, and keeps what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []

    def __call__(self, split, inputs, modules, write):
        self.asked.append((split, dict(inputs), modules))
        out = self.folder / f"made-{len(self.asked)}"
        out.mkdir(parents=True)
        write(out)
        return out, f"sha of {split} {json.dumps(inputs, sort_keys=True)}"


@pytest.fixture
def make(tmp_path) -> Maker:
    return Maker(tmp_path / "store")


def refused(call, *arguments, **named) -> str:
    with pytest.raises(PqkError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def never(*arguments):
    raise AssertionError("nothing is to be made")


def picture(path: Path, seed: int, size=(40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def coco(
    folder: Path, count: int = 3, seed: int = 0, crowd: bool = False, annotations: str = "annotations.json"
) -> Path:
    """A folder of COCO's form, with one object in each of its pictures, which follow from the seed."""
    for k in range(count):
        picture(folder / "images" / f"{k}.png", seed * 1000 + k)
    (folder / annotations).write_text(
        json.dumps(
            {
                "images": [{"id": k, "file_name": f"{k}.png", "width": 40, "height": 30} for k in range(count)],
                "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
                "annotations": [
                    {"id": k, "image_id": k, "category_id": 9, "bbox": [1, 2, 10, 5], "area": 50, "iscrowd": int(crowd)}
                    for k in range(count)
                ],
            }
        )
    )
    return folder


def opened(split, asked, root, make=never, **more) -> SampleSet:
    return data.open_split(split, asked, root, make, **more)


# ---------------------------------------------------------------- generated


@pytest.mark.parametrize(
    ("shape", "size"), [((96, 128), (128, 96)), ((96, 160), (128, 96)), ((160, 96), (96, 72)), ((96, 96), (96, 72))]
)
def test_generated_images_fit_the_input(make, tmp_path, shape, size):
    asked = workload(shape)
    found = opened("validation", asked, tmp_path, make)
    ((split, inputs, modules),) = make.asked
    assert (split, inputs["width"], inputs["height"]) == ("validation", *size)
    assert modules == ("pqk.data.detection.generate",)
    assert (inputs["split"], inputs["seed"], inputs["images"], inputs["first"]) == ("validation", 2, 2, 0)
    samples = list(data.samples(found, asked, 0))
    assert [sample.name for sample in samples] == ["000000.jpg", "000001.jpg"]
    assert [sample.group for sample in samples] == [0, 1] and found.groups == ("000000", "000001")
    for sample in samples:
        fed = sample.inputs
        assert fed.size == fed.original == size[::-1] and fed.image.shape == (1, 3, *shape)  # as made: not resized
        assert sample.truth.classes == ("ball", "box", "cylinder")
    assert found.truthful and not found.own and found.sha256.startswith("sha of validation")
    assert SampleSet.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_only_a_part_of_a_generated_set(make, tmp_path):
    """What is made later of a set is what a longer one holds there."""
    asked = workload()
    whole, part = (opened("test", asked, tmp_path, make, first=first, count=n) for first, n in ((0, 4), (2, 2)))
    images = [list(data.samples(found, asked, 0)) for found in (whole, part)]
    assert [len(some) for some in images] == [4, 2] and whole.groups[2:] == part.groups
    for one, other in zip(images[0][2:], images[1], strict=True):
        assert one.name == other.name and np.array_equal(one.inputs.image, other.inputs.image)
        assert np.array_equal(one.truth.sample.boxes, other.truth.sample.boxes)
        assert one.truth.sample.id == other.truth.sample.id
        assert one.inputs.number == other.inputs.number  # so is its noise
    assert len(list(data.samples(opened("test", asked, tmp_path, make), asked, 0))) == 3  # as the workload says


def test_calibration_has_no_truth_and_says_what_is_missing(make, tmp_path):
    asked = workload()
    found = opened("calibration", asked, tmp_path, make)
    some = data.calibration(found, asked, 2)
    assert len(some) == some.images == 2 and asked.calibration_images == 2
    assert all(sample.truth is None for sample in some) and not found.truthful
    assert not np.array_equal(some[0].inputs.image, some[1].inputs.image)
    with pytest.raises(IndexError):
        some[2]
    assert "3 calibration images are asked for, and there are 2" in refused(data.calibration, found, asked, 3)


def test_timed_images_are_one_group(make, tmp_path):
    asked = workload()
    found = opened("test", asked, tmp_path, make)
    assert data.most(found, asked) == 3
    samples = data.timed(found, asked)
    assert len(samples) == 3 and {sample.group for sample in samples} == {0}
    assert len({(sample.group, sample.name) for sample in samples}) == 3
    assert len(data.timed(found, asked, 2)) == 2
    assert "4 images are asked for, and there are 3" in refused(data.timed, found, asked, 4)


def test_an_example_is_always_the_same_and_as_real_ones_are():
    asked = workload((64, 96))
    one, again = data.example(asked), data.example(asked)
    assert one.inputs.image.shape == (1, 3, 64, 96) and one.inputs.image.dtype == np.float32
    assert np.array_equal(one.inputs.image, again.inputs.image) and one.inputs.image.std() > 0.5


def test_what_generated_data_is_learned_from_is_made_later(tmp_path):
    found = opened("train", workload(), tmp_path)
    assert found.groups == () and found.truthful and not found.own
    assert data.can_grow(workload(), Given()) and not data.can_grow(workload(), Given(images=tmp_path))
    assert not data.can_grow(workload(test={"source": "mine"}), Given())


# ---------------------------------------------------------------- folders and named sets


def test_a_folder_of_cocos_form(tmp_path):
    coco(tmp_path / "sets" / "a", 4)
    asked = workload(test={"source": "sets/a", "images": 3})
    found = opened("test", asked, tmp_path)
    samples = list(data.samples(found, asked, 0))
    assert (
        found.own
        and found.truthful
        and found.groups == ("0", "1", "2")
        and len(samples) == data.most(found, asked) == 3
    )
    assert samples[0].truth.classes == ("cat", "dog") and samples[0].truth.sample.labels.tolist() == [1]
    assert samples[0].inputs.original == (30, 40) and samples[0].inputs.size == (96, 128)
    back = SampleSet.from_json(json.loads(json.dumps(found.to_json())))
    assert [s.name for s in data.samples(back, asked, 0)] == ["0.png", "1.png", "2.png"]


def test_the_hash_follows_content_and_not_the_place(tmp_path):
    asked = {name: workload(test={"source": name}) for name in ("a", "b", "c", "d")}
    coco(tmp_path / "a"), coco(tmp_path / "b"), coco(tmp_path / "c", seed=1), coco(tmp_path / "d", crowd=True)
    a, b, c, d = (opened("test", asked[name], tmp_path).sha256 for name in "abcd")
    assert a == b and len({a, c, d}) == 3
    fewer = opened("test", workload(test={"source": "a", "images": 2}), tmp_path)
    assert fewer.sha256 != a and fewer.key != opened("test", asked["a"], tmp_path).key


def test_photographs_hash_their_pictures_alone(tmp_path):
    coco(tmp_path / "a"), coco(tmp_path / "d", crowd=True)
    a, d = (
        opened("test", workload(), tmp_path, given=Given(images=tmp_path / name / "images")).sha256
        for name in ("a", "d")
    )
    assert a == d


def test_a_set_by_its_name(tmp_path):
    coco(tmp_path / "sets" / "a", 2)
    (tmp_path / "sets" / "mine.yaml").write_text(
        "street:\n  kind: coco\n  images: a/images\n  annotations: a/annotations.json\n"
    )
    source = {"source": "sets/mine.yaml", "set": "street"}
    found = opened("validation", workload(validation=source), tmp_path)
    assert found.groups == ("0", "1") and found.own
    assert "say which one with `set`" in refused(
        opened, "validation", workload(validation={"source": "sets/mine.yaml"}), tmp_path
    )
    assert "'streets'" in (
        said := refused(opened, "validation", workload(validation={**source, "set": "streets"}), tmp_path)
    )
    assert "street" in said
    assert "this is a folder" in refused(
        opened, "validation", workload(validation={"source": "sets/a", "set": "street"}), tmp_path
    )


def test_photographs_also_in_folders_below(tmp_path):
    for seed, name in enumerate(("10.png", "2.png", "sub b/1.png", "sub a/1.png", ".hidden/1.png")):
        picture(tmp_path / "photos" / name, seed)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "photos" / "sub a")
    asked = workload()
    found = opened("test", asked, tmp_path, given=Given(images=tmp_path / "photos"))
    assert found.own and not found.truthful
    assert found.groups == ("2.png", "10.png", "sub a/1.png", "sub b/1.png")  # no path of the machine
    assert all(sample.truth is None for sample in data.samples(found, asked, 0))
    assert data.classes_of(found) == ()


def test_a_turned_photograph_is_upright(tmp_path):
    image = Image.fromarray(np.zeros((30, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photos").mkdir()
    image.save(tmp_path / "photos" / "a.jpg", exif=exif)
    found = opened("test", workload(), tmp_path, given=Given(images=tmp_path / "photos"))
    (sample,) = data.samples(found, workload(), 0)
    assert sample.inputs.original == (40, 30)


def test_what_is_missing_is_one_sentence(tmp_path):
    asked = workload(test={"source": "none"})
    assert "annotations.json" in refused(opened, "test", asked, tmp_path)
    assert "no folder with pictures" in refused(opened, "test", asked, tmp_path, given=Given(images=tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "no picture" in refused(opened, "test", asked, tmp_path, given=Given(images=tmp_path / "empty"))
    (tmp_path / "empty" / "a.png").write_bytes(b"no picture")
    assert "a.png" in refused(opened, "test", asked, tmp_path, given=Given(images=tmp_path / "empty"))
    assert "none.yaml" in refused(opened, "test", workload(test={"source": "none.yaml", "set": "a"}), tmp_path)
    both = Given(scenes=tmp_path, images=tmp_path)
    assert "--scenes and --images exclude each other" in refused(opened, "test", asked, tmp_path, given=both)
    both = Given(train_scenes=tmp_path, train_images=tmp_path)
    assert "--train-scenes and --train-images" in refused(opened, "train", asked, tmp_path, given=both)
    coco(tmp_path / "gap", 2)
    (tmp_path / "gap" / "images" / "1.png").unlink()
    assert "1.png" in refused(opened, "test", workload(test={"source": "gap"}), tmp_path)
    (tmp_path / "none at all" / "images").mkdir(parents=True)
    coco(tmp_path / "none at all", 0)
    assert "at least one image" in refused(opened, "test", workload(test={"source": "none at all"}), tmp_path)


def test_a_picture_of_another_size_than_annotated(tmp_path):
    coco(tmp_path / "a", 1)
    picture(tmp_path / "a" / "images" / "0.png", 0, (50, 30))
    asked = workload(test={"source": "a"})
    assert "50x30" in refused(lambda: list(data.samples(opened("test", asked, tmp_path), asked, 0)))


# ---------------------------------------------------------------- what is learned from


def test_some_images_are_held_out(tmp_path):
    coco(tmp_path / "a", 20)
    found = opened("train", workload(train={"source": "a"}), tmp_path)
    learned, held = data.learning_split(found)
    assert (len(learned), len(held)) == (18, 2) and not {s.id for s in learned} & {s.id for s in held}
    assert {s.id for s in learned} | {s.id for s in held} == set(range(20))
    assert found.drawn == "18 images with boxes, judged on 2 others" and found.own and found.truthful
    assert data.learning_split(found)[1] == held


def test_photographs_to_learn_from(tmp_path):
    coco(tmp_path / "a", 3)
    asked = workload(train={"source": "a/images", "pictures": True})
    found = opened("train", asked, tmp_path)
    assert found.drawn == "2 photographs, judged on 1 other" and not found.truthful
    given = opened("train", workload(), tmp_path, given=Given(train_images=tmp_path / "a" / "images"))
    assert given.drawn == found.drawn and given.sha256 == found.sha256
    boxes = opened("train", workload(), tmp_path, given=Given(train_scenes=tmp_path / "a"))
    assert boxes.truthful and boxes.drawn.startswith("2 images with boxes")


def test_one_image_is_too_few_to_learn_from(tmp_path):
    coco(tmp_path / "a", 1)
    assert "at least 2 images" in refused(opened, "train", workload(train={"source": "a"}), tmp_path)


def test_splits_share_no_picture(tmp_path):
    coco(tmp_path / "a", 2), coco(tmp_path / "b", 2, seed=1), coco(tmp_path / "c", 2, seed=2)
    sets = {
        split: opened("test", workload(test={"source": name}), tmp_path)
        for split, name in (("test", "a"), ("train", "b"))
    }
    data.refuse_overlap(sets)
    (tmp_path / "c" / "images" / "1.png").write_bytes((tmp_path / "a" / "images" / "0.png").read_bytes())
    sets["validation"] = opened("test", workload(test={"source": "c"}), tmp_path)
    said = refused(data.refuse_overlap, sets)
    assert "c/images/1.png" in said and "a/images/0.png" in said and "validation set" in said and "test set" in said


def test_two_copies_in_one_set_are_no_overlap(tmp_path):
    coco(tmp_path / "a", 2)
    (tmp_path / "a" / "images" / "1.png").write_bytes((tmp_path / "a" / "images" / "0.png").read_bytes())
    data.refuse_overlap({"test": opened("test", workload(test={"source": "a"}), tmp_path)})


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ({"test": {"source": "a"}, "validation": {"source": "a"}}, "take the same set"),
        ({"test": {"source": "synthetic"}}, "needs 'images'"),
        ({"test": {"source": "synthetic", "images": 2, "set": "a"}}, "takes no 'set'"),
        ({"train": {"source": "synthetic", "pictures": True}}, "takes no 'set', 'images' or 'pictures'"),
    ],
)
def test_settings_that_cannot_be(sets, said):
    with pytest.raises(ValueError, match=said):
        workload(**sets)


# ---------------------------------------------------------------- the digest


def test_the_digest_says_what_is_fed():
    def sha() -> str:
        return "content"

    base = data.digest("test", workload(), never)
    assert base == data.digest("test", workload(), never)
    others = [
        data.digest("test", workload((96, 160)), never),
        data.digest("test", workload(test={"source": "synthetic", "images": 4}), never),
        data.digest("test", workload(test={"source": "mine"}), sha),
        data.digest("calibration", workload(), never),
        data.digest("calibration", workload(calibration={"source": "mine"}), sha),
    ]
    assert len({base, *others}) == 6
    assert others[2] == data.digest("test", workload(test={"source": "elsewhere"}), sha)  # the place plays no part
    moved = workload()
    moved = Workload.model_validate({**moved.model_dump(), "seeds": {"train": 0, "eval": 7}})
    assert data.digest("test", moved, never) == base


def test_what_finds_the_objects_is_not_what_is_fed():
    """So that one step stands beside twenty, and a DETR beside both."""
    values = workload().model_dump()
    found = {
        data.digest("test", diffusiondet.Workload.model_validate(values | {"sampler": {"steps": n, "boxes": 9}}), never)
        for n in (1, 20)
    }
    assert found == {data.digest("test", workload(), never)}


def test_an_eval_seed_is_told_in_words(tmp_path):
    coco(tmp_path / "a", 2)
    asked = workload(test={"source": "a"}).model_dump()
    found = opened("test", Workload.model_validate({**asked, "seeds": {"train": 0, "eval": 3}}), tmp_path)
    assert found.drawn == "2 images, eval seed 3"
