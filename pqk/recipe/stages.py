"""Runs the stages of a recipe. Each result is an artifact in the store; its key has everything that it depends on."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends import exchange, registry
from backends.base import Graph, Precision, Quantizer
from pqk.engines.variant import Variant, graph_to_json, graphs_from_json, graphs_to_json
from pqk.families.contract import Family, Given, SampleSet
from pqk.files import sha256_json, write_json
from pqk.measure.noise import disturbances, load_now
from pqk.measure.predictions import ABOUT, KERNELS
from pqk.recipe.experiment import Experiment
from pqk.store import worker
from pqk.store.code import Top, code_of, refuse_edited
from pqk.store.device_hours import clock
from pqk.store.store import Artifact, OnEvent, Store

if TYPE_CHECKING:
    import torch

ENGINE_VARIANTS = {p: {Precision.F32: "fp32", Precision.F16: "fp16"}.get(p, str(p)) for p in Precision}


@dataclass
class Context:
    """The store, the callback for progress, and the description of machine and tools; every stage needs them."""

    store: Store
    on_event: OnEvent
    machine: Mapping[str, Any]  # device name and tool versions: part of the key of everything that an engine computes
    retime: bool = False  # time and memory are measured again, once by this context's store
    processes: int = 1  # that share a training

    def make(
        self,
        stage: str,
        modules: tuple[str, ...],
        inputs: Mapping[str, Any],
        make: Callable[[Path], None],
        label: str = "",
        stale: Callable[[Path], bool] = lambda folder: False,
    ) -> Artifact:
        """Makes or reuses the artifact of `inputs` and of the source of `modules`, the code that makes it.

        Events name the stage and then `label`, such as 'quality int8'. stale: see `Store.get_or_make`.
        """

        def tell(kind: str, name: str, key: str, seconds: float) -> None:
            self.on_event(kind, f"{name} {label}".strip(), key, seconds)

        return self.store.get_or_make(stage, {**inputs, "code": code_of(*modules)}, make, tell, stale)

    def tell(self, stage: str, news: Mapping[str, Any]) -> None:
        """Passes on the news of a worker (`worker.tell`): a text, and the share that is done."""
        self.on_event("progress", stage, news["text"], news["share"])

    def key(self, stage: str, modules: tuple[str, ...], inputs: Mapping[str, Any]) -> str:
        """Returns the key of the artifact that `make` makes with these arguments."""
        return self.store.key(stage, {**inputs, "code": code_of(*modules)})

    def scratch(self, stage: str, modules: tuple[str, ...], inputs: Mapping[str, Any]) -> AbstractContextManager[Path]:
        """Returns the folder of `Store.scratch`; the arguments are those of `make`."""
        return self.store.scratch(stage, {**inputs, "code": code_of(*modules)})


LOADER_CODE = ("pqk.families.checkpoint",)
"""Code that makes a network from a checkpoint, in addition to the family's own, for stages that load one."""
_EXPORT_CODE = (*LOADER_CODE, "backends.exchange")
_QUANT_CODE = ("pqk.compress.tasks.quantize",)
_PREDICT_CODE = ("pqk.measure.predict",)
_EVAL_CODE = ("pqk.measure.scoring", "pqk.measure.evaluate")  # which of the two depends on the size of the predictions
_TIME_CODE = ("pqk.measure.timing",)
_MEMORY_CODE = ("pqk.measure.memory",)


def parts_code(of: Family, *parts: str) -> tuple[str, ...]:
    """Returns the modules of parts of a family, and of the registry that finds them."""
    return ("pqk.families.registry", *dict.fromkeys(str(getattr(of, part)) for part in parts))


def open_split(
    ctx: Context,
    experiment: Experiment,
    split: str,
    root: Path,
    given: Given | None = None,
    first: int = 0,
    count: int | None = None,
) -> SampleSet:
    """Returns the samples of a split; generated ones are an artifact. See `pqk.families.contract.DataPart`."""
    stage = "calibration" if split == "calibration" else "scenes"

    def make(
        name: str, inputs: Mapping[str, Any], modules: tuple[str, ...], write: Callable[[Path], object]
    ) -> tuple[Path, str]:
        def fill(folder: Path) -> None:
            write(folder)
            refuse_edited(stage, *modules)

        versions = {tool: ctx.machine.get("versions", {}).get(tool) for tool in ("torch", "numpy", "pillow")}
        label = name if stage == "scenes" else ""
        made = ctx.make(stage, modules, {**inputs, "versions": versions}, fill, label)
        return made.path, sha256_json(made.manifest["files"])

    part = experiment.family.data_part()
    return part.open_split(split, experiment.workload, root, make, given or Given(), first, count)


