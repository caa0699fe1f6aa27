"""Co-visibility of known geometry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk.data.scenes.covisibility import LEAST, covisibility

K = np.array([[40.0, 0, 32.0], [0, 40.0, 24.0], [0, 0, 1]])


def yaw(degrees: float, position: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """World-to-camera of a camera at `position`, turned about the vertical axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    pose = np.eye(4)
    pose[:3, :3] = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    pose[:3, 3] = -pose[:3, :3] @ np.array(position)
    return pose


@given(st.integers(0, 10**6), st.integers(1, 7), st.floats(-180, 180))
def test_same_view_sees_itself(seed, stride, angle):
    depth = np.random.default_rng(seed).uniform(0.5, 20, (48, 64)).astype(np.float32)
    assert covisibility(depth, K, yaw(angle, (1, 2, 3)), depth, K, yaw(angle, (1, 2, 3)), stride) == 1.0


def test_opposite_views_share_nothing():
    depth = np.full((48, 64), 3.0)
    assert covisibility(depth, K, yaw(0), depth, K, yaw(180), 1) == 0.0


def test_wall_seen_from_the_side_step():
    """Cameras 1.2 m apart before a wall 3 m away: 16 of 64 columns move out of sight (40 px * 1.2 / 3)."""
    wall = np.full((48, 64), 3.0)
    assert covisibility(wall, K, yaw(0), wall, K, yaw(0, (1.2, 0, 0)), 1) == pytest.approx(48 / 64)


def test_hidden_points_do_not_count_and_unmeasured_ones_are_not_judged():
    wall = np.full((48, 64), 3.0)
    nearer = wall.copy()
    nearer[:, :32] = 2.0  # something in front of the left half
    assert covisibility(wall, K, yaw(0), nearer, K, yaw(0), 1) == 0.5
    holes = wall.copy()
    holes[:24] = 0
    assert covisibility(wall, K, yaw(0), holes, K, yaw(0), 1) == 1.0  # b measured nothing there that could hide them
    assert covisibility(holes, K, yaw(0), wall, K, yaw(0), 1) == 1.0  # share of what a measured
    assert covisibility(np.zeros((48, 64)), K, yaw(0), wall, K, yaw(0), 1) == 0.0


def test_tolerance_is_relative():
    wall = np.full((48, 64), 10.0)
    assert covisibility(wall, K, yaw(0), wall * 1.04, K, yaw(0)) == 1.0
    assert covisibility(wall, K, yaw(0), wall * 1.04, K, yaw(0), tolerance=0.02) == 0.0


def measured(share: float, depth: float = 3.0, seed: int = 0) -> np.ndarray:
    """A wall of which a laser scanner hit some pixels."""
    return np.where(np.random.default_rng(seed).random((96, 128)) < share, depth, 0.0)


@pytest.mark.parametrize("share", [0.5, 0.15, 0.05, 0.01])
@pytest.mark.parametrize("stride", [4, 8])
def test_sparse_depth_costs_no_overlap(share, stride):
    """The same wall from one step to the side: what is seen is the overlap, however few pixels were measured."""
    dense, moved = np.full((96, 128), 3.0), yaw(0, (1.2, 0, 0))
    overlap = covisibility(dense, K, yaw(0), dense, K, moved, stride)
    a, b = measured(share, seed=1), measured(share, seed=2)
    assert covisibility(a, K, yaw(0), b, K, moved, stride) == pytest.approx(overlap, abs=0.1)
    assert covisibility(a, K, yaw(0), a, K, yaw(0), stride) == 1.0
    assert covisibility(a, K, yaw(0), measured(share, 2.0, 2), K, yaw(0), stride) == 0.0  # hidden
    assert covisibility(a, K, yaw(0), b, K, yaw(180), stride) == 0.0


@pytest.mark.parametrize("step", [2, 3, 8])
def test_a_grid_of_measurements_that_misses_the_sampled_pixels(step):
    grid = np.zeros((96, 128))
    grid[1::step, 1::step] = 3.0
    holes = np.full((96, 128), 3.0)
    holes[4::8] = holes[:, 4::8] = 0
    for depth in (grid, holes):
        assert covisibility(depth, K, yaw(0), depth, K, yaw(0), 8) == 1.0
        assert covisibility(depth, K, yaw(0), depth, K, yaw(0, (0.11, 0.05, 0)), 8) > 0.9


def test_few_measurements_do_not_speak_for_a_whole_view():
    wall, few = np.full((96, 128), 3.0), np.zeros((96, 128))
    few[50, 60:63] = 3.0
    assert 0 < covisibility(wall, K, yaw(0), few, K, yaw(0), 8) <= 4 / LEAST  # four cells lie near
    assert covisibility(wall, K, yaw(0), np.zeros((96, 128)), K, yaw(0), 8) == 0.0


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(-40, 40), st.floats(0, 2))
def test_dense_depth_is_judged_at_the_centres_of_cells(seed, stride, angle, step):
    """Where all is measured: the share of every stride-th pixel that b agrees with, as generated scenes are made by."""
    random = np.random.default_rng(seed)
    a, b = (random.uniform(2, 3) + random.uniform(0, 0.3, (48, 64)) for _ in range(2))
    pose = yaw(angle, (step, 0, 0))
    seen = total = 0
    for v in range(stride // 2, 48, stride):
        for u in range(stride // 2, 64, stride):
            point = pose @ np.append(np.linalg.inv(K) @ (u + 0.5, v + 0.5, 1) * a[v, u], 1)
            total += 1
            if point[2] > 1e-6:
                x, y, _ = K @ (point[:3] / point[2])
                if 0 <= x < 64 and 0 <= y < 48:
                    seen += abs(b[int(y), int(x)] - point[2]) <= 0.05 * b[int(y), int(x)]
    assert covisibility(a, K, yaw(0), b, K, pose, stride) == pytest.approx(seen / total, abs=1.5 / total)
