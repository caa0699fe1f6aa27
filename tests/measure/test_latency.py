"""Percentiles of timing samples, and the peak memory of a process."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqk.errors import PqkError
from pqk.measure.footprint import peak_ram_bytes
from pqk.stats.latency import p95, percentile, speedup

times = st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=50)


def by_hand(samples: list[float], q: float) -> float:
    """Hyndman & Fan (1996), type 7, from its definition."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * q / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@given(times, st.floats(0, 100))
def test_percentile_is_type_7(samples: list[float], q: float) -> None:
    assert percentile(samples, q) == pytest.approx(by_hand(samples, q), rel=1e-9)


def test_percentile_closed_forms() -> None:
    assert percentile([7.0], 95) == 7.0
    assert percentile([1, 2, 3, 4], 50) == 2.5
    assert percentile(range(101), 95) == 95  # type: ignore[arg-type]
    assert percentile([3, 1, 2], 0) == 1
    assert percentile([3, 1, 2], 100) == 3


@given(times, st.floats(0.1, 10))
def test_percentile_scales_and_ignores_order(samples: list[float], factor: float) -> None:
    assert percentile([factor * s for s in reversed(samples)], 50) == pytest.approx(factor * percentile(samples, 50))
    assert min(samples) <= percentile(samples, 50) <= percentile(samples, 95) <= max(samples)


@pytest.mark.parametrize("samples", [[], [1.0, -0.1], [math.nan], [1.0, math.inf]])
def test_percentile_refuses(samples: list[float]) -> None:
    with pytest.raises(PqkError, match="timing samples"):
        percentile(samples, 50)


def test_p95_needs_a_hundred_samples() -> None:
    assert p95([1.0] * 99) is None
    assert p95(range(100)) == pytest.approx(94.05)  # type: ignore[arg-type]


def test_a_speedup_is_the_median_of_paired_ratios() -> None:
    """Not the ratio of medians: a round that is slow for both says nothing of either."""
    found = speedup([2.0, 2.0, 30.0, 30.0, 30.0], [1.0, 1.0, 10.0, 15.0, 15.0])
    assert found.value == 2.0  # medians: 30 / 10
    assert found.low is None  # five rounds reach no 95 %
    ratios = [1.0 + k / 10 for k in range(30)]
    assert speedup(ratios, [1.0] * 30).ends() == pytest.approx([ratios[9], ratios[20]])  # order statistics 10 and 21


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=40))
def test_a_speedup_of_a_thing_against_itself_is_one(pairs: list[tuple[float, float]]) -> None:
    base, own = ([pair[k] for pair in pairs] for k in range(2))
    assert speedup(base, base).value == 1.0
    slowed = [3.0 if k % 2 else 1.0 for k in range(len(pairs))]  # rounds that something else slowed down
    disturbed = speedup(
        [b * s for b, s in zip(base, slowed, strict=True)], [o * s for o, s in zip(own, slowed, strict=True)]
    )
    assert disturbed.value == pytest.approx(speedup(base, own).value)


@pytest.mark.parametrize(("base", "own"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0]), ([math.nan], [1.0])])
def test_speedups_that_are_refused(base: list[float], own: list[float]) -> None:
    with pytest.raises(PqkError, match=r"a speedup needs|timing samples"):
        speedup(base, own)


def test_peak_memory_keeps_its_high_mark() -> None:
    """100 MB that were used and freed again still count; a process that never had them shows less."""
    use = "x = bytearray(100_000_000); x[::4096] = b'1' * len(x[::4096]); del x\n"
    show = "from pqk.measure.footprint import peak_ram_bytes; print(peak_ram_bytes())"
    small, large = (
        int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for code in (show, use + show)
    )
    assert 5e6 < small < 8e7
    assert 9e7 < large - small < 1.2e8
    assert peak_ram_bytes() > 1e7


def test_a_peak_can_be_forgotten() -> None:
    code = (
        "from pqk.measure.footprint import forget_peak, peak_ram_bytes, ram_bytes\n"
        "x = bytearray(100_000_000); x[::4096] = b'1' * len(x[::4096]); del x\n"
        "high = peak_ram_bytes(); print(int(forget_peak()), high, peak_ram_bytes(), ram_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    counted, high, later, now = map(int, done.stdout.split())
    assert now < high - 9e7
    assert abs(later - now) < 1e7 if counted else later >= high
