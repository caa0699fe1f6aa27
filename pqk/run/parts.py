"""What a cut bought, part by part of the network: parameters, FLOPs, and the time that its kernels take.

Fewer FLOPs need not mean less time: narrow matrices fill vector units badly, and where memory is the limit nothing is
won at all. So the float engines of the Teacher and of the smaller model are profiled in turns in one process, and each
part's time is held against its own.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pqk.files import write_json
from pqk.run import worker
from pqk.run.prepare import Model
from pqk.run.stages import Context, identity, sources_of
from pqk.run.variants import Runner, Variant

ROUNDS = 5
_CODE = ("pqk.run.parts",)
REST = "everything else"
KINDS = ("encoder attention", "encoder MLPs", "decoder attention", "decoder MLPs", "heads", REST)
_STACKS = {"enc": "encoder", "dec": "decoder"}
_BLOCK = re.compile(r"\b(enc|dec)_blocks(2?)\.(\d+)[./](attn|cross_attn|mlp)\b")
_HEAD = re.compile(r"\bdownstream_head[12]\b")


@dataclass(frozen=True)
class Bought:
    """A part, or a kind of parts, in the Teacher and in the smaller model.

    name: such as 'enc_blocks.0.mlp', or a kind. kind: one of KINDS. params: numbers of weights. flops: of one pair,
    two per multiply-add. time_ms: of its kernels for one pair, the median of the rounds; None where nothing is timed.
    ratio: the second time over the first within a round: least, median and greatest of the rounds.
    """

    name: str
    kind: str
    params: tuple[int, int]
    flops: tuple[float, float]
    time_ms: tuple[float, float] | None
    ratio: tuple[float, float, float] | None

    @property
    def cut(self) -> bool:
        """Whether weights or FLOPs of it went."""
        return self.params[1] < self.params[0] or self.flops[1] < self.flops[0]

    @property
    def faster(self) -> bool | None:
        """Whether it was faster in every round (by chance alone 1 in 32 parts would be, with 5); None: not timed."""
        return None if self.ratio is None else self.ratio[2] < 1.0


def part_of(name: str) -> str | None:
    """The part that a weight ('dec_blocks.1.mlp.fc1.bias') or a graph's node ('/dec_blocks.1/mlp/fc1/Add') is of.

    Blocks' attentions and MLPs, and heads; REST for what lies elsewhere, None for a name that tells nothing.
    """
    if found := _BLOCK.search(name):
        stack, twin, number, what = found.groups()
        return f"{stack}_blocks{twin}.{number}.{what}"
    if found := _HEAD.search(name):
        return found.group()
    return REST if "/" in name or "." in name else None


def kind_of(part: str) -> str:
    """The kind of a part of `part_of`."""
    if part.startswith("downstream_head"):
        return "heads"
    stack = _STACKS.get(part[:3])
    return REST if stack is None else f"{stack} {'MLPs' if part.endswith('.mlp') else 'attention'}"


def profile(request: Mapping[str, Any]) -> dict[str, Any]:
    """The worker's side: parameters, FLOPs and times of every part of two models.

    Request: variants (two) and models (where `load_model` finds them), rounds. Returns sides, for each model its parts
    as {name: {params, flops, time_ms}}; time_ms has one value per round, milliseconds per pair, and is null where the
    engines do not run. Every image is encoded once per pair and side: an encoder's figures count twice.
    """
    variants = [Variant.from_json(v) for v in request["variants"]]
    sides = [_weights(path) for path in request["models"]]
    runners = [Runner(v) for v in variants]
    timed = all(runner.measured == "engine" for runner in runners)
    for number in range(-1, request["rounds"] if timed else 0):  # the first run of a compiled model is slow
        for turn in range(2):
            side = (number + turn) % 2
            found = _profiled(runners[side])
            for part, (flops, spent) in found.items():
                entry = sides[side].setdefault(part, _empty())
                entry["flops"] = flops
                if number >= 0:
                    entry["time_ms"].append(spent)
    for runner in runners:
        runner.close()
    for parts in sides:
        for entry in parts.values():
            missing = request["rounds"] - len(entry["time_ms"])  # weights without kernels of their own, such as tables
            entry["time_ms"] = [*entry["time_ms"], *[0.0] * missing] if timed else None
    return {"sides": sides}


def _empty() -> dict[str, Any]:
    return {"params": 0, "flops": 0.0, "time_ms": []}


def _weights(path: str) -> dict[str, dict[str, Any]]:
    from pqk.models import load_model

    found: dict[str, dict[str, Any]] = {}
    for key, weight in load_model(path).named_parameters():
        found.setdefault(part_of(key) or REST, _empty())["params"] += weight.numel()
    return found


def _profiled(runner: Runner) -> dict[str, tuple[float, float]]:
    """FLOPs and milliseconds of each part for one pair. A kernel whose name tells nothing is of the part before it."""
    found: dict[str, tuple[float, float]] = {}
    for graph, kernels in runner.kernels().items():
        times = 2 if graph == "encoder" else 1
        part = REST
        for kernel in kernels:
            known = (part_of(name) for name in (kernel.name, *kernel.originals))
            part = next((name for name in known if name), part)
            flops, spent = found.get(part, (0.0, 0.0))
            found[part] = flops + times * kernel.flops, spent + times * kernel.time_us / 1e3
    return found


def bought(ctx: Context, before: Variant, after: Variant, teacher: Model, smaller: Model) -> list[Bought]:
    """Every kind of parts in the order of KINDS, then every part that both models have; measured or reused.

    before, after: the variants of teacher and smaller, in one precision on one backend.
    Parts of a stack whose number of blocks differs are left out, as blocks are counted anew; their kinds are not.
    """
    variants, models = [before, after], [teacher, smaller]

    def make(folder: Path) -> None:
        request = {
            "variants": [v.to_json() for v in variants],
            "models": [m.path for m in models],
            "rounds": ROUNDS,
        }
        write_json(folder / "parts.json", worker.call("parts", request))

    inputs = {
        "variants": [identity(ctx, v, None) for v in variants],
        "models": [m.sha256 for m in models],
        "rounds": ROUNDS,
    }
    made = ctx.make("parts", (*_CODE, *sources_of(*variants)), inputs, make)
    return summed(*json.loads((made.path / "parts.json").read_text())["sides"])


def summed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Bought]:
    """See `bought`. before, after: parts as `profile` returns them."""
    rows = []
    for kind in KINDS:
        sides = [[entry for part, entry in side.items() if kind_of(part) == kind] for side in (before, after)]
        if any(sides):
            rows.append(_row(kind, kind, *sides))
    moved = {kind for kind in KINDS if _names(before, kind) != _names(after, kind)}
    for part in before:
        kind = kind_of(part)
        if part != REST and not any(kind.split()[0] == other.split()[0] for other in moved):
            rows.append(_row(part, kind, [before[part]], [after[part]]))
    return rows


def _names(side: Mapping[str, Any], kind: str) -> set[str]:
    return {part for part in side if kind_of(part) == kind}


def _row(name: str, kind: str, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Bought:
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
    return Bought(name, kind, total("params"), total("flops"), times, ratio)


def as_data(rows: Sequence[Bought]) -> list[dict[str, Any]]:
    """Plain data for JSON, with `faster`."""
    return [{**asdict(row), "faster": row.faster} for row in rows]


def clause(rows: Sequence[Bought]) -> str | None:
    """One clause for the notes of a record: what was cut without becoming faster; None when nothing was timed.

    'kernels of the parts that were cut, against the Teacher's: 0.52x in encoder MLPs; no faster: heads (1.01x)'.
    """
    kinds = [row for row in rows if row.name == row.kind and row.cut and row.ratio is not None]
    if not kinds:
        return None
    won = ", ".join(f"{row.ratio[1]:.2f}x in {row.name}" for row in kinds if row.ratio and row.faster)
    lost = ", ".join(f"{row.name} ({row.ratio[1]:.2f}x)" for row in kinds if row.ratio and not row.faster)
    begin = "kernels of the parts that were cut, against the Teacher's: "
    return begin + "; ".join(filter(None, [won, f"no faster: {lost}" if lost else ""]))
