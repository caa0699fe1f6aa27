"""Times variants side by side in one process, `time_variants`: every round runs each once, in a new random order."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pqk.engines.calls import Engines, Remembering, Stopwatch, compiled
from pqk.engines.variant import Variant
from pqk.families.contract import Call
from pqk.measure.noise import Clocks, drift_pct, load_between, load_now, read_clocks
from pqk.measure.predict import opened, workload_of
from pqk.stats.latency import speedup

ORDER_SEED = 0
"""Seed of the order in each round. In a fixed rotation a variant would always run after the same other one."""

LEAST_ROUNDS = 3
"""Least number of timed rounds, also beyond `max_seconds`: a median needs them."""

LEAST_FOR_ENOUGH = 10
"""Least number of rounds before an interval may end a timing."""


def time_variants(request: dict[str, Any], read: Callable[[], Clocks] = read_clocks) -> dict[str, Any]:
    """Returns raw times in milliseconds per variant: of a sample, of each call by graph, and of the device where the
    engines measure it.

    Request: family, workload, samples, variants, efficiency (see `why_to_end`), workloads (one for each variant;
    absent: all are fed by `workload`), groups (False: no whole group is timed, and `group_s` is empty; so it must be
    where workloads differ). The inputs are the family's `timed` samples. Times with the same index are of the same
    round and the same input. group_s: seconds of the whole group, where outputs that its samples share are computed
    once; measured twice, in two rounds. `timing`: rounds, seconds, the condition that ended it, seed of the order,
    drift in percent (of the variant that drifted most), and loads in cores (`pqk.measure.noise`).
    """
    of, workload, found = opened(request)
    variants = [Variant.from_json(v) for v in request["variants"]]
    fed = [workload_of(of, asked) for asked in request.get("workloads", ())] or [workload] * len(variants)
    timed = {id(each): of.data_part().timed(found, each) for each in fed}
    samples = timed[id(fed[0])]
    run = of.predict_part().predict
    efficiency, names = request["efficiency"], [variant.name for variant in variants]
    engines = [compiled(variant) for variant in variants]
    watches = [Stopwatch(each) for each in engines]
    taken: dict[str, dict[str, Any]] = {name: {"sample": [], "graphs": defaultdict(list)} for name in names}
    for _ in range(max(1, efficiency["warmup"])):
        for each, own in zip(engines, fed, strict=True):
            run(each, timed[id(own)][0], own, 0)
    random = np.random.default_rng(ORDER_SEED)
    before = load_now(read=read)
    gc.collect()
    gc.disable()
    begin, began, rounds, ended = read(), time.monotonic(), 0, None
    while ended is None:
        for which in random.permutation(len(engines)):
            watch, kept, own = watches[which], taken[names[which]], fed[which]
            sample = timed[id(own)][rounds % len(timed[id(own)])]
            watch.reset()
            start = time.perf_counter_ns()
            run(watch, sample, own, 0)
            kept["sample"].append((time.perf_counter_ns() - start) / 1e6)
            for graph, times in watch.graphs.items():
                kept["graphs"][graph].extend(times)
            if watch.device_ms is not None:
                kept.setdefault("device", []).append(watch.device_ms)
        rounds += 1
        seconds = (time.monotonic() - began) / len(engines)
        ended = why_to_end(rounds, seconds, [taken[name]["sample"] for name in names], efficiency)
    end = read()
    after = load_now(read=read)
    limit_s = 4 * efficiency["max_seconds"]

    def whole(call: Call) -> None:
        remembering = Remembering(call)
        for sample in samples:
            run(remembering, sample, workload, 0)

    grouped = request.get("groups", True)
    groups = _group_times(dict(zip(names, engines, strict=True)), whole, limit_s, random) if grouped else {}
    gc.enable()
    drifts = [drift for name in names if (drift := drift_pct(taken[name]["sample"])) is not None]
    return {
        "variants": {
            name: {**taken[name], "group_s": groups.get(name, []), "group_samples": len(samples)} for name in names
        },
        "timing": {
            "rounds": rounds,
            "seconds": round(end.wall - begin.wall, 3),
            "ended_by": ended,
            "order_seed": ORDER_SEED,
            "drift_pct": max(drifts, key=abs, default=None),
            "load_before": round(before, 3),
            "load_during": round(load_between(begin, end), 3),
            "load_after": round(after, 3),
            "own_cores": round((end.own - begin.own) / (end.wall - begin.wall), 3),
        },
    }


def why_to_end(
    rounds: int, seconds: float, sample_ms: Sequence[Sequence[float]], efficiency: Mapping[str, Any]
) -> str | None:
    """Returns the condition that ends a timing after so many rounds and seconds per variant; None: another round.

    'minimum': both `min_rounds` and `min_seconds` are reached. 'ceiling': `max_seconds` is reached, but never before
    LEAST_ROUNDS. 'interval': every variant's speed against the first one is known to +- `enough_pct` percent (null:
    never), and not before LEAST_FOR_ENOUGH rounds.
    """
    if rounds >= efficiency["min_rounds"] and seconds >= efficiency["min_seconds"]:
        return "minimum"
    if rounds >= LEAST_ROUNDS and seconds >= efficiency["max_seconds"]:
        return "ceiling"
    enough = efficiency["enough_pct"]
    if enough is None or rounds < LEAST_FOR_ENOUGH or len(sample_ms) < 2:
        return None
    found = [speedup(sample_ms[0], other) for other in sample_ms[1:]]
    known = all(ratio.half is not None and ratio.half <= enough / 100 * ratio.value for ratio in found)
    return "interval" if known else None


def _group_times(
    engines: Mapping[str, Engines], whole: Callable[[Call], None], limit_s: float, random: np.random.Generator
) -> dict[str, list[float]]:
    """Returns the seconds of a whole group per variant, measured twice.

    It is measured once when the first turn took longer than `limit_s` per variant.
    """
    found: dict[str, list[float]] = {name: [] for name in engines}
    began, names = time.monotonic(), list(engines)
    for turn in range(2):
        if turn and time.monotonic() - began > limit_s * len(names):  # no second turn for a slow model
            break
        for which in random.permutation(len(names)):
            start = time.perf_counter()
            whole(engines[names[which]])
            found[names[which]].append(time.perf_counter() - start)
    return found
