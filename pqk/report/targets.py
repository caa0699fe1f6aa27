"""What the recipes of a campaign were to reach, and what they reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pqk.record.freeze import spread
from pqk.record.ledger import Stat
from pqk.record.tsv import markdown_cell
from pqk.report.table import DASH

if TYPE_CHECKING:
    from pqk.report.page import Recipe

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
    """A table as Markdown, a row per target and precision of its card; nothing without targets.

    targets: those of `pqk.spec.plan.Target` as plain data. What was not measured is a dash, neither reached nor missed.
    """
    if not targets:
        return []
    lines = ["## Targets", "", "| recipe | what | target | measured | reached |", "| --- | --- | --- | --- | --- |"]
    missed: dict[str, list[str]] = {}
    for target in targets:
        own = [recipe for recipe in recipes if recipe.card == target["card"]]
        for recipe in own or (None,):
            found = _measured(target, recipe, recipes)
            reached = None if found is None else _within(target, found.mean)
            word = DASH if reached is None else "yes" if reached else "**no**"
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


def _measured(target: Mapping[str, Any], recipe: Recipe | None, recipes: Sequence[Recipe]) -> Stat | None:
    mine = _value(target["measure"], recipe)
    if mine is None or not target["against"]:
        return mine
    base = _value(target["measure"], next((r for r in recipes if r.card == target["against"]), None))
    if base is None:
        return None
    if target["measure"] == "drop_pct":
        return Stat(mine.mean - base.mean, None, mine.n)
    return Stat(mine.mean / base.mean, None, mine.n) if base.mean else None


def _value(measure: str, recipe: Recipe | None) -> Stat | None:
    if recipe is None:
        return None
    if measure == "drop_pct":
        return recipe.drop
    if measure in _CUTS:
        ratio = recipe.ratios(_CUTS[measure])
        return None if ratio is None else Stat(100 * (1 - ratio.mean), ratio.std and 100 * ratio.std, ratio.n)
    return recipe.over_records(_RECORDS[measure])


def _within(target: Mapping[str, Any], value: float) -> bool:
    return bool(value >= target["least"] if target["least"] is not None else value <= target["most"])


def _text(found: Stat | None) -> str:
    return DASH if found is None else f"{found.mean:.2f}{spread(found.std) if found.std else ''}"
