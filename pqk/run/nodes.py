"""What single nodes do, in worker processes: where runtimes part on the float graphs, how much of the int8 graphs'
error each part and node causes, and int8 graphs with chosen nodes in float.

A few real pairs are looked at, and all activations are never held at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from backends import registry
from backends.base import Feeds, Graph, Precision
from pqk.data.scene import open_scene
from pqk.run.inputs import load_frames, scene_pairs
from pqk.run.variants import Runner, Variant, graph_from_json, graph_to_json
from pqk.spec.workload import PairGraph

PAIRS = 2  # pairs that the ranking looks at: shares settle with the first
GROUPS = 2  # worst parts of each graph whose single nodes are ranked too


class _Inputs:
    """Feeds of both graphs, and the float decoder behind the encoder; a context manager that frees its engines.

    Request: float (encoder and decoder graphs), scene, views, shape, pair_graph, min_covisibility, truthful.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self.floats = _graphs(request["float"])
        shape = request["shape"]
        frames = load_frames(open_scene(Path(request["scene"])), shape[0], shape[1], request["views"])
        graph = PairGraph.model_validate(request["pair_graph"])
        pairs = scene_pairs(frames, graph, request["min_covisibility"], request["truthful"])[:PAIRS]
        images: list[Feeds] = [{"image": frames[k].image[None]} for pair in pairs for k in pair]
        with ExitStack() as stack:
            variant = Variant("fp32", "openvino", Precision.F32, self.floats["encoder"], self.floats["decoder"])
            self.runner = stack.enter_context(Runner(variant))
            tokens = [self.runner.encode(item["image"]) for item in images]
            self.feeds = {"encoder": images, "decoder": _token_pairs(tokens)}
            self._stack = stack.pop_all()

    def decoded(self, outputs: list[Feeds]) -> list[Feeds]:
        """What the float decoder makes of an encoder's tokens."""
        return [self.runner.decoder.infer(item) for item in _token_pairs([out["tokens"] for out in outputs])]

    def __enter__(self) -> _Inputs:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def part_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """The first node at which OpenVINO parts from ONNX Runtime by more than `tolerance`, for each float graph.

    Request: that of `_Inputs`, and tolerance. Returns parted: graph -> sentence or null.
    """
    from backends.bisect import first_difference

    openvino, reference = registry.get("openvino"), registry.get("reference")
    parted: dict[str, str | None] = {}
    with _Inputs(request) as inputs:
        for name, graph in inputs.floats.items():
            found = first_difference(
                graph,
                lambda g: reference.compile(g, Precision.F32),
                graph,
                lambda g: openvino.compile(g, Precision.F32),
                inputs.feeds[name][:1],
                request["tolerance"],
            )
            parted[name] = found.sentence() if found else None
    return {"parted": parted}


def rank_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """How much of the error at the decoder's outputs is gone when one part, or one node, computes in float.

    Request: that of `_Inputs`, and int8 (encoder and decoder graphs of NNCF). Returns groups (parts of the model) and
    nodes (single nodes of the worst parts): rows of `rank.NodeShare` with their graph and `of_all`, the share of both
    graphs' errors together, sorted by it. Encoder parts are judged by what the float decoder makes of their tokens.
    """
    from backends.openvino.rank import rank_by_groups

    ints = _graphs(request["int8"])
    rows: dict[str, list[dict[str, Any]]] = {"groups": [], "nodes": []}
    with _Inputs(request) as inputs:
        for name, after in (("encoder", inputs.decoded), ("decoder", None)):
            ranked = rank_by_groups(inputs.floats[name], ints[name], inputs.feeds[name], detail=GROUPS, after=after)
            for kind, shares in zip(("groups", "nodes"), ranked, strict=True):
                rows[kind] += [{"graph": name, **asdict(share)} for share in shares]
    total = sum(next((row["error_all"] for row in rows["groups"] if row["graph"] == n), 0.0) for n in ints)
    for listed in rows.values():
        for row in listed:
            row["of_all"] = (row["error_all"] - row["error_without"]) / total if total else 0.0
        listed.sort(key=lambda row: -row["of_all"])
    return dict(rows)


def mix_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """Int8 graphs with nodes back in float, written to `out`; a graph without such nodes is not written.

    Request: float and int8 (encoder and decoder graphs), nodes (graph -> names), out. Returns graphs.
    """
    from backends.openvino.rank import with_float_nodes

    floats, ints, out = _graphs(request["float"]), _graphs(request["int8"]), Path(request["out"])
    mixed = {
        name: with_float_nodes(ints[name], floats[name], nodes, out / f"{name}.xml")
        for name, nodes in request["nodes"].items()
        if nodes
    }
    return {"graphs": {name: graph_to_json(graph) for name, graph in mixed.items()}}


def _graphs(data: dict[str, Any]) -> dict[str, Graph]:
    return {name: graph_from_json(data[name]) for name in ("encoder", "decoder")}


def _token_pairs(tokens: Sequence[np.ndarray]) -> list[Feeds]:
    return [{"tokens_1": tokens[k], "tokens_2": tokens[k + 1]} for k in range(0, len(tokens), 2)]
