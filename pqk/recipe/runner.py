"""`pqk run CARD`: makes the candidate, scores it and its baselines on test samples once, times them, writes records."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.base import BackendError, Precision
from pqk import paths
from pqk.errors import PqkError
from pqk.measure.noise import warning
from pqk.measure.scores import rise_of
from pqk.recipe import stages
from pqk.recipe.block_profile import Bought, bought, clause
from pqk.recipe.candidate import Made, Outcome
from pqk.recipe.columns import Measurements, judged, judged_float, measured_record, planned_shares, write_failure
from pqk.recipe.final import Final, check_decide, score_final
from pqk.recipe.recover import choose
from pqk.recipe.request import Request, asked_experiment
from pqk.recipe.verdict import Rise
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
) -> Outcome:
    """Run a card. Its records are validated and written to logs/.

    `log`: a file that the caller will write the candidate's record to, or without a recipe all of them; refused before
    the long stages when it holds another one. rollback: let the rollback table act on a recipe that drops too much.
    decide: add test scenes, up to so many, until the interval of the drop lies on one side of its limit.

    Where the engines are emulated nothing is timed: those columns are null.
    Raises PqkError or BackendError for everything that a user can correct, and WorkerCrashed for a defect. When that
    comes out of the stages, after all that was asked was looked at, it leaves a record of the failure in logs/.
    """
    began = time.monotonic()
    known: dict[str, Any] = {}
    if decide is not None:
        check_decide(request, asked_experiment(request, root))
    try:
        made, request = choose(request, root, on_event, say, log, known, rollback)
        return _measured(made, request, root, say, decide, began)
    except (PqkError, BackendError, WorkerCrashed) as error:
        if known and write_failure(root / "logs", known, error):
            say(f"a record of the failure is in {paths.shown(root / 'logs')}")
        raise


def _measured(
    made: Made, request: Request, root: Path, say: Callable[[str], None], decide: int | None, began: float
) -> Outcome:
    """The outcome with its records: test samples are scored here, and nowhere before."""
    outcome, rows = made.outcome, made.rows
    evaluation, recipe = outcome.experiment.evaluation, outcome.experiment.card.recipe if request.recipe else ()
    final = score_final(outcome, request, root, recipe, decide, say)
    timed, memory = _time(outcome, final, say)
    if outcome.trained:
        outcome = replace(outcome, parts=_parts(outcome))

    common = made.common | {"hashes": made.common["hashes"] | {"scenes": final.sha256}}
    measured = Measurements(rows[0].variant, final.scored, timed, memory, final.level)
    for row in rows:
        variant = row.variant
        own = {**row.own, "hashes": {**row.own["hashes"], "scenes": final.sha256}} if "hashes" in row.own else row.own
        record = measured_record(common | own, measured, variant, row.against, outcome.truthful, outcome.experiment)
        if record["role"] == "candidate" and made.drop is not None:
            record["validation_drop_pct"] = made.drop.value
        rises = _rises(outcome, final.scored[variant.name], final.scored[rows[0].variant.name])
        if variant.precision is Precision.INT8:
            if timed is None:
                record["notes"] += planned_shares(final.scored[variant.name]["executed"])
            record |= judged(record, evaluation.thresholds, recipe, rises)
        elif record["role"] == "candidate":
            lost = outcome.trained[-1].reason if outcome.trained[-1].failed else None
            record |= judged_float(record, evaluation.thresholds, recipe, lost, rises)
        if record["role"] == "candidate":
            record["wall_s"] = round(time.monotonic() - began, 1)
            told = [record["notes"], clause(outcome.parts), final.note, *request.moves]
            record["notes"] = "; ".join(filter(None, told)) or None
        validate(record)
        outcome.records.append(record)
    for record in outcome.records:
        write_record(root / "logs", record)
    say(f"{len(outcome.records)} records in {paths.shown(root / 'logs')}")
    return outcome


def _rises(outcome: Outcome, mine: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[Rise]:
    """Of the metrics that are recorded, those that are judged beside the main one."""
    evaluation, known = outcome.experiment.evaluation, outcome.experiment.metrics
    return [
        Rise(name, known[name].meaning, rise_of(name, mine, teacher), getattr(evaluation.thresholds, threshold))
        for name in evaluation.quality.metrics
        if (threshold := known[name].threshold) is not None
    ]


def _time(
    outcome: Outcome, final: Final, say: Callable[[str], None]
) -> tuple[dict[str, Any] | None, dict[str, dict[str, int | None]]]:
    """Interleaved samples and memory of every variant; None and nothing where one of them is emulated."""
    if any(scores["measured"] == "emulated" for scores in final.scored.values()):
        say("no device of this backend here: compiled and scored by emulation, not timed")
        return None, {}
    timed = outcome.time(outcome.variants)
    if timed["disturbed"]:
        say(warning(timed["disturbed"]))
    return timed, {v.name: stages.memory(outcome.ctx, outcome.experiment, v) for v in outcome.variants}


def _parts(outcome: Outcome) -> list[Bought]:
    """What P and K bought, part by part, between the f32 engines of the Teacher and of the trained model."""
    hashes = outcome.onnx_float.hashes
    smaller = next(v for v in outcome.variants if v.precision is Precision.F32 and v.hashes == hashes)
    return bought(
        outcome.ctx, outcome.experiment, outcome.variants[0], smaller, outcome.teacher, outcome.trained[-1].model
    )
