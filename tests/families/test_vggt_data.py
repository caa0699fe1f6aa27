"""What VGGT is fed: windows of neighbouring frames of generated scenes and of the user's own, and calibration sets."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pqk import paths
from pqk.data.render.generate import ScenePlan, make_scenes
from pqk.data.scenes.open import open_scene
from pqk.data.scenes.preprocess import Frame
from pqk.errors import PqkError
from pqk.families.contract import Given, Sample, SampleSet
from pqk.families.scenes.frames import learning_split
from pqk.families.vggt import data
from pqk.families.vggt.inputs import count_windows, for_network, load, windows
from pqk.families.vggt.settings import FrameSets, Workload, load_workload
from pqk.files import sha256_json

SIDE = 56
CONFIGS = paths.configs(paths.project_root()) / "vggt" / "workload.yaml"


def workload(frames: int = 2, **more: Any) -> Workload:
    """A tiny workload: one generated scene of four views in each split, pictures of 56 x 56."""
    scene = {"source": "synthetic", "count": 1, "views": 4}
    settings = {
        "input": {"shape": [1, 3, SIDE, SIDE], "frames": frames},
        "scenes": {"validation": {**scene, "seed": 2}, "test": {**scene, "seed": 0}},
        "calibration": {"source": "synthetic", "images": 4, "views_per_scene": 6, "seed": 0},
    }
    return load_workload(CONFIGS, overrides={**settings, **more})


class Making:
    """Makes generated data once in a folder, and remembers what it was asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, []

    def __call__(
        self, split: str, inputs: Mapping[str, Any], modules: tuple[str, ...], write: Callable[[Path], object]
    ) -> tuple[Path, str]:
        self.asked.append({"split": split, **inputs})
        folder = self.root / sha256_json(dict(inputs))[:16]
        if not folder.exists():
            write(folder)
        return folder, sha256_json(dict(inputs))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Making:
    return Making(tmp_path_factory.mktemp("made"))


