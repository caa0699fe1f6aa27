"""Runs schemes of weight quantization in real engines where one computes them: OpenVINO with NNCF's packed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.base import Graph, Precision
from pqk.compress.weights.schemes import Scheme
from pqk.engines.calls import compiled
from pqk.engines.variant import Variant
from pqk.families.contract import Family, Sample, SampleSet
from pqk.settings.workload import Workload
from pqk.stats.intervals import Interval
from pqk.stats.latency import percentile, speedup
from pqk.store import worker
from pqk.study.weights.closeness import Closeness

FLOAT = "float"


@dataclass(frozen=True)
class Timed:
    """An engine's figures. what: runtime and format; relative_error: the largest over all outputs."""

    what: str
    size_bytes: int
    sample_ms: tuple[float, ...]
    speedup: Interval
    relative_error: float | None

    def to_json(self) -> dict[str, Any]:
        """Returns the entry `engine` of a row."""
        found = {f"p{q}_ms": percentile(self.sample_ms, q) for q in (25, 50, 75)}
        ratio = {"value": self.speedup.value, "low": self.speedup.low, "high": self.speedup.high}
        about = {"what": self.what, "size_bytes": self.size_bytes, "rounds": len(self.sample_ms)}
        return {**about, **found, "speedup": ratio, "relative_error": self.relative_error}


def variants_of(schemes: Mapping[str, Scheme], graphs: Mapping[str, Graph], folder: Path) -> dict[str, Variant]:
    """Returns the float variant under `FLOAT`, and those of the schemes that NNCF packs, by their names.

    Their graphs are written below `folder`. One scale for a whole tensor has no engine.
    """
    from backends.openvino.weights import WeightSpec, compress_weights

    made = {FLOAT: Variant(FLOAT, "openvino", Precision.F32, graphs)}
    for name, scheme in schemes.items():
        if scheme.granularity == "tensor":
            continue
        spec = WeightSpec(scheme.bits, scheme.symmetric, scheme.group_size or -1)
        packed = {graph: compress_weights(one, spec, folder / name / f"{graph}.xml") for graph, one in graphs.items()}
        made[name] = Variant(name, "openvino", Precision.F32, packed)
    return made


def timed(
    variants: Mapping[str, Variant],
    fed: Mapping[str, Any],
    found: SampleSet,
    efficiency: Mapping[str, Any],
    errors: Mapping[str, float | None],
) -> dict[str, Timed]:
    """Times all variants side by side in a process of their own; see `pqk.measure.timing`.

    fed: family and workload as plain data. errors: of `worst_errors`.
    """
    asked = [variant.to_json() for variant in variants.values()]
    request = {**fed, "samples": found.to_json(), "variants": asked, "efficiency": dict(efficiency)}
    request["groups"] = False
    took = worker.call("timing", request)["variants"]
    base = took[FLOAT]["sample"]
    return {
        name: Timed(
            _what(name, variant),
            sum(graph.size_bytes for graph in variant.graphs.values()),
            tuple(took[name]["sample"]),
            speedup(base, took[name]["sample"]),
            errors.get(name),
        )
        for name, variant in variants.items()
    }


def worst_errors(
    variants: Mapping[str, Variant],
    of: Family,
    workload: Workload,
    samples: Callable[[], Iterable[Sample]],
    reference: list[Mapping[str, Any]],
) -> dict[str, float | None]:
    """Returns the largest relative error over the outputs of each variant, against the float model in torch.

    samples: yields those of `reference`, its predictions, in the same order.
    """
    found: dict[str, float | None] = {}
    for name, variant in variants.items():
        sums = {output: Closeness(kind) for output, kind in of.scoring_part().OUTPUTS.items()}
        with compiled(variant) as call:
            for sample, expected in zip(samples(), reference, strict=True):
                predicted = of.predict_part().predict(call, sample, workload, 0)
                for output, each in sums.items():
                    each.add(predicted[output], expected[output])
        errors = [each.result()["relative_error"] for each in sums.values()]
        found[name] = max((error for error in errors if error is not None), default=None)
    return found


def _what(name: str, variant: Variant) -> str:
    if name == FLOAT:
        return "OpenVINO f32"
    return "OpenVINO f32 with weights packed by NNCF compress_weights, activations not quantized"
