"""Everything that the candidate of a run stands on, made or reused, and the choice of it. Nothing is timed here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.base import Backend, Graph, Precision, baselines_of, lowered_to
from pqk import paths
from pqk.data.scene import open_scene
from pqk.errors import PqkError
from pqk.files import check_writable
from pqk.models import load_model
from pqk.models.configs import lowest_confidence
from pqk.record.log import refuse_to_lose
from pqk.run import stages
from pqk.run.inputs import load_frames, scene_pairs
from pqk.run.joint import Joined, check_trainable, join
from pqk.run.lowering import Lowering, Row
from pqk.run.parts import Bought
from pqk.run.prepare import (
    Model,
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
from pqk.run.records import common_columns, drop_pct
from pqk.run.stages import ENGINE_VARIANTS, Context, Scenes
from pqk.run.store import OnEvent
from pqk.run.training import TRAINS, Trained, method_columns, train_stages
from pqk.run.variants import Variant
from pqk.run.verdict import drop_limit
from pqk.spec.card import Experiment
from pqk.spec.recipe import JOINT, quantizes

STUDENT = "student "
"""Begins the names of the float variants of the model that P and K made; the Teacher's are the bare precisions."""


@dataclass(frozen=True)
class Outcome:
    """A finished run: its records (Teacher first, candidate last), and what they were measured on."""

    records: list[dict[str, Any]]
    variants: list[Variant]
    scenes: Scenes
    experiment: Experiment
    truthful: bool  # the scenes carry ground truth, and the model is one that can be held against it
    ctx: Context
    teacher: Model
    model: str  # what `load_model` takes: the model that is quantized, or that is the candidate itself
    onnx_float: Variant  # its exported float graphs on ONNX Runtime
    trained: Sequence[Trained]  # the stages P and K
    scoring: Mapping[str, Any]  # what every variant is scored on and how; see `pqk.run.evaluate`
    lowered: Sequence[Row] = ()  # what stage Q made: by PTQ, and by QAT where that was called for
    parts: Sequence[Bought] = ()  # of a model that P or K made smaller: what that bought, part by part

    @property
    def hours(self) -> dict[str, float]:
        """Device hours of each stage of the recipe, by its letter; PTQ and QAT are both Q."""
        hours = {stage.method: stage.hours for stage in self.trained}
        return hours | ({"Q": sum(row.hours for row in self.lowered)} if self.lowered else {})

    @property
    def paid(self) -> dict[str, float]:
        """Device hours of everything that was made, by what it is: what two runs share is in both under one name."""
        hours = {stage.model.path: stage.hours for stage in self.trained}
        return hours | {str(row.variant.encoder.path): row.hours for row in self.lowered}

    def score(self, variant: Variant, keep: Sequence[str] | None = None) -> dict[str, Any]:
        """Quality of any variant on the scenes of this run; without ground truth against this run's Teacher in f32.

        keep: what must not run in int8 kernels; default: the card's keep-list, for a quantized variant.
        """
        if keep is None:
            keep = self.experiment.quant.ptq.keep_list if variant.precision is Precision.INT8 else ()
        reference = None if self.truthful else self.variants[0]
        return stages.quality(self.ctx, variant, reference, self.scenes, {**self.scoring, "keep": list(keep)})

    def drop_pct(self, scores: Mapping[str, Any]) -> float | None:
        """Drop of the main metric of what `score` returned, against this run's Teacher in f32."""
        metric = self.experiment.evaluation.quality.main_metric
        return drop_pct(metric, scores["summary"][metric], self.records[0][metric], self.truthful)

    def floats(self) -> list[tuple[Variant, dict[str, Any]]]:
        """The float variants of `model` with their records: the student's where the recipe made one."""
        rows = zip(self.variants, self.records, strict=True)
        return [(v, r) for v, r in rows if v.hashes == self.onnx_float.hashes and v.precision is not Precision.INT8]


@dataclass(frozen=True)
class Made:
    """A run up to where its candidate is chosen: what its stages made, and how that scores. Nothing is timed yet.

    outcome: without records. rows: Teacher first, candidate last. scored: by the name of the variant. common: the
    columns that all records share.
    """

    outcome: Outcome
    rows: list[Row]
    scored: dict[str, dict[str, Any]]
    common: dict[str, Any]


