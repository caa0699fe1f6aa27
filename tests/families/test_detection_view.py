"""What detectors say of pictures to who looks at them: boxes in pixels of the file, and how boxes are paired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pqk.data.scenes.open import open_scene
from pqk.errors import PqkError
from pqk.families.metrics.boxes import paired_overlaps
from pqk.families.registry import family
from pqk.recipe.experiment import config_file, config_loaders

REPOSITORY = Path(__file__).parents[2]
NAMES = ("detr", "diffusiondet")


def workload(name: str) -> Any:
    of = family(name)
    return config_loaders(of)["workload"](config_file(REPOSITORY, of, "workload"), {"input.shape": [1, 3, 64, 96]})


def prediction(boxes: list[list[float]], scores: list[float], labels: list[int]) -> dict[str, np.ndarray]:
    return {
        "logits": np.zeros((3, 2), np.float32),
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "scores": np.array(scores, np.float32),
        "labels": np.array(labels, np.int64),
    }


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_any_size_come_back_as_they_were_fed(tmp_path: Path, name: str) -> None:
    """One of the input's size unchanged, a larger one fitted in, one that EXIF turns upright; their sizes are kept."""
    random = np.random.default_rng(0)
    exact = random.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(exact).save(tmp_path / "a.png")
    Image.new("RGB", (300, 100), (255, 7, 1)).save(tmp_path / "b.png")
    turn = Image.Exif()
    turn[274] = 6
    Image.new("RGB", (80, 40), (0, 128, 255)).save(tmp_path / "c.png", exif=turn)
    part, fed = family(name).view_part(), workload(name)
    same, samples = part.samples(open_scene(tmp_path), fed, 5)
    assert same == fed and [sample.name for sample in samples] == ["a.png", "b.png", "c.png"]
    assert [sample.inputs.number for sample in samples] == [0, 1, 2]  # the noise of each
    found: Any = part.view(samples, [prediction([[1, 2, 30, 40]], [0.1], [1])] * 3)
    np.testing.assert_array_equal(found.pictures[0].image, exact)
    assert [picture.size for picture in found.pictures] == [(64, 96), (100, 300), (80, 40)]
    assert [picture.image.shape for picture in found.pictures] == [(64, 96, 3), (32, 96, 3), (64, 32, 3)]
    assert (found.pictures[1].image == [255, 7, 1]).all() and (found.pictures[2].image == [0, 128, 255]).all()
    np.testing.assert_array_equal(found.pictures[1].boxes, [[1, 2, 30, 40]])
    assert found.pictures[2].scores == [np.float32(0.1)] and found.pictures[2].labels == [1]


def test_one_picture_is_enough_and_numbers_must_be_finite(tmp_path: Path) -> None:
    Image.new("RGB", (50, 40)).save(tmp_path / "only.png")
    part = family("detr").view_part()
    _, samples = part.samples(open_scene(tmp_path), workload("detr"), 1)
    assert len(samples) == 1
    for broken in (prediction([[0, 0, np.nan, 4]], [0.9], [0]), prediction([[0, 0, 4, 4]], [np.inf], [0])):
        with pytest.raises(PqkError, match=r"^only\.png: a box or score is not finite"):
            part.view(samples, [broken])


def test_a_box_is_paired_with_the_one_it_overlaps_most() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60], [0, 0, 4, 4]])
    labels = np.array([1, 1, 0, 2])
    others = np.array([[0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60]])
    other_labels = np.array([1, 1, 1])
    found = paired_overlaps(boxes, labels, others, other_labels, 0.5)
    assert found == pytest.approx((1, 8 / 9))  # not 0.9 with the first, which its twin took; classes are kept apart
    assert paired_overlaps(boxes, labels, others, other_labels, 0.95) == pytest.approx((1,))
    nothing = np.zeros((0, 4)), np.zeros(0, np.int64)
    assert paired_overlaps(boxes, labels, *nothing, 0.5) == paired_overlaps(*nothing, boxes, labels, 0.5) == ()


@pytest.mark.parametrize("seed", range(20))
def test_sides_may_change_places(seed: int) -> None:
    random = np.random.default_rng(seed)
    sides: list[Any] = []
    for count in random.integers(0, 6, 2):
        corners = random.uniform(0, 10, (count, 2))
        sides += [np.concatenate([corners, corners + random.uniform(1, 10, (count, 2))], axis=1)]
        sides += [random.integers(0, 2, count)]
    forth, back = paired_overlaps(*sides, 0.3), paired_overlaps(*sides[2:], *sides[:2], 0.3)
    assert forth == pytest.approx(back) and list(forth) == sorted(forth, reverse=True)
    assert len(paired_overlaps(*sides[:2], *sides[:2], 0.5)) == len(sides[0])
