"""Runs schemes of weight quantization in engines: NNCF in OpenVINO, MatMulNBits in ONNX Runtime, ModelOpt's graphs.

Every engine is timed in turns with the float engine of its own runtime. Activations stay in float in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from backends.base import BackendError, Graph, Precision
from backends.quantspec import NothingLeft
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
Pack = Callable[[Graph, Scheme, Path], Graph]


@dataclass(frozen=True)
class EngineResult:
    """The figures of a scheme in one engine.

    runtime: what ran it. measured: 'engine', or 'emulated' where another runtime computed in place of the engine, whose
    time would mean nothing. sample_ms: empty where nothing was timed. speedup: against the float engine of the same
    runtime, paired by round. relative_error: the largest over all outputs, against the float model in torch.
    """

    runtime: str
    what: str
    measured: Literal["engine", "emulated"]
    size_bytes: int
    sample_ms: tuple[float, ...]
    speedup: Interval | None
    relative_error: float | None

    def to_json(self) -> dict[str, Any]:
        """Returns an entry of `engines` of a row."""
        times = self.sample_ms
        found = {f"p{q}_ms": percentile(times, q) if times else None for q in (25, 50, 75)}
        ratio = self.speedup and {"value": self.speedup.value, "low": self.speedup.low, "high": self.speedup.high}
        about = {"runtime": self.runtime, "what": self.what, "measured": self.measured, "size_bytes": self.size_bytes}
        return {**about, "rounds": len(times), **found, "speedup": ratio, "relative_error": self.relative_error}


@dataclass(frozen=True)
class Tool:
    """A tool that packs the weights of ONNX graphs, and the runtime that computes with them.

    runtime: its name for a reader. backend: that compiles the graphs. needs: modules that must be installed. what:
    describes a scheme in it; None where the tool has no form of the scheme. pack: writes a graph, at a path without
    suffix. emulated: another runtime computes.
    """

    runtime: str
    backend: str
    needs: tuple[str, ...]
    what: Callable[[Scheme], str | None]
    pack: Pack
    precision: Precision = Precision.F32
    emulated: bool = False

    def missing(self) -> list[str]:
        """Returns the modules that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]


def _in_openvino(graph: Graph, scheme: Scheme, target: Path) -> Graph:
    from backends.openvino.weights import WeightSpec, compress_weights

    spec = WeightSpec(scheme.bits, scheme.symmetric, scheme.group_size or -1)
    return compress_weights(graph, spec, target.with_name(f"{target.name}.xml"))


def _in_ort(graph: Graph, scheme: Scheme, target: Path) -> Graph:
    from backends.ort.weights import WeightSpec, compress_weights

    spec = WeightSpec(scheme.bits, scheme.symmetric, scheme.group_size or _WIDEST)
    return compress_weights(graph, spec, target.with_name(f"{target.name}.onnx"))


def _in_modelopt(graph: Graph, scheme: Scheme, target: Path) -> Graph:
    from backends.base import QuantSpec, Source
    from backends.trt.modelopt import ModelOptQuantizer

    source = Source(target.name, None, {}, tuple(t.name for t in graph.outputs), graph)
    spec = QuantSpec(bits_w=4, bits_a=16, keep=(), calibration_samples=1, output_dir=target.parent)
    feeds = {t.name: np.zeros(t.shape, t.dtype) for t in graph.inputs}  # rounding weights to nearest reads no data
    return ModelOptQuantizer("int8").quantize(source, spec, [feeds])


_WIDEST = 256


def _openvino_what(scheme: Scheme) -> str | None:
    packed = "OpenVINO f32 with weights packed by NNCF compress_weights, activations not quantized"
    return None if scheme.granularity == "tensor" else packed


def _ort_what(scheme: Scheme) -> str | None:
    from backends.ort.weights import GROUPS

    packed = "ONNX Runtime f32 with MatMulNBits for matrix products, inputs in float32; convolutions stay in float"
    if scheme.bits == 4:
        return packed if scheme.group_size in GROUPS else None
    if scheme.granularity == "channel":
        return f"{packed}; blocks of {_WIDEST} along a channel, dequantized in each call"
    return None


