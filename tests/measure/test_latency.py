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
from pqk.measure.latency import percentile

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
