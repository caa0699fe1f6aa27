"""Ranks parts and nodes of the graphs by the quantization error that they cause, `rank_graphs`; a task of a worker.

Also finds the first node where two runtimes differ on the float graphs (`part_graphs`), and puts chosen nodes back to
float (`mix_graphs`). One sample is used: more samples change the shares by less than their noise. Memory never holds
all activations at once, nor engines that are not needed.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backends import registry
from backends.base import BackendError, Feeds, Precision, Surgery, surgery_of
from backends.rank import Progress, rank_by_groups
from backends.reference import OnnxRuntimeEngine
from pqk.engines.calls import Engines, Recorder, Replaying, on_reference
from pqk.engines.variant import graphs_from_json, graphs_to_json
from pqk.families.contract import Call
from pqk.files import write_json
from pqk.measure.predict import opened
from pqk.store.progress import tell

GROUPS = 2  # worst parts of each graph whose single nodes are ranked too


class _Looked:
    """The first sample of a request, and the inputs of the float graphs for it.

    Request: family, workload, samples, float (graphs by name).
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self.of, self.workload, found = opened(request)
        self.floats = graphs_from_json(request["float"])
        self.sample = next(iter(self.of.data_part().samples(found, self.workload, 0)))

    def feeds(self, graph: str) -> list[Feeds]:
        """Returns the inputs of a graph, call by call; only the graphs before it run."""
        with on_reference({name: self.floats[name] for name in self.before(graph)}) as engines:
            recorder = Recorder((graph,), engines, self.floats)
            self.predict(recorder)
        return list(recorder.feeds[graph])

    def before(self, graph: str) -> tuple[str, ...]:
        """Returns the graphs whose outputs reach the inputs of `graph`."""
        return next(use.after for use in self.of.settings_part().GRAPHS if use.name == graph)

    def predict(self, call: Call) -> Feeds:
        """Returns the prediction of the sample through `call`."""
        found = self.of.predict_part().predict(call, self.sample, self.workload, 0)
        return {name: found[name] for name in self.of.scoring_part().OUTPUTS}


def part_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """Finds, for each float graph, the first node where a backend differs from ONNX Runtime by more than `tolerance`.

    Request: that of `_Looked`, backend, and tolerance. Returns parted: graph -> sentence or null.
    """
    from backends.bisect import first_difference

    backend = registry.get(request["backend"])
    looked = _Looked(request)
    parted: dict[str, str | None] = {}
    for name, graph in looked.floats.items():
        found = first_difference(
            graph,
            OnnxRuntimeEngine,
            graph,
            lambda g: backend.compile(g, Precision.F32),
            looked.feeds(name)[:1],
            request["tolerance"],
        )
        parted[name] = found.sentence() if found else None
    return {"parted": parted}


def rank_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """Measures the share of the prediction error that disappears when one part, or one node, computes in float.

    Request: that of `_Looked`, backend, int8 (its quantized graphs), and scratch: a folder in which each measured error
    is kept, so that a killed ranking can resume. Returns groups (parts of the model) and nodes (single nodes of the
    worst parts): rows of `rank.NodeShare` with their graph and `of_all`, the share of the errors of all graphs
    together, sorted by it. The error of a graph is that of the prediction which the other graphs, in float in ONNX
    Runtime, compute from its outputs.
    """
    looked = _Looked(request)
    ints = {name: graph for name, graph in graphs_from_json(request["int8"]).items() if not graph.left_float}
    surgery = _surgery(request["backend"])
    rows: dict[str, list[dict[str, Any]]] = {"groups": [], "nodes": []}
    for number, name in enumerate(ints):
        known = _KeptErrors(Path(request["scratch"]) / f"{name}.json")
        with_nodes = surgery(ints[name], looked.floats[name])
        behind = {n: graph for n, graph in looked.floats.items() if n not in (name, *looked.before(name))}
        with on_reference(behind) as engines:

            def after(outputs: list[Feeds], name: str = name, engines: Engines = engines) -> list[Feeds]:
                return [looked.predict(Replaying(name, outputs, engines, looked.floats))]

            ranked = rank_by_groups(
                with_nodes,
                looked.feeds(name),
                after=after,
                detail=GROUPS,
                progress=_teller(name, number, len(ints)),
                known=known,
            )
        for kind, shares in zip(("groups", "nodes"), ranked, strict=True):
            rows[kind] += [{"graph": name, **asdict(share)} for share in shares]
    total = sum(next((row["error_all"] for row in rows["groups"] if row["graph"] == n), 0.0) for n in ints)
    for listed in rows.values():
        for row in listed:
            row["of_all"] = (row["error_all"] - row["error_without"]) / total if total else 0.0
        listed.sort(key=lambda row: -row["of_all"])
    return dict(rows)


class _KeptErrors(dict[str, float]):
    """Errors that are also written to a file, one by one: with a large model each takes a minute."""

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self.path = path

    def __setitem__(self, nodes: str, error: float) -> None:
        super().__setitem__(nodes, error)
        if math.isfinite(error):
            write_json(self.path, self)


def _teller(graph: str, number: int, graphs: int) -> Progress:
    """Returns a function that reports the progress of ranking a graph: its groups, then single nodes.

    Each graph counts as an equal share of the whole.
    """
    rankings = 0

    def say(done: int, total: int, name: str) -> None:
        nonlocal rankings
        rankings += done == 0
        share = (number + (rankings - 1 + done / total) / 2) / graphs
        tell({"text": f"{graph}, {done + 1} of {total}: {name}", "share": share})

    return say


def quantized_nodes(request: dict[str, Any]) -> dict[str, Any]:
    """Lists the nodes of each graph that compute with quantized values. Request: backend, float and int8 (graphs)."""
    floats, ints = graphs_from_json(request["float"]), graphs_from_json(request["int8"])
    surgery = _surgery(request["backend"])
    whole = {name: graph for name, graph in ints.items() if not graph.left_float}
    return {"nodes": {name: list(surgery(graph, floats[name]).nodes) for name, graph in whole.items()}}


def mix_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """Writes int8 graphs with nodes back in float to `out`; a graph without such nodes is not written.

    Request: backend, float and int8 (graphs by name), nodes (graph -> names), out. Returns graphs.
    """
    floats, ints = graphs_from_json(request["float"]), graphs_from_json(request["int8"])
    out = Path(request["out"])
    surgery = _surgery(request["backend"])
    mixed = {
        name: surgery(ints[name], floats[name]).write(nodes, out / name)
        for name, nodes in request["nodes"].items()
        if nodes
    }
    return {"graphs": graphs_to_json(mixed)}


def _surgery(backend: str) -> type[Surgery]:
    found = surgery_of(registry.get(backend))
    if found is None:
        raise BackendError(f"backend {backend!r} cannot put nodes of its quantized graphs back to float")
    return found
