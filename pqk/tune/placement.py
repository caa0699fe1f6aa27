"""Finds where int8 is the faster precision here, and where float is: `pqk tune CARD --for speed`.

The products of attention, which a keep-list leaves in float, are tried in int8. Then equal layers of all blocks are one
region: each alone goes back to float and is timed beside plain int8, in turns; those that are faster with their whole
interval are joined, and the joined model is quantized anew, timed and scored. Every graph and every timing is an
artifact of the store, so a killed search goes on and chooses the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pqk import paths
from pqk.engines.variant import Variant
from pqk.files import temporary_folder
from pqk.recipe.candidate import Candidate
from pqk.recipe.experiment import quant_loader
from pqk.recipe.ranking import MIXED, quantized_nodes, times_beside, with_floats
from pqk.recipe.recover import choose
from pqk.recipe.request import Request
from pqk.recipe.verdict import UNDECIDED, judge_drop
from pqk.stats.intervals import Interval
from pqk.stats.latency import speedup
from pqk.store.store import OnEvent
from pqk.tune.search import write_quant_yaml, write_without
from pqk.tune.tune_card import by_graph, score_final, start, use_command

Nodes = Mapping[str, tuple[str, ...]]
"""Names of nodes, `GRAPH:NODE`, by the name of their region."""
ATTENTION = ("Softmax", "AttentionScales")
"""Groups of a keep-list that leave the products of attention in float."""


@dataclass(frozen=True)
class Timed:
    """Regions in float, and how many times as fast as plain int8 the model is with them."""

    regions: tuple[str, ...]
    faster: Interval

    @property
    def sure(self) -> bool:
        """Returns whether it is faster with its whole interval."""
        return (self.faster.low or 0.0) > 1


@dataclass(frozen=True)
class Attention:
    """The products of attention in int8, and how many times as fast as plain int8 the model is with them.

    drop: on validation samples, in percent; None where it is not surely faster. taken: they stay in int8, and are part
    of plain int8 in all that is timed after.
    """

    faster: Interval
    drop: float | None
    taken: bool


@dataclass(frozen=True)
class Placed:
    """The result of `pqk tune --for speed`.

    attention: None where the keep-list does not leave it in float, or its products stay there all the same. tried: in
    the order of timing. winner: None where no region is faster in float. again: the winner, quantized anew with
    `quant_yaml`, against plain int8; against_float: that model against its own best float precision. drop: its drop
    on validation samples in percent; final: on the test samples. verdict: 'pass', 'fail' or 'undecided'.
    """

    card: str
    metric: str
    max_drop: float
    attention: Attention | None
    regions: Nodes
    tried: tuple[Timed, ...]
    winner: Timed | None
    again: Interval | None
    against_float: Interval
    best_float: str
    drop: float
    quant_yaml: Path
    final: Interval | None
    verdict: str
    sentences: tuple[str, ...]


def place(
    request: Request,
    max_drop: float,
    max_evaluations: int,
    out: Path,
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
) -> Placed:
    """Times regions in float beside plain int8, writes the fastest placement's quant.yaml, and judges it.

    Raises PqkError as `pqk.tune.tune_card.tune` does.
    """
    base, candidate, _ = start(request, max_drop, max_evaluations, out, root, on_event, say)
    with temporary_folder("tune") as folder:
        attention, fuller = _attention(request, candidate, base, max_drop, folder / base.name, root, say)
        if fuller is not None:
            base, candidate = folder / base.name, fuller
            request = replace(request, quant=base)
        return _placed(request, candidate, base, attention, max_drop, max_evaluations, out, root, say)


def _attention(
    request: Request,
    plain: Candidate,
    base: Path,
    max_drop: float,
    without: Path,
    root: Path,
    say: Callable[[str], None],
) -> tuple[Attention | None, Candidate | None]:
    """Times the card with the products of attention in int8 too; returns it where it is faster within `max_drop`.

    Its quant.yaml is written to `without`.
    """
    load = quant_loader(plain.experiment.family)
    if not set(ATTENTION) & set(load(base).ptq.keep_list):
        return None, None
    write_without(base, ATTENTION, without, load)
    asked = replace(request, quant=without)
    candidate = choose(asked, root, plain.ctx.on_event, say, rollback=False)[0].candidate
    variant = candidate.variants[-1]
    if variant.hashes == plain.variants[-1].hashes:
        return None, None
    faster = speedup(*times_beside(plain, replace(variant, name=MIXED)))
    sure = (faster.low or 0.0) > 1
    found = candidate.drop(variant) if sure else None
    drop = found.value if found else None
    taken = drop is not None and drop <= max_drop
    say(f"attention in int8: {spoken(faster)} the speed of plain int8{'' if drop is None else f', drop {drop:.2f} %'}")
    return Attention(faster, drop, taken), candidate if taken else None


def _placed(
    request: Request,
    candidate: Candidate,
    base: Path,
    attention: Attention | None,
    max_drop: float,
    max_evaluations: int,
    out: Path,
    root: Path,
    say: Callable[[str], None],
) -> Placed:
    """Returns the result for regions of `candidate`, whose quant.yaml is `base`."""
    found = quantized_nodes(candidate)
    regions = regions_of(found)

    def measure(names: tuple[str, ...]) -> Timed:
        nodes = [node for name in names for node in regions[name]]
        timed = Timed(names, speedup(*times_beside(candidate, with_floats(candidate, by_graph(nodes)))))
        say(f"{', '.join(names)} in float: {spoken(timed.faster)} the speed of plain int8")
        return timed

    tried, winner = search(_leaving_int8(regions, found), measure, max_evaluations)
    nodes = [node for name in winner.regions for node in regions[name]] if winner else []
    write_quant_yaml(base, nodes, out, quant_loader(candidate.experiment.family))
    chosen, again, variant = candidate, None, candidate.variants[-1]
    if winner is not None:
        chosen = choose(replace(request, quant=out), root, candidate.ctx.on_event, say, rollback=False)[0].candidate
        variant = chosen.variants[-1]
        again = speedup(*times_beside(candidate, replace(variant, name=MIXED)))
    drop = candidate.drop(variant, chosen.experiment.quant.ptq.keep_list)
    assert drop is not None  # plain int8 has one
    against, best = _against_float(candidate, variant)
    final, verdict, told = _judged(chosen, drop, max_drop)
    use = f"to use it: {use_command(request, out, root)}"
    shorter = attention is not None and attention.taken
    placement = _told(winner, len(nodes), again, best, against, out, shorter)
    if against.high is not None and against.high < 1:
        verdict, use = "fail", f"the fastest model here is the float one, in {best}"
    return Placed(
        candidate.experiment.card.id,
        candidate.metric,
        max_drop,
        attention,
        regions,
        tried,
        winner,
        again,
        against,
        best,
        drop.value,
        out,
        final,
        verdict,
        (*_told_attention(attention, max_drop), placement, told, use),
    )


def search(
    regions: Sequence[str], measure: Callable[[tuple[str, ...]], Timed], most: int
) -> tuple[tuple[Timed, ...], Timed | None]:
    """Returns all that was timed, at most `most` choices, and the fastest one that is surely faster; None: none is.

    Each region alone, then all that are faster together. Where together they are no faster than the best alone, they
    are joined one by one, the fastest first, and a region that makes the model slower is left out again.
    """
    tried = [measure((name,)) for name in regions[:most]]
    faster = sorted((one for one in tried if one.sure), key=lambda one: -one.faster.value)
    if not faster:
        return tuple(tried), None
    best = faster[0]
    if len(faster) > 1 and len(tried) < most:
        joined = measure(tuple(name for one in faster for name in one.regions))
        tried.append(joined)
        if joined.sure and joined.faster.value >= best.faster.value:
            return tuple(tried), joined
    for one in faster[1:]:
        names = (*best.regions, *one.regions)
        if len(tried) >= most or any(names == known.regions for known in tried):
            break  # the rest is what was joined above
        more = measure(names)
        tried.append(more)
        best = more if more.sure and more.faster.value > best.faster.value else best
    return tuple(tried), best


def regions_of(nodes: Mapping[str, Collection[str]]) -> dict[str, tuple[str, ...]]:
    """Groups quantized nodes (graph -> names) by layer, whatever the number of its block; the largest group first.

    '/blocks.0/mlp/fc1/MatMul' and '/blocks.1/mlp/fc1/MatMul' are of one region, and so are equal layers of twin stacks
    and heads ('blocks2', 'head1'); layers keep their own numbers. Nodes are `GRAPH:NODE`.
    """
    found: dict[str, list[str]] = {}
    for graph, names in nodes.items():
        for name in names:
            *stacks, layer, kind = ["", "", *name.strip("/").split("/")]
            parts = [re.sub(r"(?<=[A-Za-z])\d+", "", re.sub(r"\.\d+", ".*", stack)) for stack in stacks if stack]
            found.setdefault(f"{graph}:{'/'.join([*parts, layer, kind]).strip('/')}", []).append(f"{graph}:{name}")
    return {name: tuple(found[name]) for name in sorted(found, key=lambda name: -len(found[name]))}


def _leaving_int8(regions: Nodes, found: Mapping[str, Collection[str]]) -> list[str]:
    """Returns the regions without the last one of a graph where all of its nodes would be in float otherwise."""
    left = {graph: len(names) for graph, names in found.items()}
    chosen = []
    for name, nodes in regions.items():
        graph = name.partition(":")[0]
        if left[graph] > len(nodes):
            left[graph] -= len(nodes)
            chosen.append(name)
    return chosen


def _against_float(candidate: Candidate, variant: Variant) -> tuple[Interval, str]:
    """Returns how many times as fast as the candidate's best float precision a variant is, and that precision."""
    floats = candidate.floats()
    timed = candidate.time([*floats, variant])["variants"]
    own = timed[variant.name]["sample"]
    against = {each.precision.value: speedup(timed[each.name]["sample"], own) for each in floats}
    best = min(against, key=lambda name: against[name].value)
    return against[best], best


