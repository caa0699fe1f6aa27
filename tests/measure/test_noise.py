"""How quiet the machine is: arithmetic on stated clocks, and a real process that uses a core."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from pqk.measure.noise import Clocks, disturbances, drift_pct, load_between, load_now, read_clocks, warning

CALM = {"load_before": 0.0, "load_during": 0.1, "load_after": 0.2, "drift_pct": -4.0}


@pytest.fixture
def burner() -> Iterator[subprocess.Popen[bytes]]:
    """A process that uses one whole core."""
    process = subprocess.Popen([sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_the_load_is_what_others_used() -> None:
    begin = Clocks(wall=10.0, busy=100.0, own=3.0)
    assert load_between(begin, Clocks(12.0, 104.0, 4.0)) == 1.5  # 4 s busy, 1 s of it our own, in 2 s
    assert load_between(begin, Clocks(12.0, 101.0, 4.5)) == 0  # ticks that were counted late
    assert load_between(begin, begin) == 0


def test_another_process_counts_and_this_one_does_not(burner: subprocess.Popen[bytes]) -> None:
    """Other work on this machine may add to it, so the own work is held against the clock of this process."""
    assert load_now(0.5) > 0.3  # one core, shared with whatever else runs here
    begin = read_clocks()
    while read_clocks().own - begin.own < 0.3:
        pass
    end = read_clocks()
    assert load_between(begin, end) == pytest.approx((end.busy - begin.busy - 0.3) / (end.wall - begin.wall), abs=0.1)


def test_a_reader_can_be_given() -> None:
    readings = iter([Clocks(0, 0, 0), Clocks(2, 1, 0)])
    assert load_now(0.0, lambda: next(readings)) == 0.5


@pytest.mark.parametrize(
    ("samples", "percent"),
    [([1.0] * 8, None), ([1.0] * 9, 0.0), ([2.0] * 10 + [9.0] * 10 + [2.5] * 10, 25.0), ([2, 2, 50] + [1] * 6, -50)],
)
def test_drift_is_that_of_the_medians_of_thirds(samples: list[float], percent: float | None) -> None:
    assert drift_pct(samples) == percent


def test_what_disturbs_is_named_with_its_limit() -> None:
    assert disturbances(CALM, max_load=0.25, max_drift_pct=10) == []
    assert disturbances({**CALM, "drift_pct": None}, 0.25, 10) == []
    (load,) = disturbances({**CALM, "load_during": 0.93}, 0.25, 10)
    assert load == "other processes used 0.9 cores during it (at most 0.25)"
    both = disturbances({**CALM, "load_after": 2.0, "drift_pct": 61.2}, 0.25, 10)
    assert both[0].startswith("other processes used 2.0 cores after it")
    assert both[1] == "times drifted by +61 % over its rounds (at most 10 %)"
    assert len(warning(both).splitlines()) == 1 and "--retime" in warning(both) and "; times drifted" in warning(both)