def export_graphs(ctx: Context, experiment: Experiment, model: torch.nn.Module, model_sha: str) -> dict[str, Graph]:
    """Returns the model's graphs as ONNX, each checked against torch when it was written."""
    of, workload = experiment.family, experiment.workload

    def make(folder: Path) -> None:
        found = {}
        for name, spec in of.model_part().graphs(model, workload).items():
            target = folder / f"{name}.onnx"
            graph = exchange.export(spec.module, spec.inputs, spec.output_names, target, more=spec.more)
            found[name] = {**graph_to_json(graph), "path": graph.path.name}
        write_json(folder / "graphs.json", found)

    versions = {
        name: ctx.machine["versions"].get(name) for name in ("torch", "numpy", "onnx", "onnxscript", "onnxruntime")
    }
    code = (*_EXPORT_CODE, *parts_code(of, "model"))
    made = ctx.make("graphs", code, {"model": model_sha, **workload.static, "versions": versions}, make)
    return read_graphs(made.path)


def read_graphs(folder: Path) -> dict[str, Graph]:
    """Returns the graphs that a stage left in `folder`, by the names in its graphs.json."""
    return graphs_from_json(json.loads((folder / "graphs.json").read_text()), folder)


@dataclass(frozen=True)
class Learn:
    """Quantization-aware training: the section `qat` of quant.yaml, the train seed, and its stop-loss rules.

    rules: all of `StopRules`. lines: the rules in the key of the artifact (not the budget: one that ran out makes no
    artifact). train: the training samples as plain data. key: of the training samples. note: on them, for a record.
    """

    spec: Mapping[str, Any]
    seed: int
    rules: Mapping[str, Any]
    lines: Mapping[str, Any]
    train: Mapping[str, Any]
    key: Mapping[str, Any]
    note: str | None


@dataclass(frozen=True)
class Quantized:
    """Graphs of a quantizer, with the number of images and the hours that it used."""

    graphs: dict[str, Graph]
    images: int
    notes: str  # on the quantization, for the record
    hours: float = 0.0  # device hours of calibration and training, over all resumed parts


def quantize(
    ctx: Context,
    experiment: Experiment,
    backend: str,
    quantizer: str,
    model: str,
    graphs: Mapping[str, Graph],
    calibration: SampleSet,
    learn: Learn | None = None,
) -> Quantized:
    """Returns all graphs quantized, in a process of their own; with `learn`, they are trained too (QAT).

    model: the path of the modules, for a quantizer that starts from them and for training.
    """
    tool = registry.get(backend).quantizers()[quantizer]
    of, ptq = experiment.family, experiment.quant.ptq.model_dump(mode="json")
    stage = "qat" if learn else "quantized"
    loads = learn is not None or tool.starts_from == "module"
    parts = (*(("model",) if loads else ()), *(("learning",) if learn else ()))
    code = (
        *_QUANT_CODE,
        *(("pqk.compress.tasks.qat",) if learn else ()),
        *(LOADER_CODE if loads else ()),
        *parts_code(of, "settings", "predict", "data", *parts),
        *tool_code(backend, tool),
    )

    def make(folder: Path) -> None:
        request: dict[str, Any] = {
            **experiment.fed,
            "samples": calibration.to_json(),
            "backend": backend,
            "quantizer": quantizer,
            "model": model,
            "graphs": graphs_to_json(graphs),
            "ptq": ptq,
            "out": str(folder),
        }
        if learn is None:
            result = worker.call("quantize", request)
        else:
            with ctx.scratch(stage, code, inputs) as scratch, clock(scratch) as running:
                request |= {"qat": learn.spec, "seed": learn.seed, "rules": learn.rules, "train": learn.train}
                request["scratch"] = str(scratch)

                def on_news(news: Mapping[str, Any]) -> None:
                    running.keep()
                    ctx.tell(stage, news)

                result = worker.call("qat", request, on_news, ctx.processes)
                result["device_s"] = running.seconds
        keep_graphs(folder, result.pop("graphs"))
        write_json(folder / "about.json", result)

    inputs: dict[str, Any] = {
        "backend": backend,
        "quantizer": quantizer,
        "graphs": {name: graph.sha256 for name, graph in graphs.items()},
        "calibration": calibration.key,
        "ptq": ptq,
        **experiment.workload.static,
        "machine": dict(ctx.machine),
    }
    if learn is not None:
        inputs |= {"qat": learn.spec, "seed": learn.seed, "lines": learn.lines, "train": learn.key}
    made = ctx.make(stage, code, inputs, make)
    about = json.loads((made.path / "about.json").read_text())
    notes = [
        *about["notes"],
        calibrated_note(of, about) if about["images"] else "weights were rounded without data",
        f"quantization took at most {about['peak_bytes'] / 1e9:.1f} GB",
    ]
    if learn is not None:
        notes.append(trained_note("QAT", about["steps"], about["training_s"] / 3600, about["drop_pct"]))
        notes += [f"QAT ended early: {about['reason']}"] if about["reason"] else []
        notes += [note for note in (about["waited"], learn.note) if note]
    return Quantized(read_graphs(made.path), about["images"], "; ".join(notes), device_hours(made, about))


