"""Measures the host memory of a variant, `measure_memory`: in a process that compiles it, and in one that loads the
compiled model and runs it.

A compiler needs memory that is free again when the model runs. For a device that only runs a model, the second number
counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pqk.engines.calls import compiled
from pqk.engines.variant import Variant
from pqk.measure.footprint import forget_peak, peak_ram_bytes, ram_bytes
from pqk.measure.predict import opened_workload

SETTLED = 0.01
"""Share by which memory may grow over two samples while a process counts as settled."""

_SAMPLES = 20  # limit for a process to settle


def measure_memory(request: dict[str, Any]) -> dict[str, Any]:
    """Measures this process, which must be fresh.

    Request: family, workload, variant, compiled (folder of the compiled model), step: 'compile' compiles the model,
    writes it into `compiled` and returns peak_bytes; 'run', in another process afterwards, loads it from there and
    returns steady_bytes: the peak while a sample runs, once samples need no more memory than those before. Null when
    the model was compiled again, or memory still grew after 20 samples. A backend that cannot keep compiled models
    compiles in both.
    """
    variant = Variant.from_json(request["variant"])
    options = {name: value for name, value in variant.options.items() if name != "cache_dir"}
    if variant.backend != "reference":  # the reference does not compile
        options["cache_dir"] = request["compiled"]
    of, workload = opened_workload(request)
    sample, predict = of.data_part().example(workload), of.predict_part().predict
    with compiled(replace(variant, options=options)) as engines:

        def run() -> None:
            predict(engines, sample, workload, 0)

        if request["step"] == "compile":
            run()
            return {"peak_bytes": peak_ram_bytes()}
        loaded = all(getattr(engine, "loaded_from_cache", True) for engine in engines.engines.values())
        return {"steady_bytes": steady_bytes(run) if loaded else None}


def steady_bytes(run: Callable[[], object]) -> int | None:
    """Returns the peak memory of one `run` after it stopped growing; None when it still grows after 20 runs."""
    peaks: list[int] = []
    for _ in range(_SAMPLES):
        counted = forget_peak()
        run()
        peaks.append(peak_ram_bytes() if counted else ram_bytes())
        if len(peaks) > 2 and peaks[-1] <= (1 + SETTLED) * peaks[-3]:
            return peaks[-1]
    return None
