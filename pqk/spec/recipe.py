"""Recipes: the ordered stages of an experiment, and which of them this version can run."""

from __future__ import annotations

from collections.abc import Sequence

from pqk.errors import NotBuilt, nearest

STAGES = {
    "P": "structured pruning",
    "K": "distillation",
    "Q": "quantization",
    "PQK": "joint pruning, quantization and distillation",
}
BUILT = ("P", "K", "Q")
"""Stages that this version can run."""


def check_stages(stages: Sequence[str]) -> tuple[str, ...]:
    """The stages as a tuple; ValueError when there is none, one is unknown or repeated, or PQK is not alone."""
    if not stages:
        raise ValueError("must hold at least one stage out of P, K, Q, PQK")
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"must hold stages out of P, K, Q, PQK, and {stage!r} is none{nearest(stage, STAGES)}")
    if len(set(stages)) != len(stages):
        raise ValueError("must hold each stage at most once")
    if "PQK" in stages and len(stages) > 1:
        raise ValueError("must hold PQK, the joint recipe, alone")
    return tuple(stages)


def combo_of(stages: Sequence[str]) -> str:
    """What the table calls a recipe: 'Q-only', 'K→Q', 'Joint PQK'."""
    if tuple(stages) == ("PQK",):
        return "Joint PQK"
    return f"{stages[0]}-only" if len(stages) == 1 else "→".join(stages)


def ensure_built(stages: Sequence[str], card_id: str) -> None:
    """Raise NotBuilt (exit code 3) naming the first stage of the card that this version cannot run."""
    for stage in stages:
        if stage not in BUILT:
            raise NotBuilt(
                f"card {card_id} needs stage {stage} ({STAGES[stage]}), which this version does not offer; "
                f"built: {', '.join(BUILT)}"
            )
