"""Says where the time of a card's float and int8 engines goes, and why int8 is as fast as it is here: `pqk profile`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import Kernel, Precision
from pqk.bench.engine import ceilings_of
from pqk.engines.calls import Counting, Engines, compiled
from pqk.engines.variant import Variant
from pqk.errors import PqkError
from pqk.files import temporary_folder, write_json
from pqk.measure.noise import load_now
from pqk.recipe.candidate import Candidate
from pqk.recipe.recover import choose
from pqk.recipe.request import Request
from pqk.report.style import PALETTE, blank_figure, write_figure
from pqk.stats.latency import percentile
from pqk.store.store import OnEvent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = ("convolutions", "linear layers", "attention", "layout changes", "the rest")
"""What kernels do. The rest: norms, activations, resizes, additions, quantizers of activations."""
_LAYOUT = {"Reorder", "Transpose", "Reshape", "Concat", "Split", "Gather", "Slice", "StridedSlice", "Convert", "Copy"}
_LAYOUT |= {"ReorderInput", "ReorderOutput", "Squeeze", "Unsqueeze", "Expand"}  # as ONNX Runtime names them
_CONVOLUTIONS = {"Convolution", "Deconvolution", "GroupConvolution", "conv"}
REST = "everything else"
_SHOWN = 5


@dataclass(frozen=True)
class Spent:
    """What one kernel of an engine does in one sample: graph and part of the network, class, FLOPs, milliseconds."""

    graph: str
    name: str
    part: str
    kind: str
    does: str
    implementation: str
    precision: str
    flops: float
    ms: float


def profile(request: Request, rounds: int, root: Path, on_event: OnEvent, say: Callable[[str], None]) -> dict[str, Any]:
    """Makes or reuses a card's candidate, and times every kernel of it and of its own f32 model, in turns.

    Returns plain JSON: kernels of both, their sums by kind of part and by class, the machine's largest rates, and
    sentences. Raises PqkError for a card that does not quantize and for engines that are emulated.
    """
    candidate = choose(request, root, on_event, say, rollback=False)[0].candidate
    lowered = candidate.variants[-1]
    if lowered.precision is not Precision.INT8:
        raise PqkError(
            f"card {candidate.experiment.card.id} quantizes nothing, so there is no int8 to compare with float"
        )
    plain = next(v for v in candidate.floats() if v.precision is Precision.F32)
    sides = _kernels(candidate, (plain, lowered), rounds)
    rates = _rates(candidate)
    kinds = (*candidate.experiment.family.settings_part().KINDS, REST)
    found = {
        "card": candidate.experiment.card.id,
        "model": lowered.name,
        "backend": lowered.backend,
        "rounds": rounds,
        "rates_gflops_per_s": rates,
        "parts": _sums(sides, kinds, lambda spent: spent.kind),
        "classes": _sums(sides, CLASSES, lambda spent: spent.does),
        "kernels": {name: [vars(spent) for spent in side] for name, side in zip(("f32", "int8"), sides, strict=True)},
    }
    return found | {"why": why(sides, rates)}


def _kernels(candidate: Candidate, variants: Sequence[Variant], rounds: int) -> tuple[list[Spent], list[Spent]]:
    """Returns the kernels of both variants, each with the median of its times over the rounds."""
    experiment = candidate.experiment
    of, workload = experiment.family, experiment.workload
    part_of = of.settings_part().part_of
    engines = [compiled(variant) for variant in variants]
    try:
        if any(each.measured != "engine" for each in engines):
            raise PqkError("pqk profile needs times, but these engines are emulated: they have none")
        counting = Counting(engines[0])
        of.predict_part().predict(counting, of.data_part().example(workload), workload, 0)
        runs: tuple[list[list[Spent]], list[list[Spent]]] = ([], [])
        for number in range(-1, rounds):  # the first run of a compiled model is slow
            for turn in range(2):
                side = (number + turn) % 2
                spent = _spent(engines[side], counting.calls, part_of)
                if number >= 0:
                    runs[side].append(spent)
    finally:
        for each in engines:
            each.close()
    return _medians(runs[0]), _medians(runs[1])


def _spent(engines: Engines, calls: Mapping[str, int], part_of: Callable[[str], tuple[str, str] | None]) -> list[Spent]:
    """Returns the kernels of one run. A kernel without a known name counts for the part of the one before it."""
    found = []
    for graph, kernels in engines.kernels().items():
        part = (REST, REST)
        for kernel in kernels:
            named = (part_of(name) or _elsewhere(name) for name in (kernel.name, *kernel.originals))
            part = next((one for one in named if one), part)
            flops, ms = calls[graph] * kernel.flops, calls[graph] * kernel.time_us / 1e3
            found.append(
                Spent(graph, kernel.name, *part, _does(kernel), kernel.implementation, kernel.precision, flops, ms)
            )
    return found


def _elsewhere(name: str) -> tuple[str, str] | None:
    return (REST, REST) if "/" in name or "." in name else None


def _does(kernel: Kernel) -> str:
    if kernel.type in _CONVOLUTIONS:
        return "linear layers" if "1x1" in kernel.implementation and "MatMul" in kernel.name else "convolutions"
    if kernel.flops > 0:
        return "linear layers" if kernel.type == "FullyConnected" else "attention"
    return "layout changes" if kernel.type in _LAYOUT else "the rest"


def _medians(runs: list[list[Spent]]) -> list[Spent]:
    return [
        Spent(**{**vars(first), "ms": percentile([run[place].ms for run in runs], 50)})
        for place, first in enumerate(runs[0])
    ]


def _rates(candidate: Candidate) -> dict[str, dict[str, float]]:
    """Returns the largest rates of this machine in GFLOP/s, by precision and layer.

    They are measured once and kept, and again on a quiet machine where other work was in their way.
    """
    most = candidate.experiment.evaluation.efficiency.max_load

    def make(folder: Path) -> None:
        load = load_now()
        with temporary_folder("rates") as scratch:
            write_json(folder / "rates.json", {"rates": ceilings_of(scratch), "load": load})

    def stale(folder: Path) -> bool:
        return json.loads((folder / "rates.json").read_text())["load"] > most and load_now() <= most

    inputs = {"machine": dict(candidate.ctx.machine)}
    made = candidate.ctx.make("rates", ("pqk.bench.engine_child",), inputs, make, stale=stale)
    found: dict[str, dict[str, float]] = json.loads((made.path / "rates.json").read_text())["rates"]
    return found


def _sums(
    sides: Sequence[Sequence[Spent]], names: Iterable[str], key: Callable[[Spent], str]
) -> dict[str, dict[str, float]]:
    found = {}
    for name in names:
        mine = [[spent for spent in side if key(spent) == name] for side in sides]
        if any(mine):
            flops, ms = [sum(s.flops for s in side) for side in mine], [sum(s.ms for s in side) for side in mine]
            found[name] = {"gflop": flops[0] / 1e9, "f32_ms": ms[0], "int8_ms": ms[1]}
    return found


def why(sides: Sequence[Sequence[Spent]], rates: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns sentences on the speed of int8: what it gives, where its time goes, and the parts that are no faster."""
    plain, lowered = (sum(spent.ms for spent in side) for side in sides)
    quantized = [spent for spent in sides[1] if spent.precision == "int8" and spent.flops > 0]
    ms, flops = sum(s.ms for s in quantized), sum(s.flops for s in quantized)
    said = [f"int8 takes {lowered:.0f} ms where f32 takes {plain:.0f}: {plain / lowered:.2f}x, summed over kernels"]
    if ms:
        rate, largest = flops / ms / 1e6, max(rates["int8"].values())
        said.append(
            f"{100 * ms / lowered:.0f} % of its time are int8 kernels, at {rate:.0f} GFLOP/s, "
            f"{100 * rate / largest:.0f} % of the largest int8 rate here ({largest:.0f}; f32: "
            f"{max(rates['f32'].values()):.0f})"
        )
    floats = [spent for spent in sides[1] if spent.precision != "int8" and spent.flops > 0]
    rest = lowered - ms - sum(s.ms for s in floats)
    layout = sum(s.ms for s in sides[1] if s.does == "layout changes")
    said.append(
        f"{100 * sum(s.ms for s in floats) / lowered:.0f} % are products that stay in float, "
        f"{100 * rest / lowered:.0f} % has no products; changes of layout are {100 * layout / lowered:.0f} %"
    )
    slower = sorted(_no_faster(sides), key=lambda row: row[1] - row[2])[:_SHOWN]
    if slower:
        listed = ", ".join(f"{part} ({after:.1f} ms, {before:.1f} in f32)" for part, before, after in slower)
        said.append(f"no faster than in f32: {listed}")
    bound = sum(min(s.flops / max(rates["f32"].values()) / 1e6, s.ms) for s in floats) + rest
    bound += flops / max(rates["int8"].values()) / 1e6 if ms else 0.0
    said.append(f"with all products at the largest rates it would be {plain / bound:.2f}x of f32")
    return said


