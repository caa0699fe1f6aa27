"""Runs the engines of a variant over the samples of a split, `predict`: predictions and executed kernels. Nothing is
scored.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from backends import registry
from backends.base import Engine, Kernel, executed_precision, matched_by_size
from pqk.engines.calls import Counting, Engines, Remembering, compiled
from pqk.engines.variant import Variant
from pqk.errors import CheckFailed
from pqk.families.contract import Family, Sample, SampleSet
from pqk.families.registry import family
from pqk.files import clear_write_errors
from pqk.measure.predictions import ABOUT, KERNELS, Writer
from pqk.settings.keep import keep_for
from pqk.settings.workload import Workload

Arrays = Mapping[str, np.ndarray]
Take = Callable[[Sample, Arrays, Arrays | None], None]
"""Gets a sample, its prediction, and the prediction of the reference where one runs along with the variant."""


def predict(request: dict[str, Any]) -> dict[str, Any]:
    """Writes the predictions of a variant into the folder request['out']; for the rest see `run_samples`."""
    out = Path(request["out"])
    with Writer(out) as writer:
        about = run_samples(request, lambda sample, arrays, _: writer.add(sample.group, sample.name, arrays))
    with clear_write_errors(out):
        (out / KERNELS).write_text(json.dumps(about.pop("kernels"), indent=0))
        (out / ABOUT).write_text(json.dumps(about, indent=1))
    return {}


def opened(request: Mapping[str, Any]) -> tuple[Family, Workload, SampleSet]:
    """Returns family, workload and samples (see `SampleSet.to_json`) of a request."""
    return *opened_workload(request), SampleSet.from_json(request["samples"])


def opened_workload(request: Mapping[str, Any]) -> tuple[Family, Workload]:
    """Returns family and workload of a request."""
    found = family(request["family"])
    return found, workload_of(found, request["workload"])


def workload_of(of: Family, asked: Mapping[str, Any]) -> Workload:
    """Returns a workload from plain data."""
    return of.settings_part().Workload.model_validate_json(json.dumps(asked))


def run_samples(request: Mapping[str, Any], take: Take) -> dict[str, Any]:
    """Runs every sample, one at a time, and hands it to `take`.

    Request: family, workload, samples, variant, reference (a variant that runs along with it, or absent), seed, keep
    (keep-list or []). Returns measured (engine or emulated), size_bytes (files that ship), executed (share of FLOPs per
    precision), matched_by_size (share of FLOPs that were assigned to a kernel only by their number), flops (of the
    first sample), planned (share of FLOPs that the graphs' rounding asks for; None where an engine does not tell),
    kernels (rows by graph).
    Raises CheckFailed when a kept node ran in an int8 kernel, and PqkError as the samples and engines do.
    """
    of, workload, found = opened(request)
    variant, seed = Variant.from_json(request["variant"]), request["seed"]
    reference = Variant.from_json(request["reference"]) if request.get("reference") else None
    run = of.predict_part().predict
    with ExitStack() as stack:
        engines = stack.enter_context(compiled(variant, counting=True))
        mine = Remembering(engines)
        other: Engines | None = None
        if reference is not None and reference != variant:  # a variant against itself needs no second copy in memory
            other = stack.enter_context(compiled(reference))
        theirs = Remembering(other) if other is not None else None
        calls, group = Counter[str](), -1
        for sample in of.data_part().samples(found, workload, seed):
            if sample.group != group:
                mine.forget()
                if theirs is not None:
                    theirs.forget()
                group = sample.group
            counted = Counting(mine)
            arrays = run(counted, sample, workload, seed)
            calls = calls or counted.calls
            taught = run(theirs, sample, workload, seed) if theirs is not None else None
            take(sample, arrays, arrays if reference == variant else taught)
        if other is not None:
            other.close()  # profiling may compile once more, and a large model leaves no room for three
        measured, size = engines.measured, engines.size_bytes
        kernels: dict[str, list[Kernel]] = {}
        planned: dict[str, float | None] = {}
        for name, engine in engines.engines.items():
            kernels[name] = engines.kernels_of(name)
            planned[name] = engine.planned_flops()
            if request["keep"]:
                _refuse_int8(variant, name, engine, kernels[name], request["keep"])
            engine.close()  # profiling may have compiled it once more, and there may be no room for all of them twice
    of_a_sample = [k for name, listed in kernels.items() for _ in range(calls[name]) for k in listed]
    flops = sum(k.flops for k in of_a_sample)
    asked = None if None in planned.values() else sum(calls[name] * (count or 0) for name, count in planned.items())
    return {
        "measured": measured,
        "size_bytes": size,
        "executed": executed_precision(of_a_sample),
        "matched_by_size": matched_by_size(of_a_sample),
        "flops": flops,
        "planned": asked / flops if asked is not None and flops else None,
        "kernels": {name: [_row(k) for k in listed] for name, listed in kernels.items()},
    }


def _refuse_int8(variant: Variant, graph: str, engine: Engine, kernels: list[Kernel], keep: list[str]) -> None:
    broken = registry.get(variant.backend).kept_in_int8(engine, keep_for(keep, graph), kernels)
    if broken:
        raise CheckFailed(
            f"{graph}: {len(broken)} kept nodes ran in int8 kernels, the first is {broken[0].name} "
            f"({broken[0].implementation})"
        )


def _row(kernel: Kernel) -> dict[str, Any]:
    shown = ("name", "type", "implementation", "precision", "time_us", "flops", "matched")
    return {name: getattr(kernel, name) for name in shown}
