"""Makes the candidate of a recipe: exports, trains, quantizes, and chooses on validation samples.

Nothing is timed here and no test sample is scored: `pqk.recipe.runner` does both once, after all choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.base import Backend, Graph, Precision, baselines_of, lowered_to
from pqk import paths
from pqk.engines.variant import Variant
from pqk.errors import PqkError
from pqk.families.contract import SampleSet
from pqk.files import check_writable
from pqk.heap import trim
from pqk.measure.scores import drop_of
from pqk.models import load_model
from pqk.recipe import stages
from pqk.recipe.block_profile import PartChange
from pqk.recipe.columns import common_columns
from pqk.recipe.experiment import Experiment
from pqk.recipe.joint import Joined, check_trainable, join
from pqk.recipe.quantization import Quantization, Row
from pqk.recipe.reduce import check_reducing, keeping, reduce_model
from pqk.recipe.request import (
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
from pqk.recipe.splits import check_apart, test_split, train_split
from pqk.recipe.stages import ENGINE_VARIANTS, Context, open_split
from pqk.recipe.training import TRAINS, Trained, check_family, check_sharing, method_columns, train_stages
from pqk.recipe.verdict import drop_limit
from pqk.record.log import refuse_to_lose
from pqk.settings.recipe import JOINT, quantizes
from pqk.stats.intervals import Interval
from pqk.store.store import OnEvent

STUDENT = "student "
"""Prefix of the names of the trained model's float variants; the Teacher's names are the bare precisions."""


@dataclass(frozen=True)
class Candidate:
    """A made recipe with everything needed to judge it; after the measurement also its records.

    records: Teacher first, candidate last. variants: one for each record, in the same order.
    """

    records: list[dict[str, Any]]
    variants: list[Variant]
    validation: SampleSet
    test: SampleSet
    experiment: Experiment
    truthful: bool  # the test samples have ground truth, and the weights are not random
    ctx: Context
    teacher: Model
    model: str  # argument of `load_model`: the model that is quantized, or that is the candidate itself
    onnx_float: Variant  # its exported float graphs on ONNX Runtime
    trained: Sequence[Trained]  # the stages P, K and T
    config: Mapping[str, Any]  # of the Teacher's network; it defines the meaning of its outputs
    lowered: Sequence[Row] = ()  # results of stage Q: of PTQ, and of QAT where it was needed
    parts: Sequence[PartChange] = ()  # of a model that P or K made smaller: its changes, part by part

    @property
    def hours(self) -> dict[str, float]:
        """Returns the device hours of each stage of the recipe by its letter; PTQ and QAT both count as Q."""
        hours = {stage.method: stage.hours for stage in self.trained}
        return hours | ({"Q": sum(row.hours for row in self.lowered)} if self.lowered else {})

    @property
    def paid(self) -> dict[str, float]:
        """Returns the device hours of each artifact by its path; an artifact that two runs share has one path."""
        hours = {stage.model.path: stage.hours for stage in self.trained}
        return hours | {str(next(iter(row.variant.graphs.values())).path): row.hours for row in self.lowered}

    @property
    def metric(self) -> str:
        """Returns the name of the main metric, which every decision and the drop refer to."""
        return self.experiment.evaluation.quality.main_metric

    @property
    def decides(self) -> bool:
        """Returns whether validation samples give a drop against ground truth, so that it may change the recipe.

        Where the test samples have none, both splits are scored against the Teacher; random weights predict nothing.
        """
        return self.truthful and self.validation.truthful

    def score(self, variant: Variant, keep: Sequence[str] | None = None, on: SampleSet | None = None) -> dict[str, Any]:
        """Returns the scores of a variant on validation samples, or on those of `on`.

        They are against ground truth, or against the Teacher in f32 where the run has no ground truth.
        keep: nodes that must not run in int8 kernels; default: the card's keep-list, for a quantized variant.
        """
        found = on or self.validation
        if keep is None:
            keep = self.experiment.quant.ptq.keep_list if variant.precision is Precision.INT8 else ()
        reference = None if self.truthful and found.truthful else self.variants[0]
        where = "validation" if found is self.validation else "test"
        return stages.quality(self.ctx, self.experiment, variant, reference, found, self.config, keep, where)

    def drop(self, variant: Variant, keep: Sequence[str] | None = None) -> Interval | None:
        """Returns the drop of a variant on validation samples, in percent, against this run's Teacher in f32.

        None where the main metric gives no drop.
        """
        mine, teacher = self.score(variant, keep), self.score(self.variants[0])
        return drop_of(self.experiment.metric, mine, teacher, self.decides)

    def time(self, variants: Sequence[Variant]) -> dict[str, Any]:
        """Times variants in interleaved rounds on validation samples; see `pqk.recipe.stages.timing`."""
        return stages.timing(self.ctx, self.experiment, list(variants), self.validation)

    def floats(self) -> list[Variant]:
        """Returns the float variants of `model`: the student's where the recipe made one."""
        return [v for v in self.variants if v.hashes == self.onnx_float.hashes and v.precision is not Precision.INT8]


