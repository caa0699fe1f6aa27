"""Generated detection sets: what is written, that boxes are those of the visible pixels, and that seeds decide all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pqk.cli.app import app
from pqk.data.detection import compose
from pqk.data.detection.coco import read_coco
from pqk.data.detection.compose import CLASSES, LEAST_PIXELS, LEAST_SIDE, THINGS, render_picture, visible
from pqk.data.detection.generate import FILLINGS, SetPlan, make_set
from pqk.data.render.synthetic import texture_bank
from pqk.errors import PqkError
from pqk.files import sha256_file
from pqk.settings.seeds import split_seed

PLAN = SetPlan("test", 3, 10, 160, 120)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def bank():
    return texture_bank()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("made"), PLAN, jobs=1)


def test_what_is_written_is_read_back(made):
    found = read_coco(made / "annotations.json", made / "images")
    assert found.classes == CLASSES and len(found.samples) == 10 and found.notes == ()
    assert [sample.image_path.name for sample in found.samples] == [f"{i:06d}.jpg" for i in range(10)]
    assert all(sample.load_image().shape == (120, 160, 3) for sample in found.samples)
    about = json.loads((made / "set.json").read_text())
    assert about["classes"] == found.counts() and min(about["classes"].values()) > 0
    areas = np.concatenate([sample.areas for sample in found.samples])
    sizes = [(areas <= 32**2).sum(), ((areas > 32**2) & (areas <= 96**2)).sum(), (areas > 96**2).sum()]
    assert list(about["sizes"].values()) == sizes and about["objects"] == len(areas)
    counts = [len(sample.boxes) for sample in found.samples]
    assert about["empty_images"] == counts.count(0) >= 1 and about["most_objects"] == max(counts)
    assert about["annotations_sha256"] == sha256_file(made / "annotations.json")


def test_boxes_are_those_of_the_visible_pixels(made, bank):
    """The map of surfaces, traced again, and boxes and areas found in it in another way: pixel by pixel."""
    found = read_coco(made / "annotations.json", made / "images")
    objects = 0
    for index in (0, 1, 4):
        seed = split_seed("test", 3, index)
        picture = render_picture(seed, FILLINGS[index], 160, 120, bank)
        error = found.samples[index].load_image().astype(float) - picture.pixels
        assert np.abs(error).mean() < 4  # JPEG's loss on a noisy little image
        expected: dict[int, list[int]] = {}
        for y, row in enumerate(picture.surface.tolist()):
            for x, number in enumerate(row):
                if number >= 6:
                    x1, y1, x2, y2, area = expected.get(number - 6, [x, y, x, y, 0])
                    expected[number - 6] = [min(x1, x), min(y1, y), max(x2, x + 1), max(y2, y + 1), area + 1]
        sample = found.samples[index]
        assert sorted(expected) == list(picture.seen)  # nothing that shows is without a box
        assert sample.boxes.tolist() == [expected[k][:4] for k in picture.seen]
        assert sample.areas.tolist() == [expected[k][4] for k in picture.seen]
        assert [CLASSES[label] for label in sample.labels] == [picture.names[k] for k in picture.seen]
        assert all(area >= LEAST_PIXELS for area in sample.areas)
        assert all(min(x2 - x1, y2 - y1) >= LEAST_SIDE for x1, y1, x2, y2 in sample.boxes)
        objects += len(picture.seen)
    assert objects > 10


def test_fillings_hold_what_they_say(bank):
    counts = {name: [] for name in THINGS}
    for index in range(6):
        for name in THINGS:
            picture = render_picture(split_seed("train", 1, index), name, 160, 120, bank)
            counts[name].append(len(picture.names))
            assert len(picture.seen) <= len(picture.names) <= THINGS[name][1]
    assert set(counts["empty"]) == {0}
    assert 3 <= max(counts["usual"]) <= 9 < min(counts["crowded"])


def test_things_do_not_touch():
    """Those on the floor keep apart by the circles that hold them, and every thing is inside the room."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        room = np.array([3.0, 2.6, 3.0])
        things = compose._furnish(random, "crowded", room, np.zeros(3), np.array([2.0, -1.5, 2.0]))
        floor = [thing for thing in things if thing.centre[1] == -thing.half[1]]
        for i, one in enumerate(floor):
            for other in floor[:i]:
                apart = np.hypot(one.centre[0] - other.centre[0], one.centre[2] - other.centre[2])
                assert apart >= one.radius + other.radius
        for thing in things:
            assert abs(thing.centre[0]) + thing.radius <= 3.0 and abs(thing.centre[2]) + thing.radius <= 3.0
            assert -room[1] <= thing.centre[1] - thing.half[1] and thing.centre[1] + thing.half[1] <= 1e-12
            assert np.hypot(thing.centre[0] - 2, thing.centre[2] - 2) >= thing.radius + 0.69


