"""Ranks the nodes of a quantized model by their share of its error, and puts nodes back to float.

`pqk parity --explain`, `pqk tune` and the rollback use these stages. Each one runs a few validation pairs in a worker
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
from pqk.recipe.candidate import Candidate
from pqk.recipe.forms import formed
from pqk.recipe.stages import fed_key, keep_graphs, parts_code, read_graphs
from pqk.store import worker

_CODE = ("pqk.measure.node_ranking",)
MIXED = "mixed"  # the name of every variant with nodes in float; timing samples are stored under it


def can_rank(backend: str) -> bool:
    """Returns whether nodes of this backend's quantized graphs can go back to float."""
    return surgery_of(registry.get(backend)) is not None


def _code(backend: str) -> tuple[str, ...]:
    surgery = surgery_of(registry.get(backend))
    return (*_CODE, *(surgery.sources if surgery else ()))


def _found(candidate: Candidate, task: str, about: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the result of the worker task `task` on the graphs, as kept in the store."""
    quantized, plain = candidate.variants[-1], candidate.onnx_float

    def make(folder: Path) -> None:
        graphs = {"float": graphs_to_json(plain.graphs), "int8": graphs_to_json(quantized.graphs)}
        request = {**candidate.experiment.fed, "samples": candidate.validation.to_json(), **graphs, **asked}
        heard = partial(candidate.ctx.tell, f"{task} {quantized.backend}")
        with candidate.ctx.scratch(task, code, inputs) as scratch:
            write_json(folder / f"{task}.json", worker.call(task, {**request, "scratch": str(scratch)}, heard))

    asked = {"backend": quantized.backend, **asked}
    inputs = {**about, "samples": candidate.validation.key, **fed_key(candidate.experiment), **asked}
    parts = parts_code(candidate.experiment.family, "settings", "data", "predict")
    code = (*_code(quantized.backend), *parts, *stages.sources_of(quantized, plain))
    made = candidate.ctx.make(task, code, inputs, make, quantized.backend)
    found: dict[str, Any] = json.loads((made.path / f"{task}.json").read_text())
    return found


def parted(candidate: Candidate) -> dict[str, str | None]:
    """Returns for each float graph a sentence on where the backend first differs from ONNX Runtime; None: nowhere."""
    asked = {"tolerance": candidate.experiment.evaluation.parity.float_relative}
    found: dict[str, str | None] = _found(
        candidate, "parted", stages.identity(candidate.ctx, candidate.onnx_float, None), asked
    )["parted"]
    return found


def ranking(candidate: Candidate) -> dict[str, list[dict[str, Any]]]:
    """Returns groups and nodes as ranked by `pqk.measure.node_ranking`. Raises PqkError when no node is quantized."""
    about = stages.identity(candidate.ctx, candidate.variants[-1], candidate.onnx_float)
    found = _found(candidate, "ranking", about, {})
    if not found["groups"]:
        raise PqkError("no node of the quantized graphs computes with quantized values: there is nothing to rank")
    return {kind: found[kind] for kind in ("groups", "nodes")}


def quantized_nodes(candidate: Candidate) -> dict[str, list[str]]:
    """Returns the nodes of each graph that compute with quantized values, as patterns of a keep-list find them.

    Raises PqkError when there is none.
    """
    about = stages.identity(candidate.ctx, candidate.variants[-1], candidate.onnx_float)
    found: dict[str, list[str]] = _found(candidate, "quantized_nodes", about, {})["nodes"]
    if not any(found.values()):
        raise PqkError("no node of the quantized graphs computes with quantized values: all is in float already")
    return {graph: nodes for graph, nodes in found.items() if nodes}


def with_floats(candidate: Candidate, nodes: Mapping[str, Sequence[str]]) -> Variant:
    """Makes the candidate with nodes (graph -> names) back in float; graphs without such nodes stay as they are."""
    quantized, plain = candidate.variants[-1], candidate.onnx_float
    wanted = {name: sorted(names) for name, names in nodes.items() if names}

    def make(folder: Path) -> None:
        graphs = {"float": graphs_to_json(plain.graphs), "int8": graphs_to_json(quantized.graphs)}
        request = {**graphs, "backend": quantized.backend, "nodes": wanted, "out": str(folder)}
        keep_graphs(folder, worker.call("mixed", request)["graphs"])

    inputs = {"float": plain.hashes, "int8": quantized.hashes, "nodes": wanted, "machine": dict(candidate.ctx.machine)}
    code = _code(quantized.backend)
    made = candidate.ctx.make("mixed", code, inputs, make, str(sum(map(len, wanted.values()))))
    graphs = {**quantized.graphs, **read_graphs(made.path)}
    return formed(candidate.ctx, Variant(MIXED, quantized.backend, Precision.INT8, graphs, quantized.options))[0]


def times_beside(candidate: Candidate, variant: Variant) -> tuple[list[float], list[float]]:
    """Returns times in ms of the candidate and of `variant` (named MIXED), round by round of one interleaved run."""
    quantized = candidate.variants[-1]
    timed = candidate.time([quantized, variant])["variants"]
    return timed[quantized.name]["sample"], timed[variant.name]["sample"]
