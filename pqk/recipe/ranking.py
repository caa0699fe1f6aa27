"""Ranks the nodes of a quantized model by their share of its error, and puts nodes back to float.

Stages of `pqk parity --explain`, of `pqk tune` and of the rollback; each looks at a few validation pairs in a worker
(`pqk.measure.node_ranking`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from backends import registry
from backends.base import Precision, surgery_of
from pqk.engines.variant import Variant, graph_from_json, graph_to_json
from pqk.errors import PqkError
from pqk.files import write_json
from pqk.recipe import stages
from pqk.recipe.candidate import Outcome
from pqk.store import worker

_CODE = ("pqk.measure.node_ranking",)
MIXED = "mixed"  # the name of every variant with nodes in float: samples of a timing are kept under it


def _pairs_asked(outcome: Outcome) -> dict[str, Any]:
    """Which pairs of a validation scene a worker looks at."""
    return {
        **{name: outcome.scoring[name] for name in ("shape", "pair_graph", "min_covisibility")},
        "views": outcome.validation.views,
        "truthful": outcome.validation.truthful,
    }


def _graphs(variant: Variant) -> dict[str, Any]:
    return {"encoder": graph_to_json(variant.encoder), "decoder": graph_to_json(variant.decoder)}


def can_rank(backend: str) -> bool:
    """Whether nodes of this backend's quantized graphs can go back to float."""
    return surgery_of(registry.get(backend)) is not None


def _code(backend: str) -> tuple[str, ...]:
    surgery = surgery_of(registry.get(backend))
    return (*_CODE, *(surgery.sources if surgery else ()))


def _found(outcome: Outcome, task: str, about: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the worker `task` finds out about the graphs, kept in the store."""
    candidate, plain = outcome.variants[-1], outcome.onnx_float

    def make(folder: Path) -> None:
        graphs = {"float": _graphs(plain), "int8": _graphs(candidate)}
        request = {**graphs, **asked, "scene": str(outcome.validation.scenes.folders[0])}
        heard = partial(outcome.ctx.tell, f"{task} {candidate.backend}")
        with outcome.ctx.scratch(task, code, inputs) as scratch:
            write_json(folder / f"{task}.json", worker.call(task, {**request, "scratch": str(scratch)}, heard))

    asked = {"backend": candidate.backend, **asked}
    inputs = {**about, "scenes": outcome.validation.scenes.sha256, **asked}
    code = (*_code(candidate.backend), *stages.sources_of(candidate, plain))
    made = outcome.ctx.make(task, code, inputs, make, candidate.backend)
    found: dict[str, Any] = json.loads((made.path / f"{task}.json").read_text())
    return found


def parted(outcome: Outcome) -> dict[str, str | None]:
    """For each float graph where the backend parts from ONNX Runtime, as a sentence; None where it does not."""
    asked = {**_pairs_asked(outcome), "tolerance": outcome.experiment.evaluation.parity.float_relative}
    found: dict[str, str | None] = _found(
        outcome, "parted", stages.identity(outcome.ctx, outcome.onnx_float, None), asked
    )["parted"]
    return found


def ranking(outcome: Outcome) -> dict[str, list[dict[str, Any]]]:
    """Groups and nodes ranked by `pqk.measure.node_ranking`. Raises PqkError when no node is quantized."""
    about = stages.identity(outcome.ctx, outcome.variants[-1], outcome.onnx_float)
    found = _found(outcome, "ranking", about, _pairs_asked(outcome))
    if not found["groups"]:
        raise PqkError("no node of the quantized graphs computes with quantized values: there is nothing to rank")
    return {kind: found[kind] for kind in ("groups", "nodes")}


def with_floats(outcome: Outcome, nodes: Mapping[str, Sequence[str]]) -> Variant:
    """The candidate with nodes (graph -> names) back in float; a graph without such nodes is the candidate's own."""
    candidate, plain = outcome.variants[-1], outcome.onnx_float
    wanted = {name: sorted(names) for name, names in nodes.items() if names}

    def make(folder: Path) -> None:
        graphs = {"float": _graphs(plain), "int8": _graphs(candidate)}
        made = worker.call("mixed", {**graphs, "backend": candidate.backend, "nodes": wanted, "out": str(folder)})[
            "graphs"
        ]
        for graph in made.values():
            graph["path"] = Path(graph["path"]).name
        write_json(folder / "graphs.json", made)

    inputs = {"float": plain.hashes, "int8": candidate.hashes, "nodes": wanted, "machine": dict(outcome.ctx.machine)}
    code = _code(candidate.backend)
    made = outcome.ctx.make("mixed", code, inputs, make, str(sum(map(len, wanted.values()))))
    written = json.loads((made.path / "graphs.json").read_text())
    graphs = {n: graph_from_json({**g, "path": str(made.path / g["path"])}) for n, g in written.items()}
    encoder, decoder = graphs.get("encoder", candidate.encoder), graphs.get("decoder", candidate.decoder)
    return Variant(MIXED, candidate.backend, Precision.INT8, encoder, decoder, candidate.options)


def times_beside(outcome: Outcome, variant: Variant) -> tuple[list[float], list[float]]:
    """Pair times in ms of the candidate and of `variant` (named MIXED), round by round of one interleaved run."""
    candidate = outcome.variants[-1]
    timed = outcome.time([candidate, variant])["variants"]
    return timed[candidate.name]["pair"], timed[variant.name]["pair"]
