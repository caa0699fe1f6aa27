"""Finds the nodes of an int8 model that must compute in float, and writes their quant.yaml: `pqk tune CARD`.

The card is run (or reused), its nodes are ranked as by `pqk parity --explain`, and `pqk.tune.search.search` asks for
measurements: the int8 graphs with a choice of nodes back in float, scored on all validation pairs and timed. Every
measurement is an artifact of the store, so a killed tuning resumes. At the end the whole recipe, quantizer included,
runs with the winner's keep-list; its result is measured again, and scored on the test samples once.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pqk import paths
from pqk.engines.variant import Variant
from pqk.errors import PqkError
from pqk.files import check_writable, temporary_folder
from pqk.measure.scores import drop_of
from pqk.recipe.candidate import Candidate
from pqk.recipe.experiment import config_file, quant_loader
from pqk.recipe.ranking import MIXED, can_rank, ranking, times_beside, with_floats
from pqk.recipe.recover import choose
from pqk.recipe.request import Request, asked_experiment, chosen_quantizer, usable_backend
from pqk.recipe.runner import run
from pqk.recipe.verdict import UNDECIDED, judge_drop
from pqk.settings.keep import keep_patterns, split_entry
from pqk.stats.intervals import Interval
from pqk.stats.latency import speedup
from pqk.store.store import OnEvent
from pqk.tune.search import Point, TuneResult, search, write_quant_yaml


@dataclass(frozen=True)
class Unit:
    """Nodes that go to float together: one node, or a part of the model. Nodes are named `GRAPH:NODE`.

    `of_all` is the share of the int8 error that disappears when this unit alone computes in float.
    """

    name: str
    nodes: tuple[str, ...]
    of_all: float


@dataclass(frozen=True)
class Tuned:
    """The result that `pqk tune` prints and writes. Points of `result` name units; without a ranking there are none.

    Drops of points are measured on validation samples. `quant_yaml` is None when no point is within the limit.
    `confirmed` is the winner with the same nodes in float, but quantized again with `quant_yaml`; None for plain int8,
    which is the card's own run. `final` is the drop on the test samples of the recipe with `quant_yaml`. `verdict`
    judges it against the limit: 'pass', 'fail' or 'undecided'.
    """

    card: str
    metric: str
    units: Mapping[str, Unit]
    result: TuneResult
    confirmed: Point | None
    quant_yaml: Path | None
    final: Interval | None
    verdict: str
    sentences: tuple[str, ...]

    @property
    def plain(self) -> Point:
        """Returns the point of the int8 model without nodes in float: the first one of every search."""
        return self.result.points[0]

    def nodes(self, point: Point) -> list[str]:
        """Returns the nodes of a point that compute in float, `GRAPH:NODE`."""
        return [node for name in point.names for node in self.units[name].nodes]


def tune(
    request: Request,
    max_drop: float,
    max_evaluations: int,
    out: Path,
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
) -> Tuned:
    """Finds the fastest choice of float nodes whose drop is at most `max_drop` percent, and writes its quant.yaml.

    Times of all points are comparable on a noisy machine: each is the candidate's own median in the card's run, divided
    by the speedup of one interleaved timing of both (`pqk.stats.latency.speedup`).
    Raises PqkError, before anything long runs, for a backend whose nodes cannot go back to float or whose engines are
    emulated, a limit that is not finite, fewer than two evaluations, a keep-list that the card or a setting overrides,
    and a file that cannot be written; afterwards when the card's metric gives no drop.
    """
    base, candidate, plain = start(request, max_drop, max_evaluations, out, root, on_event, say)
    record = candidate.records[-1]
    # Plain int8 that is good enough needs no ranking, which takes as long as several measurements.
    ranked = [] if plain.value <= max_drop else units_of(ranking(candidate))
    units = {unit.name: unit for unit in ranked}
    kept = candidate.experiment.quant.ptq.keep_list

    def evaluate(chosen: tuple[str, ...]) -> tuple[float, float]:
        nodes = [node for name in chosen for node in units[name].nodes]
        if nodes:
            # The keep-list is checked here too: these nodes must not run in int8 kernels.
            drop, time = _measure(candidate, with_floats(candidate, by_graph(nodes)), (*kept, *keep_patterns(nodes)))
        else:
            drop, time = plain.value, float(record["t_pair_p50_ms"])
        say(f"{len(nodes)} nodes in float: drop {drop:.2f} %, {time:.1f} ms")
        return drop, time

    result = search(_may_be_float(ranked), evaluate, max_drop, max_evaluations)
    tuned = Tuned(
        candidate.experiment.card.id,
        record["main_metric"],
        units,
        result,
        confirmed=None,
        quant_yaml=None,
        final=None,
        verdict="fail",
        sentences=(),
    )
    winner = result.winner
    if winner is None:
        best = min(result.points, key=lambda p: p.drop_pct)
        return replace(
            tuned,
            sentences=(
                f"nothing measured is within {max_drop:g} %: the lowest drop is {best.drop_pct:.2f} %, with "
                f"{len(tuned.nodes(best))} nodes in float; no quant.yaml is written",
            ),
        )
    write_quant_yaml(base, tuned.nodes(winner), out, quant_loader(candidate.experiment.family))
    confirmed, chosen = None, candidate
    if winner.names:
        confirmed, chosen = _confirm(candidate, winner, request, out, root, say)
    found, final = _told(tuned, winner, confirmed, out), None
    if confirmed is None or confirmed.drop_pct <= max_drop:
        final = score_final(chosen)
    ok, sentence = judge_drop(final, max_drop)
    verdict = "pass" if ok is True else UNDECIDED if ok == UNDECIDED else "fail"
    lines = [found] if final is None else [found, f"on the test samples, {verdict}: {sentence}"]
    sentences = (*lines, f"to use it: {use_command(request, out, root)}")
    return replace(tuned, confirmed=confirmed, quant_yaml=out, final=final, verdict=verdict, sentences=sentences)


def start(
    request: Request,
    max_drop: float,
    max_evaluations: int,
    out: Path,
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
) -> tuple[Path, Candidate, Interval]:
    """Checks the request, and runs or reuses its card; returns quant.yaml to start from, the candidate and its drop.

    The drop is that of plain int8 on validation samples. Raises PqkError as `tune` does.
    """
    base = _check(request, max_drop, max_evaluations, out, root)
    candidate = run(request, root, on_event, say)
    record = candidate.records[-1]
    if record["measured"] == "emulated":  # known only after the run
        raise PqkError("pqk tune needs times, but these engines are emulated: they have none")
    plain = candidate.drop(candidate.variants[-1])
    if plain is None:
        raise PqkError(f"pqk tune needs a drop, but without ground truth {record['main_metric']} gives none")
    return base, candidate, plain


def _check(request: Request, max_drop: float, max_evaluations: int, out: Path, root: Path) -> Path:
    """Checks the request before the long stages, and returns the quant.yaml to start from. Raises PqkError."""
    backend = usable_backend(request.backend)
    if not can_rank(backend.name):
        raise PqkError(f"pqk tune puts nodes of quantized graphs back to float, which backend {backend.name} cannot do")
    if backend.availability().emulated:
        raise PqkError(f"pqk tune needs times, but engines of backend {backend.name} are emulated here: they have none")
    if not math.isfinite(max_drop):
        raise PqkError(f"--max-drop must be a number of percent, got {max_drop}")
    if max_evaluations < 2:
        raise PqkError(f"--max-evaluations must be at least 2, got {max_evaluations}")
    experiment = asked_experiment(request, root)
    base = request.quant or config_file(root, experiment.family, "quant")
    load_quant = quant_loader(experiment.family)
    if "Q" not in experiment.card.recipe:
        raise PqkError(f"pqk tune needs a recipe with stage Q, which that of card {experiment.card.id} does not have")
    chosen_quantizer(backend, request.quantizer, experiment.quant.ptq)
    if experiment.quant.ptq.keep_list != load_quant(base).ptq.keep_list:
        raise PqkError(
            f"quant.ptq.keep_list is overridden by card {request.card} or --set, which would hide the list that is "
            f"tuned; move it into {paths.shown(base)}"
        )
    if out.is_dir() or out.resolve() == base.resolve():
        raise PqkError(
            f"-o {out}: give a new file; this is {'a folder' if out.is_dir() else 'the file that tuning starts from'}"
        )
    check_writable(out.parent)
    with temporary_folder("tune") as folder:
        write_quant_yaml(base, ["graph:a/b"], folder / "quant.yaml", load_quant)  # reports a list in an odd style now
    return base


def units_of(ranked: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Unit]:
    """Returns all quantized nodes, each in one unit, the unit with the largest share first.

    `ranked`: see `pqk.recipe.ranking.ranking`. Nodes that were ranked singly are units of their own, and the other
    parts of the model are one each. So there are few units, and the parts that matter most are split.
    """
    single = {f"{row['graph']}:{row['name']}" for row in ranked["nodes"]}
    units = []
    for row in (*ranked["nodes"], *ranked["groups"]):
        nodes = tuple(f"{row['graph']}:{node}" for node in row["nodes"])
        name = f"{row['graph']}:{row['name']}"
        if name in single or single.isdisjoint(nodes):
            units.append(Unit(name, nodes, row["of_all"]))
    return sorted(units, key=lambda unit: -unit.of_all)


def _may_be_float(ranked: Sequence[Unit]) -> list[str]:
    """Returns the units' names without the last one of each graph: every graph needs at least one int8 node."""
    last = {split_entry(unit.name)[0]: unit.name for unit in ranked}
    return [unit.name for unit in ranked if unit.name not in last.values()]