@dataclass(frozen=True)
class Choice:
    """One attempt at a recipe: its candidate, not yet timed and not yet scored on test samples.

    candidate: without records. rows: Teacher first, candidate last. common: the columns that all records share. drop:
    of the candidate on validation samples; None where no decision used it.
    """

    candidate: Candidate
    rows: list[Row]
    common: dict[str, Any]
    drop: Interval | None


@dataclass(frozen=True)
class _Tools:
    """The quantizer and the backend of a run.

    quantizer: None where the recipe does not quantize. lowered: the quantized model's precision in records; for the
    backend every graph with Q/DQ nodes is Precision.INT8. floats: the precisions of the baselines, f32 first.
    options: of the engines.
    """

    backend: Backend
    quantizer: str | None
    lowered: str
    floats: Sequence[Precision]
    options: Mapping[str, Any]

    def in_float(self, graphs: Mapping[str, Graph], model: str = "") -> list[Variant]:
        """Returns the float variants of a model's graphs. model: prefix of their names."""
        return [
            Variant(model + ENGINE_VARIANTS[p], self.backend.name, p, graphs, dict(self.options)) for p in self.floats
        ]


def make(
    request: Request,
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
    log: Path | None = None,
    known: dict[str, Any] | None = None,
) -> Choice:
    """Makes or reuses everything of a run up to its candidate, which is chosen on validation samples.

    log: a file that the caller will write records to; refused before the long stages when it holds other records.
    known: receives the columns for the record of a failure when the stages begin; without it nothing is written to
    logs/. Raises PqkError or BackendError for every error that a user can correct, and WorkerCrashed for a defect.
    """
    experiment = asked_experiment(request, root)
    workload, evaluation = experiment.workload, experiment.evaluation
    if known is not None:
        check_writable(root / "logs")
    recipe = experiment.card.recipe if request.recipe else ()
    tools = _tools(request, experiment, recipe, root)
    ctx = context(request, tools.backend, root, on_event)

    teacher, module = load_teacher(request.model, root)
    test = test_split(ctx, request, experiment, root)
    validation = open_split(ctx, experiment, "validation", root)
    truthful = test.truthful and not teacher.random
    hashes = {
        "model": teacher.sha256,
        "workload": workload.sha256,
        "eval": evaluation.sha256,
        "quant": experiment.quant.sha256,
        "card": experiment.card.sha256,
        "scenes": test.sha256,
        "validation": validation.sha256,
    }
    commit = commit_of()
    common = common_columns(experiment, tools.backend.name, ctx.machine, teacher.name, truthful, commit, hashes)
    common |= {"run_id": request.run_id, "command": request.command}
    planned = _planned(request, recipe, tools, teacher, common)
    if log is not None:
        refuse_to_lose(log, planned)
    calibration: SampleSet | None = None
    if tools.quantizer is not None:
        calibration = open_split(ctx, experiment, "calibration", root)
    train = train_split(ctx, request, experiment, root, recipe)
    check_apart(experiment, {"train": train, "validation": validation, "test": test, "calibration": calibration})
    if known is not None:
        known |= planned[-1]
    graphs = stages.export_graphs(ctx, experiment, module, teacher.sha256)
    common |= {"status": "ok", "role": request.role, **_parameters(module)}
    config = dict(module.config)
    del module
    trim()

    teachers = tools.in_float(graphs)
    rows = [Row(v, teachers, {}) for v in teachers]
    joined: Joined | None = None
    if tools.quantizer is not None and calibration is not None and recipe == JOINT:
        joined = join(ctx, experiment, tools.backend.name, tools.quantizer, teacher, graphs, calibration, train)
        trained = [joined.trained]
    else:
        trained = train_stages(ctx, experiment, teacher, train) if recipe else []
    if "T" in recipe and not (trained and trained[-1].failed):
        trained.append(reduce_model(ctx, experiment, trained[-1].model if trained else teacher))
        experiment = keeping(experiment, trained[-1].model)
    quantizer, final, floats, columns = tools.quantizer, teacher, teachers, {"hashes": hashes}
    if trained:
        final = trained[-1].model
        say(f"{final.name}: checkpoint in {paths.shown(Path(final.path))}")
        module = load_model(final.path)
        graphs = stages.export_graphs(ctx, experiment, module, final.sha256)
        columns = method_columns(experiment, trained, hashes, train) | _parameters(module)
        del module
        trim()
        floats = tools.in_float(graphs, STUDENT)
        if trained[-1].failed:
            say(f"stop-loss: {trained[-1].reason}" + ("; not quantized" if quantizer else ""))
            quantizer = None
        rows += _rows_of_trained(floats, columns, is_candidate=quantizer is None)
    quantization: Quantization | None = None
    if quantizer is not None and calibration is not None:
        quantization = Quantization(
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
            train,
        )
        rows.append(quantization.row(ctx))
    onnx_float = Variant("fp32", "reference", Precision.F32, graphs)
    variants = [row.variant for row in rows]
    candidate = Candidate(
        [],
        variants,
        validation,
        test,
        experiment,
        truthful,
        ctx,
        teacher,
        final.path,
        onnx_float,
        trained,
        config,
    )
    drop = None
    if quantization is not None and quantization.made is None and request.qat and candidate.decides:
        drop = _train_if_it_drops(candidate, quantization, rows, drop_limit(recipe, evaluation.thresholds), say)
    candidate = replace(candidate, lowered=[row for row in rows if row.lowered])
    return Choice(candidate, rows, common, drop)