def keep_graphs(folder: Path, graphs: Mapping[str, dict[str, Any]]) -> None:
    """Writes graphs.json for graphs (as plain data) whose files lie in `folder`; `read_graphs` reads it back."""
    write_json(folder / "graphs.json", {n: {**graph, "path": Path(graph["path"]).name} for n, graph in graphs.items()})


def calibrated_note(of: Family, about: Mapping[str, Any]) -> str:
    """Returns 'GRAPH calibrated on 512 images, OTHER on 128 pairs of them', for the notes of a record."""
    units = {use.name: use.unit for use in of.settings_part().GRAPHS}
    fed = [f"{name} {{}}on {count} {units[name]}" for name, count in about["feeds"].items()]
    return ", ".join([fed[0].format("calibrated "), *(f"{clause.format('')} of them" for clause in fed[1:])])


def device_hours(made: Artifact, about: Mapping[str, Any]) -> float:
    """Returns the wall hours of the processes that made an artifact, on their one device.

    about: facts written by the maker: 'device_s' over all its resumed parts. Without it, the time that the store
    measured for the last part, or the time of the training alone, whichever is longer.
    """
    known = about.get("device_s")
    return float(known if known is not None else max(about.get("training_s", 0.0), made.manifest["seconds"])) / 3600


def trained_note(method: str, steps: int, hours: float, drop_pct: float | None) -> str:
    """Returns 'K: 400 steps in 9.1 min, best drop on held-out pairs 1.20 %', for the notes of a record."""
    text = f"{method}: {steps} steps in {60 * hours:.1f} min"
    return text if drop_pct is None else f"{text}, best drop on held-out pairs {drop_pct:.2f} %"


KEPT_BYTES = 8_000_000_000
"""Bytes of all predictions that stay in the store; the least recently used ones are deleted first."""
_MOST_TAKEN = 2  # attempts at a timing whose only disturbance is drift
ONE_BYTES = 2_000_000_000
"""Most bytes of the predictions of one evaluation that are kept: 238 pairs of point maps of 512x512."""


def quality(
    ctx: Context,
    experiment: Experiment,
    variant: Variant,
    reference: Variant | None,
    found: SampleSet,
    config: Mapping[str, Any],
    keep: Sequence[str] = (),
    where: str = "test",
) -> dict[str, Any]:
    """Returns scores, executed precision and FLOPs of a variant over samples.

    reference: a variant whose predictions serve as ground truth, or None for real ground truth. config: of the
    Teacher's network; it defines the meaning of its outputs. keep: nodes that must not run in int8 kernels. The result
    has the values of `run_samples` and `Scorer`, the names of the groups, artifact (folder of the scores) and the
    `provenance`. Groups have the current names of their folders: a renamed copy has the same content, and so the same
    scores.

    Predictions are an artifact of their own: a change of only the scores runs no engine. Existing scores are reused
    without a check of their predictions. Predictions of more than `ONE_BYTES` are not kept.
    """
    of, seed = experiment.family, experiment.workload.seeds.eval
    if reference is not None:
        found = replace(found, truthful=False)
    metrics = ("main_metric", "metrics")  # these only select from computed values
    options = {n: v for n, v in experiment.evaluation.quality.model_dump(mode="json").items() if n not in metrics}
    asked: dict[str, Any] = {"quality": options, "seed": seed}
    if reference is not None:
        asked["config"] = dict(config)
    theirs = None if reference is None else _Predicted(ctx, experiment, reference, found, (), where)
    mine = _Predicted(ctx, experiment, variant, found, keep, where)
    work = {**asked, **experiment.fed, "samples": found.to_json(), "name": variant.name}

    code = (*_EVAL_CODE, *parts_code(of, "settings", "data", "scoring"))

    def make(folder: Path) -> None:
        from pqk.measure.scoring import score

        if of.data_part().most(found, experiment.workload) * _sample_bytes(of, variant) <= ONE_BYTES:
            other = theirs.make().path if theirs else None
            own = other if other and theirs and theirs.key == mine.key else mine.make().path
            places = {"predictions": str(own), "reference": str(other) if other else None}
            result = score({**work, **places})  # here: no engine runs, and a process would first import everything
            refuse_edited("scores", *code)
            result |= json.loads((own / ABOUT).read_text())
            kernels = (own / KERNELS).read_text()
            ctx.store.trim("predictions", KEPT_BYTES)
        else:
            variants = {"variant": variant.to_json(), "reference": reference.to_json() if reference else None}
            result = worker.call("quality", {**work, **variants, "keep": list(keep)})
            kernels = json.dumps(result.pop("kernels"), indent=0)
        (folder / "quality.json").write_text(json.dumps(result, indent=1, allow_nan=False))
        (folder / KERNELS).write_text(kernels)

    inputs = {"predictions": mine.key, "reference": theirs.key if theirs else None, **asked}
    made = ctx.make("scores", code, inputs, make, f"{variant.name} on {where} samples")
    scores: dict[str, Any] = json.loads((made.path / "quality.json").read_text())
    for row in scores["samples"]:
        row["group"] = found.groups[row["group"]]
    return {**scores, "groups": list(found.groups), "artifact": str(made.path), **provenance(made)}