@dataclass(frozen=True)
class _Tools:
    """What lowers and runs the graphs.

    quantizer: None where the recipe does not quantize. lowered: what records call its precision; to the backend every
    graph with Q/DQ nodes is Precision.INT8. floats: the precisions of the baselines, f32 first.
    """

    backend: Backend
    quantizer: str | None
    lowered: str
    floats: Sequence[Precision]
    options: Mapping[str, Any]

    def in_float(self, graphs: Mapping[str, Graph], model: str = "") -> list[Variant]:
        """The float variants of a model's graphs; `model` begins their names."""
        parts = graphs["encoder"], graphs["decoder"]
        return [
            Variant(model + ENGINE_VARIANTS[p], self.backend.name, p, *parts, dict(self.options)) for p in self.floats
        ]


def make(
    request: Request,
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
    log: Path | None = None,
    known: dict[str, Any] | None = None,
) -> Made:
    """Make or reuse everything of a run that its candidate stands on, score it, and choose the candidate.

    `log`: a file that the caller will write records to; refused before the long stages when it holds other ones.
    `known` gets what a record of a failure tells, once the stages begin; without it nothing will be written to logs/.
    Raises PqkError or BackendError for everything that a user can mend, and WorkerCrashed for a defect.
    """
    experiment = asked_experiment(request, root)
    workload, evaluation = experiment.workload, experiment.evaluation
    if known is not None:
        check_writable(root / "logs")
    recipe = experiment.card.recipe if request.recipe else ()
    tools = _tools(request, experiment, recipe, root)
    ctx = context(request, tools.backend, root, on_event)

    teacher, module = load_teacher(request.model, root)
    scenes, truthful = _scenes(ctx, request, experiment, root)
    if teacher.name.startswith("random:"):
        truthful = False  # random weights predict nothing; only their agreement with the float model means something
    height, width = workload.input.height, workload.input.width
    if request.scenes or request.images:  # a user's pictures are looked at before the long stages, not after
        for folder in scenes.folders:
            frames = load_frames(open_scene(folder), height, width)
            scene_pairs(frames, workload.pair_graph, workload.min_covisibility, truthful)
    hashes = {
        "model": teacher.sha256,
        "workload": workload.sha256,
        "eval": evaluation.sha256,
        "quant": experiment.quant.sha256,
        "card": experiment.card.sha256,
        "scenes": scenes.sha256,
    }
    commit = commit_of(root)
    common = common_columns(experiment, tools.backend.name, ctx.machine, teacher.name, truthful, commit, hashes)
    planned = _planned(request, recipe, tools, teacher, common)
    if log is not None:
        refuse_to_lose(log, planned)
    calibration: Scenes | None = None
    if tools.quantizer is not None:
        calibration = stages.calibration_images(ctx, workload.calibration, workload, root)
    if known is not None:
        known |= planned[-1]
    graphs = stages.export_graphs(ctx, module, teacher.sha256, height, width)
    common |= {"status": "ok", "role": request.role, **_parameters(module)}
    min_conf = lowest_confidence(module.config)
    del module

    teachers = tools.in_float(graphs)
    rows = [Row(v, teachers, {}) for v in teachers]
    joined: Joined | None = None
    if tools.quantizer is not None and calibration is not None and recipe == JOINT:
        joined = join(ctx, experiment, tools.backend.name, tools.quantizer, teacher, graphs, calibration)
        trained = [joined.trained]
    else:
        trained = train_stages(ctx, experiment, teacher) if recipe else []
    quantizer, final, floats, columns = tools.quantizer, teacher, teachers, {"hashes": hashes}
    if trained:
        final = trained[-1].model
        say(f"{final.name}: its checkpoint is {paths.shown(Path(final.path))}")
        module = load_model(final.path)
        graphs = stages.export_graphs(ctx, module, final.sha256, height, width)
        columns = method_columns(experiment, trained, hashes) | _parameters(module)
        del module
        floats = tools.in_float(graphs, STUDENT)
        if trained[-1].failed:
            say(f"stop-loss: {trained[-1].reason}" + ("; not quantized" if quantizer else ""))
            quantizer = None
        rows += _rows_of_trained(floats, teachers, columns, is_candidate=quantizer is None)
    lowering: Lowering | None = None
    if quantizer is not None and calibration is not None:
        lowering = Lowering(
            experiment,
            tools.backend.name,
            quantizer,
            tools.lowered,
            final,
            graphs,
            calibration,
            floats,
            columns,
            tools.options,
            joined.quantized if joined else None,
        )
        rows.append(lowering.row(ctx))
    scoring = {
        "views": None if request.scenes or request.images else workload.scenes.test.views,
        "shape": [height, width],
        "pair_graph": workload.pair_graph.model_dump(mode="json"),
        "min_covisibility": workload.min_covisibility,
        "quality": evaluation.quality.model_dump(mode="json"),
        "seed": workload.seeds.eval,
        "min_conf": min_conf,
    }
    onnx_float = Variant("fp32", "reference", Precision.F32, graphs["encoder"], graphs["decoder"])
    variants = [row.variant for row in rows]
    outcome = Outcome(
        [], variants, scenes, experiment, truthful, ctx, teacher, final.path, onnx_float, trained, scoring
    )
    scored = {variant.name: outcome.score(variant) for variant in variants}
    if lowering is not None and lowering.made is None and request.qat and truthful:
        _train_if_it_drops(outcome, lowering, rows, scored, drop_limit(recipe, evaluation.thresholds), say)
    outcome = replace(outcome, lowered=[row for row in rows if row.lowered])
    return Made(outcome, rows, scored, common)