def _judged(chosen: Candidate, drop: Interval, max_drop: float) -> tuple[Interval | None, str, str]:
    """Returns the drop on test samples, which are scored where validation samples allow it, a verdict and why."""
    if drop.value > max_drop:
        return (
            None,
            "fail",
            (f"the drop on validation samples is {drop.value:.2f} %, above {max_drop:g} %: `--for quality` lowers it"),
        )
    final = score_final(chosen)
    ok, sentence = judge_drop(final, max_drop)
    verdict = "pass" if ok is True else UNDECIDED if ok == UNDECIDED else "fail"
    return final, verdict, f"on the test samples, {verdict}: {sentence}"


def _told_attention(found: Attention | None, max_drop: float) -> list[str]:
    if found is None:
        return []
    told = f"the products of attention in int8: {spoken(found.faster)} the speed of plain int8"
    if found.drop is None:
        return [f"{told}; they stay in float"]
    if not found.taken:
        return [f"{told}, but the drop is {found.drop:.2f} %, above {max_drop:g} %: they stay in float"]
    return [f"{told}, drop {found.drop:.2f} % on validation samples: taken, and part of plain int8 from here on"]


def _told(
    winner: Timed | None,
    nodes: int,
    again: Interval | None,
    best: str,
    against: Interval,
    out: Path,
    shorter: bool,
) -> str:
    beside = f"{spoken(against)} the speed of {best}"
    if winner is None or again is None:
        changed = "has the shorter keep-list" if shorter else "is the unchanged file"
        return f"no region is faster in float: int8 as it is runs at {beside}; {paths.shown(out)} {changed}"
    return (
        f"{len(winner.regions)} regions with {nodes} nodes in float, quantized again with {paths.shown(out)}: "
        f"{spoken(again)} the speed of plain int8, {beside}"
    )


def spoken(found: Interval) -> str:
    """Returns a speedup with its interval: 1.05x [1.02, 1.08]."""
    ends = found.ends()
    return f"{found.value:.2f}x" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")
