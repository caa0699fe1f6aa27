"""Runs a recipe up to its candidate: exports, trains, quantizes, and chooses on validation samples.

Nothing is timed here and no test sample is scored: `pqk.recipe.runner` does both once, when everything is chosen.
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
from pqk.measure.scores import drop_of
from pqk.models import load_model
from pqk.recipe import stages
from pqk.recipe.block_profile import Bought
from pqk.recipe.columns import common_columns
from pqk.recipe.experiment import Experiment
from pqk.recipe.joint import Joined, check_trainable, join
from pqk.recipe.quantization import Lowering, Row
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
from pqk.recipe.training import TRAINS, Trained, check_family, method_columns, train_stages
from pqk.recipe.verdict import drop_limit
from pqk.record.log import refuse_to_lose
from pqk.settings.recipe import JOINT, quantizes
from pqk.stats.intervals import Interval
from pqk.store.store import OnEvent

STUDENT = "student "
"""Begins the names of the float variants of the model that P and K made; the Teacher's are the bare precisions."""


@dataclass(frozen=True)
class Outcome:
    """A run: what was asked, what was made, and on what it is judged; once measured, its records too.

    records: Teacher first, candidate last. variants: one for each record, in the same order.
    """

    records: list[dict[str, Any]]
    variants: list[Variant]
    validation: SampleSet
    test: SampleSet
    experiment: Experiment
    truthful: bool  # the test samples carry ground truth, and the model is one that can be held against it
    ctx: Context
    teacher: Model
    model: str  # what `load_model` takes: the model that is quantized, or that is the candidate itself
    onnx_float: Variant  # its exported float graphs on ONNX Runtime
    trained: Sequence[Trained]  # the stages P and K
    config: Mapping[str, Any]  # of the Teacher's network, which says what its outputs mean
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
        return hours | {str(next(iter(row.variant.graphs.values())).path): row.hours for row in self.lowered}

    @property
    def metric(self) -> str:
        """The main metric, which every decision and the drop refer to."""
        return self.experiment.evaluation.quality.main_metric

    @property
    def decides(self) -> bool:
        """Whether validation samples tell a drop against ground truth, by which a recipe may be changed.

        Where the test samples have none, both are scored against the Teacher; and random weights predict nothing.
        """
        return self.truthful and self.validation.truthful

    def score(self, variant: Variant, keep: Sequence[str] | None = None, on: SampleSet | None = None) -> dict[str, Any]:
        """Scores a variant on validation samples, or on those of `on`; against the Teacher in f32 where the run has no
        ground truth.

        keep: what must not run in int8 kernels; default: the card's keep-list, for a quantized variant.
        """
        found = on or self.validation
        if keep is None:
            keep = self.experiment.quant.ptq.keep_list if variant.precision is Precision.INT8 else ()
        reference = None if self.truthful and found.truthful else self.variants[0]
        where = "validation" if found is self.validation else "test"
        return stages.quality(self.ctx, self.experiment, variant, reference, found, self.config, keep, where)

    def drop(self, variant: Variant, keep: Sequence[str] | None = None) -> Interval | None:
        """The drop of a variant on validation samples, in percent, against this run's Teacher in f32.

        None where the main metric does not tell one.
        """
        mine, teacher = self.score(variant, keep), self.score(self.variants[0])
        return drop_of(self.experiment.metric, mine, teacher, self.decides)

    def time(self, variants: Sequence[Variant]) -> dict[str, Any]:
        """Times variants side by side on validation samples; see `pqk.recipe.stages.timing`."""
        return stages.timing(self.ctx, self.experiment, list(variants), self.validation)

    def floats(self) -> list[Variant]:
        """The float variants of `model`: the student's where the recipe made one."""
        return [v for v in self.variants if v.hashes == self.onnx_float.hashes and v.precision is not Precision.INT8]


