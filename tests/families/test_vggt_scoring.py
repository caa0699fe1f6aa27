"""Scores of VGGT's sets: what a perfect, a scaled, a disturbed, a destroyed and a broken prediction get."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from pqk.data.scenes.preprocess import Frame
from pqk.errors import PqkError
from pqk.families.contract import Sample
from pqk.families.vggt import scoring
from pqk.families.vggt.geometry import extri_intri_to_pose_encoding
from pqk.families.vggt.scoring import POSE_METRICS, Prediction, Scores, constant_scores, score_set, set_truth
from pqk.families.vggt.settings import METRICS

HEIGHT, WIDTH = 14, 28
OPTIONS = {"scale_alignment": "median", "chamfer_points": 64, "min_valid_pixels": 50}
CHAMFER = {"chamfer", "chamfer_accuracy", "chamfer_completeness"}
DEPTH = {"absrel", "delta1", "rmse"}
KEYS = DEPTH | CHAMFER | {"ause", *POSE_METRICS}
SIZES = st.sampled_from([1, 2, 4])


def make_frames(count: int, seed: int = 0) -> tuple[Frame, ...]:
    """Bumpy walls seen from different places, with a few pixels of unknown depth."""
    rng, frames = np.random.default_rng(seed), []
    v, u = np.mgrid[:HEIGHT, :WIDTH] / WIDTH
    for k in range(count):
        depth = (2 + u + 0.5 * np.sin(9 * v + k) + 0.1 * rng.random((HEIGHT, WIDTH))).astype(np.float32)
        depth[rng.random((HEIGHT, WIDTH)) < 0.1] = 0
        pose = np.eye(4)
        pose[:3, :3] = Rotation.from_rotvec(0.4 * rng.normal(size=3)).as_matrix()
        pose[:3, 3] = rng.normal(size=3)
        K = np.array([[1.1 * WIDTH, 0, WIDTH / 2], [0, 1.2 * WIDTH, HEIGHT / 2], [0, 0, 1]])
        image = rng.random((3, HEIGHT, WIDTH), dtype=np.float32)
        frames.append(Frame(f"v{k}", image, K, pose, depth, "room"))
    return tuple(frames)


def encoded(cameras: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Pose encodings (S, 9) of world-to-camera matrices."""
    one = torch.from_numpy(np.tile(K, (len(cameras), 1, 1)))
    return extri_intri_to_pose_encoding(torch.from_numpy(cameras[:, :3]), one, (HEIGHT, WIDTH)).numpy()


def perfect(frames: tuple[Frame, ...]) -> dict[str, np.ndarray]:
    """The truth as the network would say it: in the first camera's frame."""
    truth = set_truth(frames)
    cameras = truth.cameras @ np.linalg.inv(truth.cameras[0])
    return {
        "pose_enc": encoded(cameras, frames[0].K),
        "depth": truth.depth.astype(np.float32),
        "depth_conf": np.full(truth.depth.shape, 2, np.float32),
        "world_points": truth.points.astype(np.float32),
        "world_points_conf": np.full(truth.depth.shape, 2, np.float32),
    }


def scaled(pred: Prediction, factor: float) -> dict[str, np.ndarray]:
    """The same prediction in another unit."""
    pose = pred["pose_enc"].copy()
    pose[:, :3] *= factor
    return {
        **pred,
        "pose_enc": pose,
        "depth": (factor * pred["depth"]).astype(np.float32),
        "world_points": (factor * pred["world_points"]).astype(np.float32),
    }


def disturbed(pred: Prediction, amount: float = 0.1, seed: int = 1) -> dict[str, np.ndarray]:
    """Noise on every output."""
    rng = np.random.default_rng(seed)
    noisy = {key: pred[key] + amount * rng.normal(size=pred[key].shape) for key in ("world_points", "pose_enc")}
    depth = pred["depth"] * np.exp(amount * rng.normal(size=pred["depth"].shape))
    conf = 1 + rng.exponential(size=pred["depth"].shape)
    return {**pred, **noisy, "depth": depth, "depth_conf": conf}