def _sample_bytes(of: Family, variant: Variant) -> int:
    """Returns the bytes of a prediction, estimated from the outputs of the graphs."""
    outputs = [info for graph in variant.graphs.values() for info in graph.outputs]
    known = [info for info in outputs if info.name in of.scoring_part().OUTPUTS]
    return sum(math.prod(info.shape) * np.dtype(info.dtype).itemsize for info in known)


class _Predicted:
    """The predictions of a variant: their key, and on request the artifact."""

    def __init__(
        self,
        ctx: Context,
        experiment: Experiment,
        variant: Variant,
        found: SampleSet,
        keep: Sequence[str],
        where: str,
    ) -> None:
        self._ctx, self._experiment, self._variant, self._found = ctx, experiment, variant, found
        self._keep = list(keep)
        self._label = f"{variant.name} on {where} samples"
        of = experiment.family
        self._code = (
            *_PREDICT_CODE,
            *parts_code(of, "settings", "data", "predict"),
            *sources_of(variant),
            *keep_code(variant, keep),
        )
        self._inputs = {
            **identity(ctx, variant, None),
            "samples": found.key,
            **fed_key(experiment),
            "seed": experiment.workload.seeds.eval,
            "keep": self._keep,
        }
        self.key = ctx.key("predictions", self._code, self._inputs)

    def make(self) -> Artifact:
        """Makes or reuses the artifact, and marks it as used just now, so that `Store.trim` keeps it."""
        made = self._ctx.make("predictions", self._code, self._inputs, self._write, self._label)
        os.utime(made.path)
        return made

    def _write(self, folder: Path) -> None:
        request = {
            **self._experiment.fed,
            "samples": self._found.to_json(),
            "variant": self._variant.to_json(),
            "seed": self._experiment.workload.seeds.eval,
            "keep": self._keep,
            "out": str(folder),
        }
        worker.call("predictions", request)


def fed_key(experiment: Experiment) -> dict[str, Any]:
    """Returns the part of the workload that decides how samples are fed, for samples from any source."""
    return {"family": experiment.family.name, **experiment.workload.feeding}


