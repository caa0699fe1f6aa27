"""The stages of a run. Each result is an artifact in the store, named by everything that made it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends import exchange, registry
from backends.base import Graph, Precision, Quantizer
from pqk.data.render.generate import ScenePlan, make_scenes
from pqk.data.scenes.pairs import most_pairs
from pqk.engines.variant import Variant, graph_from_json, graph_to_json
from pqk.errors import PqkError
from pqk.families.registry import family_modules
from pqk.files import sha256_json, write_json
from pqk.measure.noise import disturbances, load_now
from pqk.measure.predictions import ABOUT, KERNELS, bytes_of
from pqk.settings.workload import SYNTHETIC, Calibration, SceneList, Workload
from pqk.store import worker
from pqk.store.code import Top, code_of, refuse_edited
from pqk.store.device_hours import clock
from pqk.store.store import Artifact, OnEvent, Store

if TYPE_CHECKING:
    import torch

ENGINE_VARIANTS = {p: {Precision.F32: "fp32", Precision.F16: "fp16"}.get(p, str(p)) for p in Precision}


@dataclass
class Context:
    """What every stage needs: the store, who is told about progress, and what machine and tools these are."""

    store: Store
    on_event: OnEvent
    machine: Mapping[str, Any]  # device name and tool versions: part of the key of everything that an engine computes
    retime: bool = False  # time and memory are measured anew, once by this context's store

    def make(
        self,
        stage: str,
        modules: tuple[str, ...],
        inputs: Mapping[str, Any],
        make: Callable[[Path], None],
        label: str = "",
        stale: Callable[[Path], bool] = lambda folder: False,
    ) -> Artifact:
        """The artifact of `inputs` and of the source of `modules`, the code that makes it.

        Events name the stage with `label` behind it, such as 'quality int8'. `stale`: see `Store.get_or_make`.
        """

        def tell(kind: str, name: str, key: str, seconds: float) -> None:
            self.on_event(kind, f"{name} {label}".strip(), key, seconds)

        return self.store.get_or_make(stage, {**inputs, "code": code_of(*modules)}, make, tell, stale)

    def tell(self, stage: str, news: Mapping[str, Any]) -> None:
        """Pass on what a worker said with `worker.tell`: a text, and the share that is done."""
        self.on_event("progress", stage, news["text"], news["share"])

    def key(self, stage: str, modules: tuple[str, ...], inputs: Mapping[str, Any]) -> str:
        """The key of what `make` makes of these arguments."""
        return self.store.key(stage, {**inputs, "code": code_of(*modules)})

    def scratch(self, stage: str, modules: tuple[str, ...], inputs: Mapping[str, Any]) -> AbstractContextManager[Path]:
        """See `Store.scratch`; the arguments are those of `make`."""
        return self.store.scratch(stage, {**inputs, "code": code_of(*modules)})


_SCENE_CODE = ("pqk.data.render.generate",)
LOADER_CODE = ("pqk.families.checkpoint", *family_modules())
"""Code that makes a network out of a checkpoint, for stages that load one."""
MODEL_CODE = (*LOADER_CODE, "backends.exchange")
_QUANT_CODE = ("pqk.compress.tasks.quantize",)
_PREDICT_CODE = ("pqk.measure.predict",)
_EVAL_CODE = ("pqk.measure.scoring", "pqk.measure.evaluate")  # which of the two depends on the size of the predictions
_TIME_CODE = ("pqk.measure.timing",)
_MEMORY_CODE = ("pqk.measure.memory",)


@dataclass(frozen=True)
class Scenes:
    """Scene folders in order, and the sha256 of what the readers take from them. `root`: the folder they lie in."""

    folders: tuple[Path, ...]
    sha256: str
    root: Path

    @property
    def names(self) -> list[str]:
        """The names that the scenes have now; an artifact made of the same content may have seen other ones."""
        return [folder.name for folder in self.folders]


def synthetic_scenes(
    ctx: Context,
    stage: str,
    split: str,
    count: int,
    views: int,
    seed: int,
    workload: Workload,
    depth: bool,
    first: int = 0,
) -> Scenes:
    """Generate (or reuse) `count` scenes of a split, from number `first` on."""
    plan = ScenePlan(
        split=split,
        seed=seed,
        index=0,
        views=views,
        size=max(workload.input.height, workload.input.width),
        k=workload.pair_graph.k,
        min_covisibility=workload.min_covisibility,
        depth=depth,
    )
    plans = [replace(plan, index=i) for i in range(first, first + count)]

    def make(folder: Path) -> None:
        make_scenes(folder, plans)
        refuse_edited(stage, *_SCENE_CODE)

    inputs = {
        name: getattr(plan, name) for name in ("split", "seed", "views", "size", "k", "min_covisibility", "depth")
    }
    versions = {name: ctx.machine.get("versions", {}).get(name) for name in ("torch", "numpy", "pillow")}
    made = ctx.make(
        stage,
        _SCENE_CODE,
        {**inputs, "first": first, "count": count, "versions": versions},
        make,
        split if stage == "scenes" else "",
    )
    return Scenes(tuple(made.path / p.name for p in plans), sha256_json(made.manifest["files"]), made.path)


def listed_scenes(
    ctx: Context, split: str, scenes: SceneList, workload: Workload, root: Path, first: int = 0
) -> Scenes:
    """The scenes of a list: generated ones of `split` from number `first` on, or those of a folder.

    Raises PqkError when one is missing.
    """
    if scenes.source == SYNTHETIC:
        return synthetic_scenes(
            ctx, "scenes", split, scenes.count or 0, scenes.views or 0, scenes.seed, workload, True, first
        )
    return folder_scenes(_under(root, scenes.source), scenes.names, scenes.count)


def folder_scenes(
    folder: Path,
    names: tuple[str, ...] | None = None,
    count: int | None = None,
    pictures: bool = False,
    truth: bool = True,
) -> Scenes:
    """Scenes that lie in a folder: all of them by name, or the listed ones in their order; at most `count`.

    pictures: see `open_scenes`. truth: whether depth and masks are read too, and so are part of the sha256.
    Raises PqkError for what the readers refuse.
    """
    from pqk.data.scenes.open import open_scene, open_scenes

    found = [open_scene(folder / name) for name in names] if names else open_scenes(folder, pictures)
    chosen = found[:count]
    content = [scene.content(truth) for scene in chosen]
    if not any(scene["views"] for scene in content):
        raise PqkError(f"{folder}: no picture of these scenes was read, so nothing says what they are")
    return Scenes(tuple(scene.root for scene in chosen), sha256_json(content), folder)


def calibration_images(ctx: Context, calibration: Calibration, workload: Workload, root: Path) -> Scenes:
    """The folder of calibration scenes; pictures only, as no quantizer looks at depth.

    Raises PqkError when a folder given as source is missing or holds no scene.
    """
    if calibration.source != SYNTHETIC:
        try:
            return folder_scenes(_under(root, calibration.source), calibration.names, truth=False)
        except PqkError as error:
            raise PqkError(
                f"the calibration set (workload.calibration.source) is empty or unreadable: {error}"
            ) from error
    in_pairs = calibration.views_per_scene - calibration.views_per_scene % 2  # the odd one has no partner
    count = -(-calibration.images // in_pairs)
    return synthetic_scenes(
        ctx, "calibration", "calibration", count, calibration.views_per_scene, calibration.seed, workload, False
    )


def _under(root: Path, source: str) -> Path:
    path = Path(source).expanduser()
    return path if path.is_absolute() else root / path


def export_graphs(ctx: Context, model: torch.nn.Module, model_sha: str, height: int, width: int) -> dict[str, Graph]:
    """The model's encoder and decoder as ONNX, each checked against torch when it was written."""

    def make(folder: Path) -> None:
        specs = model.graphs(height, width)  # type: ignore[operator]
        found = {}
        for name, spec in specs.items():
            graph = exchange.export(spec.module, spec.inputs, spec.output_names, folder / f"{name}.onnx")
            found[name] = {**graph_to_json(graph), "path": graph.path.name}
        write_json(folder / "graphs.json", found)

    versions = {
        name: ctx.machine["versions"].get(name) for name in ("torch", "numpy", "onnx", "onnxscript", "onnxruntime")
    }
    made = ctx.make("graphs", MODEL_CODE, {"model": model_sha, "shape": [height, width], "versions": versions}, make)
    return read_graphs(made.path)