def apart(one: Scores, other: Scores) -> set[str]:
    """Keys whose values differ."""
    assert one.keys() == other.keys()
    return {key for key in one if one[key] != other[key]}


def test_the_evidence_is_what_the_settings_name() -> None:
    named = {name for metric in METRICS for name in (metric.name, *metric.parts)}
    frames = make_frames(2)
    scores = score_set(perfect(frames), set_truth(frames))
    assert scores.keys() == named == KEYS
    assert json.loads(json.dumps(scores)) == scores and all(type(value) is float for value in scores.values())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-2, 1e2), st.sampled_from(["median", "lstsq"]), SIZES)
def test_the_truth_at_any_scale_is_perfect(seed: int, factor: float, align: str, count: int) -> None:
    frames = make_frames(count, seed)
    scores = score_set(scaled(perfect(frames), factor), set_truth(frames), align, chamfer_points=10_000)
    assert scores.keys() == KEYS
    for key in {"absrel", "rmse", *CHAMFER}:
        assert scores[key] == pytest.approx(0, abs=1e-4), key
    assert scores["delta1"] == 1
    if count == 1:
        assert {scores[name] for name in POSE_METRICS} == {None}
        return
    for key in ("rot_deg", "trans_deg"):
        assert scores[key] == pytest.approx(0, abs=1e-4), key
    assert scores["pose_miss30"] == 0
    assert {scores[key] for key in scores if key[:3] in ("auc", "rra", "rta")} == {1.0}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-2, 1e2), SIZES)
def test_one_scale_for_all_outputs_changes_nothing(seed: int, factor: float, count: int) -> None:
    frames = make_frames(count, seed)
    pred = disturbed(perfect(frames), seed=seed)
    one, other = (score_set(p, set_truth(frames)) for p in (pred, scaled(pred, factor)))
    for key, value in one.items():
        assert other[key] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), key


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), SIZES)
def test_each_head_changes_its_own_metrics_alone(seed: int, count: int) -> None:
    frames = make_frames(count)
    truth, pred = set_truth(frames), disturbed(perfect(frames), 0.01)
    scores, rng = score_set(pred, truth), np.random.default_rng(seed)

    def with_random(*keys: str) -> set[str]:
        destroyed = {key: 1 + rng.random(pred[key].shape) for key in keys}
        return apart(scores, score_set({**pred, **destroyed}, truth))

    cameras = with_random("pose_enc")
    assert cameras <= set(POSE_METRICS) and ("rot_deg" in cameras) == (count > 1)
    assert {"absrel", "rmse", "ause"} <= with_random("depth") <= DEPTH | {"ause"}
    assert with_random("depth_conf") == {"ause"}
    assert with_random("world_points") <= CHAMFER
    assert with_random("world_points_conf") == set()


def test_the_world_frame_of_the_truth_does_not_matter() -> None:
    frames = make_frames(3)
    moved = np.eye(4)
    moved[:3, :3] = Rotation.from_rotvec([0.3, -1.0, 0.7]).as_matrix()
    moved[:3, 3] = 5, -2, 1
    others = tuple(replace(frame, world_to_cam=frame.world_to_cam @ moved) for frame in frames)
    pred = disturbed(perfect(frames))
    one, other = (score_set(pred, set_truth(f)) for f in (frames, others))
    assert other == pytest.approx(one, rel=1e-6, abs=1e-6)


def test_depth_in_closed_form() -> None:
    """One scale for the set, by the median over its pixels; each metric is a mean over the frames."""
    frames = make_frames(2)
    mostly = frames[0].depth.copy()
    mostly[:, 5:] = 0  # few pixels: the frame counts as much as the other
    frames = (replace(frames[0], depth=mostly), frames[1])
    truth, pred = set_truth(frames), perfect(frames)
    pred["depth"][0] *= 1.5
    scores = score_set(pred, truth)
    depth = pred["depth"].astype(float)
    scale = np.median(truth.depth[truth.valid]) / np.median(depth[truth.valid])
    assert 0.9 < scale < 1
    assert scores["absrel"] == pytest.approx((abs(1.5 * scale - 1) + abs(scale - 1)) / 2, rel=1e-5)
    assert scores["delta1"] == pytest.approx(0.5)
    off = [np.sqrt(np.mean((scale * d - t)[v] ** 2)) for d, t, v in zip(depth, truth.depth, truth.valid, strict=True)]
    assert scores["rmse"] == pytest.approx(np.mean(off), rel=1e-6)
    alone = score_set(pred, truth, "none")
    assert alone["absrel"] == pytest.approx(0.25, rel=1e-5)


