"""`pqk parity --explain`: where runtimes part, and which nodes of the int8 model cause its error, proved by a run.

Two questions for each run, each answered on a few validation pairs (`pqk.run.nodes`):

- Float: the first node at which the backend parts from ONNX Runtime on the float graphs.
- Int8: how much of the error at the outputs is gone when one part of the model computes in float. The worst part is
  then really put back to float, scored on all validation pairs and, where the engines are real, timed beside the
  int8 model.

`ranking`, `with_floats` and `times_beside` are the stages of this; `pqk tune` works with the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from backends import registry
from backends.base import BackendError, Precision, surgery_of
from pqk.errors import PqkError
from pqk.files import write_json
from pqk.measure.latency import percentile, speedup
from pqk.run import stages, worker
from pqk.run.candidate import Outcome
from pqk.run.variants import Variant, graph_from_json, graph_to_json

_CODE = ("pqk.run.nodes",)
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
    """The rows groups and nodes of `pqk.run.nodes.rank_graphs`. Raises PqkError when no node is quantized."""
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


def explain(outcome: Outcome) -> dict[str, Any]:
    """Rank the parts of a quantized run, put the worst back to float, and measure what that changes.

    Returns parted, groups, nodes (see `ranking`), worst (the row chosen), proof (drop on validation samples and pair
    time before and after in the same interleaved run, and the speedup from before to after) and a sentence. Of a
    backend that is emulated, parted and times are null.
    Raises PqkError or BackendError for an outcome whose nodes cannot go back to float.
    """
    backend = outcome.variants[-1].backend
    if not can_rank(backend):
        raise PqkError(f"backend {backend} cannot put nodes of its quantized graphs back to float")
    timed = outcome.records[-1]["measured"] == "engine"
    # An emulated engine computes in ONNX Runtime: there is nothing to part from.
    found: dict[str, Any] = {"parted": parted(outcome) if timed else None, **ranking(outcome)}
    worst = found["worst"] = found["groups"][0]
    mixed = with_floats(outcome, {worst["graph"]: worst["nodes"]})
    before, after = outcome.drop(outcome.variants[-1]), outcome.drop(mixed, ())
    times = times_beside(outcome, mixed) if timed else None
    before_ms, after_ms = [percentile(t, 50) for t in times] if times else (None, None)
    found["proof"] = {
        "drop_before_pct": before.value if before else None,
        "drop_after_pct": after.value if after else None,
        "t_pair_p50_before_ms": before_ms,
        "t_pair_p50_after_ms": after_ms,
        "speedup": speedup(*times).value if times else None,
    }
    found["sentence"] = _sentence(worst, found["proof"])
    return found


def explain_all(outcomes: Mapping[tuple[str, str], Outcome]) -> dict[str, dict[str, Any]]:
    """`explain` of each outcome under 'backend/quantizer'; one that cannot be explained has only a sentence: why."""
    found: dict[str, dict[str, Any]] = {}
    for (backend, quantizer), outcome in outcomes.items():
        try:
            found[f"{backend}/{quantizer}"] = explain(outcome)
        except (BackendError, PqkError) as error:
            found[f"{backend}/{quantizer}"] = {"sentence": f"cannot be explained: {error}"}
    return found


def _sentence(worst: Mapping[str, Any], proof: Mapping[str, Any]) -> str:
    before, after = proof["drop_before_pct"], proof["drop_after_pct"]
    drop = (
        "the drop cannot be measured"
        if before is None or after is None
        else f"the drop on validation samples goes from {before:.2f} % to {after:.2f} %"
    )
    if proof["speedup"] is None:
        time = "what that costs in time was not measured, as these engines are emulated"
    else:
        slower = 100 * (1 / proof["speedup"] - 1)
        time = f"a pair takes {slower:+.1f} % time"
    return (
        f"{worst['graph']} {worst['name']}: {100 * worst['of_all']:.0f} % of the final error; with its "
        f"{len(worst['nodes'])} nodes in float {drop} and {time}"
    )
