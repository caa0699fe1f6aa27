"""The clock of work that is killed and goes on, and the hours of artifacts that were made without one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pqk.recipe.stages import device_hours
from pqk.store.device_hours import Clock, clock
from pqk.store.store import Artifact


def test_parts_add_up(tmp_path: Path) -> None:
    first = Clock(tmp_path)
    time.sleep(0.05)
    first.keep()  # too early
    assert not (tmp_path / "clock.json").exists()
    first.keep(now=True)
    time.sleep(0.05)  # lost with the process
    second = Clock(tmp_path)
    assert 0.05 <= second.seconds < first.seconds
    with pytest.raises(KeyError), clock(tmp_path):
        time.sleep(0.05)
        raise KeyError("its hours are spent")
    assert Clock(tmp_path).seconds >= 0.1
    (tmp_path / "clock.json").write_text("{")
    assert Clock(tmp_path).seconds < 0.05


def test_artifacts_without_a_clock(tmp_path: Path) -> None:
    made = Artifact(tmp_path, "k", "pruned", True, {"seconds": 7200.0})
    assert device_hours(made, {"device_s": 3600.0, "training_s": 9000.0}) == 1
    assert device_hours(made, {"training_s": 3600.0}) == 2  # the scan is in the store's own time
    assert device_hours(made, {"training_s": 9000.0}) == 2.5  # resumed: the store saw only the last part
    assert device_hours(made, {}) == 2  # calibration
