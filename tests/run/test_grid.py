"""`pqk bench grid` on a toy family: every combination is run, the front is the front, and bad input runs nothing."""

from __future__ import annotations

import pytest

from pqk.bench.grid import on_front
from pqk.cli.run_output import grid_of
from pqk.errors import PqkError


def test_front() -> None:
    rows = [
        {"value": 30.0, "p50_ms": 10.0, "better": "higher"},
        {"value": 40.0, "p50_ms": 20.0, "better": "higher"},
        {"value": 35.0, "p50_ms": 25.0, "better": "higher"},
        {"value": 40.0, "p50_ms": 20.0, "better": "higher"},
    ]
    assert [on_front(row, rows) for row in rows] == [True, True, False, True]
    lower = [{**row, "better": "lower"} for row in rows]
    assert [on_front(row, lower) for row in lower] == [True, False, False, False]


def test_values_are_read() -> None:
    assert grid_of(["a.b=1,4", "c=[1, 2],[3, 4]"]) == {"a.b": [1, 4], "c": [[1, 2], [3, 4]]}
    for wrong in (["a.b"], ["a.b="], ["a=1,2", "a=3"]):
        with pytest.raises(PqkError):
            grid_of(wrong)