def read_graphs(folder: Path) -> dict[str, Graph]:
    """The graphs that a stage left in `folder`, by the names in its graphs.json."""
    data = json.loads((folder / "graphs.json").read_text())
    return {name: graph_from_json({**entry, "path": str(folder / entry["path"])}) for name, entry in data.items()}


@dataclass(frozen=True)
class Learn:
    """Quantization-aware training: the section `qat` of quant.yaml, the train seed, and its stop-loss.

    rules: all of `StopRules`; lines: those of them that are part of what is made (a budget that ran out makes nothing).
    """

    spec: Mapping[str, Any]
    seed: int
    rules: Mapping[str, Any]
    lines: Mapping[str, Any]


@dataclass(frozen=True)
class Quantized:
    """Graphs of a quantizer, and what it consumed."""

    graphs: dict[str, Graph]
    images: int
    pairs: int
    notes: str  # what the record should tell of how it was made
    hours: float = 0.0  # device hours of calibration and training, over all resumed parts


def quantize(
    ctx: Context,
    backend: str,
    quantizer: str,
    model: str,
    graphs: Mapping[str, Graph],
    calibration: Scenes,
    ptq: Mapping[str, Any],
    shape: tuple[int, int],
    learn: Learn | None = None,
) -> Quantized:
    """Both graphs quantized, in a process of their own; with `learn`, they are trained too (QAT).

    `model` is where modules are loaded from, by a quantizer that starts from them and for training.
    """
    tool = registry.get(backend).quantizers()[quantizer]
    stage = "qat" if learn else "quantized"
    loads = learn is not None or tool.starts_from == "module"
    code = (
        *_QUANT_CODE,
        *(("pqk.compress.tasks.qat",) if learn else ()),
        *(LOADER_CODE if loads else ()),
        *tool_code(backend, tool),
    )

    def make(folder: Path) -> None:
        request: dict[str, Any] = {
            "backend": backend,
            "quantizer": quantizer,
            "model": model,
            "encoder": graph_to_json(graphs["encoder"]),
            "decoder": graph_to_json(graphs["decoder"]),
            "calibration": [str(folder) for folder in calibration.folders],
            "shape": list(shape),
            "ptq": dict(ptq),
            "out": str(folder),
        }
        if learn is None:
            result = worker.call("quantize", request)
        else:
            with ctx.scratch(stage, code, inputs) as scratch, clock(scratch) as running:
                request |= {"qat": learn.spec, "seed": learn.seed, "rules": learn.rules, "scratch": str(scratch)}

                def told(news: Mapping[str, Any]) -> None:
                    running.keep()
                    ctx.tell(stage, news)

                result = worker.call("qat", request, told)
                result["device_s"] = running.seconds
        parts = {name: result.pop(name) for name in ("encoder", "decoder")}
        for part in parts.values():
            part["path"] = Path(part["path"]).name
        write_json(folder / "graphs.json", parts)
        write_json(folder / "about.json", result)

    inputs: dict[str, Any] = {
        "backend": backend,
        "quantizer": quantizer,
        "graphs": {name: graph.sha256 for name, graph in graphs.items()},
        "calibration": calibration.sha256,
        "ptq": dict(ptq),
        "shape": list(shape),
        "machine": dict(ctx.machine),
    }
    if learn is not None:
        inputs |= {"qat": learn.spec, "seed": learn.seed, "lines": learn.lines}
    made = ctx.make(stage, code, inputs, make)
    about = json.loads((made.path / "about.json").read_text())
    on = f"encoder calibrated on {about['images']} images, decoder on {about['pairs']} pairs of them"
    notes = [
        *about["notes"],
        on if about["images"] else "weights were rounded without data",
        f"quantization took at most {about['peak_bytes'] / 1e9:.1f} GB",
    ]
    if learn is not None:
        notes.append(trained_note("QAT", about["steps"], about["training_s"] / 3600, about["drop_pct"]))
        notes += [f"QAT ended early: {about['reason']}"] if about["reason"] else []
        notes += [about["waited"]] if about["waited"] else []
    return Quantized(
        read_graphs(made.path), about["images"], about["pairs"], "; ".join(notes), device_hours(made, about)
    )


