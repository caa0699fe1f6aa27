"""`pqk run CARD`: Teacher baselines, the recipe, and one record for each, on one backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.base import BackendError, Precision, baselines_of, lowered_to
from pqk import paths
from pqk.data.scene import open_scene
from pqk.errors import PqkError
from pqk.files import check_writable
from pqk.models.configs import lowest_confidence
from pqk.record.log import refuse_to_lose, write_record
from pqk.record.schema import validate
from pqk.run import stages
from pqk.run.inputs import load_frames, scene_pairs
from pqk.run.prepare import (
    Request,
    asked_experiment,
    check_float_rest,
    chosen_quantizer,
    commit_of,
    context,
    count_parameters,
    engine_options,
    load_teacher,
    usable_backend,
)
from pqk.run.records import (
    Measurements,
    common_columns,
    drop_pct,
    judged,
    measured_record,
    planned_shares,
    write_failure,
)
from pqk.run.stages import ENGINE_VARIANTS, Context, Scenes
from pqk.run.store import OnEvent
from pqk.run.variants import Variant
from pqk.run.worker import WorkerCrashed
from pqk.spec.card import Experiment

_HIGHER_IS_BETTER = {"delta1"}
_PARTS = {"chamfer": ("chamfer_accuracy", "chamfer_completeness")}


@dataclass(frozen=True)
class Outcome:
    """A finished run: its records (Teacher first, candidate last), and what they were measured on."""

    records: list[dict[str, Any]]
    variants: list[Variant]
    scenes: Scenes
    experiment: Experiment
    truthful: bool  # the scenes carry ground truth, and the model is one that can be held against it
    ctx: Context
    model: str  # what `load_model` takes
    onnx_float: Variant  # the exported float graphs on ONNX Runtime
    scoring: Mapping[str, Any]  # what every variant is scored on and how; see `pqk.run.evaluate`

    def score(self, variant: Variant, keep: Sequence[str]) -> dict[str, Any]:
        """Quality of any variant on the scenes of this run; without ground truth against this run's Teacher in f32."""
        reference = None if self.truthful else self.variants[0]
        return stages.quality(self.ctx, variant, reference, self.scenes, {**self.scoring, "keep": list(keep)})

    def drop_pct(self, scores: Mapping[str, Any]) -> float | None:
        """Drop of the main metric of what `score` returned, against this run's Teacher in f32."""
        metric = self.experiment.evaluation.quality.main_metric
        return drop_pct(metric, scores["summary"][metric], self.records[0][metric], self.truthful)


def run(
    request: Request, root: Path, on_event: OnEvent, say: Callable[[str], None], log: Path | None = None
) -> Outcome:
    """Run a card. Its records are validated and written to logs/.

    `log`: a file that the caller will write the candidate's record to, or without a recipe all of them; refused before
    the long stages when it holds another one.

    Where the engines are emulated nothing is timed: those columns are null.
    Raises PqkError or BackendError for everything that a user can mend, and WorkerCrashed for a defect. When that comes
    out of the stages, after all that was asked was looked at, it leaves a record of the failure in logs/.
    """
    known: dict[str, Any] = {}
    try:
        return _run(request, root, on_event, say, log, known)
    except (PqkError, BackendError, WorkerCrashed) as error:
        if known and write_failure(root / "logs", known, error):
            say(f"a record of the failure is in {paths.shown(root / 'logs')}")
        raise


