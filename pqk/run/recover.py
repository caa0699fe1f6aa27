"""`pqk run` with the rollback table: a recipe that failed by its quality is run again with the table's next move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.base import Precision
from pqk.run.candidate import Outcome
from pqk.run.prepare import Request
from pqk.run.rollback import BETAS, KEEP_LIST, QAT_EPOCHS, RHO, TASK_SHARE, TUNE_EPOCHS, State, next_move
from pqk.run.runlog import RunLog
from pqk.run.runner import run
from pqk.run.store import OnEvent
from pqk.run.verdict import drop_limit
from pqk.spec.card import Experiment


def run_with_rollback(
    request: Request, root: Path, on_event: OnEvent, say: Callable[[str], None], log: Path | None = None
) -> Outcome:
    """Run a card; while a stage fails by its quality and the table has a move, make it and run again.

    Every attempt leaves its records; those of a later one tell its moves in their notes. Attempts, moves and their cost
    are also in logs/runs/CARD.jsonl. Only drops against ground truth count: a model without one is run once. Returns
    the attempt with the smallest drop, of equal ones the first. Raises what `pqk.run.runner.run` raises.
    """
    best: Outcome | None = None
    tried: tuple[str, ...] = ()
    hours: dict[str, float] = {}  # of each stage, as it went last
    paid: dict[str, float] = {}  # by where it was made: a stage that two attempts share is paid for once
    while True:
        outcome = run(request, root, on_event, say, log)
        experiment, record, failed = outcome.experiment, outcome.records[-1], failed_stage(outcome)
        card, best = experiment.card, _better(best, outcome)
        history = RunLog(root, card.id)
        hours |= outcome.hours
        paid |= outcome.paid
        spent = sum(paid.values())
        history.append(
            "attempt",
            recipe=list(card.recipe),
            moves=list(tried),
            hours=spent,
            **{name: record[name] for name in ("status", "verdict", "quality_drop_pct", "wall_s")},
        )
        if failed is None or not outcome.truthful:
            return best
        budget = card.budget.gpu_hours * experiment.evaluation.stop_loss.gpu_hours_overrun_pct / 100
        state = State(failed[0], card.recipe, failed[1], _settings(experiment), (), tried, hours, budget - spent)
        move = next_move(state)
        if move is None:
            say(f"{failed[1]}; the rollback table has no {'further ' if tried else ''}move for it")
            if record["status"] == "stopped":
                history.append("stop", why=failed[1])
            return best
        history.append("move", **move.as_data())
        say(f"rollback {move.name}: {move.why} (cost: {move.cost})")
        tried += (move.name,)
        request = replace(
            request,
            settings={**request.settings, **move.settings},
            stages=move.recipe or request.stages,
            moves=(*request.moves, f"rollback {move.name}: {move.why}"),
        )


def failed_stage(outcome: Outcome) -> tuple[str, str] | None:
    """The stage whose quality failed, and one sentence with the numbers; None when none did.

    A stop-loss names its stage. A drop above the success line is the last stage's, or that of the float stage before
    it where the float model is above the line already.
    """
    record, recipe = outcome.records[-1], outcome.experiment.card.recipe
    if record["status"] == "stopped":
        stage = outcome.trained[-1]
        return stage.method, str(stage.reason)
    limit = drop_limit(recipe, outcome.experiment.evaluation.thresholds)
    drop = record["quality_drop_pct"]
    if drop is None or drop <= limit:
        return None
    floats = [r["quality_drop_pct"] for _, r in outcome.floats() if r["precision"] == str(Precision.F32)]
    if outcome.trained and floats and floats[0] is not None and floats[0] > limit:
        drop, last = floats[0], outcome.trained[-1].method  # lost before anything was quantized
    else:
        last = recipe[-1]
    return last, f"{last} ended with a drop of {drop:.2f} %, above {limit:g} %"


def _settings(found: Experiment) -> Mapping[str, Any]:
    """The values that the table may change, as this attempt had them."""
    loss = found.distill.loss
    return {
        KEEP_LIST: list(found.quant.ptq.keep_list),
        QAT_EPOCHS: found.quant.qat.epochs,
        BETAS[0]: loss.beta_start,
        BETAS[1]: loss.beta_end,
        TASK_SHARE: loss.task_share,
        RHO: found.prune.rho,
        TUNE_EPOCHS: found.prune.train.epochs,
    }


def _better(best: Outcome | None, other: Outcome) -> Outcome:
    """The one with the smaller drop; a stopped attempt loses to one that was finished."""

    def rank(outcome: Outcome) -> tuple[bool, float]:
        record = outcome.records[-1]
        drop = record["quality_drop_pct"]
        return record["status"] != "ok", math.inf if drop is None else drop

    return other if best is None or rank(other) < rank(best) else best
