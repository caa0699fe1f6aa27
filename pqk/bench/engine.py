"""Times a model in every way that it runs here, beside what the machine can do at most: `bench_engine`.

Each variant is a process of its own (`pqk.bench.engine_child`); one runs at a time, in a random order in every round,
so that no thread pool or cache of one library is in the way of another, and what slows the machine down slows all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from backends.base import BackendError, Precision
from backends.cpu import instruction_sets
from pqk import paths
from pqk.bench.engine_child import flops_of
from pqk.bench.whole import export_whole
from pqk.engines.calls import calls_of
from pqk.engines.variant import graph_to_json
from pqk.errors import PqkError
from pqk.files import temporary_folder, write_json
from pqk.measure.noise import load_now
from pqk.models import load_model
from pqk.recipe.candidate import Candidate
from pqk.recipe.recover import choose
from pqk.recipe.request import Request
from pqk.stats.latency import percentile, speedup

BASE = "OpenVINO f32, one graph"
"""The variant that all others are compared with: what a user exports and compiles without pqk."""
LAYERS = ("matmul", "conv1x1", "conv3x3")
_WARMUP = 2


class Child:
    """A process with one variant; a context manager that ends it. `error` says why it has none."""

    def __init__(self, request: Mapping[str, Any], folder: Path) -> None:
        asked = folder / f"{len(list(folder.iterdir()))}.json"
        asked.write_text(json.dumps(request))
        here = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pqk.bench.engine_child", str(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])},
        )
        said = self._line()
        self.error, self.notes = said.get("error"), said.get("ready", "")

    def run(self) -> float:
        """Runs one sample and returns the milliseconds it took. Raises PqkError when the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        said = self._line()
        if "ms" not in said:
            raise PqkError(f"bench engine: {said['error']}")
        return float(said["ms"])

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"error": f"its process ended with exit code {self._process.wait()}"}
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()


def bench_engine(
    card: str, model: str | None, settings: Mapping[str, Any], rounds: int, only: Sequence[str], out: Path
) -> dict[str, Any]:
    """Times torch, ONNX Runtime, OpenVINO and NNCF as used by hand, and the variants of a card, round by round.

    Prints the table and writes `out` (.json), both with the ratio to `BASE` and its interval, the rate in GFLOP/s, and
    its share of the largest rate that this machine reached in that precision through OpenVINO. only: parts of names;
    the base always runs. A variant that cannot run has a reason in place of figures. Raises PqkError for fewer than 6
    rounds and for a part of a name that none has.
    """
    if rounds < 6:
        raise PqkError("bench engine needs at least 6 rounds for an interval of the median")
    request = Request(card, "openvino", model=model, settings=settings, qat=False)
    choice, _ = choose(request, paths.project_root(), lambda *_: None, print)
    candidate = choice.candidate
    with temporary_folder("bench") as folder:
        asked, flops = _variants(candidate, folder)
        for part in only:
            if not any(part in name for name in asked):
                raise PqkError(f"--only {part}: no variant has that in its name: {', '.join(asked)}")
        asked = {n: r for n, r in asked.items() if n == BASE or not only or any(part in n for part in only)}
        rows, load = _timed(asked, rounds, folder)
        ceilings = ceilings_of(folder)
    for name, row in rows.items():
        if row["p50_ms"] is not None:
            row["gflops_per_s"] = flops / row["p50_ms"] / 1e6
            row["share_of_ceiling"] = row["gflops_per_s"] / max(ceilings[_precision_of(name)].values())
    found = {
        "card": card,
        "model": candidate.teacher.name,
        "gflop": flops / 1e9,
        "isa": list(instruction_sets()),
        "rounds": rounds,
        "load_before": load,
        "ceilings_gflops_per_s": ceilings,
        "variants": rows,
    }
    write_json(out, found)
    _print(found)
    print(paths.shown(out))
    print(json.dumps(found))
    return found


def _precision_of(name: str) -> str:
    """Returns the precision whose ceiling a variant is held against; every variant names its own."""
    return next(precision for precision in ("int8", "bf16", "f32") if precision in name)