def _modelopt_what(scheme: Scheme) -> str | None:
    from backends.trt.modelopt import INT4_BLOCK

    if (scheme.bits, scheme.symmetric, scheme.group_size) != (4, True, INT4_BLOCK):
        return None
    return "emulated: ModelOpt's int4 blocks for TensorRT, computed by ONNX Runtime in float; no time"


TOOLS = (
    Tool("OpenVINO", "openvino", ("openvino", "nncf"), _openvino_what, _in_openvino),
    Tool("ONNX Runtime", "onnxruntime", ("onnxruntime",), _ort_what, _in_ort),
    Tool(
        "TensorRT",
        "reference",  # which keeps the inputs of int4 products in float
        ("modelopt", "onnx_graphsurgeon", "onnxslim", "lief"),
        _modelopt_what,
        _in_modelopt,
        Precision.INT8,
        emulated=True,
    ),
)


def variants_of(
    tool: Tool, schemes: Mapping[str, Scheme], graphs: Mapping[str, Graph], folder: Path
) -> tuple[dict[str, Variant], list[str]]:
    """Returns the variants of the schemes that a tool packs, the float one first under `FLOAT`, and notes on the rest.

    Their graphs are written below `folder`. A graph without a weight that the tool takes runs in float. No variant
    where nothing is packed.
    """
    made: dict[str, Variant] = {}
    notes: list[str] = []
    for name, scheme in schemes.items():
        if tool.what(scheme) is None:
            continue
        packed: dict[str, Graph] = {}
        try:
            for graph, one in graphs.items():
                target = folder / name / graph
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    packed[graph] = tool.pack(one, scheme, target)
                except NothingLeft:
                    packed[graph] = one
        except BackendError as error:
            notes.append(f"{tool.runtime}, {name}: {error}")
            continue
        if any(packed[graph] is not one for graph, one in graphs.items()):
            made[name] = Variant(name, tool.backend, tool.precision, packed)
        else:
            notes.append(f"{tool.runtime}, {name}: the model has no weight that it packs")
    return ({FLOAT: Variant(FLOAT, tool.backend, Precision.F32, graphs), **made} if made else {}), notes


def engines_of(
    tool: Tool,
    variants: Mapping[str, Variant],
    schemes: Mapping[str, Scheme],
    times: Mapping[str, list[float]] | None,
    errors: Mapping[str, float | None],
) -> dict[str, EngineResult]:
    """Returns the results of a tool's variants; the float one has none where nothing is timed.

    times: of `sample_times`; None: not timed. errors: of `worst_errors`.
    """
    found: dict[str, EngineResult] = {}
    for name, variant in variants.items():
        if name == FLOAT and times is None:
            continue
        what = f"{tool.runtime} f32" if name == FLOAT else tool.what(schemes[name])
        assert what is not None
        size = sum(graph.size_bytes for graph in variant.graphs.values())
        taken = () if times is None else tuple(times[name])
        ratio = None if times is None else speedup(times[FLOAT], taken)
        measured: Literal["engine", "emulated"] = "emulated" if tool.emulated else "engine"
        found[name] = EngineResult(tool.runtime, what, measured, size, taken, ratio, errors.get(name))
    return found


def sample_times(
    variants: Mapping[str, Variant], fed: Mapping[str, Any], found: SampleSet, efficiency: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Times all variants side by side in a process of their own, in milliseconds; see `pqk.measure.timing`.

    fed: family and workload as plain data.
    """
    asked = [variant.to_json() for variant in variants.values()]
    request = {**fed, "samples": found.to_json(), "variants": asked, "efficiency": dict(efficiency)}
    took = worker.call("timing", {**request, "groups": False})["variants"]
    return {name: took[name]["sample"] for name in variants}


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
