"""What `pqk optimize` tries, cheapest first, and what it need not try: pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pqk.stats.intervals import Interval

LETTERS = ("T", "Q", "K", "P")
"""Letters in the order of their cost: what trains comes last."""
_SHARES = (0.5, 0.3, 0.0)
"""Shares of merged tokens, the fastest first."""
_ORDER = ("P", "K", "T", "Q")


@dataclass(frozen=True)
class Point:
    """A recipe and its settings. Two points are equal when both are."""

    letters: tuple[str, ...]
    tokens: float | None = None  # of letter T

    @property
    def name(self) -> str:
        """Returns 'T→Q, tail and 50 % of the tokens'."""
        letters = "→".join(self.letters)
        if self.tokens is None:
            return letters
        return f"{letters}, tail" + (f" and {100 * self.tokens:g} % of the tokens" if self.tokens else "")

    @property
    def short(self) -> str:
        """Returns 'T50→Q', for a figure."""
        share = "" if self.tokens is None else f"{100 * self.tokens:g}"
        return "→".join(letter + (share if letter == "T" else "") for letter in self.letters)

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the settings that are laid over the card's."""
        return {} if self.tokens is None else {"reduce.tokens": self.tokens}

    @property
    def parts(self) -> list[Point]:
        """Returns the points of one letter that this one chains."""
        if len(self.letters) == 1:
            return [self]
        return [Point((letter,), self.tokens if letter == "T" else None) for letter in self.letters]


@dataclass(frozen=True)
class Found:
    """A measured point. drop: on validation samples, in percent. speedup: against the Teacher in f32; faster: against
    its best float precision. guards: losses of the guard metrics, in percent. ms: the median of a sample. foretold:
    the speed against the Teacher in f32 that was predicted before; None without a prediction.
    """

    point: Point
    drop: Interval
    speedup: Interval
    faster: Interval
    guards: Mapping[str, Interval] = field(default_factory=dict)
    ms: float = 0.0
    foretold: float | None = None

    def within(self, max_drop: float, most: float) -> bool:
        """Returns whether drop and guard metrics are within their limits, by their values."""
        return self.drop.value <= max_drop and all(lost.value <= most for lost in self.guards.values())


class Status(StrEnum):
    """Why a point was not measured."""

    IMPOSSIBLE = "impossible here"
    NEEDLESS = "needless"
    RULED_OUT = "ruled out by prediction"
    NO_BUDGET = "budget used up"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Skipped:
    """A point that was not measured, and why. foretold: see `Found`."""

    point: Point
    status: Status
    why: str
    foretold: float | None = None


def points_of(letters: Sequence[str]) -> list[Point]:
    """Returns all points of some letters: what needs no training first, and short recipes before long ones.

    T runs the tail of dense heads on a quarter of the grid and merges half, a third or none of the tokens.
    """
    found = []
    trains = [(), *((letter,) for letter in ("K", "P") if letter in letters)]
    trains += [("P", "K")] if {"P", "K"} <= set(letters) else []
    for trained in trains:
        for spared in (False, True) if "T" in letters else (False,):
            for quantized in (False, True) if "Q" in letters else (False,):
                recipe = (*trained, *(("T",) if spared else ()), *(("Q",) if quantized else ()))
                if recipe:
                    found += [Point(recipe, share) for share in _SHARES] if spared else [Point(recipe)]
    cost = {letter: 10**place for place, letter in enumerate(LETTERS)}
    return sorted(found, key=lambda point: sum(cost[letter] for letter in point.letters))


def predicted(point: Point, known: Mapping[Point, Found]) -> float | None:
    """Returns the product of the measured speeds of a point's parts against the Teacher in f32; None without one."""
    speed = 1.0
    for part in point.parts:
        if part not in known:
            return None
        speed *= known[part].speedup.value
    return speed


def needless(
    point: Point, known: Mapping[Point, Found], best: Found | None, max_drop: float, most: float
) -> str | None:
    """Returns why a point need not be measured, or None.

    A part alone, or fewer merged tokens, that is above a limit; a training that comes with the others may bring that
    back, so then it decides nothing. Or a product of its parts' speeds that is below what was measured already. most:
    limit of the guard metrics.
    """
    for other in known.values():
        part = other.point in point.parts and not {"K", "P"} & (set(point.letters) - set(other.point.letters))
        fewer = other.point.letters == point.letters and (other.point.tokens or 0) < (point.tokens or 0)
        if not (part or fewer):
            continue
        if other.drop.value > max_drop:
            return f"{other.point.name} alone drops {other.drop.value:.2f} %"
        for name, lost in other.guards.items():
            if lost.value > most:
                return f"{other.point.name} alone loses {lost.value:.1f} % in {name}"
    speed = predicted(point, known) if len(point.letters) > 1 else None
    if best is not None and speed is not None and speed <= best.speedup.value:
        return f"its parts predict {speed:.2f}x, and {best.point.name} has {best.speedup.value:.2f}x"
    return None


def too_slow(foretold: float | None, best: Found | None, error_pct: float) -> str | None:
    """Returns why a point cannot be the fastest although its predicted speed may err by so many percent, or None."""
    if foretold is None or best is None:
        return None
    most = foretold * (1 + error_pct / 100)
    if most >= best.speedup.value:
        return None
    return (
        f"{foretold:.2f}x is predicted, {most:.2f}x with its error of {error_pct:g} %, and {best.point.name} has "
        f"{best.speedup.value:.2f}x"
    )


def front(found: Sequence[Found]) -> list[Found]:
    """Returns the points that no other one beats in drop and speed at once, the fastest last."""
    ranked = sorted(found, key=lambda one: (-one.speedup.value, one.drop.value))
    kept: list[Found] = []
    for one in ranked:
        if not kept or one.drop.value < kept[-1].drop.value:
            kept.append(one)
    return kept[::-1]
