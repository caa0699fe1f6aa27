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
from pqk.engines.variant import Variant, graphs_to_json
from pqk.errors import PqkError
from pqk.files import write_json
from pqk.recipe import stages
from pqk.recipe.candidate import Outcome
from pqk.recipe.stages import fed_key, keep_graphs, parts_code, read_graphs
from pqk.store import worker

_CODE = ("pqk.measure.node_ranking",)
MIXED = "mixed"  # the name of every variant with nodes in float: samples of a timing are kept under it


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
        graphs = {"float": graphs_to_json(plain.graphs), "int8": graphs_to_json(candidate.graphs)}
        request = {**outcome.experiment.fed, "samples": outcome.validation.to_json(), **graphs, **asked}
        heard = partial(outcome.ctx.tell, f"{task} {candidate.backend}")
        with outcome.ctx.scratch(task, code, inputs) as scratch:
            write_json(folder / f"{task}.json", worker.call(task, {**request, "scratch": str(scratch)}, heard))

    asked = {"backend": candidate.backend, **asked}
    inputs = {**about, "samples": outcome.validation.key, **fed_key(outcome.experiment), **asked}
    parts = parts_code(outcome.experiment.family, "settings", "data", "predict")
    code = (*_code(candidate.backend), *parts, *stages.sources_of(candidate, plain))
    made = outcome.ctx.make(task, code, inputs, make, candidate.backend)
    found: dict[str, Any] = json.loads((made.path / f"{task}.json").read_text())
    return found


def parted(outcome: Outcome) -> dict[str, str | None]:
    """For each float graph where the backend parts from ONNX Runtime, as a sentence; None where it does not."""
    asked = {"tolerance": outcome.experiment.evaluation.parity.float_relative}
    found: dict[str, str | None] = _found(
        outcome, "parted", stages.identity(outcome.ctx, outcome.onnx_float, None), asked
    )["parted"]
    return found


def ranking(outcome: Outcome) -> dict[str, list[dict[str, Any]]]:
    """Groups and nodes ranked by `pqk.measure.node_ranking`. Raises PqkError when no node is quantized."""
    about = stages.identity(outcome.ctx, outcome.variants[-1], outcome.onnx_float)
    found = _found(outcome, "ranking", about, {})
    if not found["groups"]:
        raise PqkError("no node of the quantized graphs computes with quantized values: there is nothing to rank")
    return {kind: found[kind] for kind in ("groups", "nodes")}


def with_floats(outcome: Outcome, nodes: Mapping[str, Sequence[str]]) -> Variant:
    """The candidate with nodes (graph -> names) back in float; a graph without such nodes is the candidate's own."""
    candidate, plain = outcome.variants[-1], outcome.onnx_float
    wanted = {name: sorted(names) for name, names in nodes.items() if names}

    def make(folder: Path) -> None:
        graphs = {"float": graphs_to_json(plain.graphs), "int8": graphs_to_json(candidate.graphs)}
        request = {**graphs, "backend": candidate.backend, "nodes": wanted, "out": str(folder)}
        keep_graphs(folder, worker.call("mixed", request)["graphs"])

    inputs = {"float": plain.hashes, "int8": candidate.hashes, "nodes": wanted, "machine": dict(outcome.ctx.machine)}
    code = _code(candidate.backend)
    made = outcome.ctx.make("mixed", code, inputs, make, str(sum(map(len, wanted.values()))))
    graphs = {**candidate.graphs, **read_graphs(made.path)}
    return Variant(MIXED, candidate.backend, Precision.INT8, graphs, candidate.options)


def times_beside(outcome: Outcome, variant: Variant) -> tuple[list[float], list[float]]:
    """Sample times in ms of the candidate and of `variant` (named MIXED), round by round of one interleaved run."""
    candidate = outcome.variants[-1]
    timed = outcome.time([candidate, variant])["variants"]
    return timed[candidate.name]["sample"], timed[variant.name]["sample"]