def device_hours(made: Artifact, told: Mapping[str, Any]) -> float:
    """Wall hours of the processes that made an artifact, on their one device.

    told: what the maker wrote down: 'device_s' over all its resumed parts. Without it, the time that the store measured
    for the last part, or that of the training alone, whichever is longer.
    """
    known = told.get("device_s")
    return float(known if known is not None else max(told.get("training_s", 0.0), made.manifest["seconds"])) / 3600


def trained_note(method: str, steps: int, hours: float, drop_pct: float | None) -> str:
    """'K: 400 steps in 9.1 min, best drop on held-out pairs 1.20 %', for the notes of a record."""
    told = f"{method}: {steps} steps in {60 * hours:.1f} min"
    return told if drop_pct is None else f"{told}, best drop on held-out pairs {drop_pct:.2f} %"


KEPT_BYTES = 8_000_000_000
"""Predictions of all evaluations that stay in the store; those used longest ago go first."""
ONE_BYTES = 2_000_000_000
"""Predictions of one evaluation that are kept: 238 pairs of 512x512."""
_SCORED = ("scale_alignment", "chamfer_points", "min_valid_pixels")  # of the evaluation's section `quality`


def quality(
    ctx: Context,
    variant: Variant,
    reference: Variant | None,
    scenes: Scenes,
    request: Mapping[str, Any],
    where: str = "test",
) -> dict[str, Any]:
    """Scores, executed precision and FLOPs of a variant.

    reference: a variant whose predictions play the truth, or None for ground truth. request: views, shape, pair_graph,
    min_covisibility, seed, keep and optionally pairs_per_scene, see `pqk.measure.predict.run_pairs`; quality and
    min_conf, see `pqk.measure.scoring.Scorer`. Returns what both return, the scenes, artifact (folder of the scores)
    and the `provenance`. Scenes have the names of their folders today: a renamed copy has the same content, and so the
    same scores.

    Predictions are an artifact of their own: what only changes the scores runs no engine. Scores that are there are
    taken without a look at their predictions. Those of more than `ONE_BYTES` are not kept.
    """
    fed: dict[str, Any] = {name: request.get(name) for name in _FED} | {"truthful": reference is None}
    asked = {"quality": {name: request["quality"][name] for name in _SCORED}, "seed": request["seed"]}
    if reference is not None:
        asked["min_conf"] = request["min_conf"]
    teacher = None if reference is None else _Predicted(ctx, reference, scenes, {**fed, "keep": []}, where)
    mine = _Predicted(ctx, variant, scenes, {**fed, "keep": list(request["keep"])}, where)
    work = {**asked, **fed, "name": variant.name, "scenes": [str(path) for path in scenes.folders]}

    def make(folder: Path) -> None:
        if _most_pairs(scenes, fed) * bytes_of(1, *fed["shape"]) <= ONE_BYTES:
            theirs = teacher.make().path if teacher else None
            own = theirs if theirs and teacher and teacher.key == mine.key else mine.make().path
            places = {"predictions": str(own), "reference": str(theirs) if theirs else None}
            result = worker.call("scores", {**work, **places})
            result |= json.loads((own / ABOUT).read_text())
            kernels = (own / KERNELS).read_text()
            ctx.store.trim("predictions", KEPT_BYTES)
        else:
            variants = {"variant": variant.to_json(), "reference": reference.to_json() if reference else None}
            result = worker.call("quality", {**work, **variants, "keep": list(request["keep"])})
            kernels = json.dumps(result.pop("kernels"), indent=0)
        (folder / "quality.json").write_text(json.dumps(result, indent=1))
        (folder / KERNELS).write_text(kernels)

    inputs = {"predictions": mine.key, "reference": teacher.key if teacher else None, **asked}
    made = ctx.make("scores", _EVAL_CODE, inputs, make, f"{variant.name} on {where} samples")
    found: dict[str, Any] = json.loads((made.path / "quality.json").read_text())
    for row in found["pairs"]:
        row["scene"] = scenes.names[row["scene"]]
    return {**found, "scenes": scenes.names, "artifact": str(made.path), **provenance(made)}


