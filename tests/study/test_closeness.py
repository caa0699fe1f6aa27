"""The eight metrics of a study of weights, against definitions written out, and the grades."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pqk.study.weights.closeness import METRICS, Closeness
from pqk.study.weights.grades import grade

_MAPS = arrays(np.float32, (2, 16, 16), elements=st.floats(0.5, 8.0, width=32))


def compared(own: np.ndarray, reference: np.ndarray, kind: str = "values") -> dict[str, float | None]:
    sums = Closeness(kind)  # type: ignore[arg-type]
    sums.add(own, reference)
    return sums.result()


@given(_MAPS, _MAPS)
def test_the_metrics_are_those_of_their_definitions(own: np.ndarray, reference: np.ndarray) -> None:
    found = compared(own, reference)
    a, b = own.astype(np.float64), reference.astype(np.float64)
    assert found["mae"] == pytest.approx(np.mean(np.abs(a - b)))
    assert found["mse"] == pytest.approx(np.mean((a - b) ** 2))
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((a - b) ** 2)))
    assert found["cosine"] == pytest.approx(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    assert found["relative_error"] == pytest.approx(np.mean(np.abs(a - b) / np.abs(b)))
    if found["psnr"] is not None:
        span = b.max() - b.min()
        assert found["psnr"] == pytest.approx(10 * math.log10(span**2 / np.mean((a - b) ** 2)))
    assert found["ce"] is None


@given(_MAPS)
def test_equal_outputs_are_perfect(reference: np.ndarray) -> None:
    found = compared(reference, reference)
    assert (found["mae"], found["mse"], found["relative_error"], found["psnr"]) == (0.0, 0.0, 0.0, None)
    assert found["cosine"] == pytest.approx(1.0)
    assert found["ssim"] is None or found["ssim"] == pytest.approx(1.0)


def test_two_samples_add_up_to_one_of_both() -> None:
    random = np.random.default_rng(0)
    own, reference = random.normal(3, 1, (4, 20, 24)), random.normal(3, 1, (4, 20, 24))
    sums = Closeness("values")
    for part in (slice(0, 2), slice(2, 4)):
        sums.add(own[part], reference[part])
    assert sums.result() == pytest.approx(compared(own, reference))


def test_ssim_is_that_of_scikit_image_and_of_points_it_takes_the_depth() -> None:
    from skimage.metrics import structural_similarity

    random = np.random.default_rng(1)
    points = random.uniform(1, 4, (2, 32, 40, 3))
    other = points + random.normal(0, 0.1, points.shape)
    expected = [
        structural_similarity(a[..., 2], b[..., 2], data_range=np.ptp(b[..., 2]))
        for a, b in zip(other, points, strict=True)
    ]
    assert compared(other, points, "points")["ssim"] == pytest.approx(np.mean(expected))


def test_a_point_is_one_element_and_so_is_a_pose() -> None:
    reference = np.full((1, 20, 20, 3), [3.0, 0.0, 4.0])
    moved = reference + np.array([0.0, 0.5, 0.0])
    assert compared(moved, reference, "points")["relative_error"] == pytest.approx(0.5 / 5)
    pose = np.array([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
    found = compared(pose + np.eye(9)[:1] * 0.1, pose)
    assert found["relative_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert found["ssim"] is None


def test_outputs_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        Closeness("values").add(np.zeros((2, 3)), np.zeros((3, 2)))


def test_nothing_compared_is_nothing_measured() -> None:
    assert Closeness("values").result() == dict.fromkeys(METRICS)


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [
        ("mae", 0.0009, "excellent"),
        ("mae", 0.001, "good"),
        ("mae", 0.05, "acceptable"),
        ("mae", 0.2, "poor"),
        ("psnr", 41.0, "excellent"),
        ("psnr", 19.0, "poor"),
        ("cosine", 0.97, "good"),
        ("ssim", 0.96, "excellent"),
        ("ssim", 0.90, None),
        ("relative_error", 0.049, "excellent"),
        ("relative_error", 0.2, None),
        ("ce", None, None),
    ],
)
def test_grades_follow_the_ranges_of_the_guide(metric: str, value: float | None, expected: str | None) -> None:
    assert grade(metric, value) == expected
