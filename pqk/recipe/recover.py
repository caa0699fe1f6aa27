"""Chooses the candidate of `pqk run` with the rollback table: a recipe that drops too much is made again, changed.

Everything is decided on validation samples; the caller scores the chosen attempt on test samples, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.base import Precision
from pqk.recipe.candidate import Made, Outcome, make
from pqk.recipe.experiment import Experiment
from pqk.recipe.ranking import can_rank, ranking
from pqk.recipe.request import Request
from pqk.recipe.rollback import BETAS, KEEP_LIST, QAT_EPOCHS, RHO, TASK_SHARE, TUNE_EPOCHS, State, next_move
from pqk.recipe.verdict import drop_limit
from pqk.record.runlog import RunLog
from pqk.settings.keep import keep_patterns
from pqk.stats.intervals import Interval
from pqk.store.store import OnEvent


def choose(
    request: Request,
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
    log: Path | None = None,
    known: dict[str, Any] | None = None,
    rollback: bool = True,
) -> tuple[Made, Request]:
    """Make a card's candidate; while a stage fails by its quality and the table has a move, make it again with that.

    The one way to a candidate: `pqk run`, `export`, `tune` and `ledger` all come here. rollback: False makes it once.

    Returns the attempt with the smallest drop on validation samples, of equal ones the first, and the request that made
    it, which names its moves. Attempts, moves and their cost are in logs/runs/CARD.jsonl. A model that no ground truth
    judges is made once. Raises what `pqk.recipe.candidate.make` raises.
    """
    best: tuple[Made, Request] | None = None
    tried: tuple[str, ...] = ()
    hours: dict[str, float] = {}  # of each stage, as it went last
    paid: dict[str, float] = {}  # by where it was made: a stage that two attempts share is paid for once
    while True:
        made = make(request, root, on_event, say, log, known)
        outcome = made.outcome
        if not (rollback and request.recipe and outcome.decides):
            return made, request
        if made.drop is None and not _stopped(outcome):
            made = replace(made, drop=outcome.drop(outcome.variants[-1]))
        failed, card = failed_stage(made), outcome.experiment.card
        best = _better(best, (made, request))
        history = RunLog(root, card.id)
        hours |= outcome.hours
        paid |= outcome.paid
        spent = sum(paid.values())
        history.append(
            "attempt",
            recipe=list(card.recipe),
            moves=list(tried),
            hours=spent,
            status="stopped" if _stopped(outcome) else "ok",
            **_told(made.drop),
        )
        if failed is None:
            return best
        budget = card.budget.gpu_hours * outcome.experiment.evaluation.stop_loss.gpu_hours_overrun_pct / 100
        settings, ranked = _settings(outcome.experiment), _ranked(made, failed[0], "keep-worst-nodes" in tried, say)
        part, trains = outcome.experiment.family.settings_part(), outcome.experiment.family.learning is not None
        known_of = (part.ATTENTION, part.LAST_LAYERS, trains)
        state = State(failed[0], card.recipe, failed[1], settings, ranked, tried, hours, budget - spent, *known_of)
        move = next_move(state)
        if move is None:
            say(f"{failed[1]}; the rollback table has no {'further ' if tried else ''}move for it")
            if _stopped(outcome):
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


def failed_stage(made: Made) -> tuple[str, str] | None:
    """The stage whose quality failed on validation samples, and one sentence with the numbers; None when none did.

    A stop-loss names its stage. A drop above the success line is the last stage's, or that of the float stage before
    it where the float model is above the line already.
    """
    outcome = made.outcome
    if _stopped(outcome):
        stage = outcome.trained[-1]
        return stage.method, str(stage.reason)
    recipe = outcome.experiment.card.recipe
    limit = drop_limit(recipe, outcome.experiment.evaluation.thresholds)
    if made.drop is None or made.drop.value <= limit:
        return None
    drop, last = made.drop.value, recipe[-1]
    if outcome.trained and outcome.lowered:
        plain = next(variant for variant in outcome.floats() if variant.precision is Precision.F32)
        before = outcome.drop(plain)
        if before is not None and before.value > limit:
            drop, last = before.value, outcome.trained[-1].method  # lost before anything was quantized
    return last, f"{last} ended with a drop of {drop:.2f} % on validation samples, above {limit:g} %"


def _stopped(outcome: Outcome) -> bool:
    return bool(outcome.trained) and outcome.trained[-1].failed


def _told(drop: Interval | None) -> dict[str, Any]:
    return {
        "validation_drop_pct": None if drop is None else drop.value,
        "interval": None if drop is None else drop.ends(),
    }


def _ranked(made: Made, stage: str, done: bool, say: Callable[[str], None]) -> tuple[tuple[str, float], ...]:
    """Keep-list entries of the worst nodes with their share of the quantization error, where stage Q is to blame.

    Empty where the backend cannot rank; not ranked again once the worst nodes are in float.
    """
    outcome = made.outcome
    if stage != "Q" or done or not can_rank(outcome.variants[-1].backend):
        return ()
    say("ranking the nodes of the quantized model on validation samples")
    rows = ranking(outcome)["nodes"]
    entries = [(keep_patterns([f"{row['graph']}:{node}" for node in row["nodes"]]), row["of_all"]) for row in rows]
    return tuple((patterns[0], share) for patterns, share in entries if len(patterns) == 1)


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


def _better(best: tuple[Made, Request] | None, other: tuple[Made, Request]) -> tuple[Made, Request]:
    """The one with the smaller drop; a stopped attempt loses to one that was finished."""

    def rank(made: Made) -> tuple[bool, float]:
        return _stopped(made.outcome), math.inf if made.drop is None else made.drop.value

    return other if best is None or rank(other[0]) < rank(best[0]) else best
