"""Times every graph of a model with several items in one call, beside as many calls of one: `bench_batch`.

pqk runs items one at a time; this shows what a machine would gain by batches of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backends import exchange
from backends.base import Backend, BackendError, Engine, Precision
from pqk import paths
from pqk.bench.scene import FRAME
from pqk.errors import PqkError
from pqk.families.contract import GraphSpec
from pqk.files import temporary_folder, write_json
from pqk.measure.noise import load_now
from pqk.recipe.request import Request, asked_experiment, engine_options, load_teacher, usable_backend
from pqk.stats.latency import percentile, speedup

_WARMUP = 2
_SAME = 1e-4  # of the output: what other sums over a larger batch may change
Feeds = dict[str, np.ndarray]


def bench_batch(
    backend: str, model: str | None, sizes: Sequence[int], settings: Mapping[str, Any], rounds: int, out: Path
) -> dict[str, Any]:
    """Times the f32 engines of a model, exported anew for each batch, in a random order in every round.

    sizes: of the batches, beside 1. In each round every engine runs as many items as the largest batch has, so that a
    ratio compares equal work. A graph that cannot take a batch has a reason in place of figures. Prints the table,
    with JSON as the last line, and writes `out` (.json). Raises PqkError for sizes that do not divide the largest one,
    and for emulated engines.
    """
    most = max(sizes)
    if min(sizes) < 2 or any(most % size for size in sizes) or len(set(sizes)) != len(sizes):
        raise PqkError(
            f"bench batch needs sizes from 2, none twice, that divide the largest; got {', '.join(map(str, sizes))}"
        )
    request, root = Request(FRAME, backend, model=model, settings=settings, recipe=False), paths.project_root()
    experiment = asked_experiment(request, root)
    tool = usable_backend(backend)
    teacher, module = load_teacher(model, root)
    specs = experiment.family.model_part().graphs(module.eval(), experiment.workload)
    load = round(load_now(), 3)
    rows: list[dict[str, Any]] = []
    with temporary_folder("bench") as folder:
        for name, spec in specs.items():
            options = engine_options(experiment, backend)
            rows += [{"graph": name, **row} for row in _graph(spec, tool, options, [1, *sorted(sizes)], rounds, folder)]
    found = {
        "model": teacher.name,
        "backend": backend,
        "rounds": rounds,
        "load_before": load,
        **experiment.workload.static,
        "rows": rows,
    }
    write_json(out, found)
    _print(found)
    print(paths.shown(out))
    print(json.dumps(found))
    return found


def _graph(
    spec: GraphSpec, backend: Backend, options: Mapping[str, Any], sizes: Sequence[int], rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """Returns a row for each size of batch of one graph."""
    rows: dict[int, dict[str, Any]] = {
        size: {"batch": size, "p50_ms": None, "speedup": None, "reason": None} for size in sizes
    }
    engines: dict[int, tuple[Engine, Feeds]] = {}
    with ExitStack() as stack:
        for size in sizes:
            batch = {name: torch.cat([tensor] * size) for name, tensor in spec.inputs.items()}
            try:
                graph = exchange.export(spec.module, batch, spec.output_names, folder / f"{size}.onnx")
                engine = stack.enter_context(backend.compile(graph, Precision.F32, options))
            except BackendError as error:
                if size == 1:
                    raise
                rows[size]["reason"] = str(error)
                continue
            if engine.measured != "engine":
                raise PqkError("bench batch needs times, but these engines are emulated: they have none")
            feeds = {name: tensor.cpu().numpy() for name, tensor in batch.items()}
            first = engines.get(1)
            if first is not None and not _one_of_many(engine.infer(feeds), first[0].infer(first[1]), size):
                rows[size]["reason"] = "its outputs are not those of the single items"
            else:
                engines[size] = engine, feeds
        samples = _timed(engines, max(sizes), rounds)
    for size, times in samples.items():
        ratio = speedup(samples[1], times)
        rows[size]["p50_ms"] = percentile(times, 50)
        rows[size]["speedup"] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    return list(rows.values())


def _one_of_many(many: Mapping[str, np.ndarray], one: Mapping[str, np.ndarray], size: int) -> bool:
    """Whether every item of a batch of equal items is the single item's output."""

    def same(name: str) -> bool:
        single, batch = one[name], many[name]
        largest = max(float(np.abs(single).max()), 1e-30)
        return batch.shape == (size * len(single), *single.shape[1:]) and bool(
            np.abs(batch - np.concatenate([single] * size)).max() <= _SAME * largest
        )

    return all(map(same, one))


def _timed(engines: Mapping[int, tuple[Engine, Feeds]], items: int, rounds: int) -> dict[int, list[float]]:
    """Returns the milliseconds of an item by the size of its batch, one for each round."""
    random, sizes = np.random.default_rng(0), list(engines)
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(-_WARMUP, rounds):
        for which in random.permutation(len(sizes)):
            engine, feeds = engines[sizes[which]]
            begin = time.perf_counter_ns()
            for _ in range(items // sizes[which]):
                engine.infer(feeds)
            if number >= 0:
                taken[sizes[which]].append((time.perf_counter_ns() - begin) / 1e6 / items)
    return taken


def _print(found: Mapping[str, Any]) -> None:
    print(f"{found['model']} f32, {found['rounds']} rounds; x: times as fast, item for item, as one item a call")
    print(f"{'graph':12} {'batch':>5} {'ms an item':>10} {'x':>6} {'95 %':>14}")
    for row in found["rows"]:
        if row["p50_ms"] is None:
            print(f"{row['graph']:12} {row['batch']:5} {'–':>10} {row['reason']}")
            continue
        ratio = row["speedup"]
        interval = "–" if ratio["low"] is None else f"{ratio['low']:.3f} to {ratio['high']:.3f}"
        print(f"{row['graph']:12} {row['batch']:5} {row['p50_ms']:10.2f} {ratio['value']:6.3f} {interval:>14}")