def by_graph(nodes: Iterable[str]) -> dict[str, list[str]]:
    """Returns nodes `GRAPH:NODE` as names by graph."""
    found: dict[str, list[str]] = {}
    for graph, node in map(split_entry, nodes):
        found.setdefault(str(graph), []).append(node)
    return found


def _measure(candidate: Candidate, variant: Variant, keep: Sequence[str]) -> tuple[float, float]:
    """Returns drop in percent and pair time in ms of a variant named MIXED; `tune` describes how times are compared."""
    drop = candidate.drop(variant, keep)
    plain, mixed = times_beside(candidate, variant)
    faster = speedup(plain, mixed).value
    return math.nan if drop is None else drop.value, float(candidate.records[-1]["t_pair_p50_ms"]) / faster


def score_final(candidate: Candidate) -> Interval | None:
    """Returns the drop of the candidate on the test samples, which were not used to choose it."""
    mine, teacher = (candidate.score(candidate.variants[n], on=candidate.test) for n in (-1, 0))
    return drop_of(candidate.experiment.metric, mine, teacher, candidate.truthful)


def _confirm(
    candidate: Candidate, winner: Point, request: Request, out: Path, root: Path, say: Callable[[str], None]
) -> tuple[Point, Candidate]:
    """Makes the winner again, as `pqk run` does with the tuned quant.yaml: quantized, scored and timed."""
    choice, _ = choose(replace(request, quant=out), root, candidate.ctx.on_event, say, rollback=False)
    variant = replace(choice.candidate.variants[-1], name=MIXED)
    return Point(
        winner.names, *_measure(candidate, variant, choice.candidate.experiment.quant.ptq.keep_list)
    ), choice.candidate


