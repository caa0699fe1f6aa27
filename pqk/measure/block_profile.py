"""Profiles two models part by part, `profile`: parameters, FLOPs, and kernel times; a task of a worker process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pqk.engines.calls import Counting, Engines, compiled
from pqk.engines.variant import Variant
from pqk.families.checkpoint import load_model
from pqk.measure.predict import opened_workload

REST = "everything else"


def profile(request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters, FLOPs and times of every part of two models.

    Request: family, workload, variants (two) and models (paths for `load_model`), rounds. Returns sides, for each model
    its parts as {name: {kind, params, flops, time_ms}}; time_ms has one value per round, milliseconds per sample, and
    is null for emulated engines. A graph that a sample calls twice counts twice.
    """
    of, workload = opened_workload(request)
    part_of = of.settings_part().part_of
    variants = [Variant.from_json(v) for v in request["variants"]]
    sides = [_weights(path, part_of) for path in request["models"]]
    engines = [compiled(v) for v in variants]
    counting = Counting(engines[0])
    of.predict_part().predict(counting, of.data_part().example(workload), workload, 0)
    timed = all(each.measured == "engine" for each in engines)
    for number in range(-1, request["rounds"] if timed else 0):  # the first run of a compiled model is slow
        for turn in range(2):
            side = (number + turn) % 2
            found = _profiled(engines[side], counting.calls, part_of)
            for (part, kind), (flops, spent) in found.items():
                entry = sides[side].setdefault(part, _empty(kind))
                entry["flops"] = flops
                if number >= 0:
                    entry["time_ms"].append(spent)
    for each in engines:
        each.close()
    for parts in sides:
        for entry in parts.values():
            missing = request["rounds"] - len(entry["time_ms"])  # weights without kernels of their own, such as tables
            entry["time_ms"] = [*entry["time_ms"], *[0.0] * missing] if timed else None
    return {"sides": sides}


PartOf = Callable[[str], tuple[str, str] | None]


def _empty(kind: str) -> dict[str, Any]:
    return {"kind": kind, "params": 0, "flops": 0.0, "time_ms": []}


def _weights(path: str, part_of: PartOf) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, weight in load_model(path).named_parameters():
        part, kind = part_of(key) or (REST, REST)
        found.setdefault(part, _empty(kind))["params"] += weight.numel()
    return found


def _profiled(
    engines: Engines, calls: Mapping[str, int], part_of: PartOf
) -> dict[tuple[str, str], tuple[float, float]]:
    """Returns FLOPs and milliseconds of each part for one sample.

    A kernel without a known name counts for the part of the kernel before it.
    """
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for graph, kernels in engines.kernels().items():
        part = (REST, REST)
        for kernel in kernels:
            known = (_part(name, part_of) for name in (kernel.name, *kernel.originals))
            part = next((name for name in known if name), part)
            flops, spent = found.get(part, (0.0, 0.0))
            found[part] = flops + calls[graph] * kernel.flops, spent + calls[graph] * kernel.time_us / 1e3
    return found


def _part(name: str, part_of: PartOf) -> tuple[str, str] | None:
    """Returns part and kind of a node: REST for a node elsewhere in the network, None for a name without a path."""
    return part_of(name) or ((REST, REST) if "/" in name or "." in name else None)
