"""Pair scores: what a perfect, a scaled, a disturbed and a broken prediction get."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from pqk.errors import PqkError
from pqk.families.contract import Sample, SampleSet
from pqk.families.dust3r.configs import NAMED, lowest_confidence
from pqk.families.dust3r.scoring import (
    PairTruth,
    constant_depth_scores,
    pair_depth,
    pair_truth,
    quality_drop_pct,
    score_against_reference,
    score_pair,
    summarise,
)
from pqk.measure.scoring import Scorer

CHAMFER = {"chamfer", "chamfer_accuracy", "chamfer_completeness", "chamfer_paired"}
KEYS = CHAMFER | {"absrel", "rmse", "delta1", "ause", "reproj_px"}
ZERO_AT_BEST = KEYS - {"delta1", "ause"}


@dataclass(frozen=True)
class Frame:
    K: np.ndarray
    world_to_cam: np.ndarray
    depth: np.ndarray | None


def make_frame(rng, height, width):
    """A slanted, bumpy wall seen from somewhere, with a few pixels of unknown depth."""
    v, u = np.mgrid[:height, :width] / max(height, width)
    depth = (2 + u + 0.5 * np.sin(9 * v) + 0.1 * rng.random((height, width))).astype(np.float32)
    depth[rng.random((height, width)) < 0.1] = 0
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec(0.2 * rng.normal(size=3)).as_matrix()
    pose[:3, 3] = 0.3 * rng.normal(size=3)
    K = np.array([[1.1 * width, 0, 0.52 * width], [0, 1.2 * width, 0.47 * height], [0, 0, 1]])
    return Frame(K, pose, depth)


def make_pair(seed=0, size1=(20, 28), size2=(24, 18)) -> tuple[PairTruth, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    truth = pair_truth(make_frame(rng, *size1), make_frame(rng, *size2))
    return truth, {
        "pts3d_1": truth.gt1.copy(),
        "pts3d_2": truth.gt2.copy(),
        "conf_1": np.full(size1, 2.0, np.float32),
        "conf_2": np.full(size2, 2.0, np.float32),
    }


def scaled(pred, factor):
    return {key: (value * factor if key.startswith("pts") else value) for key, value in pred.items()}


def disturbed(pred, amount, seed=1):
    rng = np.random.default_rng(seed)
    noisy = {k: v + amount * rng.normal(size=v.shape) for k, v in pred.items() if k.startswith("pts")}
    return pred | {k: v.astype(np.float32) for k, v in noisy.items()}


def test_pair_truth_closed_form():
    """Two parallel cameras 1 m apart in x: view 2's points, seen from camera 1, lie 1 m to the right."""
    K = np.array([[10.0, 0, 2.0], [0, 20.0, 1.5], [0, 0, 1]])
    depth = np.full((3, 4), 2.0, np.float32)
    depth[1, 1] = 0
    world_to_cam1, world_to_cam2 = np.eye(4), np.eye(4)
    world_to_cam1[0, 3], world_to_cam2[0, 3] = 5.0, 4.0
    truth = pair_truth(Frame(K, world_to_cam1, depth), Frame(K, world_to_cam2, depth))
    np.testing.assert_allclose(truth.gt1[2, 3], [(3.5 - 2) / 10 * 2, (2.5 - 1.5) / 20 * 2, 2], rtol=1e-6)
    np.testing.assert_allclose(truth.gt2[2, 3], truth.gt1[2, 3] + [1, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(truth.valid1, depth > 0)
    assert (truth.gt1[1, 1] == 0).all() and (truth.gt2[1, 1] == 0).all()
    assert truth.gt1.dtype == truth.gt2.dtype == np.float32
    assert truth.cam1_to_cam2[0, 3] == pytest.approx(-1)


def test_pair_truth_refuses_frames_without_truth():
    good = make_frame(np.random.default_rng(0), 4, 5)
    with pytest.raises(PqkError, match="depth"):
        pair_truth(good, dataclasses.replace(good, depth=None))
    with pytest.raises(PqkError, match="K must be"):
        pair_truth(dataclasses.replace(good, K=np.zeros((3, 3))), good)
    with pytest.raises(PqkError, match="world_to_cam"):
        pair_truth(good, dataclasses.replace(good, world_to_cam=np.eye(3)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-2, 1e2), st.sampled_from(["median", "lstsq"]))
def test_the_truth_at_any_scale_is_perfect(seed, factor, align):
    truth, pred = make_pair(seed)
    scores = score_pair(scaled(pred, np.float32(factor)), truth, align)
    assert scores.keys() == KEYS
    for key in ZERO_AT_BEST:
        assert scores[key] == pytest.approx(0, abs=1e-4), key
    assert scores["delta1"] == 1


def test_without_alignment_the_scale_counts():
    truth, pred = make_pair()
    assert score_pair(pred, truth, "none")["absrel"] == 0
    alone = score_pair(scaled(pred, 1.5), dataclasses.replace(truth, valid2=truth.valid2 & False), "none")
    assert alone["absrel"] == pytest.approx(0.5, rel=1e-5)
    assert alone["delta1"] == 0
    scores = score_pair(scaled(pred, 1.5), truth, "none")
    assert scores["absrel"] > 0.3
    assert scores["chamfer"] > 0.3
    assert scores["reproj_px"] > 0.5


def test_scores_get_worse_with_noise():
    truth, pred = make_pair()
    ladder = [score_pair(disturbed(pred, amount), truth) for amount in (0.0, 0.02, 0.1, 0.5)]
    for key in ZERO_AT_BEST:
        values = [scores[key] for scores in ladder]
        assert values == sorted(values) and values[0] < values[1], key
    assert ladder[0]["delta1"] == 1 > ladder[-1]["delta1"]


def test_scores_in_closed_form():
    """Half of view 1's depths are doubled along their rays: known depth error, and no reprojection error of view 1."""
    truth, pred = make_pair()
    truth = dataclasses.replace(truth, valid2=np.zeros_like(truth.valid2))
    rows, columns = np.nonzero(truth.valid1)
    third = slice(None, None, 3)
    pred["pts3d_1"][rows[third], columns[third]] *= 2
    scores = score_pair(pred, truth, "none")
    doubled = len(rows[third]) / len(rows)
    z = truth.gt1[rows[third], columns[third], 2].astype(float)
    assert scores["absrel"] == pytest.approx(doubled, rel=1e-6)
    assert scores["delta1"] == pytest.approx(1 - doubled)
    assert scores["rmse"] == pytest.approx(math.sqrt((z**2).sum() / len(rows)), rel=1e-6)
    assert scores["reproj_px"] == pytest.approx(0, abs=1e-4)


def test_view_two_counts_in_its_own_camera():
    truth, pred = make_pair(size1=(20, 20), size2=(20, 20))
    perfect = score_pair(pred, truth)
    pred["pts3d_2"] = pred["pts3d_2"] + np.float32([0.2, 0.1, 0])  # across camera 1's axis: its scale stays 1
    scores = score_pair(pred, truth)
    camera2 = pred["pts3d_2"][truth.valid2] @ truth.cam1_to_cam2[:3, :3].T + truth.cam1_to_cam2[:3, 3]
    true2 = truth.gt2[truth.valid2] @ truth.cam1_to_cam2[:3, :3].T + truth.cam1_to_cam2[:3, 3]
    share = truth.valid2.sum() / (truth.valid1.sum() + truth.valid2.sum())
    assert perfect["absrel"] == pytest.approx(0, abs=1e-6)
    assert scores["absrel"] == pytest.approx(np.mean(np.abs(camera2 - true2)[:, 2] / true2[:, 2]) * share, rel=1e-4)
    assert scores["rmse"] == pytest.approx(np.sqrt(np.mean((camera2 - true2)[:, 2] ** 2) * share), rel=1e-4)
    assert scores["absrel"] > 0.001 and scores["chamfer"] > 0.001
    projected = camera2 @ truth.K2.T
    rows, columns = np.nonzero(truth.valid2)
    error = np.linalg.norm(projected[:, :2] / projected[:, 2:] - np.stack([columns, rows], axis=1) - 0.5, axis=1)
    assert scores["reproj_px"] == pytest.approx(error.mean() * share, rel=1e-4)


def test_one_scale_from_both_views():
    """Of two views that disagree on the scale neither is right alone: the median depth of all their pixels decides."""
    truth, pred = make_pair()
    pred["pts3d_2"] *= np.float32(1.3)
    points, gts, valids = (pred["pts3d_1"], pred["pts3d_2"]), (truth.gt1, truth.gt2), (truth.valid1, truth.valid2)
    z = [np.concatenate([p[v][:, 2] for p, v in zip(both, valids, strict=True)]) for both in (points, gts)]
    scale = np.median(z[1].astype(float)) / np.median(z[0].astype(float))
    found = pair_depth(points, gts, valids, truth.cam1_to_cam2)
    assert 1 / 1.3 < scale < 1 and found.scale == pytest.approx(scale, rel=1e-12)
    first = len(truth.gt1[truth.valid1])
    np.testing.assert_allclose(found.depth[:first] / found.truth[:first], scale, rtol=1e-5)
    alone = pair_depth(points, gts, (valids[0], valids[1] & False), truth.cam1_to_cam2)
    assert alone.scale == pytest.approx(1) and len(alone.depth) == first


def test_confidence_is_scored_by_how_it_ranks_the_errors():
    """The errors are distances of points, which is what a confidence is trained to predict."""
    truth, pred = make_pair()
    pred = disturbed(pred, 0.2)
    valids = (truth.valid1, truth.valid2)
    scale = pair_depth((pred["pts3d_1"], pred["pts3d_2"]), (truth.gt1, truth.gt2), valids, truth.cam1_to_cam2).scale
    both = (("pts3d_1", truth.gt1, valids[0]), ("pts3d_2", truth.gt2, valids[1]))
    errors = np.concatenate([np.linalg.norm(scale * pred[key][v] - gt[v], axis=1) for key, gt, v in both])

    def with_confidence(values):
        maps = [np.full(v.shape, np.nan, np.float32) for v in valids]
        first = int(valids[0].sum())
        maps[0][valids[0]], maps[1][valids[1]] = values[:first], values[first:]
        return score_pair(pred | {"conf_1": maps[0], "conf_2": maps[1]}, truth)

    perfect, constant = with_confidence(1 / errors), score_pair(pred, truth)
    assert perfect["ause"] == pytest.approx(0, abs=1e-6)
    assert constant["ause"] > 0.2
    assert with_confidence(errors)["ause"] > 1.5 * constant["ause"]
    assert {k: v for k, v in perfect.items() if k != "ause"} == {k: v for k, v in constant.items() if k != "ause"}
    with pytest.raises(PqkError, match="NaN refused: the confidence"):
        score_pair(pred | {"conf_2": np.full_like(pred["conf_2"], np.nan)}, truth)
    with pytest.raises(PqkError, match="no conf_1"):
        score_pair({k: v for k, v in pred.items() if k != "conf_1"}, truth)
    with pytest.raises(PqkError, match="conf_2 has shape"):
        score_pair(pred | {"conf_2": pred["conf_1"]}, truth)


def test_invalid_pixels_do_not_matter():
    truth, pred = make_pair()
    noisy = disturbed(pred, 0.05)
    expected = score_pair(noisy, truth)
    noisy["pts3d_1"][~truth.valid1] = np.nan
    noisy["pts3d_2"][~truth.valid2] = np.inf
    assert score_pair(noisy, truth) == expected


def test_the_chamfer_sample_is_seeded():
    truth, pred = make_pair()
    noisy = disturbed(pred, 0.05)
    first = score_pair(noisy, truth, chamfer_points=50, seed=3)
    assert score_pair(noisy, truth, chamfer_points=50, seed=3) == first
    other = score_pair(noisy, truth, chamfer_points=50, seed=4)
    assert other["chamfer"] != first["chamfer"] and other["absrel"] == first["absrel"]


def test_chamfer_samples_the_two_clouds_apart():
    """A perfect prediction is not compared with its own pixels: what is left is half the distance between samples."""
    truth, pred = make_pair()
    perfect = score_pair(pred, truth, chamfer_points=50)
    assert perfect["chamfer_paired"] == pytest.approx(0, abs=1e-6)
    floors = [score_pair(pred, truth, chamfer_points=n)["chamfer"] for n in (25, 100, 400)]
    assert floors == sorted(floors, reverse=True) and floors[2] > 0.01
    assert perfect["chamfer"] == pytest.approx((perfect["chamfer_accuracy"] + perfect["chamfer_completeness"]) / 2)
    assert score_pair(pred, truth, chamfer_points=10_000)["chamfer"] == pytest.approx(0, abs=1e-6)  # all points
    assert score_pair(scaled(disturbed(pred, 0.5), 3), truth, chamfer_points=50)["chamfer"] > perfect["chamfer"]


def test_one_point_far_away_costs_its_own_error_and_no_more():
    truth, pred = make_pair()
    pixel = tuple(np.argwhere(truth.valid2)[0])
    pred = {**pred, "pts3d_2": pred["pts3d_2"].copy()}
    pred["pts3d_2"][pixel] = 1e10
    found = score_pair(pred, truth)
    row, offset = truth.cam1_to_cam2[2, :3], truth.cam1_to_cam2[2, 3]
    depth, true = pred["pts3d_2"][pixel] @ row + offset, truth.gt2[pixel] @ row + offset
    assert found["absrel"] == pytest.approx(
        abs(depth - true) / true / (truth.valid1.sum() + truth.valid2.sum()), rel=1e-3
    )
    assert found["delta1"] == pytest.approx(1, abs=0.005)
    assert found["chamfer_completeness"] < 0.1  # the others are aligned as without it
    assert found["chamfer_accuracy"] > 1e5  # and it counts as it is


def test_broken_predictions_are_refused():
    truth, pred = make_pair()
    rows, columns = np.nonzero(truth.valid2)
    broken = disturbed(pred, 0)
    broken["pts3d_2"][rows[0], columns[0], 1] = np.nan
    with pytest.raises(PqkError, match="NaN refused"):
        score_pair(broken, truth)
    with pytest.raises(PqkError, match="not determined"):
        score_pair(pred | {k: np.ones_like(pred[k]) for k in ("pts3d_1", "pts3d_2")}, truth)
    with pytest.raises(PqkError, match="scale alignment"):
        score_pair(scaled(pred, -1), truth)
    with pytest.raises(PqkError, match="no pts3d_2"):
        score_pair({"pts3d_1": pred["pts3d_1"]}, truth)
    with pytest.raises(PqkError, match="expected"):
        score_pair(pred | {"pts3d_2": pred["pts3d_1"]}, truth)
    with pytest.raises(PqkError, match="no valid pixel"):
        score_pair(pred, dataclasses.replace(truth, valid1=np.zeros_like(truth.valid1)))
    with pytest.raises(PqkError, match="did you mean 'median'"):
        score_pair(pred, truth, align="medians")
    with pytest.raises(PqkError, match="chamfer_points"):
        score_pair(pred, truth, chamfer_points=2)


def test_against_a_reference():
    truth, teacher = make_pair()
    student = scaled(disturbed(teacher, 0.03), 0.4)
    scores = score_against_reference(student, teacher)
    assert scores.keys() == KEYS
    assert scores["reproj_px"] is None
    assert scores["absrel"] > 0 and scores["chamfer"] > 0
    same = score_against_reference(scaled(teacher, 3), teacher)
    assert same["absrel"] == pytest.approx(0, abs=1e-6) and same["delta1"] == 1
    assert same["chamfer"] == pytest.approx(0, abs=1e-6)

    # With confidence where the truth is valid, the teacher's points score as the truth does; without a pose the depth
    # of view 2 is z in camera 1.
    teacher["conf_1"][~truth.valid1] = 1.0
    teacher["conf_2"][~truth.valid2] = np.nan
    against_truth = score_pair(student, dataclasses.replace(truth, cam1_to_cam2=np.eye(4)))
    for key, value in score_against_reference(student, teacher).items():
        if key not in ("reproj_px", "ause"):
            assert value == pytest.approx(against_truth[key], rel=1e-6), key


def test_without_truth_the_teachers_confidence_is_the_error_to_rank():
    _, teacher = make_pair()
    random = np.random.default_rng(0)
    for key in ("conf_1", "conf_2"):
        teacher[key] = (1 + random.exponential(size=teacher[key].shape)).astype(np.float32)
    student = disturbed(teacher, 0.03)
    assert score_against_reference(student, teacher)["ause"] == pytest.approx(0, abs=1e-12)
    assert score_against_reference(student | {"conf_2": 7 * teacher["conf_2"]}, teacher)["ause"] > 0.02
    for key in ("conf_1", "conf_2"):
        shuffled = random.permutation(teacher[key].ravel()).reshape(teacher[key].shape)
        for destroyed in (np.full_like(teacher[key], 2), shuffled):
            assert score_against_reference(student | {key: destroyed}, teacher)["ause"] > 0.05


def test_reference_without_confidence_is_refused():
    _, teacher = make_pair()
    with pytest.raises(PqkError, match="reference has no conf_1"):
        score_against_reference(teacher, {k: v for k, v in teacher.items() if k != "conf_1"})
    with pytest.raises(PqkError, match="no valid pixel"):
        score_against_reference(teacher, teacher | {"conf_1": np.ones_like(teacher["conf_1"])})
    with pytest.raises(PqkError, match="conf_2 has shape"):
        score_against_reference(teacher, teacher | {"conf_2": teacher["conf_1"]})


def test_constant_depth_baseline():
    """One depth for the pixels of both views, each in its own camera."""
    truth, _ = make_pair()
    moved = truth.gt2[truth.valid2] @ truth.cam1_to_cam2[:3, :3].T + truth.cam1_to_cam2[:3, 3]
    z = np.concatenate([truth.gt1[truth.valid1][:, 2], moved[:, 2]]).astype(float)
    scores = constant_depth_scores(truth)
    middle = np.median(z)
    assert scores.keys() == {"absrel", "rmse", "delta1"}
    assert scores["absrel"] == pytest.approx(np.mean(np.abs(middle - z) / z), rel=1e-6)
    assert scores["rmse"] == pytest.approx(np.sqrt(np.mean((middle - z) ** 2)), rel=1e-6)
    assert scores["delta1"] == pytest.approx(np.mean(np.maximum(middle / z, z / middle) < 1.25))
    assert constant_depth_scores(truth, "lstsq")["rmse"] == pytest.approx(z.std(), rel=1e-6)


def test_summarise():
    pairs = [{"absrel": value, "reproj_px": None} for value in np.linspace(0.0, 1.0, 21)]
    assert summarise(pairs) == {"absrel": pytest.approx(0.5), "absrel_p95": pytest.approx(0.95), "reproj_px": None}
    with pytest.raises(PqkError, match="nothing to summarise"):
        summarise([])
    with pytest.raises(PqkError, match="reproj_px is missing for 1 of 2"):
        summarise([{"reproj_px": 1.0}, {"reproj_px": None}])
    with pytest.raises(PqkError, match="rmse is missing"):
        summarise([{"absrel": 1.0}, {"absrel": 1.0, "rmse": 1.0}])
    with pytest.raises(PqkError, match="NaN refused"):
        summarise([{"absrel": 1.0}, {"absrel": math.nan}])


def test_quality_drop():
    assert quality_drop_pct(0.11, 0.10) == pytest.approx(10)
    assert quality_drop_pct(0.09, 0.10) == pytest.approx(-10)
    assert quality_drop_pct(0.72, 0.80, higher_is_better=True) == pytest.approx(10)
    assert quality_drop_pct(0.0, 0.0) == 0
    with pytest.raises(PqkError, match="teacher's value is 0"):
        quality_drop_pct(0.1, 0.0)
    for value, teacher in ((math.nan, 0.1), (0.1, math.inf), (-0.1, 0.1)):
        with pytest.raises(PqkError, match="finite"):
            quality_drop_pct(value, teacher)


@settings(deadline=None)
@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(1e-3, 1e3))
def test_quality_drop_has_no_unit(value, teacher, unit):
    drop = quality_drop_pct(value, teacher)
    assert drop >= -100
    assert (drop > 0) == (value > teacher)
    assert quality_drop_pct(unit * value, unit * teacher) == pytest.approx(drop, rel=1e-6, abs=1e-6)


def test_confidences_of_a_sigmoid_count():
    """Below 1 is what a sigmoid gives: its own bound is 0, that of the official activation stays 1."""
    official = {**NAMED["dust3r-tiny"], "conf_mode": ["exp", 1, "inf"]}
    low = lowest_confidence({**official, "conf_mode": ["sigmoid", 0, 1]})
    assert (lowest_confidence(official), low) == (1.0, 0.0)
    points = np.random.default_rng(0).uniform(1, 2, (2, 8, 8, 3)).astype(np.float32)
    conf = np.full((8, 8), 0.5, np.float32)
    reference = {"pts3d_1": points[0], "pts3d_2": points[1], "conf_1": conf, "conf_2": conf}
    assert score_against_reference(reference, reference, min_conf=low)["absrel"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(PqkError):
        score_against_reference(reference, reference, min_conf=lowest_confidence(official))
    quality = {"scale_alignment": "median", "chamfer_points": 16}
    config = {**official, "conf_mode": ["sigmoid", 0, 1]}
    samples = SampleSet({}, {}, ("a",), "0", False).to_json()
    request = {"family": "dust3r", "samples": samples, "quality": quality, "seed": 0, "config": config}
    with Scorer(request, threads=1) as scorer:
        scorer.add(Sample(0, "x, y", None), reference, reference)
        assert scorer.result()["summary"]["delta1"] == 1
