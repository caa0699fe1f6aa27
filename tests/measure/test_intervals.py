"""Intervals: exact on hand-made numbers, and they cover the truth as often as they say, for few scenes too."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqk.stats.intervals import (
    Interval,
    difference_interval,
    drop_interval,
    groups_to_decide,
    mean_interval,
    median_interval,
    within,
)

TRUE_DROP = 0.8


def scenes_of(
    draw: np.random.Generator, count: int, pairs: int, equal: bool = True
) -> tuple[list[float], list[float], list[int]]:
    """Two models on scenes: AbsRel differs from scene to scene, and what the second one loses does too."""
    mine, teacher, groups = [], [], []
    for scene in range(count):
        level = draw.gamma(16, 0.115 / 16)  # of a scene: mean 0.115, a quarter of it to both sides
        lost = draw.normal(TRUE_DROP / 100, 0.02)  # of the drop in this scene, whatever its level
        for _ in range(pairs if equal else int(draw.integers(1, pairs + 1))):
            t = level * draw.lognormal(0, 0.2)
            teacher.append(t)
            mine.append(t * (1 + lost + draw.normal(0, 0.01)))
            groups.append(scene)
    return mine, teacher, groups


def coverage(count: int, pairs: int, equal: bool, clusters: bool = True, runs: int = 1500) -> float:
    draw, hits = np.random.default_rng(count), 0
    for _ in range(runs):
        mine, teacher, scenes = scenes_of(draw, count, pairs, equal)
        found = drop_interval(mine, teacher, scenes if clusters else range(len(scenes)))
        assert found.low is not None and found.high is not None
        hits += found.low <= TRUE_DROP <= found.high
    return hits / runs


@pytest.mark.parametrize(("count", "pairs"), [(2, 9), (3, 9), (5, 9), (8, 9), (52, 1)])
def test_the_drop_interval_covers_the_true_drop(count: int, pairs: int) -> None:
    assert 0.93 <= coverage(count, pairs, equal=True) <= 0.97  # 0.95, with three standard deviations of 1500 runs
    if pairs > 1:  # pairs of a scene repeat each other: taken as independent, they promise too much
        assert coverage(count, pairs, equal=True, clusters=False, runs=300) < 0.85


@pytest.mark.parametrize("count", [3, 8])
def test_unlike_scenes_cover_a_little_less(count: int) -> None:
    assert 0.90 <= coverage(count, 9, equal=False) < 0.95


def test_the_drop_interval_by_hand() -> None:
    """Two scenes of one pair each: ratio 1.1, residuals +-0.1, t(1) = 12.706, se = sqrt(2 * 0.02) / 2."""
    found = drop_interval([1.2, 1.0], [1.0, 1.0], ["a", "b"])
    assert (found.value, found.groups) == (pytest.approx(10), 2)
    half = 100 * 12.7062 * math.sqrt(2 * 0.02) / 2
    assert found.half == pytest.approx(half, rel=1e-4)
    assert found.ends() == pytest.approx([10 - half, 10 + half], rel=1e-4)


def test_the_drop_of_a_score_points_the_other_way() -> None:
    error = drop_interval([1.2, 1.0, 1.1], [1.0, 1.0, 1.0], "abc")
    score = drop_interval([1.2, 1.0, 1.1], [1.0, 1.0, 1.0], "abc", higher_is_better=True)
    assert score.value == -error.value
    assert score.ends() == [-x for x in reversed(error.ends() or [])]


def test_equal_models_drop_nothing_and_one_scene_tells_no_interval() -> None:
    same = drop_interval([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], "aab")
    assert (same.value, same.ends()) == (0, [0, 0])
    one = drop_interval([0.11, 0.2], [0.1, 0.2], "aa")
    assert (one.low, one.high, one.half, one.groups) == (None, None, None, 1)
    assert drop_interval([0, 0], [0, 0], "ab").ends() == [0, 0]
    with pytest.raises(ValueError, match="the drop is undefined"):
        drop_interval([0, 1], [0, 0], "ab")
    with pytest.raises(ValueError, match="equally many"):
        drop_interval([1], [1, 2], "ab")


def test_a_paired_difference_is_tighter_than_two_drops() -> None:
    draw = np.random.default_rng(0)
    teacher = draw.gamma(16, 0.115 / 16, 40)
    shared = draw.normal(0.01, 0.03, 40)  # both recipes lose in the same scenes
    one = teacher * (1 + shared + 0.004 + draw.normal(0, 0.002, 40))
    other = teacher * (1 + shared)
    found = difference_interval(list(one), list(other), list(teacher), range(40))
    alone = drop_interval(list(one), list(teacher), range(40))
    assert found.half is not None and alone.half is not None and found.half < alone.half / 5
    assert found.low is not None and found.low > 0
    both = alone.value - drop_interval(list(other), list(teacher), range(40)).value
    assert found.value == pytest.approx(both)


@pytest.mark.parametrize("count", [6, 11, 30])
def test_the_median_interval_covers_the_true_median(count: int) -> None:
    draw, runs, hits = np.random.default_rng(count), 2000, 0
    for _ in range(runs):
        found = median_interval(list(draw.lognormal(0, 1, count)))
        assert found.low is not None and found.high is not None
        hits += found.low <= 1.0 <= found.high
    assert hits / runs >= 0.94


def test_the_median_interval_is_two_order_statistics() -> None:
    found = median_interval([float(x) for x in range(1, 31)])
    assert (found.value, found.low, found.high) == (15.5, 10, 21)
    assert median_interval([1, 2, 3, 4, 5]).ends() is None
    assert median_interval([3.0, 1.0, 2.0]).value == 2


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=40), st.integers(1, 5), st.integers(0, 2**16))
def test_order_and_names_of_scenes_do_not_matter(values: list[float], scenes: int, seed: int) -> None:
    groups = [n % scenes for n in range(len(values))]
    teacher = [1 + value / 3 for value in values]
    found = drop_interval(values, teacher, groups)
    order = random.Random(seed).sample(range(len(values)), len(values))
    again = drop_interval([values[n] for n in order], [teacher[n] for n in order], [f"s{groups[n]}" for n in order])
    assert again.value == pytest.approx(found.value, abs=1e-9)
    assert (again.ends() or []) == pytest.approx(found.ends() or [], abs=1e-6)
    mean = mean_interval(values, groups)
    assert mean.value == pytest.approx(sum(values) / len(values))
    assert mean.low is None or mean.low <= mean.value <= (mean.high or 0) + 1e-12


def test_how_many_scenes_would_decide() -> None:
    found = drop_interval([1.2, 1.0, 1.1, 1.3], [1.0] * 4, "abcd")
    assert found.half is not None
    needed = groups_to_decide(found, limit=1.0)
    assert needed == math.ceil(4 * (found.half / abs(found.value - 1.0)) ** 2)
    assert groups_to_decide(found, found.value) is None
    assert groups_to_decide(Interval(1e-200, 1e-200, 1.0, 8), 0.0) is None  # the ratio's square is no float


@given(st.floats(-5, 5), st.floats(0, 3), st.floats(0.01, 4))
def test_within_asks_the_whole_interval(value: float, half: float, limit: float) -> None:
    found = within(Interval(value, value - half, value + half, 9), limit)
    inside = [abs(value + part * half) <= limit for part in np.linspace(-1, 1, 1001)]
    if found is None:
        assert value - half <= limit and value + half >= -limit and not (inside[0] and inside[-1])
    else:
        assert set(inside) == {found}
    assert within(Interval(value, None, None, 1), limit) is (abs(value) <= limit)