@dataclass(frozen=True)
class Made:
    """A run up to where its candidate is chosen. Nothing is timed yet, and no test sample was scored.

    outcome: without records. rows: Teacher first, candidate last. common: the columns that all records share. drop:
    of the candidate on validation samples; None where nothing was decided by it.
    """

    outcome: Outcome
    rows: list[Row]
    common: dict[str, Any]
    drop: Interval | None


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
) -> Made:
    """Make or reuse everything of a run up to its candidate, which is chosen on validation samples.

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
    common["run_id"] = request.run_id
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

    teachers = tools.in_float(graphs)
    rows = [Row(v, teachers, {}) for v in teachers]
    joined: Joined | None = None
    if tools.quantizer is not None and calibration is not None and recipe == JOINT:
        joined = join(ctx, experiment, tools.backend.name, tools.quantizer, teacher, graphs, calibration, train)
        trained = [joined.trained]
    else:
        trained = train_stages(ctx, experiment, teacher, train) if recipe else []
    quantizer, final, floats, columns = tools.quantizer, teacher, teachers, {"hashes": hashes}
    if trained:
        final = trained[-1].model
        say(f"{final.name}: its checkpoint is {paths.shown(Path(final.path))}")
        module = load_model(final.path)
        graphs = stages.export_graphs(ctx, experiment, module, final.sha256)
        columns = method_columns(experiment, trained, hashes, train) | _parameters(module)
        del module
        floats = tools.in_float(graphs, STUDENT)
        if trained[-1].failed:
            say(f"stop-loss: {trained[-1].reason}" + ("; not quantized" if quantizer else ""))
            quantizer = None
        rows += _rows_of_trained(floats, columns, is_candidate=quantizer is None)
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
            train,
        )
        rows.append(lowering.row(ctx))
    onnx_float = Variant("fp32", "reference", Precision.F32, graphs)
    variants = [row.variant for row in rows]
    outcome = Outcome(
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
    if lowering is not None and lowering.made is None and request.qat and outcome.decides:
        drop = _train_if_it_drops(outcome, lowering, rows, drop_limit(recipe, evaluation.thresholds), say)
    outcome = replace(outcome, lowered=[row for row in rows if row.lowered])
    return Made(outcome, rows, common, drop)


def _tools(request: Request, experiment: Experiment, recipe: Sequence[str], root: Path) -> _Tools:
    """The asked backend and quantizer. Raises PqkError or NotBuilt where they cannot do the recipe."""
    card, ptq = experiment.card, experiment.quant.ptq
    check_family(experiment, recipe)
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
    if not request.fresh and backend.name != "reference":  # which compiles nothing that could be kept
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


def _rows_of_trained(floats: Sequence[Variant], columns: Mapping[str, Any], is_candidate: bool) -> list[Row]:
    """The float rows of the trained model. is_candidate: the one in f32, as which it was trained, which comes last."""
    rows = [Row(v, floats, {**columns, "role": "baseline"}) for v in floats]
    if is_candidate:
        rows[0].own["role"] = "candidate"
        rows = [*rows[1:], rows[0]]
    return rows


def _train_if_it_drops(
    outcome: Outcome, lowering: Lowering, rows: list[Row], limit: float, say: Callable[[str], None]
) -> Interval | None:
    """Where the quantized model drops more than `limit` percent, trains it, and adds the row of what came out.

    The better of the two becomes the candidate and comes last; the other one stays as a baseline. If the quantizer
    cannot train, says so and names those that can. Everything is decided on validation samples. Returns the drop of
    the candidate; None where the main metric tells none.
    """
    drop = outcome.drop(rows[-1].variant)
    if drop is None:
        return None
    rows[-1].own["validation_drop_pct"] = drop.value
    if not limit < drop.value:
        return drop
    above = f"PTQ drops {drop.value:.2f} % on validation samples, above {limit:g} %"
    if lowering.untrained:
        say(f"{above}; {lowering.untrained}")
        return drop
    say(f"{above}: quantization-aware training")
    learned = lowering.row(outcome.ctx, trained=True, spent_hours=rows[-1].own["gpu_hours"])
    outcome.variants.append(learned.variant)
    found = outcome.drop(learned.variant)
    if found is None:
        return drop
    learned.own["validation_drop_pct"] = found.value
    say(f"QAT: drop {found.value:.2f} % on validation samples")
    better = found.value < drop.value
    rows[-1:] = [rows[-1], learned] if better else [learned, rows[-1]]
    rows[-2].own["role"] = "baseline"
    outcome.variants[:] = [row.variant for row in rows]
    return found if better else drop


def _parameters(module: Any) -> dict[str, Any]:
    count = count_parameters(module)
    return {"params": count, "params_M": count / 1e6}
