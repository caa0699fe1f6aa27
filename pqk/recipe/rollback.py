"""What is tried next when a stage failed: the rollback table of the lab's schedule, as data and a pure function.

- Q, drop above its success line: the worst ranked nodes stay in float (without a ranking: the matmuls of attention,
  then the last layers of both heads); K before Q; 5 more epochs of QAT; P left out.
- P, no convergence: ρ = 0.1 with a shorter fine-tune; K after P, likewise; P left out.
- K, no convergence: half the β; a longer task phase; and where P comes before K, ρ = 0.1, then P left out.

A rung that does not apply, was tried, or does not fit into what is left of the hours, is passed over. The joint PQK has
no rung: its card falls back on the recipe in turns (F1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

KEEP_LIST, QAT_EPOCHS = "quant.ptq.keep_list", "quant.qat.epochs"
BETAS, TASK_SHARE = ("distill.loss.beta_start", "distill.loss.beta_end"), "distill.loss.task_share"
RHO, TUNE_EPOCHS = "prune.rho", "prune.train.epochs"

MOST_NODES, ENOUGH = (
    4,
    0.5,
)  # of a ranking: at most so many nodes, and no more once they make up this share of the error
LIGHT_RHO = 0.1
SHORTER = 2 / 3  # 15 epochs of fine-tuning become 10, the range of the schedule
MORE_EPOCHS = 5


@dataclass(frozen=True)
class Move:
    """A change, and why.

    settings: dotted names below quant, distill and prune, to lay over the card's. recipe: another one, or None.
    hours: an estimate from what the stages took so far; None is unknown. cost: what they are spent on.
    """

    name: str
    why: str
    settings: Mapping[str, Any]
    recipe: tuple[str, ...] | None
    hours: float | None
    cost: str

    def as_data(self) -> dict[str, Any]:
        """Plain data, for the run log."""
        return asdict(self)


@dataclass(frozen=True)
class State:
    """A failed stage, and what is known of it.

    stage: 'P', 'K', 'Q' or 'PQK'. trouble: one sentence with the numbers, such as `Stop.why` or a verdict's.
    settings: the values that the failed attempt ran with, by dotted name; a rung whose values are not among them does
    not apply. ranking: keep-list entries with their share of the quantization error (0..1). tried: names of the moves
    made so far. hours: what each stage took, by letter (an estimate for one that never ran, if there is any).
    hours_left: of the card's budget with its overrun. attention, last_layers: the family's keep-list entries of
    the matmuls of attention and of its last layers. trains: whether models of the family can be trained.
    """

    stage: str
    recipe: tuple[str, ...]
    trouble: str
    settings: Mapping[str, Any]
    ranking: tuple[tuple[str, float], ...] = ()
    tried: tuple[str, ...] = ()
    hours: Mapping[str, float] = field(default_factory=dict)
    hours_left: float = math.inf
    attention: str | None = None
    last_layers: str | None = None
    trains: bool = True


def next_move(state: State) -> Move | None:
    """The first rung of the table that applies, was not tried, and fits into the hours left; None when there is none.

    Pure: it changes nothing, and the same state gives the same move. Whoever makes the move adds its name to `tried`
    and lays its settings over the state's, so a chain of failures comes to an end.
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


def _keep_pattern(state: State, name: str, what: str, entry: str | None) -> Move | None:
    listed = state.settings.get(KEEP_LIST)
    if entry is None or listed is None or state.ranking or entry in listed:
        return None
    return _widened(state, name, what, [entry])


def _widened(state: State, name: str, what: str, entries: list[str]) -> Move:
    why = f"{state.trouble}; {what}, so they stay in float: {', '.join(entries)}"
    listed = [*state.settings[KEEP_LIST], *entries]
    return Move(name, why, {KEEP_LIST: listed}, None, state.hours.get("Q"), "quantization again; a slower engine")