_FED = ("views", "shape", "pair_graph", "min_covisibility", "pairs_per_scene", "seed")


class _Predicted:
    """The predictions of a variant: their key, and, when they are asked for, the artifact."""

    def __init__(self, ctx: Context, variant: Variant, scenes: Scenes, fed: Mapping[str, Any], where: str) -> None:
        self._ctx, self._variant, self._scenes, self._fed = ctx, variant, scenes, fed
        self._label = f"{variant.name} on {where} samples"
        self._code = (*_PREDICT_CODE, *sources_of(variant), *keep_code(variant, fed["keep"]))
        self._inputs = {**identity(ctx, variant, None), "scenes": scenes.sha256, **fed}
        self.key = ctx.key("predictions", self._code, self._inputs)

    def make(self) -> Artifact:
        """Made or reused, and marked as used just now, which keeps it from `Store.trim`."""
        made = self._ctx.make("predictions", self._code, self._inputs, self._write, self._label)
        os.utime(made.path)
        return made

    def _write(self, folder: Path) -> None:
        scenes = [str(path) for path in self._scenes.folders]
        worker.call(
            "predictions", {"variant": self._variant.to_json(), "scenes": scenes, **self._fed, "out": str(folder)}
        )


def _most_pairs(scenes: Scenes, fed: Mapping[str, Any]) -> int:
    """How many pairs the scenes have at most; too little overlap may leave fewer."""
    from pqk.data.scenes.open import open_scene

    counts = [most_pairs(len(open_scene(p).views[: fed["views"]]), **fed["pair_graph"]) for p in scenes.folders]
    return sum(min(count, fed["pairs_per_scene"] or count) for count in counts)