def nothing_made(*_: object) -> tuple[Path, str]:
    raise AssertionError("nothing is generated here")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes of four views of 64 x 64 with depth, as `pqk data make` writes them."""
    folder = tmp_path_factory.mktemp("own") / "scenes"
    plan = {"split": "test", "seed": 7, "views": 4, "size": 64, "k": 2, "min_covisibility": 0.3, "depth": True}
    make_scenes(folder, [ScenePlan(index=i, **plan) for i in range(2)], jobs=1)
    return folder


def photos(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for k in range(count):
        pixels = np.random.default_rng((len(folder.name), k)).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 60)).save(folder / f"{k}.png")
    return folder


def frames_of(depths: list[float]) -> list[Frame]:
    """Frames of one camera that looks at a wall each; a wall at another depth hides what the others see."""
    K = np.array([[40.0, 0, 28], [0, 40, 28], [0, 0, 1]])
    image = np.zeros((3, SIDE, SIDE), np.float32)
    return [
        Frame(f"v{k}", image, K, np.eye(4), np.full((SIDE, SIDE), z, np.float32), "room") for k, z in enumerate(depths)
    ]


def names(found: list[Sample]) -> list[str]:
    return [sample.name for sample in found]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (1, ["0", "1", "2", "3"]),
        (2, ["0, 1", "1, 2", "2, 3"]),
        (4, ["0, 1, 2, 3"]),
    ],
)
def test_generated_scenes_become_windows(make: Making, frames: int, expected: list[str]) -> None:
    fed = workload(frames)
    found = data.open_split("test", fed, Path(), make)
    assert (found.own, found.truthful, len(found.groups)) == (False, True, 1)
    assert make.asked[-1]["k"] == 2 and make.asked[-1]["size"] == 64 and make.asked[-1]["depth"]
    samples = list(data.samples(found, fed, 0))
    assert [name.replace("00", "").replace(".jpg", "").replace("dslr_images_undistorted/", "") for name in
            names(samples)] == expected  # fmt: skip
    assert data.most(found, fed) == len(expected)
    for sample in samples:
        assert sample.group == 0 and sample.truth is sample.inputs and len(sample.inputs) == frames
        for frame in sample.inputs:
            assert frame.image.shape == (3, SIDE, SIDE) and frame.image.dtype == np.float32
            assert frame.depth.shape == (SIDE, SIDE) and frame.world_to_cam.shape == (4, 4)
            assert 0 <= frame.image.min() < 0.5 < frame.image.max() <= 1


def test_a_picture_comes_in_its_own_values(make: Making) -> None:
    """The value k of a pixel is k / 255: the range is converted once."""
    fed = workload()
    scene = open_scene(data.open_split("test", fed, Path(), make).where["folders"][0])
    frame = load(scene, fed)[0]
    assert frame.image.min() < 0
    values = for_network(frame).image * 255
    np.testing.assert_allclose(values, np.round(values), atol=1e-4)
    np.testing.assert_allclose(values, (frame.image + 1) * 127.5, atol=1e-4)
    assert for_network(frame).depth is frame.depth


def test_an_eval_seed_draws_other_scenes() -> None:
    asked: list[Mapping[str, Any]] = []

    def make(split: str, inputs: Mapping[str, Any], *_: object) -> tuple[Path, str]:
        asked.append(inputs)
        raise LookupError

    for more in ({}, {"first": 1, "count": 2}):
        with pytest.raises(LookupError):
            data.open_split("test", workload(seeds={"train": 0, "eval": 5}), Path(), make, **more)
    assert [(of["seed"], of["first"], of["count"]) for of in asked] == [(5, 0, 1), (5, 1, 2)]
    fed = workload()
    assert data.can_grow(fed, Given()) and not data.can_grow(fed, Given(images=Path("x")))
    assert data.open_split("train", fed, Path(), nothing_made).groups == ()


def test_too_few_generated_views_are_refused_before_they_are_made() -> None:
    with pytest.raises(PqkError, match=r"workload\.scenes\.test\.views is 4, but 5 images are fed at once"):
        data.open_split("test", workload(5), Path(), nothing_made)
    with pytest.raises(PqkError, match=r"workload\.calibration\.views_per_scene is 6, but 7 images are fed at once"):
        data.open_split("calibration", workload(7), Path(), nothing_made)


def test_the_users_scenes_are_looked_at(scenes: Path, tmp_path: Path) -> None:
    fed = workload(3)
    found = data.open_split("test", fed, Path(), nothing_made, Given(scenes=scenes))
    assert (found.own, found.truthful, found.drawn) == (True, True, "all 2 of the list")
    samples = list(data.samples(found, fed, 0))
    assert {sample.group for sample in samples} == {0, 1} and len(samples) <= data.most(found, fed) == 4
    with pytest.raises(PqkError, match=r"no 3 neighbouring images each share 100% of their view"):
        data.open_split("test", workload(3, min_covisibility=1.0), Path(), nothing_made, Given(scenes=scenes))
    with pytest.raises(PqkError, match="a scene needs at least 5 images, found 4"):
        data.open_split("test", workload(5), Path(), nothing_made, Given(scenes=scenes))
    lacking = tmp_path / "lacking"
    shutil.copytree(scenes, lacking)
    depth = next(lacking.rglob("ground_truth_depth/*/001.jpg"))
    depth.unlink()
    with pytest.raises(PqkError, match=r"view '.*001\.jpg' has no depth \(1 of the 4 views have none\)"):
        data.open_split("test", fed, Path(), nothing_made, Given(scenes=lacking))
    with depth.open("wb") as file:
        file.write(np.zeros((64, 64), "<f4").tobytes())
    with pytest.raises(PqkError, match=r"the depth map of .*001\.jpg has no valid pixel"):
        data.open_split("test", fed, Path(), nothing_made, Given(scenes=lacking))


def test_photographs_have_no_truth(tmp_path: Path) -> None:
    fed = workload(4)
    found = data.open_split("test", fed, Path(), nothing_made, Given(images=photos(tmp_path / "trip", 6)))
    assert (found.own, found.truthful) == (True, False)
    samples = list(data.samples(found, fed, 0))
    assert names(samples)[-1] == "2.png, 3.png, 4.png, 5.png" and len(samples) == 3
    assert all(sample.truth is None for sample in samples)
    assert all(frame.image.min() >= 0 and frame.image.max() <= 1 for sample in samples for frame in sample.inputs)
    with pytest.raises(PqkError, match="a scene needs at least 4 images, found 3"):
        data.open_split("test", fed, Path(), nothing_made, Given(images=photos(tmp_path / "few", 3)))
    one = data.open_split("test", workload(1), Path(), nothing_made, Given(images=photos(tmp_path / "single", 1)))
    assert names(list(data.samples(one, workload(1), 0))) == ["0.png"]


def test_splits_share_no_picture(tmp_path: Path) -> None:
    trip = photos(tmp_path / "trip", 6)
    fed = workload(2, calibration={"source": str(trip), "images": 4, "views_per_scene": 4})
    test = data.open_split("test", fed, Path(), nothing_made, Given(images=trip))
    with pytest.raises(PqkError, match="splits test and calibration share a folder"):
        data.refuse_overlap({"test": test, "calibration": data.open_split("calibration", fed, Path(), nothing_made)})


def test_windows_start_every_step_and_are_spread() -> None:
    ten = frames_of([2.0] * 10)
    assert windows(ten, 4, FrameSets(step=3), 0.3, True) == [(0, 1, 2, 3), (3, 4, 5, 6), (6, 7, 8, 9)]
    assert windows(ten, 4, FrameSets(step=4), 0.3, True) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert windows(ten, 1, FrameSets(step=1, most=4), 0.3, True) == [(0,), (2,), (5,), (7,)]
    assert [window[0] for window in windows(ten, 2, FrameSets(step=1, most=3), 0.3, False)] == [0, 3, 6]
    for together in (1, 2, 4, 10):
        for sets in (FrameSets(step=1), FrameSets(step=3), FrameSets(step=2, most=2)):
            assert len(windows(ten, together, sets, 0.3, False)) == count_windows(10, together, sets)


def test_a_window_is_left_out_where_a_frame_shares_too_little_with_the_one_before() -> None:
    frames = frames_of([2, 2, 2, 5, 5])
    assert windows(frames, 2, FrameSets(step=1), 0.5, True) == [(0, 1), (1, 2), (3, 4)]
    assert windows(frames, 3, FrameSets(step=1), 0.5, True) == [(0, 1, 2)]
    assert len(windows(frames, 3, FrameSets(step=1), 0.5, False)) == 3
    assert len(windows(frames, 1, FrameSets(step=1), 0.5, True)) == 5
    assert windows(frames, 2, FrameSets(step=1, most=2), 0.5, True) == [(0, 1), (1, 2)]
    with pytest.raises(PqkError, match="scene room: no 4 neighbouring images each share 50% of their view with the on"):
        windows(frames, 4, FrameSets(step=1), 0.5, True)


def test_a_scene_is_looked_at_frame_by_frame(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a thousand pictures no more are in memory than of a few."""
    monkeypatch.setattr("pqk.families.scenes.frames._FRAMES", 4 * SIDE * SIDE * 12)
    folder = photos(tmp_path / "long", 2)
    for k in range(2, 200):
        (folder / f"{k}.png").symlink_to("0.png")
    frames = load(open_scene(folder), workload(2))
    tracemalloc.start()
    assert len(windows(frames, 2, FrameSets(step=1), 0.3, False)) == 199
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * SIDE * SIDE * 12


