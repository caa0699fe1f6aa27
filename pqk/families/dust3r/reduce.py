"""Makes networks that do less work with the weights they have: letter T, see `pqk.families.reducing`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pqk.errors import PqkError
from pqk.families.dust3r.configs import read_config
from pqk.families.reducing import TAILS, folded

if TYPE_CHECKING:
    from torch import Tensor


def reduced(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], tail: str, tokens: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """See `ReducingPart`. A linear head has no tail.

    Of a quarter, `head.0` is folded for the resize before it and `head.2` for both; of a half, `head.2` alone.
    """
    before = read_config(config)
    if before.tail != 1:
        raise PqkError("the tail of this network is folded already")
    tail = tail if before.dpt is not None else "full"
    if tail == "full" and not tokens > 0:
        head = "a linear head has no tail to fold, and " if before.dpt is None else ""
        raise PqkError(f"nothing becomes less: {head}reduce.tokens is {tokens:g} and reduce.tail {tail}")
    new = {**config, "reduce": {"tail": tail, "tokens": tokens}}
    coarser = TAILS[tail]
    by = {"head.0.weight": max(1, coarser // 2), "head.2.weight": coarser}
    kept = dict(weights)
    for name in weights:
        for layer, factor in by.items():
            if name.endswith(f".dpt.{layer}"):
                kept[name] = folded(weights[name], factor)
    return new, kept


def keep(config: Mapping[str, Any]) -> tuple[str, ...]:
    """See `ReducingPart`: the resize of points and confidence at the end of a folded tail.

    Rounded to 8 bits they lose in chamfer and reprojection what AbsRel does not show. The other resizes of a head have
    names of their own.
    """
    return (r"decoder:/downstream_head\d/dpt/Resize(_\d+)?$",) if read_config(config).tail > 1 else ()