def timing(
    ctx: Context,
    experiment: Experiment,
    variants: list[Variant],
    found: SampleSet,
    load: Callable[[], float] = load_now,
) -> dict[str, Any]:
    """Returns interleaved samples of all variants, each with its `provenance`; see `pqk.measure.timing`.

    The result also has `disturbed`, a clause for each disturbance of the timing. A stored timing that was disturbed is
    taken again where `load`, the number of cores that other processes use now, is within `efficiency.max_load`; for a
    drift alone only once. With `retime` of the context every timing is taken again.
    """
    efficiency = experiment.evaluation.efficiency.model_dump(mode="json")
    limits = {
        name: efficiency.pop(name) for name in ("max_load", "max_drift_pct")
    }  # limits for the judgement; they change no sample

    taken = 0

    def make(folder: Path) -> None:
        asked = {**experiment.fed, "samples": found.to_json(), "variants": [v.to_json() for v in variants]}
        asked["efficiency"] = efficiency
        write_json(folder / "timing.json", {**worker.call("timing", asked), "taken": taken + 1})

    def stale(folder: Path) -> bool:
        nonlocal taken
        before = json.loads((folder / "timing.json").read_text())
        taken = before.get("taken", 1)  # absent in artifacts of older versions
        # A drift that repeats on a quiet machine is a property of the machine.
        drift = limits["max_drift_pct"] if taken < _MOST_TAKEN else math.inf
        disturbed = disturbances(before["timing"], limits["max_load"], drift)
        return ctx.retime or (bool(disturbed) and load() <= limits["max_load"])

    inputs = {"variants": [identity(ctx, v, None) for v in variants], "samples": found.key, **fed_key(experiment)}
    code = (*_TIME_CODE, *parts_code(experiment.family, "settings", "data", "predict"), *sources_of(*variants))
    made = ctx.make("timing", code, {**inputs, "efficiency": efficiency}, make, stale=stale)
    timed: dict[str, Any] = json.loads((made.path / "timing.json").read_text())
    for samples in timed["variants"].values():
        samples |= provenance(made)
    return {**timed, "disturbed": disturbances(timed["timing"], **limits)}


def memory(ctx: Context, experiment: Experiment, variant: Variant) -> dict[str, int | None]:
    """Returns bytes of host memory: `compile` and `steady`. See `pqk.measure.memory`.

    compile: the peak of a process that compiles the variant. steady: the memory of a process that loads the compiled
    model and runs it; None where it did not settle.
    """

    def make(folder: Path) -> None:
        asked = {**experiment.fed, "variant": variant.to_json()}
        with tempfile.TemporaryDirectory(prefix="compiled-", dir=folder) as compiled:
            compiling = worker.call("memory", {**asked, "compiled": compiled, "step": "compile"})
            running = worker.call("memory", {**asked, "compiled": compiled, "step": "run"})
        write_json(folder / "memory.json", {"compile": compiling["peak_bytes"], "steady": running["steady_bytes"]})

    made = ctx.make(
        "memory",
        (*_MEMORY_CODE, *parts_code(experiment.family, "settings", "data", "predict"), *sources_of(variant)),
        {**identity(ctx, variant, None), **fed_key(experiment)},
        make,
        variant.name,
        stale=lambda folder: ctx.retime,
    )
    found: dict[str, int | None] = json.loads((made.path / "memory.json").read_text())
    return found


def sources_of(*variants: Variant | None) -> tuple[str, ...]:
    """Returns the modules of the backends that run the variants."""
    found = dict.fromkeys(v.backend for v in variants if v)
    own = (_top_of(registry.get(name)) for name in found)
    return (*own, *(module for name in found for module in registry.get(name).sources))


def tool_code(backend: str, tool: Quantizer) -> tuple[str, ...]:
    """Returns the modules of a quantizer, and of the backend that provides it."""
    return (_top_of(registry.get(backend)), *tool.sources)


def _top_of(part: object) -> Top:
    """Returns the module of a backend or quantizer alone; imports of its functions are in `sources` where needed."""
    return Top(type(part).__module__)


def keep_code(variant: Variant, keep: Sequence[str]) -> tuple[str, ...]:
    """Returns the modules of the quantizers whose code checks a keep-list in the engine; none without a keep-list."""
    tools = registry.get(variant.backend).quantizers().values() if keep else ()
    return tuple(dict.fromkeys(_top_of(tool) for tool in tools))


def provenance(made: Artifact) -> dict[str, str | None]:
    """Returns the time and the code version of an artifact's making, as columns of a record.

    A reused artifact keeps its original values; None where its manifest has none.
    """
    return {"measured_at": made.manifest.get("created"), "measured_commit": made.manifest.get("commit")}


def identity(ctx: Context, variant: Variant, reference: Variant | None) -> dict[str, Any]:
    """Returns the key of a measurement of a variant; the path of the compiled-model cache is not part of it."""

    def plain(v: Variant) -> dict[str, Any]:
        options = {name: value for name, value in v.options.items() if name != "cache_dir"}
        forms = {"forms": dict(v.forms)} if v.forms else {}
        return {"backend": v.backend, "precision": str(v.precision), "graphs": v.hashes, "options": options, **forms}

    return {
        "variant": plain(variant),
        "reference": plain(reference) if reference else None,
        "machine": dict(ctx.machine),
    }
