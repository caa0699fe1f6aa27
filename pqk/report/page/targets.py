"""Compares the measured values of a campaign's recipes with their targets: `targets_lines`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pqk.record.deliverable import spread
from pqk.record.ledger import Stat
from pqk.record.tsv import markdown_cell
from pqk.report.cells import DASH, interval_of
from pqk.report.drops import difference_of, interval_text
from pqk.stats.intervals import Interval

if TYPE_CHECKING:
    from pqk.report.page.recipes import Recipe

_CUTS = {"params_cut_pct": "params_M", "flops_cut_pct": "flops_G", "file_cut_pct": "size_MB"}
_RECORDS = {
    "x_own_f32": "speedup_vs_own_f32",
    "x_own_best_float": "speedup_vs_best_float",
    "flops_G": "flops_G",
    "hours": "gpu_hours",
}
_WORDS = {
    "drop_pct": "drop %",
    "params_cut_pct": "parameters cut, %",
    "flops_cut_pct": "FLOPs cut, %",
    "file_cut_pct": "files smaller by, %",
    "x_own_f32": "speed, x own f32",
    "x_own_best_float": "speed, x own best float",
    "flops_G": "GFLOPs",
    "hours": "device hours",
}


def targets_lines(targets: Sequence[Mapping[str, Any]], recipes: Sequence[Recipe]) -> list[str]:
    """Returns a table as Markdown, a row per target and precision of its card; nothing without targets.

    targets: `pqk.settings.plan.Target` as plain data. A value that was not measured is a dash, neither reached nor
    missed; a value whose interval contains the target is undecided.
    """
    if not targets:
        return []
    lines = ["## Targets", "", "| recipe | what | target | measured | reached |", "| --- | --- | --- | --- | --- |"]
    missed: dict[str, list[str]] = {}
    for target in targets:
        own = [recipe for recipe in recipes if recipe.card == target["card"]]
        for recipe in own or (None,):
            found = _measured(target, recipe, recipes)
            reached = None if found is None else _within(target, found)
            word = {True: "yes", False: "**no**", None: DASH if found is None else "undecided"}[reached]
            name = target["card"] if recipe is None else f"{recipe.card}, {recipe.precision}"
            what = _WORDS[target["measure"]]
            if target["against"]:
                what += f", {'beyond' if target['measure'] == 'drop_pct' else 'over'} that of {target['against']}"
            limit = f"at least {target['least']:g}" if target["least"] is not None else f"at most {target['most']:g}"
            cells = (markdown_cell(name), what, limit, _text(found), word)
            lines.append(f"| {' | '.join(cells)} |")
            if reached is False and target["if_missed"]:
                missed.setdefault(target["if_missed"], []).append(f"{name}: {what}")
    lines += ["", *(f"- {markdown_cell('; '.join(whose))}: {markdown_cell(why)}" for why, whose in missed.items())]
    return [*lines, ""] if missed else lines


def _measured(target: Mapping[str, Any], recipe: Recipe | None, recipes: Sequence[Recipe]) -> Stat | Interval | None:
    """Returns the measured value for a target; an Interval where one is known: drops, speeds with it in the records."""
    measure = target["measure"]
    if recipe is None:
        return None
    if not target["against"]:
        return _value(measure, recipe)
    base = next((r for r in recipes if r.card == target["against"]), None)
    if base is None:
        return None
    if measure == "drop_pct":
        found = difference_of(recipe.rows, base.rows, recipe.teachers, recipe.scores)
        return None if found is None else found.interval
    mine, other = _value(measure, recipe), _value(measure, base)
    if mine is None or other is None or not _mean(other):
        return None
    return Stat(_mean(mine) / _mean(other), None, 1)


def _value(measure: str, recipe: Recipe) -> Stat | Interval | None:
    if measure == "drop_pct":
        return None if recipe.drop is None else recipe.drop.interval
    if measure in _CUTS:
        ratio = recipe.ratios(_CUTS[measure])
        return None if ratio is None else Stat(100 * (1 - ratio.mean), ratio.std and 100 * ratio.std, ratio.n)
    found = recipe.over_records(_RECORDS[measure])
    ends = [ends for _, record, _ in recipe.runs if (ends := interval_of(record, _RECORDS[measure]))]
    if found is None or len(ends) < len(recipe.runs):
        return found
    # The mean of the ends is wider than the interval of a mean of independent timings, and never too narrow.
    low, high = (statistics.fmean(side) for side in zip(*ends, strict=True))
    return Interval(found.mean, low, high, found.n)


def _mean(found: Stat | Interval) -> float:
    return found.mean if isinstance(found, Stat) else found.value


def _within(target: Mapping[str, Any], found: Stat | Interval) -> bool | None:
    """Returns whether the target is reached; None (undecided) where the interval contains it."""
    low = high = _mean(found)
    if isinstance(found, Interval):
        if found.low is None or found.high is None:
            return None
        low, high = found.low, found.high
    if target["least"] is not None:
        return True if low >= target["least"] else False if high < target["least"] else None
    return True if high <= target["most"] else False if low > target["most"] else None


def _text(found: Stat | Interval | None) -> str:
    if isinstance(found, Interval):
        return interval_text(found)
    return DASH if found is None else f"{found.mean:.2f}{spread(found.std) if found.std else ''}"
