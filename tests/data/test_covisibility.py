"""Co-visibility of known geometry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqk.data.covisibility import covisibility

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


def test_hidden_and_unmeasured_points_do_not_count():
    wall = np.full((48, 64), 3.0)
    nearer = wall.copy()
    nearer[:, :32] = 2.0  # something in front of the left half
    assert covisibility(wall, K, yaw(0), nearer, K, yaw(0), 1) == 0.5
    holes = wall.copy()
    holes[:24] = 0
    assert covisibility(wall, K, yaw(0), holes, K, yaw(0), 1) == 0.5
    assert covisibility(holes, K, yaw(0), wall, K, yaw(0), 1) == 1.0  # share of what a measured
    assert covisibility(np.zeros((48, 64)), K, yaw(0), wall, K, yaw(0), 1) == 0.0


def test_tolerance_is_relative():
    wall = np.full((48, 64), 10.0)
    assert covisibility(wall, K, yaw(0), wall * 1.04, K, yaw(0)) == 1.0
    assert covisibility(wall, K, yaw(0), wall * 1.04, K, yaw(0), tolerance=0.02) == 0.0