def test_points_of_the_truth_lie_in_the_first_camera() -> None:
    """Two cameras 1 m apart in x: the second one's points are 1 m to the right of those of the first."""
    K = np.array([[10.0, 0, 2.0], [0, 20.0, 1.5], [0, 0, 1]])
    depth = np.full((3, 4), 2.0, np.float32)
    depth[1, 1] = 0
    poses = [np.eye(4), np.eye(4)]
    poses[0][0, 3], poses[1][0, 3] = 5.0, 4.0
    image = np.zeros((3, 3, 4), np.float32)
    truth = set_truth([Frame(str(k), image, K, pose, depth) for k, pose in enumerate(poses)])
    np.testing.assert_allclose(truth.points[0, 2, 3], [(3.5 - 2) / 10 * 2, (2.5 - 1.5) / 20 * 2, 2])
    np.testing.assert_allclose(truth.points[1, 2, 3], truth.points[0, 2, 3] + [1, 0, 0])
    assert (truth.valid == (depth > 0)).all() and truth.depth.dtype == truth.points.dtype == np.float64


def test_poses_in_closed_form() -> None:
    """A camera turned by 10 degrees about its own axis: two of three pairs are off by that."""
    frames = make_frames(3)
    truth, pred = set_truth(frames), perfect(frames)
    cameras = truth.cameras.copy()
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec([0, 0, math.radians(10.5)]).as_matrix()
    cameras[2] = turn @ cameras[2]
    scores = score_set({**pred, "pose_enc": encoded(cameras, frames[0].K)}, truth)
    assert scores["rot_deg"] == pytest.approx(2 * 10.5 / 3, abs=1e-4)
    assert (scores["rra5"], scores["rra15"]) == (pytest.approx(1 / 3), 1)
    assert scores["trans_deg"] == pytest.approx(0, abs=1e-4)  # centres and the other camera's axes are as they were
    assert scores["auc30"] == pytest.approx((1 + 2 * 20 / 30) / 3)  # floor(10.5) of 30
    assert scores["pose_miss30"] == pytest.approx(1 - scores["auc30"])
    assert scores["auc5"] == pytest.approx(1 / 3)


def test_confidence_is_scored_by_how_it_ranks_the_errors_of_depth() -> None:
    frames = make_frames(2)
    truth, pred = set_truth(frames), disturbed(perfect(frames))
    scale = np.median(truth.depth[truth.valid]) / np.median(pred["depth"][truth.valid])
    errors = np.abs(scale * pred["depth"] - truth.depth)
    right, wrong = (score_set({**pred, "depth_conf": conf}, truth)["ause"] for conf in (1 / (1 + errors), errors))
    constant = score_set({**pred, "depth_conf": np.ones_like(errors)}, truth)["ause"]
    assert right == pytest.approx(0, abs=1e-9) and right < 0.2 < constant < wrong


def test_invalid_pixels_do_not_matter() -> None:
    frames = make_frames(2)
    truth, pred = set_truth(frames), disturbed(perfect(frames))
    expected = score_set(pred, truth)
    for key, value in (("depth", np.nan), ("world_points", np.inf), ("depth_conf", np.nan)):
        pred[key] = pred[key].copy()
        pred[key][~truth.valid] = value
    assert score_set(pred, truth) == expected


def test_the_clouds_are_sampled_apart_and_seeded() -> None:
    frames = make_frames(2)
    truth, pred = set_truth(frames), perfect(frames)
    floors = [score_set(pred, truth, chamfer_points=n)["chamfer"] for n in (25, 100, 400)]
    assert floors == sorted(floors, reverse=True) and floors[2] > 0.01
    first, again, other = (score_set(pred, truth, chamfer_points=50, seed=s) for s in (3, 3, 4))
    assert first == again and apart(first, other) <= CHAMFER and first["chamfer"] != other["chamfer"]


