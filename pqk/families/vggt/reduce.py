"""Makes networks that do less work with the weights they have: letter T, see `pqk.families.reducing`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pqk.errors import PqkError
from pqk.families.reducing import TAILS, folded
from pqk.families.vggt.network.configs import read_config
from pqk.families.vggt.network.dpt import GRID

if TYPE_CHECKING:
    from torch import Tensor


def reduced(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], tail: str, tokens: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """See `ReducingPart`. The tails are those of the dense heads, which end at `patch_size` pixels to a patch.

    On half of the image's grid the last 3x3 convolution is folded for the resize before it; on a quarter also the one
    before, for the resize of the last fusion block.
    """
    before = read_config(config)
    if before.dpt.tail != 1:
        raise PqkError("the tail of this network is folded already")
    if tail == "full" and not tokens > 0:
        raise PqkError(f"nothing becomes less: reduce.tokens is {tokens:g} and reduce.tail {tail}")
    new = {**config, "reduce": {"tail": tail, "tokens": tokens}}
    coarser, grid = TAILS[tail], GRID // 2 if tail == "quarter" else GRID
    if coarser == 1:
        return new, dict(weights)
    by = {"output_conv1.weight": GRID / grid, "output_conv2.0.weight": before.patch_size / grid}
    kept = dict(weights)
    for head in ("depth_head", "point_head"):
        for layer, factor in by.items():
            name = f"{head}.scratch.{layer}"
            if name in kept:
                kept[name] = folded(kept[name], factor)
    return new, kept


def keep(config: Mapping[str, Any]) -> tuple[str, ...]:
    """See `ReducingPart`: the resize of depths, points and confidences at the end of a folded tail."""
    read = read_config(config)
    found = {"depth": read.depth_head, "points": read.point_head}
    return tuple(LAST_RESIZE[graph] for graph, has in found.items() if has) if read.dpt.tail > 1 else ()


LAST_RESIZE = {"depth": r"depth:/depth_head/Resize$", "points": r"points:/point_head/Resize$"}
"""Keep-list entries of the resize of a raw map: other resizes of a head stand in its fusion blocks."""