def _tools(request: Request, experiment: Experiment, recipe: Sequence[str], root: Path) -> _Tools:
    """Returns the requested backend and quantizer. Raises PqkError or NotBuilt where they cannot run the recipe."""
    card, ptq = experiment.card, experiment.quant.ptq
    check_family(experiment, recipe)
    check_sharing(experiment, recipe, request.processes)
    check_reducing(experiment.family, card.id, recipe)
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
    if not request.fresh and backend.name != "reference":  # the reference compiles nothing
        options["cache_dir"] = str(paths.store(root).parent / "engines")
    return _Tools(backend, quantizer, lowered, baselines_of(backend), options)


def _planned(
    request: Request, recipe: Sequence[str], tools: _Tools, teacher: Model, common: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns the known columns of the records for `log`: the candidate's record, or without a recipe the floats'."""
    if not recipe:
        return [{**common, "role": request.role, "precision": str(p), "quantizer": None} for p in tools.floats]
    name = "+".join((teacher.name, *(stage for stage in recipe if stage in (*TRAINS, "T"))))
    precision = tools.lowered if tools.quantizer is not None else str(Precision.F32)
    return [{**common, "role": "candidate", "model": name, "precision": precision, "quantizer": tools.quantizer}]


def _rows_of_trained(floats: Sequence[Variant], columns: Mapping[str, Any], is_candidate: bool) -> list[Row]:
    """Returns the float rows of the trained model. is_candidate: its f32 row is the candidate and comes last."""
    rows = [Row(v, floats, {**columns, "role": "baseline"}) for v in floats]
    if is_candidate:
        rows[0].own["role"] = "candidate"
        rows = [*rows[1:], rows[0]]
    return rows


def _train_if_it_drops(
    candidate: Candidate, quantization: Quantization, rows: list[Row], limit: float, say: Callable[[str], None]
) -> Interval | None:
    """Trains the quantized model where it drops more than `limit` percent, and adds the row of the trained model.

    The better of the two becomes the candidate and comes last; the other one stays as a baseline. If the quantizer
    cannot train, a message says so and names those that can. All decisions use validation samples. Returns the drop of
    the candidate; None where the main metric gives none.
    """
    drop = candidate.drop(rows[-1].variant)
    if drop is None:
        return None
    rows[-1].own["validation_drop_pct"] = drop.value
    if not limit < drop.value:
        return drop
    above = f"PTQ drops {drop.value:.2f} % on validation samples, above {limit:g} %"
    if quantization.untrained:
        say(f"{above}; {quantization.untrained}")
        return drop
    say(f"{above}: quantization-aware training")
    learned = quantization.row(candidate.ctx, trained=True, spent_hours=rows[-1].own["gpu_hours"])
    candidate.variants.append(learned.variant)
    found = candidate.drop(learned.variant)
    if found is None:
        return drop
    learned.own["validation_drop_pct"] = found.value
    say(f"QAT: drop {found.value:.2f} % on validation samples")
    better = found.value < drop.value
    rows[-1:] = [rows[-1], learned] if better else [learned, rows[-1]]
    rows[-2].own["role"] = "baseline"
    candidate.variants[:] = [row.variant for row in rows]
    return found if better else drop


def _parameters(module: Any) -> dict[str, Any]:
    count = count_parameters(module)
    return {"params": count, "params_M": count / 1e6}
