"""Geometry metrics: closed forms, invariances, and refusal of input that has no score."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from pqk.errors import PqkError
from pqk.families.metrics.geometry import (
    abs_rel,
    align_scale,
    chamfer,
    delta,
    reprojection_error,
    rmse,
    sparsification_error,
    umeyama,
)

depths = arrays(np.float64, st.integers(1, 40), elements=st.floats(0.05, 100.0))
seeds = st.integers(0, 2**32 - 1)
scales = st.floats(1e-3, 1e3)
DEPTH_METRICS = [abs_rel, rmse, delta]


@st.composite
def depth_pairs(draw):
    gt = draw(depths)
    pred = draw(arrays(np.float64, gt.shape, elements=st.floats(0.05, 100.0)))
    return pred, gt


# Depth


def test_depth_closed_forms():
    pred, gt = np.array([1.0, 3.0, 5.0, 2.0]), np.array([2.0, 2.0, 4.0, 2.0])
    assert abs_rel(pred, gt) == pytest.approx((0.5 + 0.5 + 0.25 + 0.0) / 4)
    assert rmse(pred, gt) == pytest.approx(math.sqrt(3 / 4))
    assert delta(pred, gt) == 0.25  # 5/4 is not below 1.25
    assert delta(pred, gt, threshold=1.26) == 0.5
    assert delta(pred, gt, threshold=1.6) == 0.75
    assert align_scale(pred, gt, None, "median") == pytest.approx(2.0 / 2.5)
    assert align_scale(pred, gt, None, "lstsq") == pytest.approx((2 + 6 + 20 + 4) / (1 + 9 + 25 + 4))
    assert align_scale(pred, gt, None, "none") == 1.0


@settings(deadline=None)
@given(depth_pairs(), scales, st.sampled_from(["median", "lstsq"]))
def test_depth_scores_after_alignment_ignore_the_scale_of_the_prediction(pair, scale, method):
    pred, gt = pair
    aligned = align_scale(pred, gt, None, method) * pred
    rescaled = align_scale(scale * pred, gt, None, method) * scale * pred
    assert abs_rel(rescaled, gt) == pytest.approx(abs_rel(aligned, gt), rel=1e-9, abs=1e-12)
    assert rmse(rescaled, gt) == pytest.approx(rmse(aligned, gt), rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(depth_pairs(), st.floats(1.001, 5.0), st.floats(1.001, 5.0))
def test_depth_ranges_and_monotone_delta(pair, a, b):
    pred, gt = pair
    assert abs_rel(pred, gt) >= 0 and rmse(pred, gt) >= 0
    low, high = delta(pred, gt, threshold=min(a, b)), delta(pred, gt, threshold=max(a, b))
    assert 0 <= low <= high <= 1
    assert delta(pred, gt, threshold=a) == delta(gt, pred, threshold=a)
    assert abs_rel(gt, gt) == 0 and rmse(gt, gt) == 0 and delta(gt, gt) == 1


@settings(deadline=None)
@given(depth_pairs())
def test_lstsq_is_the_best_scale(pair):
    pred, gt = pair
    best = align_scale(pred, gt, None, "lstsq")
    for other in (best * 0.99, best * 1.01, align_scale(pred, gt, None, "median")):
        assert rmse(best * pred, gt) <= rmse(other * pred, gt) * (1 + 1e-9) + 1e-12


@settings(deadline=None)
@given(depth_pairs(), seeds)
def test_only_masked_pixels_with_true_depth_count(pair, seed):
    pred, gt = pair
    rng = np.random.default_rng(seed)
    size = len(gt) + 4
    place = np.sort(rng.choice(size, len(gt), replace=False))
    wide_pred, wide_gt, mask = np.full(size, np.nan), np.full(size, 7.0), np.zeros(size, bool)
    wide_pred[place], wide_gt[place], mask[place] = pred, gt, True
    outside = np.flatnonzero(~mask)
    wide_gt[outside[:3]] = [0.0, np.nan, -1.0]  # true depth unknown: ignored even when the mask says yes
    mask[outside[:3]] = True
    for metric in DEPTH_METRICS:
        assert metric(wide_pred, wide_gt, mask) == metric(pred, gt)
    assert align_scale(wide_pred, wide_gt, mask, "median") == align_scale(pred, gt, None, "median")


def test_nan_at_a_valid_pixel_is_refused():
    gt = np.ones((2, 3))
    for bad in (np.nan, np.inf, -np.inf):
        pred = np.ones((2, 3))
        pred[1, 2] = bad
        for metric in [*DEPTH_METRICS, lambda p, g: align_scale(p, g, None, "median")]:
            with pytest.raises(PqkError, match="NaN refused"):
                metric(pred, gt)


def test_depth_without_valid_pixels_or_of_other_shape_is_refused():
    gt = np.ones((2, 3))
    for metric in DEPTH_METRICS:
        with pytest.raises(PqkError, match="no valid pixel"):
            metric(gt, gt, np.zeros((2, 3)))
        with pytest.raises(PqkError, match="no valid pixel"):
            metric(gt, np.zeros((2, 3)))
        with pytest.raises(PqkError, match="one shape"):
            metric(np.ones((3, 2)), gt)
        with pytest.raises(PqkError, match="mask"):
            metric(gt, gt, np.ones(6))


def test_predicted_depth_behind_the_camera_is_a_miss():
    assert delta(np.array([1.0, 0.0, -1.0, 1.0]), np.ones(4)) == 0.5


@pytest.mark.parametrize("pred", [np.zeros(4), -np.ones(4)])
@pytest.mark.parametrize("method", ["median", "lstsq"])
def test_degenerate_scale_is_refused(pred, method):
    with pytest.raises(PqkError, match="scale alignment"):
        align_scale(pred, np.ones(4), None, method)


def test_wrong_options_name_the_nearest():
    with pytest.raises(PqkError, match="did you mean 'median'"):
        align_scale(np.ones(4), np.ones(4), None, "medain")
    with pytest.raises(PqkError, match="above 1"):
        delta(np.ones(4), np.ones(4), threshold=1.0)


# Confidence

errors_and_ranks = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        arrays(np.float64, n, elements=st.floats(0, 10)), arrays(np.float32, n, elements=st.floats(1, 9, width=32))
    )
)


def area(errors, order):
    """Mean over k of the mean error of the k pixels that come first."""
    return np.mean([errors[order[: k + 1]].mean() for k in range(len(errors))])


@settings(deadline=None)
@given(errors_and_ranks, seeds)
def test_sparsification_error_is_the_area_between_the_curves(pair, seed):
    errors, confidence = pair
    rng = np.random.default_rng(seed)
    distinct = rng.permutation(len(errors)).astype(np.float32)
    oracle = area(errors, np.argsort(errors))
    mean = errors.mean()
    expected = (area(errors, np.argsort(-distinct)) - oracle) / mean if mean else 0.0
    assert sparsification_error(errors, distinct) == pytest.approx(expected, abs=1e-9)
    found = sparsification_error(errors, confidence)
    assert 0 <= found == sparsification_error(errors, 2 * confidence)  # only the order matters
    shuffled = rng.permutation(len(errors))
    assert sparsification_error(errors[shuffled], confidence[shuffled]) == pytest.approx(found, abs=1e-9)
    assert sparsification_error(3 * errors, confidence) == pytest.approx(found, abs=1e-9)
    assert sparsification_error(errors, -errors) == pytest.approx(0, abs=1e-9)
    assert found <= sparsification_error(errors, errors) + 1e-9  # the worst order of all


def test_sparsification_error_in_closed_form():
    errors = np.array([0.0, 1.0, 2.0])
    # Mean of the one, two and three surest: 0, 1, 1 against the oracle's 0, 0.5, 1; the mean error is 1.
    assert sparsification_error(errors, np.array([3.0, 1.0, 2.0])) == pytest.approx((0 + 1 + 1) / 3 - (0 + 0.5 + 1) / 3)
    assert sparsification_error(np.zeros(3), errors) == 0


def test_constant_confidence_scores_like_a_random_ranking():
    rng = np.random.default_rng(0)
    errors = rng.exponential(size=400)
    random = [sparsification_error(errors, rng.random(400)) for _ in range(300)]
    constant = sparsification_error(errors, np.full(400, 2.0))
    assert constant == pytest.approx(np.mean(random), abs=3 * np.std(random) / math.sqrt(300))
    halves = sparsification_error(errors, errors < np.median(errors))  # ties within each half
    assert 0 < halves < 0.5 * constant
    assert sparsification_error(errors, np.where(errors < 1, np.inf, 1.0)) < constant  # an overflow still ranks


def test_sparsification_error_refuses_bad_input():
    with pytest.raises(PqkError, match="NaN refused: the confidence holds 1 NaN of 2"):
        sparsification_error(np.ones(2), np.array([1.0, np.nan]))
    with pytest.raises(PqkError, match="NaN refused: the errors"):
        sparsification_error(np.array([1.0, np.inf]), np.ones(2))
    with pytest.raises(PqkError, match="no valid pixel"):
        sparsification_error(np.ones(0), np.ones(0))
    with pytest.raises(PqkError, match="one shape"):
        sparsification_error(np.ones(2), np.ones(3))


# Similarity


def random_similarity(rng):
    return math.exp(rng.uniform(-2, 2)), Rotation.random(random_state=rng).as_matrix(), rng.normal(size=3) * 5


@settings(deadline=None)
@given(seeds, st.integers(3, 50), st.booleans())
def test_umeyama_recovers_a_random_similarity(seed, count, weighted):
    rng = np.random.default_rng(seed)
    scale, rotation, translation = random_similarity(rng)
    source = rng.normal(size=(count, 3))
    target = scale * source @ rotation.T + translation
    found = umeyama(source, target, rng.uniform(0.1, 2, count) if weighted else None)
    np.testing.assert_allclose(found.apply(source), target, atol=1e-6)
    assert np.linalg.det(found.rotation) == pytest.approx(1.0)
    if count >= 4:  # three points may be close to one line
        assert found.scale == pytest.approx(scale, rel=1e-6)
        np.testing.assert_allclose(found.rotation, rotation, atol=1e-6)
        np.testing.assert_allclose(found.translation, translation, atol=1e-6)


@settings(deadline=None)
@given(seeds)
def test_umeyama_minimises_the_squared_error_and_never_mirrors(seed):
    rng = np.random.default_rng(seed)
    source = rng.normal(size=(20, 3))
    target = source * [1, 1, -1] + 0.05 * rng.normal(size=(20, 3))  # a mirror image: no rotation fits it
    found = umeyama(source, target)
    assert np.linalg.det(found.rotation) == pytest.approx(1.0)
    best = np.sum((found.apply(source) - target) ** 2)
    for _ in range(20):
        turn = Rotation.from_rotvec(0.02 * rng.normal(size=3)).as_matrix()
        moved = found.scale * math.exp(0.02 * rng.normal()) * source @ (turn @ found.rotation).T
        moved += found.translation + 0.02 * rng.normal(size=3)
        assert np.sum((moved - target) ** 2) >= best


def test_umeyama_weights_choose_points():
    rng = np.random.default_rng(3)
    scale, rotation, translation = random_similarity(rng)
    source = rng.normal(size=(12, 3))
    target = scale * source @ rotation.T + translation
    target[7:] += 10.0
    weights = np.r_[np.ones(7), np.zeros(5)]
    found = umeyama(source, target, weights)
    np.testing.assert_allclose(found.rotation, rotation, atol=1e-9)
    assert found.scale == pytest.approx(scale)


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([0.0, 1.0, 1e3]), st.sampled_from([np.float32, np.float64]))
def test_umeyama_refuses_undetermined_alignments(seed, distance, dtype):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(30, 3)) + distance
    equal = np.full((30, 3), rng.normal(size=3) + distance, dtype=dtype)
    for source in (equal, target):
        other = target if source is equal else equal
        with pytest.raises(PqkError, match="not determined"):
            umeyama(source, other)
    with pytest.raises(PqkError, match="not determined"):
        umeyama((rng.normal(size=(30, 1)) * rng.normal(size=3)).astype(dtype), target)


@pytest.mark.parametrize("far", [1e5, 1e10, -1e15, 3e38])
@pytest.mark.parametrize("weighted", [False, True])
def test_umeyama_is_not_decided_by_a_few_points_far_away(caplog, far, weighted):
    """They are left out of the fit, in either cloud, and counted in a note; the rest is aligned as without them."""
    rng = np.random.default_rng(5)
    scale, rotation, translation = random_similarity(rng)
    source = rng.normal(size=(500, 3))
    target = scale * source @ rotation.T + translation
    source[3], target[40, 2], source[41, 1] = far, far, far
    found = umeyama(source, target, np.ones(500) if weighted else None)
    assert found.scale == pytest.approx(scale)
    np.testing.assert_allclose(found.rotation, rotation, atol=1e-9)
    assert "3 of 500 points lie more than 10000 times farther out" in caplog.text
    caplog.clear()
    umeyama(np.r_[np.zeros((6, 3)), np.eye(3)], np.r_[np.zeros((6, 3)), np.eye(3)])  # most points are one: none is far
    assert not caplog.text


def test_umeyama_refuses_bad_input():
    points = np.eye(3)
    with pytest.raises(PqkError, match="at least 3 points, got 2"):
        umeyama(points[:2], points[:2])
    with pytest.raises(PqkError, match="at least 3 points, got 2"):
        umeyama(points, points, np.array([1.0, 1.0, 0.0]))
    with pytest.raises(PqkError, match="corresponding"):
        umeyama(points, np.ones((4, 3)))
    with pytest.raises(PqkError, match="weights"):
        umeyama(points, points, np.array([1.0, 1.0, -1.0]))
    with pytest.raises(PqkError, match="NaN refused"):
        umeyama(points * np.nan, points)


# Chamfer


def test_chamfer_closed_form():
    found = chamfer(np.array([[0.0, 0, 0], [3.0, 0, 0]]), np.array([[0.0, 4, 0]]))
    assert found.accuracy == pytest.approx((4 + 5) / 2)
    assert found.completeness == pytest.approx(4)
    assert found.mean == pytest.approx((4.5 + 4) / 2)


@settings(deadline=None)
@given(seeds, st.integers(1, 30), st.integers(1, 30))
def test_chamfer_properties(seed, count_p, count_g):
    rng = np.random.default_rng(seed)
    p, g, shift = rng.normal(size=(count_p, 3)), rng.normal(size=(count_g, 3)), 10 * rng.normal(size=3)
    found, swapped, moved = chamfer(p, g), chamfer(g, p), chamfer(p + shift, g + shift)
    assert found.mean == pytest.approx(swapped.mean)
    assert found.accuracy == pytest.approx(swapped.completeness)
    assert found.mean == pytest.approx(moved.mean)
    assert found.mean > 0
    assert chamfer(p, rng.permutation(p)).mean == 0
    distances = np.linalg.norm(p[:, None] - g, axis=2)
    assert found.accuracy == pytest.approx(distances.min(axis=1).mean())
    assert found.completeness == pytest.approx(distances.min(axis=0).mean())


def test_chamfer_refuses_bad_clouds():
    with pytest.raises(PqkError, match="no valid point"):
        chamfer(np.zeros((0, 3)), np.zeros((1, 3)))
    with pytest.raises(PqkError, match="NaN refused"):
        chamfer(np.zeros((1, 3)), np.full((1, 3), np.inf))
    with pytest.raises(PqkError, match=r"\(N, 3\)"):
        chamfer(np.zeros((4, 4, 3)), np.zeros((1, 3)))


# Reprojection

K = np.array([[80.0, 0.5, 8.3], [0.0, 90.0, 5.1], [0.0, 0.0, 1.0]])
HEIGHT, WIDTH = 10, 16


def point_map(depth, du=0.0, dv=0.0):
    """Points at the given depth whose projections lie (du, dv) away from their pixel centres."""
    v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    pixels = np.stack([u + du, v + dv, np.ones_like(u)], axis=-1)
    return depth[..., None] * (pixels @ np.linalg.inv(K).T)


@settings(deadline=None)
@given(arrays(np.float64, (HEIGHT, WIDTH), elements=st.floats(0.1, 50)), st.floats(-5, 5), st.floats(-5, 5), scales)
def test_reprojection_is_zero_for_exact_points_and_measures_pixels(depth, du, dv, scale):
    assert reprojection_error(point_map(depth), K) == pytest.approx(0, abs=1e-9)
    assert reprojection_error(scale * point_map(depth, du, dv), K) == pytest.approx(math.hypot(du, dv), abs=1e-6)


def test_reprojection_counts_points_behind_the_camera_and_clips():
    depth, diagonal = np.full((HEIGHT, WIDTH), 2.0), math.hypot(HEIGHT, WIDTH)
    for bad in ([0.0, 0.0, -1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1e-7], [1e6, 0.0, 1.0]):
        points = point_map(depth)
        points[3, 4] = bad
        assert reprojection_error(points, K) == pytest.approx(diagonal / depth.size)
        mask = np.ones((HEIGHT, WIDTH))
        mask[3, 4] = 0
        assert reprojection_error(points, K, mask) == pytest.approx(0, abs=1e-9)


def test_reprojection_refuses_bad_input():
    points = point_map(np.ones((HEIGHT, WIDTH)))
    with pytest.raises(PqkError, match="no valid pixel"):
        reprojection_error(points, K, np.zeros((HEIGHT, WIDTH)))
    with pytest.raises(PqkError, match="mask"):
        reprojection_error(points, K, np.ones((WIDTH, HEIGHT)))
    with pytest.raises(PqkError, match="intrinsics"):
        reprojection_error(points, K[:2])
    with pytest.raises(PqkError, match="point map"):
        reprojection_error(points[0], K)
    points[0, 0, 0] = np.nan
    with pytest.raises(PqkError, match="NaN refused"):
        reprojection_error(points, K)
    mask = np.ones((HEIGHT, WIDTH), bool)
    mask[0, 0] = False
    assert reprojection_error(points, K, mask) == pytest.approx(0, abs=1e-9)
