"""The stages of a run. Each result is an artifact in the store, named by everything that made it."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends import exchange, registry
from backends.base import Graph, Precision
from pqk.data.generate import ScenePlan, make_scenes
from pqk.errors import PqkError
from pqk.files import sha256_file, sha256_json, write_json
from pqk.run import worker
from pqk.run.clock import clock
from pqk.run.evaluate import write_evaluation
from pqk.run.store import Artifact, OnEvent, Store
from pqk.run.variants import Variant, graph_from_json, graph_to_json
from pqk.spec.workload import SYNTHETIC, Calibration, SceneList, Workload

if TYPE_CHECKING:
    import torch

ENGINE_VARIANTS = {p: {Precision.F32: "fp32", Precision.F16: "fp16"}.get(p, str(p)) for p in Precision}


@dataclass
class Context:
    """What every stage needs: the store, who is told about progress, and what machine and tools these are."""

    store: Store
    on_event: OnEvent
    machine: Mapping[str, Any]  # device name and tool versions: part of the key of everything that an engine computes

    def make(
        self,
        stage: str,
        modules: tuple[str, ...],
        inputs: Mapping[str, Any],
        make: Callable[[Path], None],
        label: str = "",
    ) -> Artifact:
        """The artifact of `inputs` and of the source of `modules`, the code that makes it.

        Events name the stage with `label` behind it, such as 'quality int8'.
        """

        def tell(kind: str, name: str, key: str, seconds: float) -> None:
            self.on_event(kind, f"{name} {label}".strip(), key, seconds)

        return self.store.get_or_make(stage, {**inputs, "code": code_of(*modules)}, make, tell)

    def tell(self, stage: str, news: Mapping[str, Any]) -> None:
        """Pass on what a worker said with `worker.tell`: a text, and the share that is done."""
        self.on_event("progress", stage, news["text"], news["share"])

    def scratch(self, stage: str, modules: tuple[str, ...], inputs: Mapping[str, Any]) -> AbstractContextManager[Path]:
        """See `Store.scratch`; the arguments are those of `make`."""
        return self.store.scratch(stage, {**inputs, "code": code_of(*modules)})


@cache
def code_of(*modules: str) -> str:
    """sha256 over the sources of modules and of everything of pqk and backends that they import, wherever they do it.

    A changed stage makes its artifacts anew. What is loaded by a name in a string is not seen: backends and quantizers
    list their own modules in `sources`.
    """
    found: dict[str, bytes] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise PqkError(f"module {name} has no source file")
        found[name] = Path(spec.origin).read_bytes()
        waiting += _imported(found[name])
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(hashlib.sha256(found[name]).digest())
    return digest.hexdigest()


@cache
def _imported(source: bytes) -> list[str]:
    """The modules of pqk and backends that a file imports; those only for the type checker count too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return sorted(name for name in names if name.split(".")[0] in ("pqk", "backends") and _is_module(name))


@cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # an object of a module, not a module of a package
        return False


_SCENE_CODE = ("pqk.data.generate",)
MODEL_CODE = ("pqk.models.dust3r", "backends.exchange")
_QUANT_CODE = ("pqk.run.quantize",)
_EVAL_CODE = ("pqk.run.evaluate",)
_TIME_CODE = ("pqk.run.timing",)
_MEMORY_CODE = ("pqk.run.variants", "pqk.measure.footprint")


@dataclass(frozen=True)
class Scenes:
    """Scene folders in order, and the sha256 of every byte in them."""

    folders: tuple[Path, ...]
    sha256: str
    root: Path


def synthetic_scenes(
    ctx: Context, stage: str, split: str, count: int, views: int, seed: int, workload: Workload, depth: bool
) -> Scenes:
    """Generate (or reuse) the scenes of a split."""
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
    plans = [replace(plan, index=i) for i in range(count)]

    def make(folder: Path) -> None:
        make_scenes(folder, plans)

    inputs = {
        name: getattr(plan, name) for name in ("split", "seed", "views", "size", "k", "min_covisibility", "depth")
    }
    versions = {name: ctx.machine.get("versions", {}).get(name) for name in ("torch", "numpy", "pillow")}
    made = ctx.make(stage, _SCENE_CODE, {**inputs, "count": count, "versions": versions}, make)
    return Scenes(tuple(made.path / p.name for p in plans), sha256_json(made.manifest["files"]), made.path)


def test_scenes(ctx: Context, scenes: SceneList, workload: Workload, root: Path) -> Scenes:
    """The evaluated scenes: generated ones, or those of a folder. Raises PqkError when one is missing."""
    if scenes.source == SYNTHETIC:
        return synthetic_scenes(
            ctx, "scenes", "test", scenes.count or 0, scenes.views or 0, scenes.seed, workload, True
        )
    return folder_scenes(_under(root, scenes.source), scenes.names, scenes.count)