def _variants(candidate: Candidate, folder: Path) -> tuple[dict[str, dict[str, Any]], float]:
    """Returns what each variant's process is asked, by the variant's name, and the FLOPs of one sample."""
    from backends.openvino.engine import best_float, read_model

    experiment, floats = candidate.experiment, candidate.onnx_float.graphs
    calls = calls_of(experiment.family, experiment.workload, floats)
    fed = {**experiment.fed, "samples": candidate.validation.to_json()}
    torch_model = {**fed, "kind": "torch", "model": candidate.model}
    found: dict[str, dict[str, Any]] = {
        "torch eager f32": {**torch_model, "compiled": False},
        "torch compiled f32": {**torch_model, "compiled": True},
        "ONNX Runtime f32": {**fed, "kind": "variant", "variant": candidate.onnx_float.to_json()},
    }
    flops = sum(calls[name] * flops_of(read_model(graph.path)) for name, graph in floats.items())
    of, workload = experiment.family, experiment.workload
    specs = of.model_part().graphs(load_model(candidate.model), workload)
    try:
        whole = export_whole(of, specs, of.data_part().example(workload), workload, folder / "whole.onnx")
    except (PqkError, BackendError) as error:
        found[BASE] = {"kind": "none", "error": str(error)}
    else:
        by_hand = {**fed, "kind": "whole", "graph": graph_to_json(whole), "quantized": False, "precision": "f32"}
        found[BASE] = by_hand
        if best_float() is Precision.BF16:
            found["OpenVINO bf16, one graph"] = {**by_hand, "precision": "bf16"}
        found["NNCF int8 by hand, one graph"] = {**by_hand, "quantized": True, "precision": str(best_float())}
    for variant in candidate.variants:
        precision = "f32" if variant.precision is Precision.F32 else str(variant.precision)
        name = f"pqk {'student ' if variant.name.startswith('student') else ''}{precision}"
        found[name] = {**fed, "kind": "variant", "variant": variant.to_json()}
    return found, flops


def _timed(
    asked: Mapping[str, Mapping[str, Any]], rounds: int, folder: Path
) -> tuple[dict[str, dict[str, Any]], float]:
    """Returns a row of figures for each variant, and the load by other processes before the rounds."""
    random = np.random.default_rng(0)
    rows: dict[str, dict[str, Any]] = {}
    requests = folder / "asked"
    requests.mkdir()
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        for name, request in asked.items():
            print(f"{name} …", file=sys.stderr, flush=True)
            error, notes = request.get("error"), ""
            if error is None:
                child = stack.enter_context(Child(request, requests))
                error, notes = child.error, child.notes
                if error is None:
                    children[name] = child
            rows[name] = {"p50_ms": None, "samples_ms": [], "speedup": None, "reason": error, "notes": notes}
        load, order = round(load_now(), 3), list(children)
        for number in range(-_WARMUP, rounds):
            for which in random.permutation(len(order)):
                taken = children[order[which]].run()
                if number >= 0:
                    rows[order[which]]["samples_ms"].append(taken)
    base = rows[BASE]["samples_ms"]
    for row in rows.values():
        if row["samples_ms"]:
            row["p50_ms"] = percentile(row["samples_ms"], 50)
            if base:
                ratio = speedup(base, row["samples_ms"])
                row["speedup"] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    return rows, load


def ceilings_of(folder: Path) -> dict[str, dict[str, float]]:
    """Returns the rate in GFLOP/s of each precision and kind of layer, alone on the machine, median of some runs."""
    from backends.openvino.engine import best_float

    precisions = ["f32", *(["bf16"] if best_float() is Precision.BF16 else []), "int8"]
    asked = folder / "ceilings"
    asked.mkdir()
    print(f"largest rates of this machine in {', '.join(precisions)} …", file=sys.stderr, flush=True)
    with Child({"kind": "ceilings", "layers": LAYERS, "precisions": precisions}, asked) as child:
        if child.error is not None:
            raise PqkError(f"bench engine: the largest rates of this machine: {child.error}")
        found: dict[str, dict[str, float]] = json.loads(child.notes)
    return found


def _print(found: Mapping[str, Any]) -> None:
    isa = " ".join(found["isa"])
    print(f"{found['model']}, {found['gflop']:.1f} GFLOP a sample, {found['rounds']} rounds, {isa}")
    print(f"x: times as fast as {BASE}; its 95 % interval; GFLOP/s; share of the largest rate in that precision")
    print(f"{'variant':30} {'p50 ms':>9} {'x':>6} {'95 %':>14} {'GFLOP/s':>8} {'share':>6}")
    for name, row in found["variants"].items():
        if row["p50_ms"] is None:
            print(f"{name:30} {'–':>9} {row['reason']}")
            continue
        ratio = row["speedup"]
        interval = "–" if ratio is None or ratio["low"] is None else f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        times = "–" if ratio is None else f"{ratio['value']:.2f}"
        share = f"{100 * row['share_of_ceiling']:.0f} %"
        print(f"{name:30} {row['p50_ms']:9.1f} {times:>6} {interval:>14} {row['gflops_per_s']:8.1f} {share:>6}")
    for precision, rates in found["ceilings_gflops_per_s"].items():
        print(
            f"largest {precision} rates, GFLOP/s: " + ", ".join(f"{layer} {rate:.0f}" for layer, rate in rates.items())
        )
