"""Chooses the next move after a failed stage: the rollback table of the lab's schedule, as data and a pure function.

- Q, drop above its success line: the worst ranked nodes stay in float (without a ranking: the matmuls of attention,
  then the last layers of both heads); K before Q; 5 more epochs of QAT; P left out.
- P, no convergence: ρ = 0.1 with a shorter fine-tuning; K after P, also with a shorter fine-tuning; P left out.
- T, drop above the line: three fifths of the merged tokens, then none; the tail on half of the grid.
- K, no convergence: half the β; a longer task phase; and where P comes before K, ρ = 0.1, then P left out.

A rung is skipped when it does not apply, was already tried, or needs more hours than are left. The joint PQK has no
rung: its card falls back on the recipe with separate stages (F1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

KEEP_LIST, QAT_EPOCHS = "quant.ptq.keep_list", "quant.qat.epochs"
BETAS, TASK_SHARE = ("distill.loss.beta_start", "distill.loss.beta_end"), "distill.loss.task_share"
TOKENS, TAIL = "reduce.tokens", "reduce.tail"
RHO, TUNE_EPOCHS = "prune.rho", "prune.train.epochs"

MOST_NODES = 4  # of a ranking, that one move keeps in float
ENOUGH = 0.5  # share of the quantization error: no more nodes are added when the chosen ones cause so much
LIGHT_RHO = 0.1
SHORTER = 2 / 3  # 15 epochs of fine-tuning become 10, the range of the schedule
MORE_EPOCHS = 5
FEWER_TOKENS = 0.6


@dataclass(frozen=True)
class Move:
    """A change of a recipe or of its settings, and the reason.

    settings: dotted names below quant, distill and prune, to be applied after the card's. recipe: another one, or None.
    hours: an estimate from the hours of the stages so far; None is unknown. cost: the work in these hours.
    """

    name: str
    why: str
    settings: Mapping[str, Any]
    recipe: tuple[str, ...] | None
    hours: float | None
    cost: str

    def as_data(self) -> dict[str, Any]:
        """Returns the move as plain data, for the run log."""
        return asdict(self)


@dataclass(frozen=True)
class State:
    """A failed stage with everything that the table needs for a move.

    stage: 'P', 'K', 'T', 'Q' or 'PQK'. trouble: one sentence with the numbers, such as `Stop.why` or a verdict's.
    settings: the values of the failed attempt, by dotted name; a rung whose values are not among them does not apply.
    ranking: keep-list entries with their share of the quantization error (0..1). tried: names of the moves made so
    far. hours: of each stage, by letter (an estimate for a stage that never ran, if there is one). hours_left: of the
    card's budget with its overrun. attention, last_layers: the family's keep-list entries of the matmuls of attention
    and of its last layers. trains: whether models of the family can be trained.
    """

    stage: str
    recipe: tuple[str, ...]
    trouble: str
    settings: Mapping[str, Any]
    ranking: tuple[tuple[str, float], ...] = ()
    tried: tuple[str, ...] = ()
    hours: Mapping[str, float] = field(default_factory=dict)
    hours_left: float = math.inf
    attention: Sequence[str] = ()
    last_layers: Sequence[str] = ()
    trains: bool = True


def next_move(state: State) -> Move | None:
    """Returns the first move of the table that applies, was not tried, and fits into the hours left, or None.

    A pure function: it changes nothing, and the same state gives the same move. The caller adds the move's name to
    `tried` and applies its settings to the state's, so a chain of failures ends.
    """
    if state.hours_left <= 0:
        return None
    for rung in TABLE.get(state.stage, ()):
        move = rung(state)
        if move is None or move.name in state.tried:
            continue
        if move.hours is None or move.hours <= state.hours_left:
            return move
    return None


def _keep_worst(state: State) -> Move | None:
    listed = state.settings.get(KEEP_LIST)
    if listed is None:
        return None
    chosen: list[str] = []
    covered = 0.0
    for entry, share in sorted(state.ranking, key=lambda row: -row[1]):
        if share <= 0 or covered >= ENOUGH or len(chosen) == MOST_NODES:
            break
        if entry not in listed:
            chosen.append(entry)
            covered += share
    if not chosen:
        return None
    what = f"the {len(chosen)} worst ranked nodes cause {100 * covered:.0f} % of the quantization error"
    return _widened(state, "keep-worst-nodes", what, chosen)


def _keep_attention(state: State) -> Move | None:
    return _keep_pattern(state, "keep-attention", "the matmuls of attention are the most sensitive", state.attention)


def _keep_heads(state: State) -> Move | None:
    return _keep_pattern(state, "keep-heads", "errors of the last layers reach the outputs undamped", state.last_layers)


def _keep_pattern(state: State, name: str, what: str, entries: Sequence[str]) -> Move | None:
    listed = state.settings.get(KEEP_LIST)
    if listed is None or state.ranking:
        return None
    fresh = [entry for entry in entries if entry not in listed]
    return _widened(state, name, what, fresh) if fresh else None


def _widened(state: State, name: str, what: str, entries: list[str]) -> Move:
    why = f"{state.trouble}; {what}, so they stay in float: {', '.join(entries)}"
    listed = [*state.settings[KEEP_LIST], *entries]
    return Move(name, why, {KEEP_LIST: listed}, None, state.hours.get("Q"), "quantization again; a slower engine")


def _distil_first(state: State) -> Move | None:
    if "K" in state.recipe or not state.trains:
        return None
    at = next(index for index, stage in enumerate(state.recipe) if stage in ("T", "Q"))
    recipe = (*state.recipe[:at], "K", *state.recipe[at:])
    change = f"{_arrows(state.recipe)} becomes {_arrows(recipe)}"
    why = f"{state.trouble}; a distilled model has less extreme activations: {change}"
    return Move("distil-first", why, {}, recipe, _together(state, "K", "Q"), "distillation, and quantization again")


def _more_qat(state: State) -> Move | None:
    epochs = state.settings.get(QAT_EPOCHS)
    if epochs is None or not state.trains:
        return None
    more, hours = epochs + MORE_EPOCHS, state.hours.get("Q")
    why = f"{state.trouble}; QAT gets {more} epochs instead of {epochs}"
    cost = f"QAT again, {MORE_EPOCHS} epochs longer"
    return Move("longer-qat", why, {QAT_EPOCHS: more}, None, None if hours is None else hours * more / epochs, cost)


def _less_pruning(state: State) -> Move | None:
    rho = state.settings.get(RHO)
    if rho is None or rho <= LIGHT_RHO or not _pruned(state):
        return None
    settings, text, share = _shorter(state)
    why = f"{state.trouble}; rho goes from {rho:g} to {LIGHT_RHO:g}{text}"
    hours = _scaled_pruning(state, share)
    return Move(
        "less-pruning", why, {RHO: LIGHT_RHO, **settings}, None, hours, "pruning and the stages after it, again"
    )


def _distil_after(state: State) -> Move | None:
    if "P" not in state.recipe or "K" in state.recipe:
        return None
    at = state.recipe.index("P") + 1
    recipe = (*state.recipe[:at], "K", *state.recipe[at:])
    settings, text, share = _shorter(state) if "less-pruning" not in state.tried else ({}, "", 1.0)
    why = f"{state.trouble}; distillation makes up for the pruning: {_arrows(recipe)}{text}"
    hours, distilling = _scaled_pruning(state, share), state.hours.get("K")
    total = None if hours is None or distilling is None else hours + distilling
    return Move("distil-after", why, settings, recipe, total, "distillation, and the stages after it again")


def _undo_pruning(state: State) -> Move | None:
    recipe = tuple(stage for stage in state.recipe if stage != "P")
    if not _pruned(state) or not recipe:  # P alone: without it nothing is left of the recipe
        return None
    why = f"{state.trouble}; the pruning is undone: {_arrows(state.recipe)} becomes {_arrows(recipe)}"
    hours = _together(state, *state.recipe[state.recipe.index("P") + 1 :])
    return Move("undo-pruning", why, {}, recipe, hours, "the stages after it again, on the unpruned model")


def _smaller_beta(state: State) -> Move | None:
    old = [float(state.settings.get(name) or 0) for name in BETAS]
    if not all(beta > 0 for beta in old):
        return None
    new = [beta / 2 for beta in old]
    why = (
        f"{state.trouble}; beta is halved, from {old[0]:g} rising to {old[1]:g}, to {new[0]:g} rising to {new[1]:g}, "
        "so that the task weighs more"
    )
    return Move("smaller-beta", why, dict(zip(BETAS, new, strict=True)), None, _from(state, "K"), "distillation again")


def _longer_task_phase(state: State) -> Move | None:
    share = state.settings.get(TASK_SHARE)
    if share is None or share >= 1:
        return None
    longer = round((1 + share) / 2, 4)
    why = f"{state.trouble}; the task phase lasts {100 * longer:g} % of the run instead of {100 * share:g} %"
    return Move("longer-task-phase", why, {TASK_SHARE: longer}, None, _from(state, "K"), "distillation again")


def _fewer_merged(state: State) -> Move | None:
    tokens = float(state.settings.get(TOKENS) or 0)
    fewer = round(FEWER_TOKENS * tokens, 4)
    return _spared_less(state, "fewer-merged", TOKENS, f"{tokens:g}", fewer) if tokens else None


def _none_merged(state: State) -> Move | None:
    tokens = float(state.settings.get(TOKENS) or 0)
    if not tokens or state.settings.get(TAIL) == "full":  # of T nothing would be left
        return None
    return _spared_less(state, "none-merged", TOKENS, f"{tokens:g}", 0.0)


def _finer_tail(state: State) -> Move | None:
    return _spared_less(state, "finer-tail", TAIL, "quarter", "half") if state.settings.get(TAIL) == "quarter" else None


def _spared_less(state: State, name: str, setting: str, old: str, new: float | str) -> Move:
    why = f"{state.trouble}; {setting} goes from {old} to {new}"
    first = "K" if setting == TOKENS and "K" in state.recipe else "T"  # the student learns with its tokens merged
    return Move(name, why, {setting: new}, None, _from(state, first), "the stages after it again; a slower engine")


def _pruned(state: State) -> bool:
    """Returns whether the failed stage is P or comes after P."""
    return "P" in state.recipe[: state.recipe.index(state.stage) + 1]


def _shorter(state: State) -> tuple[dict[str, Any], str, float]:
    """Returns the settings of a shorter fine-tuning, its description for the reason, and its share of the epochs."""
    epochs = state.settings.get(TUNE_EPOCHS)
    if epochs is None or epochs <= 1:
        return {}, "", 1.0
    fewer = max(1, math.ceil(epochs * SHORTER))
    return {TUNE_EPOCHS: fewer}, f", with {fewer} epochs of fine-tuning instead of {epochs}", fewer / epochs


def _together(state: State, *stages: str) -> float | None:
    """Returns the hours of these stages together; None when those of one are unknown."""
    known = [state.hours.get(stage) for stage in stages]
    return None if None in known else sum(hours for hours in known if hours is not None)


def _from(state: State, stage: str) -> float | None:
    """Returns the hours of a stage and of the stages up to the failed one, which must be made again after it."""
    first, last = state.recipe.index(stage), state.recipe.index(state.stage)
    return _together(state, *state.recipe[first : last + 1])


def _scaled_pruning(state: State, share: float) -> float | None:
    """Returns the hours of P with its fine-tuning scaled, and of the stages after it up to the failed one."""
    hours, pruning = _from(state, "P"), state.hours.get("P")
    return None if hours is None or pruning is None else hours - (1 - share) * pruning


def _arrows(recipe: tuple[str, ...]) -> str:
    return "→".join(recipe)


TABLE: dict[str, tuple[Callable[[State], Move | None], ...]] = {
    "Q": (_keep_worst, _keep_attention, _keep_heads, _distil_first, _more_qat, _undo_pruning),
    "P": (_less_pruning, _distil_after, _undo_pruning),
    "K": (_smaller_beta, _longer_task_phase, _less_pruning, _undo_pruning),
    "T": (_fewer_merged, _none_merged, _finer_tail),
    "PQK": (),
}
"""The rungs of each stage, in order."""