def folder_scenes(folder: Path, names: tuple[str, ...] | None = None, count: int | None = None) -> Scenes:
    """Scenes that lie in a folder: all of them by name, or the listed ones in their order."""
    from pqk.data.scene import open_scene, open_scenes

    found = [open_scene(folder / name) for name in names] if names else open_scenes(folder)
    chosen = tuple(scene.root for scene in found[:count])
    return Scenes(chosen, _hash_folders(chosen), folder)


def calibration_images(ctx: Context, calibration: Calibration, workload: Workload, root: Path) -> Scenes:
    """The folder of calibration scenes; pictures only, as no quantizer looks at depth.

    Raises PqkError when a folder given as source is missing or holds no scene.
    """
    if calibration.source != SYNTHETIC:
        try:
            return folder_scenes(_under(root, calibration.source))
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


def _hash_folders(folders: tuple[Path, ...]) -> str:
    """sha256 over every file, also of those that no reader looks at: what readers read is theirs to know.

    One that is forgotten here would let a stale score stand; reading a gigabyte costs a second or two.
    """
    files = {
        # Names of files that no reader looks at need not be UTF-8.
        f"{number}/{os.fsencode(path.relative_to(folder)).decode('utf-8', 'backslashreplace')}": sha256_file(path)
        for number, folder in enumerate(folders)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return sha256_json(files)


def export_graphs(ctx: Context, model: torch.nn.Module, model_sha: str, height: int, width: int) -> dict[str, Graph]:
    """The model's encoder and decoder as ONNX, each checked against torch when it was written."""

    def make(folder: Path) -> None:
        specs = model.graphs(height, width)  # type: ignore[operator]
        found = {}
        for name, spec in specs.items():
            graph = exchange.export(spec.module, spec.inputs, spec.output_names, folder / f"{name}.onnx")
            found[name] = {**graph_to_json(graph), "path": graph.path.name}
        write_json(folder / "graphs.json", found)

    versions = {name: ctx.machine["versions"].get(name) for name in ("torch", "onnx", "onnxscript")}
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
    code = (*_QUANT_CODE, *(("pqk.run.qat",) if learn else ()), *tool.sources)

    def make(folder: Path) -> None:
        request: dict[str, Any] = {
            "backend": backend,
            "quantizer": quantizer,
            "model": model,
            "encoder": graph_to_json(graphs["encoder"]),
            "decoder": graph_to_json(graphs["decoder"]),
            "calibration": str(calibration.root),
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


def quality(
    ctx: Context, variant: Variant, reference: Variant | None, scenes: Scenes, request: Mapping[str, Any]
) -> dict[str, Any]:
    """Scores, executed precision and FLOPs of a variant. `request`: see `pqk.run.evaluate`."""

    def make(folder: Path) -> None:
        result = worker.call(
            "quality",
            {
                "variant": variant.to_json(),
                "reference": reference.to_json() if reference else None,
                "scenes": [str(path) for path in scenes.folders],
                **request,
            },
        )
        write_evaluation(folder, result)

    inputs = {**identity(ctx, variant, reference), "scenes": scenes.sha256, **request}
    made = ctx.make("quality", (*_EVAL_CODE, *sources_of(variant, reference)), inputs, make, variant.name)
    found: dict[str, Any] = json.loads((made.path / "quality.json").read_text())
    return found


def timing(
    ctx: Context, variants: list[Variant], scene: Path, scenes_sha: str, request: Mapping[str, Any]
) -> dict[str, Any]:
    """Interleaved samples of all variants. `request`: shape, views, pairs, efficiency."""

    def make(folder: Path) -> None:
        asked = {"variants": [v.to_json() for v in variants], "scene": str(scene), **request}
        write_json(folder / "timing.json", worker.call("timing", asked))

    inputs = {"variants": [identity(ctx, v, None) for v in variants], "scenes": scenes_sha, **request}
    made = ctx.make("timing", (*_TIME_CODE, *sources_of(*variants)), inputs, make)
    found: dict[str, Any] = json.loads((made.path / "timing.json").read_text())
    return found


def memory(ctx: Context, variant: Variant) -> int:
    """Peak resident bytes of a fresh process that compiles and runs the variant."""

    def make(folder: Path) -> None:
        write_json(folder / "memory.json", worker.call("memory", {"variant": variant.to_json()}))

    made = ctx.make("memory", (*_MEMORY_CODE, *sources_of(variant)), identity(ctx, variant, None), make, variant.name)
    return int(json.loads((made.path / "memory.json").read_text())["peak_bytes"])


def sources_of(*variants: Variant | None) -> tuple[str, ...]:
    """Modules of the backends that run the variants."""
    found = dict.fromkeys(v.backend for v in variants if v)
    return tuple(module for name in found for module in registry.get(name).sources)


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
