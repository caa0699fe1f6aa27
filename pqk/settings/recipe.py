"""Defines recipes, the ordered stages of an experiment: `check_stages`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pqk.errors import nearest

STAGES = {
    "P": "structured pruning",
    "K": "distillation",
    "T": "less work without training",
    "Q": "quantization",
    "PQK": "joint pruning, quantization and distillation",
}
JOINT = ("PQK",)
"""The joint recipe; it has no other stages."""
_LATE = {
    "T": "P and K train the network that then does less work",
    "Q": "nothing changes a network that is quantized",
}
"""Stages that P and K, and for Q also T, must come before, and why."""


def check_stages(stages: Sequence[str]) -> tuple[str, ...]:
    """Returns the stages as a tuple.

    Raises ValueError without any, for an unknown or repeated one, for PQK with others, and for one in the wrong place.
    """
    if not stages:
        raise ValueError(f"must hold at least one stage out of {', '.join(STAGES)}")
    for stage in stages:
        if stage not in STAGES:
            known = ", ".join(STAGES)
            raise ValueError(f"must hold stages out of {known}, and {stage!r} is not one{nearest(stage, STAGES)}")
    if len(set(stages)) != len(stages):
        raise ValueError("must hold each stage at most once")
    if "PQK" in stages and len(stages) > 1:
        raise ValueError("must hold PQK, the joint recipe, alone")
    order = list(STAGES)
    for first, then in pairwise(stages):
        if first in _LATE and order.index(then) < order.index(first):
            raise ValueError(f"must hold {then} before {first}: {_LATE[first]}")
    return tuple(stages)


def combo_of(stages: Sequence[str]) -> str:
    """Returns the name of a recipe in tables: 'Q-only', 'K→Q', 'Joint PQK'."""
    if tuple(stages) == JOINT:
        return "Joint PQK"
    return f"{stages[0]}-only" if len(stages) == 1 else "→".join(stages)


def quantizes(stages: Sequence[str]) -> bool:
    """Returns whether a recipe ends in a quantized model."""
    return "Q" in stages or tuple(stages) == JOINT