def _no_faster(sides: Sequence[Sequence[Spent]]) -> list[tuple[str, float, float]]:
    """Returns (part, milliseconds in f32, in int8) of the parts that int8 makes no faster."""
    sums: list[dict[str, float]] = [{}, {}]
    for total, side in zip(sums, sides, strict=True):
        for spent in side:
            total[spent.part] = total.get(spent.part, 0.0) + spent.ms
    return [
        (part, sums[0].get(part, 0.0), ms) for part, ms in sums[1].items() if part in sums[0] and ms >= sums[0][part]
    ]


def write_profile(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes CARD.json and CARD.png; returns their paths."""
    made = [folder / f"{found['card']}.{ending}" for ending in ("json", "png")]
    write_json(made[0], dict(found))
    write_figure(made[1], lambda: _figure(found))
    return made


def print_profile(found: Mapping[str, Any], console: Any) -> None:
    """Prints the times by kind of part and by class, and the sentences."""
    from rich.table import Table

    rates = {name: max(rate.values()) for name, rate in found["rates_gflops_per_s"].items()}
    table = Table(
        title=f"{found['card']} on {found['backend']}: milliseconds of a sample", title_justify="left", box=None
    )
    table.add_column("", no_wrap=True)
    for name in ("GFLOP", "f32 ms", "of its rate", "int8 ms", "of its rate", "x f32"):
        table.add_column(name, justify="right", no_wrap=True)
    for section in ("parts", "classes"):
        for name, row in found[section].items():
            shares = [_share(row["gflop"], row[f"{side}_ms"], rates[side]) for side in ("f32", "int8")]
            ratio = f"{row['f32_ms'] / row['int8_ms']:.2f}" if row["int8_ms"] else "–"
            flops = f"{row['gflop']:.1f}" if row["gflop"] else ""
            table.add_row(name, flops, f"{row['f32_ms']:.1f}", shares[0], f"{row['int8_ms']:.1f}", shares[1], ratio)
        table.add_section()
    console.print(table)
    for sentence in found["why"]:
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)


def _share(gflop: float, ms: float, rate: float) -> str:
    return f"{100 * gflop / ms * 1e3 / rate:.0f} %" if gflop and ms else ""


def _figure(found: Mapping[str, Any]) -> Figure:
    figure, (axes,) = blank_figure(8.0, 2.8)
    left = {"f32": 0.0, "int8": 0.0}
    for number, (name, row) in enumerate(found["classes"].items()):
        for place, side in enumerate(("int8", "f32")):
            colour = PALETTE[number % len(PALETTE)]
            axes.barh(place, row[f"{side}_ms"], left=left[side], color=colour, label=f" {name}" if place else None)
            left[side] += row[f"{side}_ms"]
    axes.set_yticks([0, 1], ["int8", "f32"])
    axes.set_xlabel("milliseconds of a sample, summed over kernels")
    axes.set_title(f"{found['card']} on {found['backend']}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=3, fontsize=8, frameon=False)
    return figure
