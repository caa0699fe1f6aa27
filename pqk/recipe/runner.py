"""Runs a card: makes the candidate, scores it and its baselines on test samples once, times them, writes records."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.base import BackendError, Precision
from pqk import paths
from pqk.engines.variant import Variant
from pqk.errors import PqkError
from pqk.measure.noise import warning
from pqk.measure.scores import drop_of, rise_of
from pqk.recipe import stages
from pqk.recipe.block_profile import PartChange, changes, clause
from pqk.recipe.candidate import Candidate, Choice
from pqk.recipe.columns import Measurements, judged, judged_float, measured_record, planned_shares, write_failure
from pqk.recipe.final import Final, check_decide, score_final
from pqk.recipe.recover import choose
from pqk.recipe.request import Request, asked_experiment
from pqk.recipe.verdict import Rise, wrongly_computed
from pqk.record.log import write_record
from pqk.record.schema import validate
from pqk.store.store import OnEvent
from pqk.store.worker import WorkerCrashed


def run(
    request: Request,
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
    log: Path | None = None,
    rollback: bool = False,
    decide: int | None = None,
) -> Candidate:
    """Runs a card, validates its records and writes them to logs/.

    log: a file that the caller will write the candidate's record to, or without a recipe all records; refused before
    the long stages when it holds another one. rollback: use the rollback table for a recipe that drops too much.
    decide: add test scenes, up to so many, until the interval of the drop lies on one side of its limit.

    Where the engines are emulated nothing is timed: those columns are null.
    Raises PqkError or BackendError for every error that a user can correct, and WorkerCrashed for a defect. An error of
    the stages, after the checks of the request, leaves a record of the failure in logs/.
    """
    began = time.monotonic()
    known: dict[str, Any] = {}
    if decide is not None:
        check_decide(request, asked_experiment(request, root))
    try:
        choice, request = choose(request, root, on_event, say, log, known, rollback)
        return _measured(choice, request, root, say, decide, began)
    except (PqkError, BackendError, WorkerCrashed) as error:
        if known and write_failure(root / "logs", known, error):
            say(f"a record of the failure is in {paths.shown(root / 'logs')}")
        raise


def _measured(
    choice: Choice, request: Request, root: Path, say: Callable[[str], None], decide: int | None, began: float
) -> Candidate:
    """Returns the candidate with its records. Test samples are scored here, and nowhere before."""
    candidate, rows = choice.candidate, choice.rows
    evaluation, recipe = candidate.experiment.evaluation, candidate.experiment.card.recipe if request.recipe else ()
    final = score_final(candidate, request, root, recipe, decide, say)
    timed, memory = _time(candidate, final, say)
    if candidate.trained:
        candidate = replace(candidate, parts=_parts(candidate))

    common = choice.common | {"hashes": choice.common["hashes"] | {"scenes": final.sha256}}
    measured = Measurements(rows[0].variant, final.scored, timed, memory, final.level)
    for row in rows:
        variant = row.variant
        own = {**row.own, "hashes": {**row.own["hashes"], "scenes": final.sha256}} if "hashes" in row.own else row.own
        record = measured_record(common | own, measured, variant, row.against, candidate.truthful, candidate.experiment)
        if record["role"] == "candidate" and choice.drop is not None:
            record["validation_drop_pct"] = choice.drop.value
        rises = _rises(candidate, final.scored[variant.name], final.scored[rows[0].variant.name])
        if variant.precision is Precision.INT8:
            if timed is None:
                record["notes"] += planned_shares(final.scored[variant.name]["executed"])
            planned = final.scored[variant.name].get("planned")
            record |= judged(record, evaluation.thresholds, recipe, rises, planned)
        elif record["role"] == "candidate":
            lost = candidate.trained[-1].reason if candidate.trained[-1].failed else None
            record |= judged_float(record, evaluation.thresholds, recipe, lost, rises)
        if (wrong := _wrong(candidate, variant, final)) is not None:
            say(f"warning: {record['model']}: {wrong}")
            record["notes"] = "; ".join(filter(None, (record["notes"], wrong)))
        if record["role"] == "candidate":
            record["wall_s"] = round(time.monotonic() - began, 1)
            notes = [record["notes"], clause(candidate.parts), final.note, *request.moves]
            record["notes"] = "; ".join(filter(None, notes)) or None
        validate(record)
        candidate.records.append(record)
    for record in candidate.records:
        write_record(root / "logs", record)
    say(f"{len(candidate.records)} records in {paths.shown(root / 'logs')}")
    return candidate


def _wrong(candidate: Candidate, variant: Variant, final: Final) -> str | None:
    """Returns a warning where the runtime computes a float precision wrongly, seen against f32 of the same network."""
    same = (v for v in candidate.variants if v.precision is Precision.F32 and v.hashes == variant.hashes)
    if (own := next(same, variant)) is variant:
        return None
    metric = candidate.experiment.metrics[candidate.metric]
    drop = drop_of(metric, final.scored[variant.name], final.scored[own.name], candidate.truthful)
    return wrongly_computed(str(variant.precision), drop)


def _rises(candidate: Candidate, mine: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[Rise]:
    """Returns the rises of the recorded metrics that are judged beside the main one, and where the recipe spares work
    the relative losses of the guard metrics.
    """
    evaluation, known = candidate.experiment.evaluation, candidate.experiment.metrics
    most, spares = evaluation.thresholds.guard_drop_pct, "T" in candidate.experiment.card.recipe
    guards = [
        Rise(name, "guard metric", drop_of(known[name], mine, teacher, candidate.truthful), most, " %")
        for name in evaluation.quality.metrics
        if spares and known[name].guard and name != candidate.metric
    ]
    return guards + [
        Rise(name, known[name].meaning, rise_of(name, mine, teacher), getattr(evaluation.thresholds, threshold))
        for name in evaluation.quality.metrics
        if (threshold := known[name].threshold) is not None
    ]


def _time(
    candidate: Candidate, final: Final, say: Callable[[str], None]
) -> tuple[dict[str, Any] | None, dict[str, dict[str, int | None]]]:
    """Returns interleaved samples and memory of every variant; None and {} where one of them is emulated."""
    if any(scores["measured"] == "emulated" for scores in final.scored.values()):
        say("this machine has no device for the backend: compiled and scored by emulation, not timed")
        return None, {}
    timed = candidate.time(candidate.variants)
    if timed["disturbed"]:
        say(warning(timed["disturbed"]))
    return timed, {v.name: stages.memory(candidate.ctx, candidate.experiment, v) for v in candidate.variants}


def _parts(candidate: Candidate) -> list[PartChange]:
    """Returns the changes by P and K, part by part, between the f32 engines of the Teacher and of the trained model."""
    hashes = candidate.onnx_float.hashes
    smaller = next(v for v in candidate.variants if v.precision is Precision.F32 and v.hashes == hashes)
    return changes(
        candidate.ctx,
        candidate.experiment,
        candidate.variants[0],
        smaller,
        candidate.teacher,
        candidate.trained[-1].model,
    )