def _tools(request: Request, experiment: Experiment, recipe: Sequence[str], root: Path) -> _Tools:
    """The asked backend and quantizer. Raises PqkError or NotBuilt where they cannot do the recipe."""
    card, ptq = experiment.card, experiment.quant.ptq
    backend = usable_backend(request.backend)
    quantizer = chosen_quantizer(backend, request.quantizer, ptq) if quantizes(recipe) else None
    if quantizer is not None and recipe == JOINT:
        check_trainable(card.id, backend.name, quantizer, ptq)
        if request.qat is False:
            raise PqkError(f"--no-qat: the one training of card {card.id} is quantization-aware; leave the option out")
    if request.quantizer and recipe and quantizer is None:
        raise PqkError(f"--quantizer {request.quantizer}: the recipe of card {card.id} does not quantize")
    lowered = lowered_to(backend.quantizers()[quantizer], ptq.bits_w, ptq.bits_a) if quantizer else "int8"
    if quantizer is not None:
        check_float_rest(experiment.quant.float_rest, backend)
    options = engine_options(experiment, backend.name)
    if not request.fresh:
        options["cache_dir"] = str(paths.store(root).parent / "engines")
    return _Tools(backend, quantizer, lowered, baselines_of(backend), options)


def _planned(
    request: Request, recipe: Sequence[str], tools: _Tools, teacher: Model, common: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What is known beforehand of the records for `log`: the candidate's, or without a recipe the floats'."""
    if not recipe:
        return [{**common, "role": request.role, "precision": str(p), "quantizer": None} for p in tools.floats]
    name = "+".join((teacher.name, *(stage for stage in recipe if stage in TRAINS)))
    precision = tools.lowered if tools.quantizer is not None else str(Precision.F32)
    return [{**common, "role": "candidate", "model": name, "precision": precision, "quantizer": tools.quantizer}]


def _rows_of_trained(
    floats: Sequence[Variant], teachers: Sequence[Variant], columns: Mapping[str, Any], is_candidate: bool
) -> list[Row]:
    """The float rows of the trained model. is_candidate: the one in f32, as which it was trained, which comes last."""
    rows = [Row(v, teachers, {**columns, "role": "baseline"}) for v in floats]
    if is_candidate:
        rows[0].own["role"] = "candidate"
        rows = [*rows[1:], rows[0]]
    return rows


def _train_if_it_drops(
    outcome: Outcome,
    lowering: Lowering,
    rows: list[Row],
    scored: dict[str, dict[str, Any]],
    limit: float,
    say: Callable[[str], None],
) -> None:
    """Where the quantized model drops more than `limit` percent, train it, and add the row of what came out.

    The better of the two becomes the candidate and comes last; the other one stays as a baseline. A quantizer that
    cannot train is told of, with those that can.
    """
    teacher, metric = rows[0].variant.name, outcome.experiment.evaluation.quality.main_metric

    def drop(row: Row) -> float:
        mine, base = (scored[name]["summary"][metric] for name in (row.variant.name, teacher))
        found = drop_pct(metric, mine, base, outcome.truthful)
        return math.inf if found is None else found

    if not limit < drop(rows[-1]) < math.inf:
        return
    above = f"PTQ drops {drop(rows[-1]):.2f} %, above {limit:g} %"
    if lowering.untrained:
        say(f"{above}; {lowering.untrained}")
        return
    say(f"{above}: quantization-aware training")
    learned = lowering.row(outcome.ctx, trained=True, spent_hours=rows[-1].own["gpu_hours"])
    scored[learned.variant.name] = outcome.score(learned.variant)
    say(f"QAT: drop {drop(learned):.2f} %")
    rows[-1:] = [rows[-1], learned] if drop(learned) < drop(rows[-1]) else [learned, rows[-1]]
    rows[-2].own["role"] = "baseline"
    outcome.variants[:] = [row.variant for row in rows]


def _parameters(module: Any) -> dict[str, Any]:
    count = count_parameters(module)
    return {"params": count, "params_M": count / 1e6}


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
