"""Runs the study of weight quantization of one model: `study_weights`.

Each scheme is rounded, packed and written to a file, whose size is what is reported; read back and dequantized, it
predicts the samples in torch, in f32, so that its errors are those of the weights alone. Every engine that computes a
scheme with packed weights is timed beside the float engine of its runtime.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from backends.cpu import instruction_sets
from pqk.compress.weights.files import load_weights, save_weights
from pqk.compress.weights.model import QuantizedWeights, quantize_weights
from pqk.compress.weights.schemes import SCHEMES, Scheme
from pqk.compress.weights.torch_ao import WHAT as TORCHAO
from pqk.compress.weights.torch_ao import torchao_follows, torchao_model
from pqk.compress.weights.torch_dynamic import COMPUTE, torch_dynamic
from pqk.engines.calls import in_torch
from pqk.errors import NotBuilt, PqkError, nearest
from pqk.families.contract import Family, Metric, Sample, SampleSet
from pqk.files import temporary_folder
from pqk.measure.scores import drop_of
from pqk.measure.scoring import scored
from pqk.recipe.experiment import Experiment
from pqk.recipe.request import Model, Request, asked_experiment, context, count_parameters, load_teacher, usable_backend
from pqk.recipe.splits import test_split
from pqk.recipe.stages import export_graphs
from pqk.store.store import OnEvent
from pqk.study.weights import torch_engines
from pqk.study.weights.closeness import METRICS, Closeness
from pqk.study.weights.engines import (
    FLOAT,
    TOOLS,
    EngineResult,
    engines_of,
    sample_times,
    variants_of,
    worst_errors,
)
from pqk.study.weights.grades import SOURCE, grade
from pqk.study.weights.recommend import recommend

BASELINE = "Baseline_FP32"
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Asked:
    """The arguments of `pqk study weights`. rounds: of the timing; below 3 nothing is timed."""

    request: Request
    images: int
    device: str
    rounds: int
    schemes: Sequence[str] = tuple(SCHEMES)
    dynamic: bool = True  # PyTorch's dynamic quantization too; on the CPU alone


@dataclass
class Bench:
    """What every row needs: the model, its samples and their scores in float."""

    of: Family
    experiment: Experiment
    model: nn.Module
    found: SampleSet
    count: int  # samples
    reference: list[Arrays]  # predictions of the float model
    scores: dict[str, Any]

    def samples(self) -> Iterator[Sample]:
        """Yields the samples of the study, always the same ones."""
        workload = self.experiment.workload
        found = self.of.data_part().samples(self.found, workload, workload.seeds.eval)
        yield from islice(found, self.count)


def study_weights(asked: Asked, root: Path, out: Path, on_event: OnEvent, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns the results, in the form of `pqk.study.weights.result`; the packed weights stay in `out`/weights.

    Raises PqkError for unknown schemes, a device that is not there, and as a run does, NotBuilt without scikit-image.
    """
    if find_spec("skimage") is None:
        raise NotBuilt("SSIM needs scikit-image, which is not installed; pip install 'pqk[study]' brings it")
    unknown = [name for name in asked.schemes if name not in SCHEMES]
    if unknown:
        near = nearest(unknown[0], SCHEMES)
        raise PqkError(f"unknown scheme {unknown[0]!r}{near}; known are {', '.join(SCHEMES)}")
    device = _device(asked.device)
    request = asked.request
    experiment = asked_experiment(request, root)
    ctx = context(request, usable_backend("onnxruntime"), root, on_event)
    teacher, model = load_teacher(request.model, root)
    found = test_split(ctx, request, experiment, root)
    model.eval().to(device)
    bench = opened_bench(experiment, model, found, asked.images, asked.images)
    rows = [_baseline(bench)]
    for name in asked.schemes:
        say(f"{name}: rounding, writing, reading back, predicting {bench.count} samples")
        rows.append(_row(bench, name, SCHEMES[name], out / "weights", rows[0]["size_bytes"]))
    if asked.dynamic and device.type == "cpu":
        say(f"{torch_engines.NAME}: predicting {bench.count} samples, timing torch")
        rows.append(_dynamic(bench, rows[0]["size_bytes"], asked.rounds))
    notes: list[str] = []
    if asked.rounds >= 3:
        graphs = export_graphs(ctx, experiment, model.cpu(), teacher.sha256)
        for name, engine in measured_engines(bench, asked, graphs, notes, say):
            next(row for row in rows if row["name"] == name)["engines"].append(engine.to_json())
    return {
        "schema": "weights-2",
        "made": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "commit": ctx.store.commit,
        "model": _about(teacher, experiment, model),
        "data": {
            "samples": bench.count,
            "sha256": found.sha256,
            "truthful": found.truthful,
            "about": f"{bench.count} samples from {len(found.groups)} groups, such as {found.groups[0]}",
        },
        "machine": {
            "device": str(ctx.machine["device"]) if device.type == "cpu" else torch.cuda.get_device_name(device),
            "isa": list(instruction_sets()),
            "versions": dict(ctx.machine["versions"]),
        },
        "grades_from": SOURCE,
        "rows": rows,
        "notes": notes,
        "advice": [asdict(advice) for advice in recommend(rows)],
    }


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise PqkError(f"--device {name}: cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise PqkError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device(name)


def opened_bench(experiment: Experiment, model: nn.Module, found: SampleSet, most: int, images: int | None) -> Bench:
    """Predicts in float until `images` images were seen (None: any number), or `most` samples were predicted."""
    of, workload = experiment.family, experiment.workload
    bench = Bench(of, experiment, model, found, most, [], {})
    seen: set[Any] = set()
    reference = []
    with in_torch(of.model_part().graphs(model, workload)) as engines:

        def call(graph: str, feeds: Mapping[str, Any], *, reuse: Any = None, stay: bool = False) -> dict[str, Any]:
            seen.update([(sample.group, reuse)] if reuse is not None else [])
            return engines(graph, feeds, reuse=reuse, stay=stay)

        for sample in bench.samples():
            reference.append(of.predict_part().predict(call, sample, workload, workload.seeds.eval))
            if images is not None and len(seen) >= images:
                break
    if not reference:
        raise PqkError("there is no sample to predict")
    bench.count, bench.reference = len(reference), reference
    bench.scores = scores_of(bench, reference)
    return bench


def scores_of(bench: Bench, predictions: Iterable[Arrays], truthful: bool | None = None) -> dict[str, Any]:
    """Scores predictions against ground truth, or against those of the float model.

    truthful: which of the two; None: against ground truth where there is some.
    """
    truthful = bench.found.truthful if truthful is None else truthful
    part, options = bench.of.scoring_part(), bench.experiment.evaluation.quality.model_dump(mode="json")
    options = {name: value for name, value in options.items() if name not in ("main_metric", "metrics")}
    config, rows = dict(getattr(bench.model, "config", {})), []
    for sample, prediction, reference in zip(bench.samples(), predictions, bench.reference, strict=True):
        truth = sample if truthful else part.as_truth(reference, sample, config)
        evidence = part.score(prediction, truth, options, bench.experiment.workload.seeds.eval)
        if evidence is not None:
            rows.append({"group": sample.group, "sample": sample.name, **evidence})
    return {**(scored(part, rows) if rows else {"samples": [], "summary": {}}), "groups": bench.found.groups}


def predicted(bench: Bench, model: nn.Module) -> Iterator[Arrays]:
    """Predicts every sample with a model as it is now."""
    of, workload = bench.of, bench.experiment.workload
    with in_torch(of.model_part().graphs(model, workload)) as call:
        for sample in bench.samples():
            yield of.predict_part().predict(call, sample, workload, workload.seeds.eval)


def _baseline(bench: Bench) -> dict[str, Any]:
    """Returns the row of the float model; its size is that of a file with all weights in float32."""
    from safetensors.torch import save_model

    with temporary_folder("weights") as folder:
        path = folder / "float.safetensors"
        save_model(bench.model, str(path))
        size = path.stat().st_size
    sums = _compared(bench, bench.reference)
    return _entry(BASELINE, None, "f32", size, None, None, sums, bench, bench.scores, size)


def _row(bench: Bench, name: str, scheme: Scheme, folder: Path, float_bytes: int) -> dict[str, Any]:
    """Returns the row of a scheme."""
    began = time.perf_counter()
    weights = quantize_weights(bench.model, scheme)
    seconds = time.perf_counter() - began
    path = save_weights(weights, folder / f"{name}.safetensors")
    theory = weights.theory
    del weights
    read = load_weights(path)
    with using(bench.model, read):
        del read
        predictions = list(predicted(bench, bench.model))
    gc.collect()
    sums = _compared(bench, predictions)
    scores = scores_of(bench, predictions)
    compute = "f32 in torch, weights dequantized when they are loaded"
    return _entry(
        name, _scheme(scheme), compute, path.stat().st_size, theory, seconds, sums, bench, scores, float_bytes
    )


def _dynamic(bench: Bench, float_bytes: int, rounds: int) -> dict[str, Any]:
    """Returns the row of PyTorch's dynamic quantization, which torch itself computes in int8."""
    began = time.perf_counter()
    made = torch_dynamic(bench.model)
    seconds = time.perf_counter() - began
    predictions = list(predicted(bench, made))
    sums, size = _compared(bench, predictions), torch_engines.file_bytes(made)
    scores = scores_of(bench, predictions)
    name, scheme = torch_engines.NAME, torch_engines.SCHEME
    row = _entry(name, scheme, COMPUTE, size, None, seconds, sums, bench, scores, float_bytes)
    if rounds >= 3:
        row["engines"].append(_in_torch(bench, torch_engines.WHAT, made, rounds, worst(sums)).to_json())
    return row


def worst(sums: Mapping[str, Mapping[str, float | None]]) -> float | None:
    """Returns the largest relative error over the outputs."""
    return max((each["relative_error"] for each in sums.values() if each["relative_error"] is not None), default=None)


def _entry(
    name: str,
    scheme: Mapping[str, Any] | None,
    compute: str,
    size: int,
    theory: int | None,
    seconds: float | None,
    outputs: dict[str, dict[str, float | None]],
    bench: Bench,
    scores: Mapping[str, Any],
    float_bytes: int,
) -> dict[str, Any]:
    drop = None
    if scheme is not None and scores["samples"]:
        drop = drop_of(main_metric(bench), scores, bench.scores, bench.found.truthful)
    return {
        "name": name,
        "scheme": None if scheme is None else dict(scheme),
        "compute": compute,
        "size_bytes": size,
        "theory_bytes": theory,
        "compression": float_bytes / size,
        "quantize_s": seconds,
        "outputs": outputs,
        "grades": {
            output: {metric: grade(metric, found[metric]) for metric in METRICS} for output, found in outputs.items()
        },
        "quality": dict(scores["summary"]) if bench.found.truthful and scores["samples"] else None,
        "drop_pct": None if drop is None else {"value": drop.value, "low": drop.low, "high": drop.high},
        "engines": [],
        "note": None,
    }


def main_metric(bench: Bench) -> Metric:
    """Returns the metric whose drop is judged."""
    chosen = bench.experiment.evaluation.quality.main_metric
    return next(metric for metric in bench.of.settings_part().METRICS if metric.name == chosen)


def _scheme(scheme: Scheme) -> dict[str, Any]:
    """Returns a scheme in the words of the guide."""
    kind = f"int{scheme.bits}_" + (
        "group" if scheme.group_size else f"per_{scheme.granularity}_{'sym' if scheme.symmetric else 'asym'}"
    )
    return {
        "quant_type": kind,
        "bits": scheme.bits,
        "symmetric": scheme.symmetric,
        "per_channel": scheme.granularity == "channel",
        "group_size": scheme.group_size,
    }


def _compared(bench: Bench, predictions: Sequence[Arrays]) -> dict[str, dict[str, float | None]]:
    sums = {name: Closeness(kind) for name, kind in bench.of.scoring_part().OUTPUTS.items()}
    for own, expected in zip(predictions, bench.reference, strict=True):
        for name, each in sums.items():
            each.add(own[name], expected[name])
    return {name: each.result() for name, each in sums.items()}


def measured_engines(
    bench: Bench, asked: Asked, graphs: Mapping[str, Any], notes: list[str], say: Callable[[str], None]
) -> Iterator[tuple[str, EngineResult]]:
    """Yields the name of a row and a result of it, for every tool that is installed and every scheme that it follows.

    Why a tool or a scheme is missing is added to `notes`.
    """
    schemes = {name: SCHEMES[name] for name in asked.schemes}
    efficiency = bench.experiment.evaluation.efficiency.model_dump(mode="json")
    efficiency |= {"min_rounds": asked.rounds, "min_seconds": 0, "max_seconds": 30, "enough_pct": None}
    for tool in TOOLS:
        if missing := tool.missing():
            notes.append(f"{tool.runtime}: no engine, {', '.join(missing)} not installed")
            continue
        say(f"{tool.runtime}: packing, comparing{'' if tool.emulated else ', timing in turns'}")
        with temporary_folder("engines") as folder:
            variants, left = variants_of(tool, schemes, graphs, folder)
            notes += left
            judged = {name: each for name, each in variants.items() if name != FLOAT or not tool.emulated}
            errors = worst_errors(judged, bench.of, bench.experiment.workload, bench.samples, bench.reference)
            times = None
            if variants and not tool.emulated:
                times = sample_times(variants, bench.experiment.fed, bench.found, efficiency)
            for name, engine in engines_of(tool, variants, schemes, times, errors).items():
                yield BASELINE if name == FLOAT else name, engine
    for name, scheme in schemes.items():
        if not torchao_follows(scheme):
            continue
        say(f"torchao: {name}")
        try:
            made = torchao_model(bench.model, scheme)
        except NotBuilt as reason:
            notes.append(f"torch: no engine, {reason}")
            return
        except PqkError as reason:
            notes.append(f"torch, {name}: {reason}")
            continue
        error = worst(_compared(bench, list(predicted(bench, made))))
        yield name, _in_torch(bench, TORCHAO, made, asked.rounds, error)


def _in_torch(bench: Bench, what: str, made: nn.Module, rounds: int, error: float | None) -> EngineResult:
    """Times a model in torch in turns with the float one."""
    sample, workload = next(bench.samples()), bench.experiment.workload
    took = torch_engines.timed_in_torch({FLOAT: bench.model, "own": made}, bench.of, workload, sample, rounds)
    return torch_engines.torch_result(what, took[FLOAT], took["own"], torch_engines.file_bytes(made), error)


@contextmanager
def using(model: nn.Module, weights: QuantizedWeights) -> Iterator[None]:
    """Lets a model compute with dequantized weights; its own come back afterwards."""
    state = weights.state_dict()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    kept = {name: tensor.data for name, tensor in tensors}
    try:
        for name, tensor in tensors:
            tensor.data = state.pop(name, tensor.data).to(tensor.dtype).to(tensor.device)
        del state
        yield
    finally:
        for name, tensor in tensors:
            tensor.data = kept[name]


def _about(teacher: Model, experiment: Experiment, model: nn.Module) -> dict[str, Any]:
    return {
        "name": teacher.name,
        "family": experiment.family.name,
        "parameters": count_parameters(model),
        "sha256": teacher.sha256,
    }
