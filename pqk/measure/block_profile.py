"""Profiles two models part by part, as a task of a worker process: parameters, FLOPs, and the time of their kernels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pqk.engines.variant import Runner, Variant
from pqk.models import load_model

REST = "everything else"
_BLOCK = re.compile(r"\b(enc|dec)_blocks(2?)\.(\d+)[./](attn|cross_attn|mlp)\b")
_HEAD = re.compile(r"\bdownstream_head[12]\b")


def part_of(name: str) -> str | None:
    """The part that a weight ('dec_blocks.1.mlp.fc1.bias') or a graph's node ('/dec_blocks.1/mlp/fc1/Add') is of.

    Blocks' attentions and MLPs, and heads; REST for what lies elsewhere, None for a name that tells nothing.
    """
    if found := _BLOCK.search(name):
        stack, twin, number, what = found.groups()
        return f"{stack}_blocks{twin}.{number}.{what}"
    if found := _HEAD.search(name):
        return found.group()
    return REST if "/" in name or "." in name else None


def profile(request: Mapping[str, Any]) -> dict[str, Any]:
    """The worker's side: parameters, FLOPs and times of every part of two models.

    Request: variants (two) and models (where `load_model` finds them), rounds. Returns sides, for each model its parts
    as {name: {params, flops, time_ms}}; time_ms has one value per round, milliseconds per pair, and is null where the
    engines do not run. Every image is encoded once per pair and side: an encoder's figures count twice.
    """
    variants = [Variant.from_json(v) for v in request["variants"]]
    sides = [_weights(path) for path in request["models"]]
    runners = [Runner(v) for v in variants]
    timed = all(runner.measured == "engine" for runner in runners)
    for number in range(-1, request["rounds"] if timed else 0):  # the first run of a compiled model is slow
        for turn in range(2):
            side = (number + turn) % 2
            found = _profiled(runners[side])
            for part, (flops, spent) in found.items():
                entry = sides[side].setdefault(part, _empty())
                entry["flops"] = flops
                if number >= 0:
                    entry["time_ms"].append(spent)
    for runner in runners:
        runner.close()
    for parts in sides:
        for entry in parts.values():
            missing = request["rounds"] - len(entry["time_ms"])  # weights without kernels of their own, such as tables
            entry["time_ms"] = [*entry["time_ms"], *[0.0] * missing] if timed else None
    return {"sides": sides}


def _empty() -> dict[str, Any]:
    return {"params": 0, "flops": 0.0, "time_ms": []}


def _weights(path: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, weight in load_model(path).named_parameters():
        found.setdefault(part_of(key) or REST, _empty())["params"] += weight.numel()
    return found


def _profiled(runner: Runner) -> dict[str, tuple[float, float]]:
    """FLOPs and milliseconds of each part for one pair. A kernel whose name tells nothing is of the part before it."""
    found: dict[str, tuple[float, float]] = {}
    for graph, kernels in runner.kernels().items():
        times = 2 if graph == "encoder" else 1
        part = REST
        for kernel in kernels:
            known = (part_of(name) for name in (kernel.name, *kernel.originals))
            part = next((name for name in known if name), part)
            flops, spent = found.get(part, (0.0, 0.0))
            found[part] = flops + times * kernel.flops, spent + times * kernel.time_us / 1e3
    return found