def test_what_counts_as_visible():
    surface = np.zeros((40, 60), np.int64)
    surface[3:7, 10:16] = 6  # 24 pixels, 6 x 4
    surface[20:23, 10:30] = 7  # 3 rows
    surface[30:35, 50:54] = 8  # 20 pixels
    surface[10:20, 30:40] = 9
    seen, boxes, areas = visible(surface, np.ones(5))
    assert seen == (0, 3) and boxes.tolist() == [[10, 3, 16, 7], [30, 10, 40, 20]] and areas.tolist() == [24, 100]
    assert visible(surface, np.array([240, 1, 1, 1001, 1]))[0] == (0,)  # a tenth of what it could cover


def test_equal_plans_give_equal_bytes_and_short_sets_begin_long_ones(made, tmp_path):
    again = make_set(tmp_path / "again", PLAN, jobs=1)
    assert contents(again) == contents(made)
    short = contents(make_set(tmp_path / "short", replace(PLAN, images=3), jobs=1))
    assert all(short[name] == digest for name, digest in contents(made).items() if name in short and "jpg" in name)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert contents(make_set(tmp_path / "threads", replace(PLAN, images=3), jobs=1)) == short
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_processes_give_equal_bytes(made, tmp_path):
    assert contents(make_set(tmp_path, PLAN, jobs=2)) == contents(made)


@pytest.mark.parametrize("change", [{"split": "validation"}, {"split": "train"}, {"seed": 4}])
def test_splits_and_seeds_share_no_image(made, tmp_path, change):
    other = make_set(tmp_path, replace(PLAN, images=3, **change), jobs=1)
    assert other.name != made.name
    pictures = [set(contents(folder / "images").values()) for folder in (made, other)]
    assert len(pictures[0]) == 10 and len(pictures[1]) == 3 and not pictures[0] & pictures[1]


def test_what_is_there_stays_and_something_else_is_refused(made, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert make_set(made.parent, PLAN) == made
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    with pytest.raises(PqkError, match="holds a set with images 10, asked is 11"):
        make_set(made.parent, replace(PLAN, images=11))
    (tmp_path / "test-3").mkdir()
    (tmp_path / "test-3" / "mine.txt").touch()
    with pytest.raises(PqkError, match="exists and is no generated set"):
        make_set(tmp_path, PLAN)
    (tmp_path / "test-3" / "set.json").write_text("[")
    with pytest.raises(PqkError, match="is damaged"):
        make_set(tmp_path, PLAN)
    assert (tmp_path / "test-3" / "mine.txt").exists()
    (tmp_path / "empty" / "test-3").mkdir(parents=True)
    with pytest.raises(PqkError, match="exists already"):
        make_set(tmp_path / "empty", PLAN)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split": "tests"}, "did you mean 'test'"),
        ({"seed": 1024}, "from 0 to 1023, got 1024"),
        ({"images": 0}, "the number of images must be from 1"),
        ({"width": 32}, "the width of an image must be from 64 to 2048"),
        ({"height": 4096}, "the height of an image must be from 64 to 2048"),
    ],
)
def test_impossible_plans(tmp_path, change, said):
    with pytest.raises(PqkError, match=said):
        make_set(tmp_path / "out", replace(PLAN, **change))
    assert not (tmp_path / "out").exists()


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    from pqk.data.detection import generate

    monkeypatch.setattr(generate, "render_picture", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_set(tmp_path, PLAN, jobs=1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(PqkError, match="it is a file, not a folder"):
        make_set(tmp_path / "file", PLAN)


def test_the_command(tmp_path, capsys):
    arguments = ["data", "make", "--kind", "detection", "-o", str(tmp_path), "--images", "2", "--split", "validation"]
    app(arguments, standalone_mode=False)
    assert "2 images in" in capsys.readouterr().out
    assert (
        len(read_coco(tmp_path / "validation-0" / "annotations.json", tmp_path / "validation-0" / "images").samples)
        == 2
    )
    with pytest.raises(PqkError, match="--views is given, but --kind detection takes --images"):
        app([*arguments, "--views", "3"], standalone_mode=False)
    with pytest.raises(PqkError, match="--images is given, but --kind scenes takes --count"):
        app(["data", "make", "-o", str(tmp_path), "--images", "2"], standalone_mode=False)