def timing(
    ctx: Context,
    variants: list[Variant],
    scenes: Scenes,
    request: Mapping[str, Any],
    load: Callable[[], float] = load_now,
) -> dict[str, Any]:
    """Interleaved samples of all variants, each with its `provenance`.

    `request`: shape, views, pair_graph, efficiency (all of eval.yaml's section); see `pqk.measure.timing`.

    Besides what `pqk.measure.timing` returns: `disturbed`, a clause for each thing that disturbed the timing. A
    disturbed one that another run left is taken again where `load`, the cores that other processes use now, is within
    `efficiency.max_load`; and any one where the context says `retime`.
    """
    efficiency = dict(request["efficiency"])
    limits = {name: efficiency.pop(name) for name in ("max_load", "max_drift_pct")}  # judge, and change no sample

    def make(folder: Path) -> None:
        folders = [str(path) for path in scenes.folders]
        asked = {"variants": [v.to_json() for v in variants], "scenes": folders, **request, "efficiency": efficiency}
        write_json(folder / "timing.json", worker.call("timing", asked))

    def stale(folder: Path) -> bool:
        found = json.loads((folder / "timing.json").read_text())
        return ctx.retime or (bool(disturbances(found["timing"], **limits)) and load() <= limits["max_load"])

    inputs = {"variants": [identity(ctx, v, None) for v in variants], "scenes": scenes.sha256, **request}
    made = ctx.make(
        "timing", (*_TIME_CODE, *sources_of(*variants)), {**inputs, "efficiency": efficiency}, make, stale=stale
    )
    found: dict[str, Any] = json.loads((made.path / "timing.json").read_text())
    for samples in found["variants"].values():
        samples |= provenance(made)
    return {**found, "disturbed": disturbances(found["timing"], **limits)}


def memory(ctx: Context, variant: Variant) -> dict[str, int | None]:
    """Bytes of host memory: `compile`, the peak of a process that compiles the variant, and `steady`, what a process
    holds that loads the compiled model and runs it; None where it did not settle. See `pqk.measure.memory`."""

    def make(folder: Path) -> None:
        asked = variant.to_json()
        with tempfile.TemporaryDirectory(prefix="compiled-", dir=folder) as compiled:
            compiling = worker.call("memory", {"variant": asked, "compiled": compiled, "step": "compile"})
            running = worker.call("memory", {"variant": asked, "compiled": compiled, "step": "run"})
        write_json(folder / "memory.json", {"compile": compiling["peak_bytes"], "steady": running["steady_bytes"]})

    made = ctx.make(
        "memory",
        (*_MEMORY_CODE, *sources_of(variant)),
        identity(ctx, variant, None),
        make,
        variant.name,
        stale=lambda folder: ctx.retime,
    )
    found: dict[str, int | None] = json.loads((made.path / "memory.json").read_text())
    return found


def sources_of(*variants: Variant | None) -> tuple[str, ...]:
    """Modules of the backends that run the variants."""
    found = dict.fromkeys(v.backend for v in variants if v)
    own = (_top_of(registry.get(name)) for name in found)
    return (*own, *(module for name in found for module in registry.get(name).sources))


def tool_code(backend: str, tool: Quantizer) -> tuple[str, ...]:
    """Modules of a quantizer, and of the backend that hands it out."""
    return (_top_of(registry.get(backend)), *tool.sources)


def _top_of(part: object) -> Top:
    """The module of a backend or quantizer by itself: what its functions import is in `sources` where it counts."""
    return Top(type(part).__module__)


def keep_code(variant: Variant, keep: Sequence[str]) -> tuple[str, ...]:
    """Modules of the quantizers whose code checks a keep-list in the engine; none where nothing is kept."""
    tools = registry.get(variant.backend).quantizers().values() if keep else ()
    return tuple(dict.fromkeys(_top_of(tool) for tool in tools))


def provenance(made: Artifact) -> dict[str, str | None]:
    """When an artifact was made and by which version of the code, as the columns of a record that shows it.

    A reused one keeps what it had when it was made; None where its manifest does not tell.
    """
    return {"measured_at": made.manifest.get("created"), "measured_commit": made.manifest.get("commit")}


def identity(ctx: Context, variant: Variant, reference: Variant | None) -> dict[str, Any]:
    """What a measurement of a variant depends on; the compiled-model cache is a place, not a property."""

    def plain(v: Variant) -> dict[str, Any]:
        options = {name: value for name, value in v.options.items() if name != "cache_dir"}
        return {"backend": v.backend, "precision": str(v.precision), "graphs": v.hashes, "options": options}

    return {
        "variant": plain(variant),
        "reference": plain(reference) if reference else None,
        "machine": dict(ctx.machine),
    }
