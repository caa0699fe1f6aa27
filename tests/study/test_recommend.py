"""The advice of a study follows from its rows by the rules that it states."""

from __future__ import annotations

from typing import Any

from pqk.study.weights.recommend import recommend
from pqk.study.weights.text import table


def row(name: str, error: float, size: int, seconds: float, speed: tuple[float, float] | None = None) -> dict[str, Any]:
    emulated = {"runtime": "c", "speedup": None}
    timed = speed and {"runtime": "a", "speedup": {"value": speed[0], "low": speed[1], "high": 2 * speed[0]}}
    unsure = {"runtime": "b", "speedup": {"value": 9.0, "low": 0.5, "high": 20.0}}  # never decides
    return {
        "name": name,
        "scheme": {},
        "outputs": {"a": {"relative_error": error}, "b": {"relative_error": None}, "c": {"relative_error": error / 2}},
        "size_bytes": size,
        "compression": 100 / size,
        "quantize_s": seconds,
        "engines": [emulated, unsure, timed] if timed else [emulated],
    }


def chosen(*rows: dict[str, Any]) -> dict[str, str | None]:
    return {advice.scenario: advice.chosen for advice in recommend(rows)}


def test_each_scenario_has_its_rule() -> None:
    rows = [
        row("exact", 0.001, 30, 2.0),
        row("small", 0.04, 16, 3.0),
        row("rough", 0.09, 12, 1.0),
        row("bad", 0.5, 1, 0.1),
    ]
    assert chosen(*rows) == {
        "production": "small",
        "edge device": "rough",
        "highest precision": "exact",
        "quick prototype": "rough",
    }


def test_a_faster_engine_is_chosen_only_where_it_is_faster_for_sure() -> None:
    small, fast, noisy = (
        row("small", 0.01, 10, 1.0),
        row("fast", 0.01, 30, 1.0, (1.4, 1.3)),
        row("n", 0.01, 30, 1, (1.9, 0.9)),
    )
    assert chosen(small, fast, noisy)["production"] == "fast"
    assert chosen(small, noisy)["production"] == "small"
    assert recommend([small, fast])[0].why.endswith("1.40x of the float engine in a")
    assert recommend([small])[0].why.endswith("no engine was timed")


def test_nothing_is_recommended_where_nothing_meets_the_rule() -> None:
    assert set(chosen(row("bad", 0.5, 1, 1.0)).values()) == {None, "bad"}
    assert set(chosen({**row("float", 0.0, 100, 0.0), "scheme": None}).values()) == {None}


def test_columns_of_a_table_stand_under_each_other() -> None:
    lines = table(["name", "x"], [["a", "1"], ["long name", "22.5"]])
    assert lines == ["name          x", "---------  ----", "a             1", "long name  22.5"]
