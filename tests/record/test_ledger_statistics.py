"""Means, spreads and intervals of a ledger, and seeds as text."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pqk.errors import PqkError
from pqk.record.comparison import t_interval
from pqk.record.ledger import stat
from pqk.settings.seeds import parse_seeds, seeds_text


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_statistics(values: list[float]) -> None:
    found = stat(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12, abs=1e-9)
    if len(values) == 1:
        assert found.std is None
    else:
        assert found.std == pytest.approx(np.std(values, ddof=1), rel=1e-9, abs=1e-9)
        assert found == stat(values[::-1])
        twice = stat([2 * v for v in values])
        # the mean of numbers near 5e-324 is rounded to 0
        assert twice.mean == pytest.approx(2 * (found.mean or 0), rel=1e-12, abs=1e-300)
        assert twice.std == pytest.approx(2 * (found.std or 0), rel=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_the_interval_is_scipys(values: list[float]) -> None:
    found = t_interval(values)
    assert found.low <= found.mean <= found.high
    if np.std(values) > 1e-6:
        low, high = stats.ttest_rel(values, [0.0] * len(values)).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Of intervals over 5 normal differences around 1, 95 % hold 1: with 2000 draws, 94 to 96 within three sigma."""
    random_state = np.random.default_rng(0)
    intervals = [t_interval(list(random_state.normal(1.0, 3.0, 5))) for _ in range(2000)]
    share = sum(i.low <= 1.0 <= i.high for i in intervals) / 2000
    assert abs(share - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 2000)


@settings(deadline=None)
@given(st.sets(st.integers(0, 1023), min_size=1))
def test_seeds_as_text(seeds: set[int]) -> None:
    assert set(parse_seeds(seeds_text(seeds))) == seeds


def test_seeds_that_are_wrong() -> None:
    assert parse_seeds("0..2, 7") == (0, 1, 2, 7)
    for text in ("", "1..", "..3", "4..1", "a", "-1", "1..2..3", "1024", "0..9999999999", "²"):
        with pytest.raises(PqkError, match="seed"):
            parse_seeds(text)