def _distil_first(state: State) -> Move | None:
    if "K" in state.recipe or not state.trains:
        return None
    at = state.recipe.index("Q")
    recipe = (*state.recipe[:at], "K", *state.recipe[at:])
    why = (
        f"{state.trouble}; a distilled model has calmer activations: {_arrows(state.recipe)} becomes {_arrows(recipe)}"
    )
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
    settings, told, share = _shorter(state)
    why = f"{state.trouble}; rho goes from {rho:g} to {LIGHT_RHO:g}{told}"
    hours = _scaled_pruning(state, share)
    return Move("less-pruning", why, {RHO: LIGHT_RHO, **settings}, None, hours, "pruning and what follows it, again")


def _distil_after(state: State) -> Move | None:
    if "P" not in state.recipe or "K" in state.recipe:
        return None
    at = state.recipe.index("P") + 1
    recipe = (*state.recipe[:at], "K", *state.recipe[at:])
    settings, told, share = _shorter(state) if "less-pruning" not in state.tried else ({}, "", 1.0)
    why = f"{state.trouble}; distillation makes up for the pruning: {_arrows(recipe)}{told}"
    hours, distilling = _scaled_pruning(state, share), state.hours.get("K")
    total = None if hours is None or distilling is None else hours + distilling
    return Move("distil-after", why, settings, recipe, total, "a distillation, and what follows it again")


def _undo_pruning(state: State) -> Move | None:
    recipe = tuple(stage for stage in state.recipe if stage != "P")
    if not _pruned(state) or not recipe:  # P alone: without it nothing is left of the recipe
        return None
    why = f"{state.trouble}; the pruning is undone: {_arrows(state.recipe)} becomes {_arrows(recipe)}"
    hours = _together(state, *state.recipe[state.recipe.index("P") + 1 :])
    return Move("undo-pruning", why, {}, recipe, hours, "the stages behind it again, on the whole model")


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
    told = f"{100 * longer:g} % of the run instead of {100 * share:g} %"
    why = f"{state.trouble}; the phase that leans on the task lasts {told}"
    return Move("longer-task-phase", why, {TASK_SHARE: longer}, None, _from(state, "K"), "distillation again")


def _pruned(state: State) -> bool:
    """Whether the failed stage is P, or comes after it."""
    return "P" in state.recipe[: state.recipe.index(state.stage) + 1]


def _shorter(state: State) -> tuple[dict[str, Any], str, float]:
    """The settings of a shorter fine-tune, how to say it, and its share of the epochs."""
    epochs = state.settings.get(TUNE_EPOCHS)
    if epochs is None or epochs <= 1:
        return {}, "", 1.0
    fewer = max(1, math.ceil(epochs * SHORTER))
    return {TUNE_EPOCHS: fewer}, f", with {fewer} epochs of fine-tuning instead of {epochs}", fewer / epochs


def _together(state: State, *stages: str) -> float | None:
    """Hours of these stages; None when those of one are unknown."""
    known = [state.hours.get(stage) for stage in stages]
    return None if None in known else sum(hours for hours in known if hours is not None)


def _from(state: State, stage: str) -> float | None:
    """Hours of a stage and of those up to the failed one, which have to be made again behind it."""
    first, last = state.recipe.index(stage), state.recipe.index(state.stage)
    return _together(state, *state.recipe[first : last + 1])


def _scaled_pruning(state: State, share: float) -> float | None:
    """Hours of P, with its fine-tune scaled, and of the stages behind it up to the failed one."""
    hours, pruning = _from(state, "P"), state.hours.get("P")
    return None if hours is None or pruning is None else hours - (1 - share) * pruning


def _arrows(recipe: tuple[str, ...]) -> str:
    return "→".join(recipe)


TABLE: dict[str, tuple[Callable[[State], Move | None], ...]] = {
    "Q": (_keep_worst, _keep_attention, _keep_heads, _distil_first, _more_qat, _undo_pruning),
    "P": (_less_pruning, _distil_after, _undo_pruning),
    "K": (_smaller_beta, _longer_task_phase, _less_pruning, _undo_pruning),
    "PQK": (),
}
"""Stage -> rungs in order."""
