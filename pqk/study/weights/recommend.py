"""Recommends a scheme for each scenario of a study by a stated rule on measured rows: `recommend`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
CLOSE, USABLE = 0.05, 0.10
"""Limits of the worst relative error over all outputs: excellent in the guide's ranges, and twice that."""


@dataclass(frozen=True)
class Advice:
    """What a scenario is best served with. chosen: name of a row; None when no row meets the rule."""

    scenario: str
    rule: str
    chosen: str | None
    why: str


def worst_error(row: Row) -> float | None:
    """Returns the largest relative error over the outputs (a ratio); None where there is none."""
    found = [each["relative_error"] for each in row["outputs"].values() if each["relative_error"] is not None]
    return max(found, default=None)


def recommend(rows: Sequence[Row]) -> list[Advice]:
    """Returns the advice for four scenarios. rows: all of a study, the float model among them is never chosen."""
    known = [row for row in rows if row["scheme"] is not None and worst_error(row) is not None]
    close = [row for row in known if _error(row) <= CLOSE]
    usable = [row for row in known if _error(row) <= USABLE]
    faster = [row for row in close if _sure(row)]

    def size(row: Row) -> float:
        return float(row["size_bytes"])

    return [
        _advice(
            "production",
            f"worst relative error at most {CLOSE:.0%}; the engine that gains most over its runtime's float "
            "engine where one is faster for sure (interval above 1), else the smallest file",
            faster or close,
            (lambda row: -_ratio(_sure(row))) if faster else size,
        ),
        _advice("edge device", f"worst relative error at most {USABLE:.0%}; the smallest file", usable, size),
        _advice("highest precision", "the smallest worst relative error", known, _error),
        _advice(
            "quick prototype",
            f"worst relative error at most {USABLE:.0%}; the shortest quantization",
            [row for row in usable if row["quantize_s"] is not None],
            lambda row: float(row["quantize_s"]),
        ),
    ]


def _advice(scenario: str, rule: str, rows: Sequence[Row], key: Callable[[Row], float]) -> Advice:
    if not rows:
        return Advice(scenario, rule, None, "no scheme meets the rule")
    best = min(rows, key=key)
    timed = [engine for engine in best["engines"] if engine["speedup"] is not None]
    shown = _sure(best) or timed
    speed = "no engine was timed"
    if shown:
        engine = max(shown, key=lambda found: _ratio([found]))
        speed = f"{_ratio([engine]):.2f}x of the float engine in {engine['runtime']}"
    return Advice(
        scenario,
        rule,
        best["name"],
        f"worst relative error {_error(best):.2%}, {best['compression']:.2f}x smaller, {speed}",
    )


def _error(row: Row) -> float:
    found = worst_error(row)
    assert found is not None
    return found


def _sure(row: Row) -> list[Mapping[str, Any]]:
    """Returns the engines of a row that are faster than their float engine for sure."""
    found = [engine for engine in row["engines"] if engine["speedup"] is not None]
    return [engine for engine in found if engine["speedup"]["low"] is not None and engine["speedup"]["low"] > 1]


def _ratio(engines: Sequence[Mapping[str, Any]]) -> float:
    """Returns the largest speed-up."""
    return max(float(engine["speedup"]["value"]) for engine in engines)
