"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# a machine with other work on it is slow, and that is no fault of what is tested
settings.register_profile("pqk", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pqk")


def pytest_configure() -> None:
    """Test processes that run side by side share the cores: two thread pools that spin on the same ones starve."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores, count = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    mine = cores[int(worker.removeprefix("gw")) % len(cores) :: count]
    os.sched_setaffinity(0, mine)  # the processes that tests start inherit it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that run whole commands, and puts their files first: the last ones decide how long a process waits.

    Such a test, or a fixture of it, uses the function `pqk` or `start` of run_toys.
    """
    for item in items:
        module, fixtures = getattr(item, "module", None), getattr(item, "fixturenames", ())
        if any(hasattr(module, name) for name in ("pqk", "start")) or "finished" in fixtures:
            item.add_marker("whole")
    folder = Path(__file__).parent / "run"
    items.sort(key=lambda item: not item.path.is_relative_to(folder))


@pytest.fixture
def make_record() -> Callable[..., dict[str, Any]]:
    """A valid record with the fewest known fields, and whatever the test adds."""
    from pqk.record.schema import empty_record

    def make(**known: Any) -> dict[str, Any]:
        least = {"exp_id": "B1", "role": "candidate", "status": "ok", "datetime": "2025-10-08T12:00:00Z"}
        return {**empty_record(), **least, **known}

    return make