def test_one_frame_needs_no_overlap() -> None:
    frames = frames_of([2, 5, 1])
    assert windows(frames, 1, FrameSets(step=1), 1.0, True) == [(0,), (1,), (2,)]


@pytest.mark.parametrize(("frames", "sizes"), [(1, [1] * 4), (2, [2, 2]), (3, [3]), (4, [4])])
def test_calibration_sets_are_neighbours(make: Making, frames: int, sizes: list[int]) -> None:
    fed = workload(frames)
    found = data.open_split("calibration", fed, Path(), make)
    assert not found.truthful and not make.asked[-1]["depth"]
    sets = data.calibration(found, fed, 4)
    assert [len(sample.inputs) for sample in (sets[k] for k in range(len(sets)))] == sizes
    assert sets.images == sum(sizes)
    assert all(frame.depth is None and frame.image.min() >= 0 for frame in sets[0].inputs)
    assert len(data.calibration(found, fed, 2)) == max(1, 2 // frames)  # one sample at least, for shapes
    with pytest.raises(IndexError):
        sets[len(sets)]


def test_a_calibration_set_straddles_no_scenes(tmp_path: Path) -> None:
    for name in ("a", "bb"):
        photos(tmp_path / "calibration" / name, 5)
    settings = {"source": "calibration", "images": 6, "views_per_scene": 5}
    fed = workload(3, calibration=settings)
    found = data.open_split("calibration", fed, tmp_path, nothing_made)
    sets = data.calibration(found, fed, 8)
    assert (len(sets), sets.images) == (2, 6)
    assert [[frame.name for frame in sets[k].inputs] for k in range(2)] == [["0.png", "1.png", "2.png"]] * 2
    with pytest.raises(PqkError, match=r"the calibration set has 6 images \(in sets of 3\), 9 were asked for"):
        data.calibration(found, fed, 9)


def test_what_is_timed_does_not_ask_for_overlap(make: Making, scenes: Path) -> None:
    fed = workload(4, min_covisibility=0.3)
    own = data.open_split("test", fed, Path(), nothing_made, Given(scenes=scenes))
    timed = data.timed(own, workload(4, min_covisibility=1.0))
    assert len(timed) == 5 and all(sample.group == 0 and sample.truth is None for sample in timed)  # of 8 views
    assert timed[0].name.startswith("0 ") and timed[-1].name.split(", ")[-1].startswith("1 ")
    few = data.open_split("test", fed, Path(), make)
    assert len(data.timed(few, fed)) == 1
    assert len(data.timed(few, workload(1))) == 4
    with pytest.raises(PqkError, match="4 images are too few to be timed, as 5 are fed at once"):
        data.timed(few, workload(5))
    assert len(data.timed(own, workload(4), 6)) == 3  # windows over six images
    with pytest.raises(PqkError, match="all scenes of this list together have 4 images, 9 were asked for"):
        data.timed(few, workload(4), 9)


def test_an_example_is_always_the_same() -> None:
    first, again = data.example(workload(3)), data.example(workload(3))
    assert len(first.inputs) == 3 and len({frame.name for frame in first.inputs}) == 3
    for one, other in zip(first.inputs, again.inputs, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        assert one.image.shape == (3, SIDE, SIDE) and one.image.dtype == np.float32
        assert 0 <= one.image.min() < 0.01 and 0.99 < one.image.max() <= 1


def test_the_digest_is_of_what_is_fed() -> None:
    def of(split: str = "test", **settings: Any) -> str:
        nested = {name.replace("__", "."): value for name, value in settings.items()}
        return data.digest(split, load_workload(CONFIGS, overrides=nested), lambda: "content")

    assert of() == of(seeds__train=3, seeds__eval=4) == of(calibration__images=8)
    others = ("input__frames", 3), ("frame_sets__step", 2), ("min_covisibility", 0.4), ("scenes__test__count", 2)
    assert len({of(), *(of(**{name: value}) for name, value in others)}) == 5
    assert of("calibration") != of("calibration", calibration__seed=1)
    own = of(scenes__test__source="somewhere")
    assert own == of(scenes__test__source="elsewhere") != of()


def test_what_is_learned_from_is_split_by_whole_sets(scenes: Path, tmp_path: Path) -> None:
    found = data.open_split("train", workload(4), Path(), nothing_made, Given(train_scenes=scenes))
    assert found.drawn == "1 scenes with depth, judged on 1 other"
    pictures = data.open_split(
        "train", workload(3), Path(), nothing_made, Given(train_images=photos(tmp_path / "p", 9))
    )
    assert isinstance(pictures, SampleSet)
    (learned,), (held,) = learning_split(pictures, 3)
    assert (len(learned.views), len(held.views)) == (6, 3)
    with pytest.raises(PqkError, match="training needs at least 8 photographs, 4 of them to judge it, found 7"):
        data.open_split("train", workload(4), Path(), nothing_made, Given(train_images=photos(tmp_path / "few", 7)))
