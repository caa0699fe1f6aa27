"""`pqk parity --explain`: where runtimes part, and which nodes of the int8 model cause its error, proved by a run.

Two questions, each answered on a few real pairs without ever holding all activations:

- Float: the first node at which OpenVINO parts from ONNX Runtime on the float graphs (`backends.bisect`).
- Int8: for NNCF's graphs, how much of the error at the outputs is gone when one part of the model computes in float
  (`backends.openvino.rank`); encoder parts are judged by what the float decoder makes of their tokens. The worst part
  is then really put back to float, scored on all pairs and timed beside the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Feeds, Graph, Precision
from pqk.data.scene import open_scene
from pqk.errors import PqkError
from pqk.files import write_json
from pqk.measure.latency import percentile
from pqk.run import stages, worker
from pqk.run.inputs import load_frames, scene_pairs
from pqk.run.runner import Outcome
from pqk.run.variants import Runner, Variant, graph_from_json, graph_to_json
from pqk.spec.workload import PairGraph

PAIRS = 2  # pairs that the ranking looks at: shares settle with the first
GROUPS = 2  # worst parts of each graph whose single nodes are ranked too


def explain_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """The worker's part. Request: float and int8 (encoder and decoder graphs), scene, views, shape, pair_graph,
    min_covisibility, truthful, tolerance, out. Writes the int8 graphs with the worst part in float into `out`.

    Returns parted (graph -> sentence or null), groups and nodes (rows of `rank.NodeShare` with their graph, sorted by
    share), worst (the row chosen) and mixed (graphs).
    """
    from backends import registry
    from backends.bisect import first_difference
    from backends.openvino.rank import rank_by_groups, with_float_nodes

    floats, ints = ({n: graph_from_json(g) for n, g in request[kind].items()} for kind in ("float", "int8"))
    shape = request["shape"]
    frames = load_frames(open_scene(Path(request["scene"])), shape[0], shape[1], request["views"])
    graph = PairGraph.model_validate(request["pair_graph"])
    pairs = scene_pairs(frames, graph, request["min_covisibility"], request["truthful"])[:PAIRS]
    images: list[Feeds] = [{"image": frames[k].image[None]} for pair in pairs for k in pair]
    openvino, reference = registry.get("openvino"), registry.get("reference")

    variant = Variant("fp32", "openvino", Precision.F32, floats["encoder"], floats["decoder"])
    with Runner(variant) as runner:
        tokens = [runner.encode(item["image"]) for item in images]
        feeds = {"encoder": images, "decoder": _token_pairs(tokens)}

        def decoded(outputs: list[Feeds]) -> list[Feeds]:
            return [runner.decoder.infer(item) for item in _token_pairs([out["tokens"] for out in outputs])]

        parted = {}
        for name in ("encoder", "decoder"):
            found = first_difference(
                floats[name],
                lambda g: reference.compile(g, Precision.F32),
                floats[name],
                lambda g: openvino.compile(g, Precision.F32),
                feeds[name][:1],
                request["tolerance"],
            )
            parted[name] = found.sentence() if found else None
        rows: dict[str, list[dict[str, Any]]] = {"groups": [], "nodes": []}
        for name, after in (("encoder", decoded), ("decoder", None)):
            ranked = rank_by_groups(floats[name], ints[name], feeds[name], detail=GROUPS, after=after)
            for kind, shares in zip(("groups", "nodes"), ranked, strict=True):
                rows[kind] += [{"graph": name, **asdict(share)} for share in shares]
    # One scale for both graphs: error at the outputs of the decoder, as a part of both graphs' errors together.
    total = sum(next((row["error_all"] for row in rows["groups"] if row["graph"] == n), 0.0) for n in ints)
    for listed in rows.values():
        for row in listed:
            row["of_all"] = (row["error_all"] - row["error_without"]) / total if total else 0.0
        listed.sort(key=lambda row: -row["of_all"])
    worst = rows["groups"][0]
    out = Path(request["out"])
    mixed = {
        name: with_float_nodes(ints[name], floats[name], worst["nodes"] if name == worst["graph"] else (), out / path)
        for name, path in (("encoder", "encoder.xml"), ("decoder", "decoder.xml"))
    }
    return {"parted": parted, **rows, "worst": worst, "mixed": {n: graph_to_json(g) for n, g in mixed.items()}}


def _token_pairs(tokens: Sequence[np.ndarray]) -> list[Feeds]:
    return [{"tokens_1": tokens[k], "tokens_2": tokens[k + 1]} for k in range(0, len(tokens), 2)]


def explain(outcome: Outcome) -> dict[str, Any]:
    """Rank the parts of an openvino/nncf run, put the worst back to float, and measure what that changes.

    Returns what `explain_graphs` returns without its graphs, and proof: drop and pair time before and after, in the
    same interleaved run, and a sentence. Raises PqkError for an outcome of another toolchain.
    """
    candidate, record = outcome.variants[-1], outcome.records[-1]
    if candidate.encoder.format != "openvino":
        raise PqkError("--explain ranks the nodes of OpenVINO graphs: let openvino with nncf take part")
    ctx, scene = outcome.ctx, outcome.scenes.folders[0]
    asked = {
        **{name: outcome.scoring[name] for name in ("views", "shape", "pair_graph", "min_covisibility")},
        "truthful": outcome.truthful,
        "tolerance": outcome.experiment.evaluation.parity.float_relative,
    }

    def make(folder: Path) -> None:
        graphs = {
            kind: {"encoder": graph_to_json(v.encoder), "decoder": graph_to_json(v.decoder)}
            for kind, v in (("float", outcome.onnx_float), ("int8", candidate))
        }
        result = worker.call("explain", {**graphs, **asked, "scene": str(scene), "out": str(folder)})
        for graph in result["mixed"].values():
            graph["path"] = Path(graph["path"]).name
        write_json(folder / "explain.json", result)

    inputs = {**stages.identity(ctx, candidate, outcome.onnx_float), "scenes": outcome.scenes.sha256, **asked}
    modules = ("pqk.run.explain", *stages.sources_of(candidate, outcome.onnx_float))
    made = ctx.make("explain", modules, inputs, make)
    found: dict[str, Any] = json.loads((made.path / "explain.json").read_text())
    graphs: dict[str, Graph] = {
        name: graph_from_json({**graph, "path": str(made.path / graph["path"])})
        for name, graph in found.pop("mixed").items()
    }
    mixed = Variant("mixed", candidate.backend, Precision.INT8, graphs["encoder"], graphs["decoder"], candidate.options)
    after = outcome.drop_pct(outcome.score(mixed, ()))
    frames = load_frames(open_scene(scene), asked["shape"][0], asked["shape"][1], asked["views"])
    pairs = scene_pairs(
        frames, PairGraph.model_validate(asked["pair_graph"]), asked["min_covisibility"], asked["truthful"]
    )
    timing = {
        "shape": asked["shape"],
        "views": asked["views"],
        "pairs": [list(pair) for pair in pairs],
        "efficiency": outcome.experiment.evaluation.efficiency.model_dump(mode="json"),
    }
    timed = stages.timing(ctx, [candidate, mixed], scene, outcome.scenes.sha256, timing)["variants"]
    times = {name: percentile(timed[name]["pair"], 50) for name in (candidate.name, mixed.name)}
    found["proof"] = {
        "drop_before_pct": record["quality_drop_pct"],
        "drop_after_pct": after,
        "t_pair_p50_before_ms": times[candidate.name],
        "t_pair_p50_after_ms": times[mixed.name],
    }
    found["sentence"] = _sentence(found["worst"], found["proof"])
    return found


def _sentence(worst: Mapping[str, Any], proof: Mapping[str, Any]) -> str:
    slower = 100 * (proof["t_pair_p50_after_ms"] / proof["t_pair_p50_before_ms"] - 1)
    before, after = proof["drop_before_pct"], proof["drop_after_pct"]
    drop = (
        "the drop cannot be measured"
        if before is None or after is None
        else f"the drop goes from {before:.2f} % to {after:.2f} %"
    )
    return (
        f"{worst['graph']} {worst['name']}: {100 * worst['of_all']:.0f} % of the final error; with its "
        f"{len(worst['nodes'])} nodes in float {drop} and a pair takes {slower:+.1f} % time"
    )
