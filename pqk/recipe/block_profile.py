"""Compares each part of the Teacher with the same part of a smaller model: parameters, FLOPs, and kernel time.

Fewer FLOPs do not always save time: narrow matrices use vector units poorly, and where memory is the limit no time is
saved at all. So the float engines of the Teacher and of the smaller model are profiled in turns in one process, and
each part is compared with itself.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pqk.engines.variant import Variant
from pqk.files import write_json
from pqk.measure.block_profile import REST
from pqk.recipe.experiment import Experiment
from pqk.recipe.request import Model
from pqk.recipe.stages import LOADER_CODE, Context, fed_key, identity, parts_code, sources_of
from pqk.store import worker

ROUNDS = 5
_CODE = ("pqk.measure.block_profile", *LOADER_CODE)


@dataclass(frozen=True)
class PartChange:
    """Sizes and times of a part, or of a kind of parts: first in the Teacher, then in the smaller model.

    name: such as 'enc_blocks.0.mlp', or a kind. kind: one of the family's. params: numbers of weights. flops: of one
    sample, two per multiply-add. time_ms: of its kernels for one sample, the median of the rounds; None where nothing
    was timed. ratio: the second time divided by the first within a round: minimum, median and maximum of the rounds.
    """

    name: str
    kind: str
    params: tuple[int, int]
    flops: tuple[float, float]
    time_ms: tuple[float, float] | None
    ratio: tuple[float, float, float] | None

    @property
    def cut(self) -> bool:
        """Returns whether the part lost weights or FLOPs."""
        return self.params[1] < self.params[0] or self.flops[1] < self.flops[0]

    @property
    def faster(self) -> bool | None:
        """Returns whether the part was faster in every round; None when it was not timed.

        With 5 rounds, 1 in 32 parts would be by chance alone.
        """
        return None if self.ratio is None else self.ratio[2] < 1.0


def changes(
    ctx: Context, experiment: Experiment, before: Variant, after: Variant, teacher: Model, smaller: Model
) -> list[PartChange]:
    """Returns the changes of each kind of parts in the order of the family's KINDS, then of each part in both models.

    before, after: the variants of teacher and smaller, in one precision on one backend.
    Where the two models have different numbers of blocks in a stack, the blocks are renumbered: the stack's parts are
    left out, their kinds are not.
    """
    variants, models = [before, after], [teacher, smaller]

    def make(folder: Path) -> None:
        request = {
            **experiment.fed,
            "variants": [v.to_json() for v in variants],
            "models": [m.path for m in models],
            "rounds": ROUNDS,
        }
        write_json(folder / "parts.json", worker.call("parts", request))

    inputs = {
        "variants": [identity(ctx, v, None) for v in variants],
        "models": [m.sha256 for m in models],
        "rounds": ROUNDS,
        **fed_key(experiment),
    }
    made = ctx.make(
        "parts",
        (*_CODE, *parts_code(experiment.family, "settings", "predict", "data"), *sources_of(*variants)),
        inputs,
        make,
    )
    kinds = (*experiment.family.settings_part().KINDS, REST)
    before_parts, after_parts = json.loads((made.path / "parts.json").read_text())["sides"]
    return summed(before_parts, after_parts, kinds)


def summed(before: Mapping[str, Any], after: Mapping[str, Any], kinds: Sequence[str]) -> list[PartChange]:
    """Returns the rows of `changes`. before, after: parts as `profile` returns them."""
    rows = []
    for kind in kinds:
        sides = [[entry for entry in side.values() if entry["kind"] == kind] for side in (before, after)]
        if any(sides):
            rows.append(_row(kind, kind, *sides))
    moved = {kind for kind in kinds if _names(before, kind) != _names(after, kind)}
    for part in before:
        kind = before[part]["kind"]
        if part != REST and not any(kind.split()[0] == other.split()[0] for other in moved):
            rows.append(_row(part, kind, [before[part]], [after[part]]))
    return rows


def _names(side: Mapping[str, Any], kind: str) -> set[str]:
    return {part for part, entry in side.items() if entry["kind"] == kind}


def _row(name: str, kind: str, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> PartChange:
    def total(key: str) -> tuple[Any, Any]:
        return sum(entry[key] for entry in before), sum(entry[key] for entry in after)

    times: tuple[float, float] | None = None
    ratio: tuple[float, float, float] | None = None
    if all(entry["time_ms"] is not None for entry in (*before, *after)):
        rounds = [
            [sum(values) for values in zip(*(e["time_ms"] for e in side), strict=True)] for side in (before, after)
        ]
        first, second = (statistics.median(values) if values else 0.0 for values in rounds)
        times = first, second
        ratios = [b / a for a, b in zip(*rounds, strict=True) if a > 0] if all(rounds) else []
        if ratios:
            ratio = min(ratios), statistics.median(ratios), max(ratios)
    return PartChange(name, kind, total("params"), total("flops"), times, ratio)


def as_data(rows: Sequence[PartChange]) -> list[dict[str, Any]]:
    """Returns the rows as plain data for JSON, with `faster`."""
    return [{**asdict(row), "faster": row.faster} for row in rows]


def clause(rows: Sequence[PartChange]) -> str | None:
    """Returns a clause for the notes of a record: which cut parts are faster, and which are not.

    'kernel time of the cut parts, relative to the Teacher: 0.52x in MLPs; no faster: heads (1.01x)'. None when nothing
    was cut or timed.
    """
    kinds = [row for row in rows if row.name == row.kind and row.cut and row.ratio is not None]
    if not kinds:
        return None
    won = ", ".join(f"{row.ratio[1]:.2f}x in {row.name}" for row in kinds if row.ratio and row.faster)
    lost = ", ".join(f"{row.name} ({row.ratio[1]:.2f}x)" for row in kinds if row.ratio and not row.faster)
    begin = "kernel time of the cut parts, relative to the Teacher: "
    return begin + "; ".join(filter(None, [won, f"no faster: {lost}" if lost else ""]))