def broken(**changed: Any) -> tuple[dict[str, np.ndarray], scoring.SetTruth]:
    frames = make_frames(2)
    truth, pred = set_truth(frames), perfect(frames)
    place = tuple(np.argwhere(truth.valid)[0])
    for key, value in changed.items():
        pred[key] = pred[key].copy()
        pred[key][(0, 0) if key == "pose_enc" else place] = value
    return pred, truth


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"depth": np.nan}, "NaN refused: the predicted depths hold 1 NaN"),
        ({"depth": np.inf}, "NaN refused: the predicted depths"),
        ({"world_points": np.nan}, "NaN refused: the source points hold 3 NaN"),
        ({"depth_conf": np.nan}, "NaN refused: the confidence"),
        ({"pose_enc": np.inf}, "NaN refused: the prediction's pose_enc gives no camera for 1 of 2 frames"),
    ],
)
def test_a_broken_prediction_is_refused(changed: dict[str, float], sentence: str) -> None:
    with pytest.raises(PqkError, match=sentence):
        score_set(*broken(**changed))


def test_what_fits_no_truth_is_refused() -> None:
    pred, truth = broken()
    with pytest.raises(PqkError, match="the prediction has no depth_conf; it has pose_enc, depth, world_points"):
        score_set({key: value for key, value in pred.items() if key != "depth_conf"}, truth)
    with pytest.raises(PqkError, match=r"the prediction's pose_enc has shape \(1, 9\), expected \(2, 9\)"):
        score_set({**pred, "pose_enc": pred["pose_enc"][:1]}, truth)
    with pytest.raises(PqkError, match="pose_enc gives no camera for 2 of 2 frames"):
        score_set({**pred, "pose_enc": np.zeros((2, 9))}, truth)  # a quaternion of length 0
    with pytest.raises(PqkError, match="scale alignment"):
        score_set({**pred, "depth": -pred["depth"]}, truth)
    with pytest.raises(PqkError, match="not determined"):
        score_set({**pred, "world_points": np.ones_like(pred["world_points"])}, truth)
    with pytest.raises(PqkError, match="chamfer_points must be at least 3"):
        score_set(pred, truth, chamfer_points=2)
    with pytest.raises(PqkError, match="no ground truth to score against"):
        set_truth([replace(make_frames(1)[0], depth=None)])
    with pytest.raises(PqkError, match="world_to_cam must be a finite, invertible"):
        set_truth([replace(make_frames(1)[0], world_to_cam=None)])


def sample_of(frames: tuple[Frame, ...]) -> Sample:
    return Sample(0, "a", frames, frames)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_score_and_floor_of_a_sample(count: int) -> None:
    frames = make_frames(count)
    pred, truth = disturbed(perfect(frames)), set_truth(frames)
    assert scoring.score(pred, sample_of(frames), OPTIONS, 3) == score_set(pred, truth, "median", 64, 3)
    empty = replace(frames[-1], depth=np.zeros_like(frames[-1].depth))
    few = empty.depth.copy()
    few[0, :10] = 2
    for last in (empty, replace(empty, depth=few)):
        lacking = sample_of((*frames[:-1], last))
        assert scoring.score(pred, lacking, OPTIONS, 0) is None and scoring.floor(lacking, OPTIONS) is None
    assert "50 valid depth pixels" in scoring.needs(OPTIONS)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["median", "lstsq"]), SIZES)
