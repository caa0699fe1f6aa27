"""`pqk bench grid`: its front, its values and its figure; test_families.py runs it on a toy family."""

from __future__ import annotations

import pytest

from pqk.bench.grid import _figure, on_front, share_in_graphs
from pqk.cli.run_output import grid_of, point_of
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


def test_a_point_is_read() -> None:
    assert point_of("model='a b' c.d=[1, 2]".replace(", ", ",")) == {"model": "a b", "c.d": [1, 2]}
    for wrong in ("", "a", "model=1", "a='"):
        with pytest.raises(PqkError):
            point_of(wrong)


def test_the_figure_has_plain_numbers_and_marks_disturbed_times() -> None:
    row = {"row": "teacher f32", "metric": "ap", "better": "higher", "low": None, "high": None, "front": True}
    points = zip((1, 4, 20), (40.0, 90.0, 500.0), (False, True, False), strict=True)
    rows = [{**row, "s.steps": n, "value": 48.0 + n, "p50_ms": ms, "disturbed": off} for n, ms, off in points]
    (axes,) = _figure(rows, ["s.steps"]).axes
    axes.figure.draw_without_rendering()
    shown = [label.get_text() for label in axes.get_xticklabels(which="both")]
    assert "100" in shown and all(text.replace(".", "").isdigit() for text in shown if text)
    assert axes.get_xlabel().endswith("labels: steps; hollow: disturbed")
    faces = axes.collections[0].get_facecolors()
    assert [tuple(face) == (1, 1, 1, 1) for face in faces] == [False, True, False]


def test_the_share_of_the_graphs_is_taken_round_by_round() -> None:
    samples = {"pair": [10.0, 100.0, 20.0], "a": [4.0, 50.0, 8.0], "b": [2.0, 3.0, 20.0, 10.0, 4.0, 6.0]}
    assert share_in_graphs(samples) == 0.9  # of 0.9, 0.8 and 0.9
    assert share_in_graphs({"pair": [10.0, 10.0], "a": [1.0, 2.0, 3.0]}) is None