def _run(
    request: Request,
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
    log: Path | None,
    known: dict[str, Any],
) -> Outcome:
    """See `run`. `known` gets what a record of a failure tells, once the stages begin."""
    began = time.monotonic()
    experiment = asked_experiment(request, root)
    card, workload, evaluation = experiment.card, experiment.workload, experiment.evaluation
    check_writable(root / "logs")
    backend = usable_backend(request.backend)
    quantizer = chosen_quantizer(backend, request.quantizer) if request.recipe else None
    ptq_asked = experiment.quant.ptq
    # What the record calls it; to the backend every graph with Q/DQ nodes is Precision.INT8.
    lowered = lowered_to(backend.quantizers()[quantizer], ptq_asked.bits_w, ptq_asked.bits_a) if quantizer else "int8"
    floats = baselines_of(backend)
    float_rest = experiment.quant.float_rest
    if quantizer is not None:
        check_float_rest(float_rest, backend)
    height, width = workload.input.height, workload.input.width
    shape = (height, width)
    ctx = context(request, backend, root, on_event)

    asked, name, model_sha, model = load_teacher(request.model, root)
    scenes, truthful = _scenes(ctx, request, experiment, root)
    if name.startswith("random:"):
        truthful = False  # random weights predict nothing; only their agreement with the float model means something
    if request.scenes or request.images:  # a user's pictures are looked at before the long stages, not after
        for folder in scenes.folders:
            frames = load_frames(open_scene(folder), *shape)
            scene_pairs(frames, workload.pair_graph, workload.min_covisibility, truthful)
    hashes = {
        "model": model_sha,
        "workload": workload.sha256,
        "eval": evaluation.sha256,
        "quant": experiment.quant.sha256,
        "card": card.sha256,
        "scenes": scenes.sha256,
    }
    common = common_columns(experiment, backend.name, ctx.machine, name, truthful, commit_of(root), hashes)
    planned = [common | {"role": request.role, "precision": str(p), "quantizer": None} for p in floats]
    if quantizer is not None:
        planned = [common | {"role": "candidate", "precision": lowered, "quantizer": quantizer}]
    if log is not None:
        refuse_to_lose(log, planned)
    calibration: Scenes | None = None
    if quantizer is not None:
        calibration = stages.calibration_images(ctx, workload.calibration, workload, root)
    known |= planned[-1]
    graphs = stages.export_graphs(ctx, model, model_sha, height, width)
    params = count_parameters(model)
    min_conf = lowest_confidence(model.config)
    del model

    compiled = engine_options(experiment, backend.name)
    if not request.fresh:
        compiled["cache_dir"] = str(paths.store(root).parent / "engines")
    variants = [
        Variant(ENGINE_VARIANTS[p], backend.name, p, graphs["encoder"], graphs["decoder"], dict(compiled))
        for p in floats
    ]
    quantized = None
    if quantizer is not None and calibration is not None:
        ptq = ptq_asked.model_dump(mode="json")
        quantized = stages.quantize(ctx, backend.name, quantizer, asked, graphs, calibration, ptq, shape)
        rest = {} if float_rest == "auto" else {"rest": float_rest}  # the backend's own choice is its best
        variants.append(
            Variant(
                lowered,
                backend.name,
                Precision.INT8,
                quantized.graphs["encoder"],
                quantized.graphs["decoder"],
                {**compiled, **rest},
            )
        )
    views = None if request.scenes or request.images else workload.scenes.test.views
    scoring = {
        "views": views,
        "shape": list(shape),
        "pair_graph": workload.pair_graph.model_dump(mode="json"),
        "min_covisibility": workload.min_covisibility,
        "quality": evaluation.quality.model_dump(mode="json"),
        "seed": workload.seeds.eval,
        "min_conf": min_conf,
    }
    onnx_float = Variant("fp32", "reference", Precision.F32, graphs["encoder"], graphs["decoder"])
    outcome = Outcome([], variants, scenes, experiment, truthful, ctx, asked, onnx_float, scoring)
    kept = ptq_asked.keep_list
    scored = {v.name: outcome.score(v, kept if v.precision is Precision.INT8 else ()) for v in variants}
    emulated = any(scores["measured"] == "emulated" for scores in scored.values())
    timed: dict[str, Any] | None = None
    if emulated:
        say("no device of this backend here: compiled and scored by emulation, not timed")
    else:
        frames = load_frames(open_scene(scenes.folders[0]), *shape, views=views)
        pairs = scene_pairs(frames, workload.pair_graph, workload.min_covisibility, truthful)
        asked_timing = {
            "shape": list(shape),
            "views": views,
            "pairs": [list(p) for p in pairs],
            "efficiency": evaluation.efficiency.model_dump(mode="json"),
        }
        timed = stages.timing(ctx, variants, scenes.folders[0], scenes.sha256, asked_timing)["variants"]
    memory = {} if emulated else {v.name: stages.memory(ctx, v) for v in variants}

    measured = Measurements(variants, scored, timed, memory)
    common |= {"status": "ok", "params": params, "params_M": params / 1e6}
    for variant in variants:
        record = measured_record(common, measured, variant, truthful, evaluation.quality.metrics)
        if variant.precision is Precision.INT8 and quantized is not None and calibration is not None:
            record |= {
                "role": "candidate",
                "precision": lowered,
                "quantizer": quantizer,
                "bits_w": ptq_asked.bits_w,
                "bits_a": ptq_asked.bits_a,
                "keep_list": list(ptq_asked.keep_list),
                "images_calibration": quantized.images,
                "notes": quantized.notes + (planned_shares(scored[variant.name]["executed"]) if emulated else ""),
                "wall_s": round(time.monotonic() - began, 1),
            }
            record["hashes"]["calibration"] = calibration.sha256
            record |= judged(record, evaluation.thresholds)
        else:
            record["role"] = request.role
        validate(record)
        outcome.records.append(record)
    records = outcome.records
    for record in records:
        write_record(root / "logs", record)
    say(f"{len(records)} records in {paths.shown(root / 'logs')}")
    return outcome


def _scenes(ctx: Context, request: Request, experiment: Experiment, root: Path) -> tuple[Scenes, bool]:
    """The scenes to evaluate, and whether they carry ground truth."""
    if request.scenes and request.images:
        raise PqkError("--scenes and --images exclude each other: scenes with ground truth, or pictures without")
    if request.images:
        return stages.folder_scenes(request.images), False
    workload = experiment.workload
    if request.scenes:
        found = stages.folder_scenes(request.scenes)
    else:
        found = stages.test_scenes(ctx, workload.scenes.test, workload, root)
    truths = {path: open_scene(path).has_ground_truth for path in found.folders}
    for path in found.folders if request.scenes else ():
        refuse_partial_truth(path)
    if any(truths.values()) and not all(truths.values()):
        without = next(path for path, has in truths.items() if not has)
        raise PqkError(f"{without}: this scene has no ground truth while others have; evaluate them apart")
    return found, all(truths.values())


def refuse_partial_truth(folder: Path) -> None:
    """Raise PqkError for a scene of which some views have depth and others have not."""
    scene = open_scene(folder)
    lacking = [view.name for view in scene.views if view.depth_path is None]
    if 0 < len(lacking) < len(scene.views):
        raise PqkError(
            f"{folder}: view {lacking[0]!r} has no depth ({len(lacking)} of the {len(scene.views)} views have none); "
            "add it, or take these views or all depth out of the scene"
        )