def test_the_floor_is_one_depth_and_one_camera(seed: int, align: str, count: int) -> None:
    frames = make_frames(count, seed)
    truth = set_truth(frames)
    found = scoring.floor(sample_of(frames), {**OPTIONS, "scale_alignment": align})
    assert found == constant_scores(truth, align) and found.keys() == DEPTH | set(POSE_METRICS)
    pred = {**perfect(frames), "depth": np.full(truth.depth.shape, 7.0)}
    pred["pose_enc"] = encoded(np.tile(np.eye(4), (count, 1, 1)), frames[0].K)
    scores = score_set(pred, truth, align)
    for key, value in found.items():
        assert scores[key] == (None if value is None else pytest.approx(value, rel=1e-9, abs=1e-9)), key
    if count > 1:
        assert found["trans_deg"] == 90 and found["rta30"] == 0 and found["pose_miss30"] == 1
        turns = [
            np.degrees((Rotation.from_matrix(a[:3, :3]) * Rotation.from_matrix(b[:3, :3]).inv()).magnitude())
            for k, a in enumerate(truth.cameras)
            for b in truth.cameras[k + 1 :]
        ]
        assert found["rot_deg"] == pytest.approx(np.mean(turns), abs=1e-4)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_teacher_plays_the_truth(count: int) -> None:
    frames = make_frames(count)
    teacher = perfect(frames)
    valid = set_truth(frames).valid
    teacher["depth"][~valid], teacher["depth_conf"][~valid], teacher["world_points_conf"][~valid] = np.nan, 9, 1
    sample = scoring.as_truth(teacher, Sample(0, "a", None), {})
    student = disturbed(scaled(perfect(frames), 3))
    found = scoring.score(student, sample, OPTIONS, 0)
    against_truth = scoring.score(student, sample_of(frames), OPTIONS, 0)
    for key, value in against_truth.items():
        if key != "ause":
            assert found[key] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-5)), key
    same = scoring.score(perfect(frames), sample, {**OPTIONS, "chamfer_points": 10_000}, 0)
    assert same["absrel"] == pytest.approx(0, abs=1e-6) and same["chamfer"] == pytest.approx(0, abs=1e-5)


def test_without_truth_the_teachers_confidence_is_the_error_to_rank() -> None:
    frames = make_frames(2)
    teacher = {**perfect(frames), "depth_conf": 1 + np.random.default_rng(0).exponential(size=(2, HEIGHT, WIDTH))}
    sample = scoring.as_truth(teacher, Sample(0, "a", None), {})

    def ause(conf: np.ndarray) -> float:
        return scoring.score({**disturbed(teacher), "depth_conf": conf}, sample, OPTIONS, 0)["ause"]

    teacher["depth"] = np.maximum(teacher["depth"], 1)
    assert ause(teacher["depth_conf"]) == pytest.approx(0, abs=1e-12)
    assert ause(np.full((2, HEIGHT, WIDTH), 2)) > 0.05 and ause(1 / teacher["depth_conf"]) > 0.1


def test_a_teacher_without_an_answer_is_refused() -> None:
    teacher = perfect(make_frames(2))

    def against(**changed: np.ndarray) -> None:
        scoring.score(teacher, scoring.as_truth({**teacher, **changed}, Sample(0, "a", None), {}), OPTIONS, 0)

    with pytest.raises(PqkError, match="no valid pixel"):
        against(depth_conf=np.ones((2, HEIGHT, WIDTH)))
    with pytest.raises(PqkError, match="reference's depth_conf has shape"):
        against(depth_conf=np.ones((1, HEIGHT, WIDTH)))
    with pytest.raises(PqkError, match="the reference's pose_enc gives no camera for 2 of 2"):
        against(pose_enc=np.full((2, 9), np.nan))


def test_the_summary_is_the_mean_and_the_tail_of_absrel() -> None:
    frames = make_frames(3)
    truth = set_truth(frames)
    rows = [score_set(disturbed(perfect(frames), 0.1, seed), truth) for seed in range(5)]
    found = scoring.summarise(rows)
    assert found.keys() == KEYS | {"absrel_p95"}
    assert found["auc30"] == pytest.approx(np.mean([row["auc30"] for row in rows]))
    assert found["absrel_p95"] == pytest.approx(np.percentile([row["absrel"] for row in rows], 95))
    single = [score_set(perfect(make_frames(1, seed)), set_truth(make_frames(1, seed))) for seed in range(2)]
    assert scoring.summarise(single)["pose_miss30"] is None
    with pytest.raises(PqkError, match="nothing to summarise: no set was scored"):
        scoring.summarise([])
    with pytest.raises(PqkError, match="pose_miss30 is missing for 1 of 2 sets"):
        scoring.summarise([rows[0], single[0]])
