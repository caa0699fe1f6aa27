"""Chooses the candidate of `pqk run` with the rollback table: a recipe that drops too much is changed and made again.

All decisions use validation samples; the caller scores the chosen attempt on test samples, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.base import Precision
from pqk.recipe.candidate import Candidate, Choice, make
from pqk.recipe.experiment import Experiment
from pqk.recipe.ranking import can_rank, ranking
from pqk.recipe.request import Request
from pqk.recipe.rollback import (
    BETAS,
    KEEP_LIST,
    QAT_EPOCHS,
    RHO,
    TAIL,
    TASK_SHARE,
    TOKENS,
    TUNE_EPOCHS,
    State,
    next_move,
)
from pqk.recipe.verdict import drop_limit
from pqk.record.runlog import RunLog
from pqk.result import note
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
) -> tuple[Choice, Request]:
    """Makes a card's candidate; while a stage fails by quality and the table has a move, makes it again with that.

    `pqk run`, `export`, `tune` and `ledger` all get their candidate from this function. rollback: False makes it once.

    Returns the attempt with the smallest drop on validation samples (the first of equal ones), and its request, which
    names its moves. Attempts, moves and their cost are in logs/runs/CARD.jsonl. A model that is not judged by ground
    truth is made once. Raises the same errors as `pqk.recipe.candidate.make`.
    """
    note(stopped=None)
    best: tuple[Choice, Request] | None = None
    tried: tuple[str, ...] = ()
    hours: dict[str, float] = {}  # of each stage, in its last attempt
    paid: dict[str, float] = {}  # by path of the artifact: a stage that two attempts share counts once
    while True:
        choice = make(request, root, on_event, say, log, known)
        candidate = choice.candidate
        if not (rollback and request.recipe and candidate.decides):
            return choice, request
        if choice.drop is None and not _stopped(candidate):
            choice = replace(choice, drop=candidate.drop(candidate.variants[-1]))
        failed, card = failed_stage(choice), candidate.experiment.card
        best = _better(best, (choice, request))
        history = RunLog(root, card.id)
        hours |= candidate.hours
        paid |= candidate.paid
        spent = sum(paid.values())
        history.append(
            "attempt",
            recipe=list(card.recipe),
            moves=list(tried),
            hours=spent,
            status="stopped" if _stopped(candidate) else "ok",
            **_drop_data(choice.drop),
        )
        if failed is None:
            return best
        budget = card.budget.gpu_hours * candidate.experiment.evaluation.stop_loss.gpu_hours_overrun_pct / 100
        settings, ranked = _settings(candidate.experiment), _ranked(choice, failed[0], "keep-worst-nodes" in tried, say)
        part, trains = candidate.experiment.family.settings_part(), candidate.experiment.family.learning is not None
        known_of = (part.ATTENTION, part.LAST_LAYERS, trains)
        state = State(failed[0], card.recipe, failed[1], settings, ranked, tried, hours, budget - spent, *known_of)
        move = next_move(state)
        if move is None:
            say(f"{failed[1]}; the rollback table has no {'further ' if tried else ''}move for it")
            if _stopped(candidate):
                history.append("stop", why=failed[1])
                note(stopped=failed[1])
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


def failed_stage(choice: Choice) -> tuple[str, str] | None:
    """Returns the stage whose quality failed on validation samples, and one sentence with the numbers, or None.

    A stop-loss rule names its stage. For a drop above the success line it is the last stage, or the float stage before
    it where the float model is already above the line.
    """
    candidate = choice.candidate
    if _stopped(candidate):
        stage = candidate.trained[-1]
        return stage.method, str(stage.reason)
    recipe = candidate.experiment.card.recipe
    limit = drop_limit(recipe, candidate.experiment.evaluation.thresholds)
    if choice.drop is None or choice.drop.value <= limit:
        return None
    drop, last = choice.drop.value, recipe[-1]
    if candidate.trained and candidate.lowered:
        plain = next(variant for variant in candidate.floats() if variant.precision is Precision.F32)
        before = candidate.drop(plain)
        if before is not None and before.value > limit:
            drop, last = before.value, candidate.trained[-1].method  # lost before anything was quantized
    return last, f"{last} ended with a drop of {drop:.2f} % on validation samples, above {limit:g} %"


def _stopped(candidate: Candidate) -> bool:
    return bool(candidate.trained) and candidate.trained[-1].failed


def _drop_data(drop: Interval | None) -> dict[str, Any]:
    """Returns a drop and its interval for the run log."""
    return {
        "validation_drop_pct": None if drop is None else drop.value,
        "interval": None if drop is None else drop.ends(),
    }


def _ranked(choice: Choice, stage: str, done: bool, say: Callable[[str], None]) -> tuple[tuple[str, float], ...]:
    """Returns keep-list entries of the worst nodes with their share of the quantization error, where stage Q failed.

    Empty for other stages and where the backend cannot rank. done: the worst nodes are already in float, and are not
    ranked again.
    """
    candidate = choice.candidate
    if stage != "Q" or done or not can_rank(candidate.variants[-1].backend):
        return ()
    say("ranking the nodes of the quantized model on validation samples")
    rows = ranking(candidate)["nodes"]
    entries = [(keep_patterns([f"{row['graph']}:{node}" for node in row["nodes"]]), row["of_all"]) for row in rows]
    return tuple((patterns[0], share) for patterns, share in entries if len(patterns) == 1)


def _settings(found: Experiment) -> Mapping[str, Any]:
    """Returns the values that the table may change, as this attempt used them."""
    loss = found.distill.loss
    return {
        KEEP_LIST: list(found.quant.ptq.keep_list),
        QAT_EPOCHS: found.quant.qat.epochs,
        BETAS[0]: loss.beta_start,
        BETAS[1]: loss.beta_end,
        TASK_SHARE: loss.task_share,
        RHO: found.prune.rho,
        TUNE_EPOCHS: found.prune.train.epochs,
        TOKENS: found.reduce.tokens,
        TAIL: found.reduce.tail,
    }


def _better(best: tuple[Choice, Request] | None, other: tuple[Choice, Request]) -> tuple[Choice, Request]:
    """Returns the attempt with the smaller drop; a stopped attempt loses to a finished one."""

    def rank(choice: Choice) -> tuple[bool, float]:
        return _stopped(choice.candidate), math.inf if choice.drop is None else choice.drop.value

    return other if best is None or rank(other[0]) < rank(best[0]) else best
