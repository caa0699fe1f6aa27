"""Times graphs in each form that a backend knows of them, `choose_forms`: forms compute the same, at other speeds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from backends import registry
from backends.base import Engine, Graph, forms_of
from pqk.engines.variant import Variant
from pqk.stats.latency import speedup

LEAST_ROUNDS, MOST_ROUNDS = 11, 41
"""Rounds in which every form of a graph runs once; as few as let the interval of the ratio leave out 1."""

MOST_SECONDS = 20.0
"""For the rounds of one graph. A graph that takes longer ends with the round after it, or with FEWEST_ROUNDS."""

FEWEST_ROUNDS = 6
"""A median of fewer has no interval of 95 % (`pqk.stats.intervals.median_interval`), so nothing could be chosen."""

_WARMUP = 2


def choose_forms(request: dict[str, Any]) -> dict[str, Any]:
    """Returns `graphs`: for each graph of which another form was timed, the fastest form and how it was found.

    Request: variant. Each has `form` (its words, null: the plain one), `options` of its engine, `speedup` against the
    plain form (of the fastest other form) with `low` and `high`, and `rounds`. Another form is taken where the whole
    interval lies above 1.
    """
    variant, found = Variant.from_json(request["variant"]), {}
    backend = registry.get(variant.backend)
    for name, graph in variant.graphs.items():
        forms = forms_of(backend, graph)
        if forms:
            every: dict[str | None, Mapping[str, Any]] = {None: {}}
            every.update(forms)
            engines = {
                form: backend.compile(graph, variant.precision, {**variant.options, **options})
                for form, options in every.items()
            }
            found[name] = _fastest(engines, graph, every)
            for engine in engines.values():
                engine.close()
    return {"graphs": found}


def _fastest(
    engines: Mapping[str | None, Engine], graph: Graph, options: Mapping[str | None, Mapping[str, Any]]
) -> dict[str, Any]:
    random = np.random.default_rng(0)
    feeds = {info.name: random.standard_normal(info.shape).astype(info.dtype) for info in graph.inputs}
    taken: dict[str | None, list[float]] = {form: [] for form in engines}
    for _ in range(_WARMUP):
        for engine in engines.values():
            engine.infer(feeds)
    forms, began = list(engines), time.monotonic()
    for rounds in range(1, MOST_ROUNDS + 1):
        for which in random.permutation(len(forms)):
            start = time.perf_counter_ns()
            engines[forms[which]].infer(feeds)
            taken[forms[which]].append((time.perf_counter_ns() - start) / 1e6)
        late = time.monotonic() - began > MOST_SECONDS
        if rounds >= (FEWEST_ROUNDS if late else LEAST_ROUNDS):
            ratios = {form: speedup(taken[None], times) for form, times in taken.items() if form is not None}
            best = max(ratios, key=lambda form: ratios[form].value)
            ratio = ratios[best]
            decided = ratio.low is not None and ratio.high is not None and (ratio.low > 1 or ratio.high < 1)
            if decided or late:
                break
    chosen = best if ratio.low is not None and ratio.low > 1 else None
    return {
        "form": chosen,
        "options": dict(options[chosen]),
        "speedup": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "rounds": rounds,
    }
