"""What single nodes do, in worker processes: where runtimes part on the float graphs, how much of the int8 graphs'
error each part and node causes, and int8 graphs with chosen nodes in float.

A few real pairs are looked at, and all activations are never held at once: nor are engines that are not computing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from backends import registry
from backends.base import BackendError, Feeds, Graph, Precision, Surgery, surgery_of
from backends.rank import Progress, rank_by_groups
from backends.reference import OnnxRuntimeEngine
from pqk.data.scenes.open import open_scene
from pqk.engines.variant import graph_from_json, graph_to_json
from pqk.families.dust3r.inputs import load_frames, scene_pairs
from pqk.files import write_json
from pqk.settings.workload import PairGraph
from pqk.store.progress import tell

PAIRS = 1  # pairs that the ranking looks at: with more of them shares move by less than their noise
GROUPS = 2  # worst parts of each graph whose single nodes are ranked too


def _feeds(request: dict[str, Any], pairs: int) -> dict[str, list[Feeds]]:
    """Feeds of both float graphs for the first `pairs` pairs; the decoder's are tokens of the float encoder.

    Request: float (encoder and decoder graphs), scene, views, shape, pair_graph, min_covisibility, truthful.
    """
    shape = request["shape"]
    frames = load_frames(open_scene(Path(request["scene"])), shape[0], shape[1], request["views"])
    graph = PairGraph.model_validate(request["pair_graph"])
    chosen = scene_pairs(frames, graph, request["min_covisibility"], request["truthful"])[:pairs]
    images: list[Feeds] = [{"image": frames[k].image[None]} for pair in chosen for k in pair]
    with OnnxRuntimeEngine(graph_from_json(request["float"]["encoder"])) as engine:
        tokens = [engine.infer(item)["tokens"] for item in images]
    return {"encoder": images, "decoder": _token_pairs(tokens)}


def part_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """The first node at which a backend parts from ONNX Runtime by more than `tolerance`, for each float graph.

    Request: that of `_feeds`, backend, and tolerance. Returns parted: graph -> sentence or null.
    """
    from backends.bisect import first_difference

    backend = registry.get(request["backend"])
    feeds = _feeds(request, pairs=1)
    parted: dict[str, str | None] = {}
    for name, graph in _graphs(request["float"]).items():
        found = first_difference(
            graph,
            OnnxRuntimeEngine,
            graph,
            lambda g: backend.compile(g, Precision.F32),
            feeds[name][:1],
            request["tolerance"],
        )
        parted[name] = found.sentence() if found else None
    return {"parted": parted}


def rank_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """How much of the error at the decoder's outputs is gone when one part, or one node, computes in float.

    Request: that of `_feeds`, backend, int8 (its quantized encoder and decoder), and scratch: a folder in which each
    measured error is kept, so that a killed ranking goes on where it was. Returns groups (parts of the
    model) and nodes (single nodes of the worst parts): rows of `rank.NodeShare` with their graph and `of_all`, the
    share of both graphs' errors together, sorted by it. Encoder parts are judged by what the float decoder, in ONNX
    Runtime, makes of their tokens.
    """
    floats, ints = _graphs(request["float"]), _graphs(request["int8"])
    surgery = _surgery(request["backend"])
    feeds = _feeds(request, PAIRS)
    rows: dict[str, list[dict[str, Any]]] = {"groups": [], "nodes": []}

    def rank(name: str, **options: Any) -> None:
        known = _KeptErrors(Path(request["scratch"]) / f"{name}.json")
        with_nodes = surgery(ints[name], floats[name])
        ranked = rank_by_groups(with_nodes, feeds[name], detail=GROUPS, progress=_teller(name), known=known, **options)
        for kind, shares in zip(("groups", "nodes"), ranked, strict=True):
            rows[kind] += [{"graph": name, **asdict(share)} for share in shares]

    with OnnxRuntimeEngine(floats["decoder"]) as decoder:

        def decoded(outputs: list[Feeds]) -> list[Feeds]:
            return [decoder.infer(item) for item in _token_pairs([out["tokens"] for out in outputs])]

        rank("encoder", after=decoded)
    rank("decoder")
    total = sum(next((row["error_all"] for row in rows["groups"] if row["graph"] == n), 0.0) for n in ints)
    for listed in rows.values():
        for row in listed:
            row["of_all"] = (row["error_all"] - row["error_without"]) / total if total else 0.0
        listed.sort(key=lambda row: -row["of_all"])
    return dict(rows)


class _KeptErrors(dict[str, float]):
    """Errors that a file holds too, from the first one on: of a large model each takes a minute."""

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self.path = path

    def __setitem__(self, nodes: str, error: float) -> None:
        super().__setitem__(nodes, error)
        if math.isfinite(error):
            write_json(self.path, self)


def _teller(graph: str) -> Progress:
    """Says how far the ranking of a graph is: its groups, then single nodes; a graph is half of it all."""
    half, rankings = ("encoder", "decoder").index(graph) / 2, 0

    def say(done: int, total: int, name: str) -> None:
        nonlocal rankings
        rankings += done == 0
        share = half + (rankings - 1 + done / total) / 4
        tell({"text": f"{graph}, {done + 1} of {total}: {name}", "share": share})

    return say


def mix_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """Int8 graphs with nodes back in float, written to `out`; a graph without such nodes is not written.

    Request: backend, float and int8 (encoder and decoder graphs), nodes (graph -> names), out. Returns graphs.
    """
    floats, ints, out = _graphs(request["float"]), _graphs(request["int8"]), Path(request["out"])
    surgery = _surgery(request["backend"])
    mixed = {
        name: surgery(ints[name], floats[name]).write(nodes, out / name)
        for name, nodes in request["nodes"].items()
        if nodes
    }
    return {"graphs": {name: graph_to_json(graph) for name, graph in mixed.items()}}


def _surgery(backend: str) -> type[Surgery]:
    found = surgery_of(registry.get(backend))
    if found is None:
        raise BackendError(f"backend {backend!r} cannot put nodes of its quantized graphs back to float")
    return found


def _graphs(data: dict[str, Any]) -> dict[str, Graph]:
    return {name: graph_from_json(data[name]) for name in ("encoder", "decoder")}


def _token_pairs(tokens: Sequence[np.ndarray]) -> list[Feeds]:
    return [{"tokens_1": tokens[k], "tokens_2": tokens[k + 1]} for k in range(0, len(tokens), 2)]