def _told(tuned: Tuned, winner: Point, confirmed: Point | None, out: Path) -> str:
    limit, file = f"{tuned.result.max_drop:g} %", paths.shown(out)
    if confirmed is None:
        return f"int8 as it is drops {winner.drop_pct:.2f} %, within {limit}: {file} is the unchanged quant.yaml"
    nodes, faster = len(tuned.nodes(winner)), tuned.plain.t_pair_p50_ms / confirmed.t_pair_p50_ms
    found = f"{nodes} nodes in float, quantized again with {file}: drop {confirmed.drop_pct:.2f} %"
    if confirmed.drop_pct > tuned.result.max_drop:
        return f"NOT CONFIRMED: {found}, outside {limit}, although the search measured {winner.drop_pct:.2f} %"
    return f"confirmed: {found} (at most {limit}), {faster:.2f}x the speed of plain int8"


def use_command(request: Request, out: Path, root: Path) -> str:
    """Returns the shell command that runs the card with the tuned file.

    scripts/run_quant.py takes a quant.yaml of its own; other options need `pqk run`, which reads configs/quant.yaml.
    """
    door = root / "scripts" / "run_quant.py"
    data = request.scenes or request.images or request.train_scenes or request.train_images
    more = data or request.settings or request.seed is not None or request.quantizer
    if door.is_file() and not more:
        words = ["python", paths.shown(door), "--card", request.card, "--cfg", paths.shown(out)]
        return shlex.join([*words, *(["--ckpt", request.model] if request.model else [])])
    words = ["pqk", "run", request.card, "--backend", request.backend]
    options: dict[str, object] = {"quantizer": request.quantizer, "model": request.model, "scenes": request.scenes}
    options |= {"images": request.images, "seed": request.seed}
    options |= {"train-scenes": request.train_scenes, "train-images": request.train_images}
    for name, value in options.items():
        words += [f"--{name}", str(value)] if value is not None else []
    for name, value in request.settings.items():
        text = yaml.safe_dump({"v": value}, default_flow_style=True, width=math.inf).strip()
        words += ["--set", f"{name}={text[4:-1]}"]
    quant = paths.shown(paths.configs(root) / "quant.yaml")
    return f"{shlex.join(['cp', paths.shown(out), quant])} && {shlex.join(words)}"
