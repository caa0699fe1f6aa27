"""Batches that detectors learn from: always the same, with boxes that stay on their objects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rectangle_toys import COLOURS, Shapes, asked, drawn, rectangles

from pqk.data.detection.generate import SetPlan, make_set
from pqk.errors import PqkError
from pqk.families.contract import SampleSet
from pqk.families.detection import batches, data
from pqk.families.detection.batches import Pictured, changed, cropped, generator, resized


def same(one: batches.Images, other: batches.Images) -> bool:
    return (one.seed, one.first, one.held, one.classes) == (other.seed, other.first, other.held, other.classes) and all(
        np.array_equal(a.image, b.image) and np.array_equal(a.boxes, b.boxes) and np.array_equal(a.labels, b.labels)
        for a, b in zip(one.pictures, other.pictures, strict=True)
    )


def seen(one: Pictured, label: int) -> np.ndarray | None:
    """The box of the pixels of one colour."""
    rows, columns = np.nonzero(np.abs(one.image.astype(int) - COLOURS[label]).sum(axis=2) < 60)
    if not len(rows):
        return None
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


# ---------------------------------------------------------------- which images


@settings(max_examples=20)
@given(st.lists(st.integers(0, 50), max_size=4), st.integers(0, 50), st.integers(1, 10), st.sampled_from([64, 96]))
def test_a_batch_is_the_same_whatever_was_asked_before(before, index, count, size):
    fresh, used = drawn(asked()), drawn(asked())
    for other in before:
        used.train(other, 2, 96)
    list(used.held_out())
    one, again = fresh.train(index, count, size), used.train(index, count, size)
    assert same(one, again) and len(one.pictures) == count and not one.held and one.seed == (0, index)


def test_batches_and_seeds_differ():
    one, other, seeded = (
        drawn(asked()).train(0, 4, 96),
        drawn(asked()).train(1, 4, 96),
        drawn(asked(), seed=1).train(0, 4, 96),
    )
    assert not same(one, other) and not same(one, seeded)


def test_no_image_is_twice_in_a_batch_that_has_enough():
    found = drawn(asked(), count=8)
    whole = {rectangles(k).boxes.tobytes() for k in range(8)}
    assert len(whole) == 8
    source = Shapes(8)
    fresh = batches.Drawn(asked(), torch.device("cpu"), 0, 0, (source, Shapes(3)))
    fresh.train(0, 8, 96)
    assert source.asked == 8
    assert len(found.train(0, 20, 96).pictures) == 20  # more than there are: some come again


def test_held_out_images_are_whole_and_the_same():
    found = drawn(asked(pairs=5))
    first, again = ([*found.held_out(batch=size)] for size in (5, 2))
    assert [len(batch.pictures) for batch in again] == [2, 2, 1] and all(batch.held for batch in (*first, *again))
    pictures = [one for batch in again for one in batch.pictures]
    for number, (one, other) in enumerate(zip(first[0].pictures, pictures, strict=True)):
        want = rectangles(number)
        assert np.array_equal(one.image, other.image) and np.array_equal(one.image, want.image)
        assert np.array_equal(one.boxes, want.boxes)
    numbers = [generator(batch, k).initial_seed() for batch in again for k in range(len(batch.pictures))]
    assert numbers == [generator(first[0], k).initial_seed() for k in range(5)]  # noise of an image, not of a batch
    assert sum(len(batch.pictures) for batch in found.held_out(pairs=3)) == 3
    assert sum(len(batch.pictures) for batch in found.held_out(pairs=99)) == 8  # all that there are
    assert next(iter(found.held_out(size=48))).pictures[0].image.shape == (32, 48, 3)


def test_noise_differs_between_images_and_batches():
    found = drawn(asked(pairs=4))
    made = [*(found.train(index, 4, 96) for index in range(3)), *found.held_out(batch=2)]
    seeds = [generator(batch, number).initial_seed() for batch in made for number in range(len(batch.pictures))]
    assert len(set(seeds)) == len(seeds) == 16


# ---------------------------------------------------------------- boxes stay on their objects


@settings(max_examples=60)
@given(st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_changed_pictures_keep_boxes_on_their_objects(number, seed):
    whole = rectangles(number)
    one = changed(whole, np.random.default_rng(seed))
    height, width = one.image.shape[:2]
    assert height >= int(0.6 * 64) and width >= int(0.6 * 96)
    assert one.boxes.dtype == np.float32 and len(one.boxes) == len(one.labels) == len(one.areas) == len(one.counted)
    assert (one.boxes >= 0).all() and (one.boxes <= [width, height, width, height]).all()
    for label in range(3):
        pixels, kept = seen(one, label), np.flatnonzero(one.labels == label)
        full = np.prod(whole.boxes[label, 2:] - whole.boxes[label, :2])
        if pixels is None or np.prod(pixels[2:] - pixels[:2]) < 0.3 * full:
            assert not len(kept)
            continue
        np.testing.assert_allclose(one.boxes[kept], pixels[None], atol=1e-3)
        assert one.areas[kept] == pytest.approx([np.prod(pixels[2:] - pixels[:2])])


def test_half_of_the_pictures_are_mirrored_and_half_are_cropped():
    whole = rectangles(0)
    found = [changed(whole, np.random.default_rng(seed)) for seed in range(200)]
    crops = sum(one.image.shape != whole.image.shape for one in found)
    flips = sum(one.image.shape == whole.image.shape and not np.array_equal(one.image, whole.image) for one in found)
    assert 70 <= crops <= 130 and 30 <= flips <= 70


def test_a_box_that_is_cut_off_vanishes_with_all_that_belongs_to_it():
    image = np.zeros((100, 100, 3), np.uint8)
    boxes = np.array([[0, 0, 20, 20], [40, 40, 60, 60], [50, 80, 70, 100], [0, 40, 10, 90]], np.float32)
    one = Pictured(image, boxes, np.arange(4), np.array([100.0, 400, 400, 500]), np.array([True, False, True, True]))
    found = cropped(one, np.array([0.6, 0.6]), np.array([0.999, 0.999]))  # the right lower part, from 40 on
    assert found.image.shape == (60, 60, 3)
    assert found.labels.tolist() == [1, 2] and found.counted.tolist() == [False, True]
    assert found.boxes.tolist() == [[0, 0, 20, 20], [10, 40, 30, 60]] and found.areas.tolist() == [400, 400]


def test_an_empty_picture_stays_empty():
    empty = Pictured(
        np.zeros((40, 50, 3), np.uint8),
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int64),
        np.zeros(0),
        np.zeros(0, bool),
    )
    for seed in range(8):
        one = resized(changed(empty, np.random.default_rng(seed)), 64)
        assert one.boxes.shape == (0, 4) and max(one.image.shape) == 64


@pytest.mark.parametrize(("width", "height", "want"), [(96, 64, (43, 64)), (64, 96, (64, 43)), (500, 2, (1, 64))])
def test_the_longer_side_gets_the_size(width, height, want):
    one = rectangles(0, width, height) if height > 8 else Pictured(
        np.zeros((height, width, 3), np.uint8), np.array([[0, 0, width, height]], np.float32), np.zeros(1, np.int64),
        np.array([1.0 * width * height]), np.ones(1, bool),
    )  # fmt: skip
    found = resized(one, 64)
    assert found.image.shape[:2] == want
    scale = np.array([want[1] / width, want[0] / height] * 2)
    np.testing.assert_allclose(found.boxes, one.boxes * scale, rtol=1e-5)
    np.testing.assert_allclose(found.areas, one.areas * scale[0] * scale[1], rtol=1e-5)


def test_a_batch_of_a_size_is_a_batch_of_tensors():
    batch = drawn(asked()).train(0, 3, 64)
    images, targets = batch.images(), batch.targets()
    for image, target, one in zip(images, targets, batch.pictures, strict=True):
        assert image.dtype == torch.float32 and image.shape == (3, *one.image.shape[:2]) and max(image.shape) == 64
        assert np.array_equal(image.numpy().transpose(1, 2, 0), one.image)
        assert target["labels"].dtype == torch.int64 and target["boxes"].dtype == torch.float32
        assert len(target["labels"]) == len(target["boxes"])


# ---------------------------------------------------------------- where images come from


def own_set(folder: Path, count: int = 9, pictures: bool = False) -> SampleSet:
    """A set with an object, a crowd and a picture of its number in each image."""
    (folder / "images").mkdir(parents=True)
    for k in range(count):
        Image.fromarray(np.full((30, 40, 3), 10 * k, np.uint8)).save(folder / "images" / f"{k}.png")
    boxes = [(k, crowd) for k in range(count) for crowd in (0, 1)]
    value = {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 40, "height": 30} for k in range(count)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {
                "id": 2 * k + crowd,
                "image_id": k,
                "category_id": 1,
                "bbox": [2, 3, 36, 24],
                "area": 800,
                "iscrowd": crowd,
            }
            for k, crowd in boxes
        ],
    }
    (folder / "annotations.json").write_text(json.dumps(value))
    where = {"pictures": str(folder / "images")} if pictures else {"folder": str(folder)}
    return SampleSet(where, {"images": None}, (), "", truthful=not pictures, own=True)


def test_a_set_of_the_users(tmp_path):
    found = own_set(tmp_path)
    made = batches.batches_of(asked(pairs=99, size=40), torch.device("cpu"), 0, 7, found)
    assert made.truthful
    held = [one for batch in made.held_out() for one in batch.pictures]
    judged = {round(one.image.mean() / 10) for one in held}
    assert judged == {s.id for s in data.learning_split(found)[1]} and len(judged) == 1
    learned = {round(one.image.mean() / 10) for index in range(12) for one in made.train(index, 4, 40).pictures}
    assert learned == set(range(9)) - judged
    batch = next(iter(made.held_out()))
    assert batch.classes == ("cat",) and batch.pictures[0].counted.tolist() == [True, False]
    assert batch.targets()[0]["boxes"].tolist() == [[2, 3, 38, 27]]  # a crowd is nothing to learn from


def test_crowds_count_neither_way(tmp_path):
    from pqk.families.detection import learning, scoring

    batch = next(iter(batches.own(asked(size=40), torch.device("cpu"), 0, own_set(tmp_path)).held_out()))
    found = {"boxes": np.array([[2, 3, 38, 27], [2, 3, 38, 27]], np.float32), "scores": np.array([0.9, 0.8])}
    ((row,),) = learning.evidence([{**found, "labels": np.zeros(2, np.int64)}], batch)
    assert scoring.summarise([row])["ap"] == pytest.approx(100)


def test_photographs_have_no_truth(tmp_path):
    made = batches.batches_of(asked(size=40), torch.device("cpu"), 0, 0, own_set(tmp_path, pictures=True))
    batch = made.train(0, 2, 40)
    assert not made.truthful and not batch.truthful and batch.classes == ()
    with pytest.raises(PqkError, match="no ground truth"):
        batch.targets()
    assert len(batch.images()) == 2


def test_generated_images_are_those_of_a_set(tmp_path):
    plan = SetPlan("validation", 3, 2, 128, 96)
    folder = make_set(tmp_path, plan)
    source = batches.Rendered("validation", 3, 2, 128)
    held = data.opened({"folder": str(folder)}).samples
    assert len(source) == 2
    for index, want in enumerate(held):
        one = source[index]
        assert np.array_equal(one.image, want.load_image()) and one.labels.tolist() == want.labels.tolist()
        np.testing.assert_allclose(one.boxes, want.boxes, atol=0.01)
        assert one.areas.tolist() == want.areas.tolist() and one.counted.all()


def test_batches_of_generated_images():
    spec = asked(pairs=2, size=64)
    made, again = (batches.batches_of(spec, torch.device("cpu"), 0, 1, None) for _ in range(2))
    empty = SampleSet({}, {"images": None}, (), "", True)
    assert same(made.train(3, 2, 64), again.train(3, 2, 64))
    held = next(iter(batches.batches_of(spec, torch.device("cpu"), 0, 1, empty).held_out()))
    assert same(held, next(iter(made.held_out()))) and held.pictures[0].image.shape == (48, 64, 3)
