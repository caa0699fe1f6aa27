"""Serves one variant of `pqk bench engine` in a process of its own: a line of JSON for each line that it is sent.

`python -m pqk.bench.engine_child REQUEST.json` loads the variant and says `{"ready": ...}` or `{"error": ...}`. For
each line "run" it runs one sample and says how many milliseconds that took. It ends when its input ends.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pqk.bench.whole import images_of
from pqk.engines.calls import compiled, in_torch
from pqk.engines.variant import Variant, graph_from_json
from pqk.measure.predict import opened
from pqk.models import load_model

Run = Callable[[], object]


def main() -> None:
    """Runs the process; see the module."""
    said = sys.stdout
    sys.stdout = sys.stderr  # libraries print what they like, and not between the lines of JSON
    try:
        run, notes = LOADERS[(request := json.loads(Path(sys.argv[1]).read_text()))["kind"]](request)
        run()
    except Exception as error:
        print(json.dumps({"error": (str(error).strip() or type(error).__name__).splitlines()[0][:300]}), file=said)
        return
    print(json.dumps({"ready": notes}), file=said, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter_ns()
        run()
        print(json.dumps({"ms": (time.perf_counter_ns() - start) / 1e6}), file=said, flush=True)


def _by_predict(request: Mapping[str, Any], call: Any) -> Run:
    of, workload, found = opened(request)
    sample = of.data_part().timed(found, workload)[0]
    return lambda: of.predict_part().predict(call, sample, workload, 0)


def _variant(request: Mapping[str, Any]) -> tuple[Run, str]:
    return _by_predict(request, compiled(Variant.from_json(request["variant"]))), ""


def _torch(request: Mapping[str, Any]) -> tuple[Run, str]:
    of, workload, _ = opened(request)
    specs = of.model_part().graphs(load_model(request["model"]), workload)
    if request["compiled"]:
        for spec in specs.values():
            spec.module.compile(dynamic=False)
    return _by_predict(request, in_torch(specs)), ""


def _whole(request: Mapping[str, Any]) -> tuple[Run, str]:
    """The one graph in OpenVINO: in floats, or as `nncf.quantize` makes it when it is given nothing but data."""
    import openvino as ov

    of, workload, found = opened(request)
    samples = of.data_part().timed(found, workload)
    model, notes = ov.Core().read_model(graph_from_json(request["graph"]).path), ""
    if request["quantized"]:
        import nncf

        feeds = [images_of(sample) for sample in samples]
        model = nncf.quantize(model, nncf.Dataset(feeds))
        notes = f"nncf.quantize with its defaults, on {len(feeds)} samples"
    settings = {"INFERENCE_PRECISION_HINT": request["precision"], "PERFORMANCE_HINT": "LATENCY"}
    infer, feed = ov.Core().compile_model(model, "CPU", settings).create_infer_request(), images_of(samples[0])
    return lambda: infer.infer(feed, share_inputs=True, share_outputs=True), notes


def _ceilings(request: Mapping[str, Any]) -> tuple[Run, str]:
    """Measures the most that this machine computes in OpenVINO, in GFLOP/s by precision and layer; says it as JSON.

    Each is the median of some runs of layers of one kind and size, one behind the other.
    """
    found: dict[str, dict[str, float]] = {}
    for precision in request["precisions"]:
        for layer in request["layers"]:
            run, flops = _ceiling(layer, precision)
            times = []
            for _ in range(_WARMUP + _ROUNDS):
                start = time.perf_counter_ns()
                run()
                times.append(time.perf_counter_ns() - start)
            found.setdefault(precision, {})[layer] = flops / float(np.median(times[_WARMUP:]))
    return lambda: None, json.dumps(found)


def _ceiling(layer: str, precision: str) -> tuple[Run, float]:
    """Returns a run of layers of one kind, and its FLOPs."""
    import openvino as ov

    model = _layers(layer, precision == "int8")
    hint = "f32" if precision == "int8" else precision
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"})
    infer = compiled.create_infer_request()
    shape = compiled.input(0).get_shape()
    feed = {0: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    return lambda: infer.infer(feed, share_inputs=True, share_outputs=True), flops_of(model)


_WARMUP, _ROUNDS = 1, 7
LAYERS = 3
"""Of a ceiling's model, so that the first change of layout counts little."""


def _layers(kind: str, quantized: bool) -> Any:
    import openvino as ov
    import openvino.opset13 as ops

    random = np.random.default_rng(0)
    shape = {"matmul": (1, 1024, 1024), "conv1x1": (1, 1024, 32, 32), "conv3x3": (1, 128, 64, 64)}[kind]
    x = ops.parameter(shape, np.float32)
    node = x
    for _ in range(LAYERS):
        width = shape[-1] if kind == "matmul" else shape[1]
        kernel = {"matmul": (width, width), "conv1x1": (width, width, 1, 1), "conv3x3": (width, width, 3, 3)}[kind]
        if quantized:
            limits = [ops.constant(np.float32(value)) for value in (-4 * 128 / 127, 4) * 2]
            node = ops.fake_quantize(node, *limits, 256)
            stored = ops.convert(ops.constant(random.integers(-63, 64, kernel).astype(np.int8)), np.float32)
            weight = ops.multiply(stored, ops.constant(np.full((width, *[1] * (len(kernel) - 1)), 1e-3, np.float32)))
        else:
            weight = ops.constant((random.standard_normal(kernel) / width**0.5).astype(np.float32))
        pad = kernel[-1] // 2
        node = (
            ops.matmul(node, weight, False, True)
            if kind == "matmul"
            else ops.convolution(node, weight, [1, 1], [pad, pad], [pad, pad], [1, 1])
        )
    return ov.Model([ops.result(node)], [x], kind)


def flops_of(model: Any) -> float:
    """Returns the FLOPs of an ov.Model, two per multiply-add."""
    from backends.openvino.flops import works

    return float(sum(work.flops for work in works(model)))


LOADERS: dict[str, Callable[[Mapping[str, Any]], tuple[Run, str]]] = {
    "variant": _variant,
    "torch": _torch,
    "whole": _whole,
    "ceilings": _ceilings,
}

if __name__ == "__main__":
    main()
