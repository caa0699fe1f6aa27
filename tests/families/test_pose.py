"""Pose metrics: exact cases, what must not change the errors, and the borders of AUC, RRA and RTA.

The official numbers are in tests/golden/proto_pose_pairs and proto_pose_edge, which test_vectors.py runs.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from pqk.errors import PqkError
from pqk.families.metrics.pose import (
    LOST,
    VARIANTS,
    PairErrors,
    auc,
    by_category,
    join,
    pair_errors,
    scores,
    share_below,
    summarise,
)

seeds = st.integers(0, 2**32 - 1)
degrees = st.floats(0, 180) | st.just(float("nan"))
errors = st.lists(degrees, min_size=1, max_size=30)


def cameras(random: np.random.Generator, count: int = 5) -> np.ndarray:
    """World-to-camera matrices (count, 4, 4) of random places."""
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.random(count, random).as_matrix()
    poses[:, :3, 3] = random.normal(size=(count, 3))
    return poses


def disturbed(random: np.random.Generator, poses: np.ndarray, angle: float = 0.2) -> np.ndarray:
    """The same with other rotations and translations, by about `angle` radians and units."""
    other = poses.copy()
    other[:, :3, :3] = Rotation.from_rotvec(random.normal(0, angle, (len(poses), 3))).as_matrix() @ poses[:, :3, :3]
    other[:, :3, 3] += random.normal(0, angle, (len(poses), 3))
    return other


def rescaled(poses: np.ndarray, scale: float) -> np.ndarray:
    other = poses.copy()
    other[:, :3, 3] *= scale
    return other


def assert_same(found: PairErrors, expected: PairErrors) -> None:
    np.testing.assert_allclose(found.rotation, expected.rotation, atol=1e-5)
    np.testing.assert_allclose(found.translation, expected.translation, atol=1e-5)


@given(seeds, st.floats(0.01, 100), st.sampled_from(["vggt", "pi3"]))
def test_another_world_frame_and_scale_change_nothing(seed: int, scale: float, variant: str) -> None:
    random = np.random.default_rng(seed)
    gt = cameras(random)
    pred = disturbed(random, gt)
    expected = pair_errors(pred, gt, variant)
    moved = rescaled(pred @ cameras(random, 1)[0], scale)
    assert_same(pair_errors(moved, gt, variant), expected)
    assert_same(pair_errors(pred, rescaled(gt @ cameras(random, 1)[0], scale), variant), expected)


@given(seeds, st.floats(0.01, 100), st.sampled_from(VARIANTS))
def test_perfect_poses(seed: int, scale: float, variant: str) -> None:
    gt = cameras(np.random.default_rng(seed), 6)
    found = pair_errors(rescaled(gt, scale), gt, variant)
    assert len(found) == 15 and found.worst.max() < 1e-5 and not found.no_baseline.any() and not found.lost.any()
    assert set(scores(found).values()) == {1.0}


@given(seeds)
def test_the_errors_against_scipy(seed: int) -> None:
    random = np.random.default_rng(seed)
    gt = cameras(random, 4)
    pred = disturbed(random, gt)
    found = pair_errors(pred, gt)
    k = 0
    for i in range(4):
        for j in range(i + 1, 4):
            p, g = pred[i] @ np.linalg.inv(pred[j]), gt[i] @ np.linalg.inv(gt[j])
            angle = Rotation.from_matrix(p[:3, :3] @ g[:3, :3].T).magnitude()
            assert found.rotation[k] == pytest.approx(np.degrees(angle), abs=1e-5)
            t, u = p[:3, 3], g[:3, 3]
            line = np.arctan2(np.linalg.norm(np.cross(t, u)), abs(t @ u))
            assert found.translation[k] == pytest.approx(np.degrees(line), abs=1e-5)
            k += 1
    assert k == len(found)


@given(seeds)
def test_ranges_and_what_the_variants_share(seed: int) -> None:
    random = np.random.default_rng(seed)
    gt, pred = cameras(random), cameras(random)
    vggt, pi3, legacy = (pair_errors(pred, gt, variant) for variant in VARIANTS)
    for found in (vggt, pi3, legacy):
        assert ((found.rotation >= 0) & (found.rotation <= 180)).all()
        assert ((found.translation >= 0) & (found.translation <= 90)).all()
        np.testing.assert_array_equal(found.worst, np.maximum(found.rotation, found.translation))
    np.testing.assert_allclose(pi3.rotation, vggt.rotation, atol=1e-5)


def test_reversed_and_short_matrices() -> None:
    """The sign of a translation does not count; (N, 3, 4) matrices and lists are taken too."""
    gt = np.tile(np.eye(4), (2, 1, 1))
    gt[1, :3, 3] = [1, 2, 3]
    pred = gt.copy()
    pred[1, :3, 3] *= -2
    assert pair_errors(pred, gt).worst[0] < 1e-5
    assert pair_errors(pred[:, :3].tolist(), gt[:, :3]).worst[0] < 1e-5


@pytest.mark.parametrize("which", ["pred", "gt", "both"])
def test_pairs_without_a_baseline_are_counted_and_kept(which: str) -> None:
    random = np.random.default_rng(3)
    gt = cameras(random, 3)
    pred = gt.copy()
    for poses, name in ((pred, "pred"), (gt, "gt")):
        if which in (name, "both"):
            poses[1, :3, 3] = poses[1, :3, :3] @ poses[0, :3, :3].T @ poses[0, :3, 3]  # the centre of camera 0
    found = pair_errors(pred, gt)
    assert found.no_baseline.tolist() == [True, False, False] and len(found) == 3
    pred[:2, :3, 3] = gt[:2, :3, 3] = 0
    found = pair_errors(pred, gt)
    assert found.translation[0] == 90 and found.no_baseline[0]
    assert summarise([("a", found)]).no_baseline == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308])
@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_that_are_not_finite_are_misses(value: float, variant: str) -> None:
    random = np.random.default_rng(4)
    gt = cameras(random, 3)
    for place in ((2, 0, 3), (2, 1, 1)):
        pred = gt.copy()
        pred[place] = value
        found = pair_errors(pred, gt, variant)
        assert len(found) == 3 and found.worst[0] < 1e-5
        assert not (found.worst[1:] <= 90).any() or value == 1e308
        assert scores(found)["auc_30"] <= 1 / 3 + 1e-12
        if np.isnan(value):
            assert summarise([("a", found)]).lost == 2
    pred = np.full_like(gt, np.nan)
    found = pair_errors(pred, gt, variant)
    assert np.isnan(found.rotation).all() and (found.translation == LOST).all()
    assert set(scores(found).values()) == {0.0}


@given(errors, st.integers(1, 60))
def test_auc_is_the_closed_form(values: list[float], threshold: int) -> None:
    def part(error: float) -> float:
        if error == threshold:
            return 1 / threshold
        return (threshold - np.floor(error)) / threshold if error < threshold else 0.0

    found = auc(values, threshold)
    assert 0 <= found <= 1
    assert found == pytest.approx(np.mean([part(value) for value in values]), abs=1e-12)
    exact = np.mean([max(0.0, threshold - value) / threshold if value == value else 0.0 for value in values])
    assert found >= exact - 1e-12


@given(errors, st.floats(0, 180), st.floats(0, 180))
def test_shares_grow_with_the_threshold(values: list[float], first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert 0 <= share_below(values, low) <= share_below(values, high) <= 1
    assert share_below(values, 181) == pytest.approx(1 - np.isnan(values).mean())


def test_the_borders() -> None:
    """Strictly below for RRA and RTA; the last bin of AUC is closed, and NaN stays in the denominator."""
    assert share_below([5.0], 5) == 0 and share_below([4.999], 5) == 1 and share_below([np.nan, 1], 5) == 0.5
    assert auc([0.0], 5) == 1 and auc([5.0], 5) == pytest.approx(0.2) and auc([5.001], 5) == 0
    assert auc([0.0, np.nan, 1e6], 30) == pytest.approx(1 / 3)


def flat(rotation: list[float], translation: list[float]) -> PairErrors:
    return PairErrors(np.array(rotation), np.array(translation), np.zeros(len(rotation), bool))


def test_averages() -> None:
    """Categories weigh the same in their mean, pairs in the pooled number."""
    sequences = [
        ("tv", flat([0.5, 2.5], [0.5, 0.5])),
        ("cup", flat([40.0, 50.0], [0.1, 0.1])),
        ("tv", flat([0.0, 0.0, 60.0, 70.0], [0.0, 0.0, 0.0, 0.0])),
    ]
    found = summarise(sequences, (3, 5))
    assert list(found.per_category) == ["tv", "cup"] and found.pairs == 8
    assert [row["auc_3"] for row in found.per_sequence] == pytest.approx([(1 + 1 / 3) / 2, 0, 0.5])
    tv = (3 + 1 / 3) / 6
    assert found.per_category["tv"]["auc_3"] == pytest.approx(tv)
    assert found.mean_over_categories["auc_3"] == pytest.approx(tv / 2)
    assert found.mean_over_sequences["auc_3"] == pytest.approx(((1 + 1 / 3) / 2 + 0.5) / 3)
    assert found.pooled["auc_3"] == pytest.approx((3 + 1 / 3) / 8)
    assert found.pooled["rra_3"] == 0.5 and found.pooled["rta_3"] == 1.0
    assert sorted(found.pooled) == ["auc_3", "auc_5", "rra_3", "rra_5", "rta_3", "rta_5"]
    assert len(by_category(sequences)["tv"]) == 6 and len(join(e for _, e in sequences)) == 8


@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.just(3)), elements=st.floats(0, 180)))
def test_with_equal_numbers_of_pairs_pooled_is_the_mean_over_sequences(values: np.ndarray) -> None:
    found = summarise([(str(k), flat(list(row), list(row))) for k, row in enumerate(values)])
    for name, value in found.pooled.items():
        assert value == pytest.approx(found.mean_over_sequences[name], abs=1e-12)


def test_bad_input() -> None:
    gt = cameras(np.random.default_rng(0), 3)
    hole = gt.copy()
    hole[1, 0, 3] = np.nan
    for call, words in (
        (
            lambda: pair_errors(gt, gt, "pi4"),
            r"variant of the relative pose 'pi4'; allowed: vggt, pi3, legacy \(did you",
        ),
        (lambda: pair_errors(gt[:2], gt), "2 predicted cameras do not fit 3 true ones"),
        (lambda: pair_errors(gt[0], gt), r"the predicted cameras must have shape .*, got \(4, 4\)"),
        (lambda: pair_errors(gt[:1], gt[:1]), "at least 2 cameras, got 1 predicted ones"),
        (lambda: pair_errors(gt, hole), "the true cameras hold NaN or infinity"),
        (lambda: auc([], 5), "at least one pair"),
        (lambda: auc([[1.0]], 5), r"one list of at least one pair, got the shape \(1, 1\)"),
        (lambda: auc([1.0], 2.5), r"whole number of degrees above 0, not 2\.5"),  # type: ignore[arg-type]
        (lambda: auc([1.0], 0), "above 0, not 0"),
        (lambda: share_below([], 5), "at least one pair"),
        (lambda: summarise([]), "no sequence"),
    ):
        with pytest.raises(PqkError, match=words):
            call()
