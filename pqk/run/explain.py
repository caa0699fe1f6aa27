"""`pqk parity --explain`: where runtimes part, and which nodes of the int8 model cause its error, proved by a run.

Two questions, each answered on a few real pairs (`pqk.run.nodes`):

- Float: the first node at which OpenVINO parts from ONNX Runtime on the float graphs.
- Int8: for NNCF's graphs, how much of the error at the outputs is gone when one part of the model computes in float.
  The worst part is then really put back to float, scored on all pairs and timed beside the int8 model.

`ranking`, `with_floats` and `times_beside` are the stages of this; `pqk tune` works with the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backends.base import Precision
from pqk.data.scene import open_scene
from pqk.errors import PqkError
from pqk.files import write_json
from pqk.measure.latency import percentile
from pqk.run import stages, worker
from pqk.run.inputs import load_frames, scene_pairs
from pqk.run.runner import Outcome
from pqk.run.variants import Variant, graph_from_json, graph_to_json
from pqk.spec.workload import PairGraph

_CODE = ("pqk.run.nodes",)
MIXED = "mixed"  # the name of every variant with nodes in float: samples of a timing are kept under it


def _pairs_asked(outcome: Outcome) -> dict[str, Any]:
    """Which pairs of a scene a worker looks at."""
    return {
        **{name: outcome.scoring[name] for name in ("views", "shape", "pair_graph", "min_covisibility")},
        "truthful": outcome.truthful,
    }


def _graphs(variant: Variant) -> dict[str, Any]:
    return {"encoder": graph_to_json(variant.encoder), "decoder": graph_to_json(variant.decoder)}


def _found(outcome: Outcome, task: str, about: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the worker `task` finds out about the graphs, kept in the store."""
    candidate, plain = outcome.variants[-1], outcome.onnx_float

    def make(folder: Path) -> None:
        graphs = {"float": _graphs(plain), "int8": _graphs(candidate)}
        request = {**graphs, **asked, "scene": str(outcome.scenes.folders[0])}
        write_json(folder / f"{task}.json", worker.call(task, request))

    inputs = {**about, "scenes": outcome.scenes.sha256, **asked}
    made = outcome.ctx.make(task, (*_CODE, *stages.sources_of(candidate, plain)), inputs, make)
    found: dict[str, Any] = json.loads((made.path / f"{task}.json").read_text())
    return found


def parted(outcome: Outcome) -> dict[str, str | None]:
    """For each float graph where OpenVINO parts from ONNX Runtime, as a sentence; None where it does not."""
    asked = {**_pairs_asked(outcome), "tolerance": outcome.experiment.evaluation.parity.float_relative}
    found: dict[str, str | None] = _found(
        outcome, "parted", stages.identity(outcome.ctx, outcome.onnx_float, None), asked
    )["parted"]
    return found


def ranking(outcome: Outcome) -> dict[str, list[dict[str, Any]]]:
    """The rows groups and nodes of `pqk.run.nodes.rank_graphs` for an outcome of openvino with nncf."""
    about = stages.identity(outcome.ctx, outcome.variants[-1], outcome.onnx_float)
    found = _found(outcome, "ranking", about, _pairs_asked(outcome))
    return {kind: found[kind] for kind in ("groups", "nodes")}


def with_floats(outcome: Outcome, nodes: Mapping[str, Sequence[str]]) -> Variant:
    """The candidate with nodes (graph -> names) back in float; a graph without such nodes is the candidate's own."""
    candidate, plain = outcome.variants[-1], outcome.onnx_float
    wanted = {name: sorted(names) for name, names in nodes.items() if names}

    def make(folder: Path) -> None:
        graphs = {"float": _graphs(plain), "int8": _graphs(candidate)}
        made = worker.call("mixed", {**graphs, "nodes": wanted, "out": str(folder)})["graphs"]
        for graph in made.values():
            graph["path"] = Path(graph["path"]).name
        write_json(folder / "graphs.json", made)

    inputs = {"float": plain.hashes, "int8": candidate.hashes, "nodes": wanted, "machine": dict(outcome.ctx.machine)}
    made = outcome.ctx.make("mixed", _CODE, inputs, make, str(sum(map(len, wanted.values()))))
    written = json.loads((made.path / "graphs.json").read_text())
    graphs = {n: graph_from_json({**g, "path": str(made.path / g["path"])}) for n, g in written.items()}
    encoder, decoder = graphs.get("encoder", candidate.encoder), graphs.get("decoder", candidate.decoder)
    return Variant(MIXED, candidate.backend, Precision.INT8, encoder, decoder, candidate.options)


def times_beside(outcome: Outcome, variant: Variant) -> tuple[list[float], list[float]]:
    """Pair times in ms of the candidate and of `variant` (named MIXED), round by round of one interleaved run."""
    candidate, scene = outcome.variants[-1], outcome.scenes.folders[0]
    asked = _pairs_asked(outcome)
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
    timed = stages.timing(outcome.ctx, [candidate, variant], scene, outcome.scenes.sha256, timing)["variants"]
    return timed[candidate.name]["pair"], timed[variant.name]["pair"]


def explain(outcome: Outcome) -> dict[str, Any]:
    """Rank the parts of an openvino/nncf run, put the worst back to float, and measure what that changes.

    Returns parted, groups, nodes (see `ranking`), worst (the row chosen), proof (drop and pair time before and after,
    in the same interleaved run) and a sentence. Raises PqkError for an outcome of another toolchain.
    """
    if outcome.variants[-1].encoder.format != "openvino":
        raise PqkError("--explain ranks the nodes of OpenVINO graphs: let openvino with nncf take part")
    found: dict[str, Any] = {"parted": parted(outcome), **ranking(outcome)}
    worst = found["worst"] = found["groups"][0]
    mixed = with_floats(outcome, {worst["graph"]: worst["nodes"]})
    after = outcome.drop_pct(outcome.score(mixed, ()))
    times = times_beside(outcome, mixed)
    found["proof"] = {
        "drop_before_pct": outcome.records[-1]["quality_drop_pct"],
        "drop_after_pct": after,
        "t_pair_p50_before_ms": percentile(times[0], 50),
        "t_pair_p50_after_ms": percentile(times[1], 50),
    }
    found["sentence"] = _sentence(worst, found["proof"])
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
