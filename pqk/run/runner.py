"""`pqk run CARD`: Teacher baselines, the recipe, and one record for each, on one backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.base import BackendError, Precision
from pqk import paths
from pqk.data.scene import open_scene
from pqk.errors import PqkError
from pqk.record.log import write_record
from pqk.record.schema import validate
from pqk.run import stages
from pqk.run.candidate import Outcome, make
from pqk.run.inputs import load_frames, scene_pairs
from pqk.run.parts import Bought, bought, clause
from pqk.run.prepare import Request
from pqk.run.records import Measurements, judged, judged_float, measured_record, planned_shares, write_failure
from pqk.run.store import OnEvent
from pqk.run.worker import WorkerCrashed


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
    made = make(request, root, on_event, say, log, known)
    outcome, rows, scored = made.outcome, made.rows, made.scored
    evaluation, recipe = outcome.experiment.evaluation, outcome.experiment.card.recipe if request.recipe else ()
    timed, memory = _time(outcome, scored, say)
    if outcome.trained:
        outcome = replace(outcome, parts=_parts(outcome))

    measured = Measurements(rows[0].variant, scored, timed, memory)
    for row in rows:
        variant, metrics = row.variant, evaluation.quality.metrics
        record = measured_record(made.common | row.own, measured, variant, row.against, outcome.truthful, metrics)
        if variant.precision is Precision.INT8:
            if timed is None:
                record["notes"] += planned_shares(scored[variant.name]["executed"])
            record |= judged(record, evaluation.thresholds, recipe)
        elif record["role"] == "candidate":
            lost = outcome.trained[-1].reason if outcome.trained[-1].failed else None
            record |= judged_float(record, evaluation.thresholds, recipe, lost)
        if record["role"] == "candidate":
            record["wall_s"] = round(time.monotonic() - began, 1)
            told = [record["notes"], clause(outcome.parts), *request.moves]
            record["notes"] = "; ".join(filter(None, told)) or None
        validate(record)
        outcome.records.append(record)
    for record in outcome.records:
        write_record(root / "logs", record)
    say(f"{len(outcome.records)} records in {paths.shown(root / 'logs')}")
    return outcome


def _time(
    outcome: Outcome, scored: Mapping[str, Mapping[str, Any]], say: Callable[[str], None]
) -> tuple[dict[str, Any] | None, dict[str, int]]:
    """Interleaved samples and peak memory of every variant; None and nothing where one of them is emulated."""
    if any(scores["measured"] == "emulated" for scores in scored.values()):
        say("no device of this backend here: compiled and scored by emulation, not timed")
        return None, {}
    scenes, experiment, scoring = outcome.scenes, outcome.experiment, outcome.scoring
    height, width = scoring["shape"]
    frames = load_frames(open_scene(scenes.folders[0]), height, width, views=scoring["views"])
    pairs = scene_pairs(frames, experiment.workload.pair_graph, experiment.workload.min_covisibility, outcome.truthful)
    asked = {
        "shape": scoring["shape"],
        "views": scoring["views"],
        "pairs": [list(p) for p in pairs],
        "efficiency": experiment.evaluation.efficiency.model_dump(mode="json"),
    }
    timed = stages.timing(outcome.ctx, outcome.variants, scenes.folders[0], scenes.sha256, asked)["variants"]
    return timed, {v.name: stages.memory(outcome.ctx, v) for v in outcome.variants}


def _parts(outcome: Outcome) -> list[Bought]:
    """What P and K bought, part by part, between the f32 engines of the Teacher and of the trained model."""
    hashes = outcome.onnx_float.hashes
    smaller = next(v for v in outcome.variants if v.precision is Precision.F32 and v.hashes == hashes)
    return bought(outcome.ctx, outcome.variants[0], smaller, outcome.teacher, outcome.trained[-1].model)
