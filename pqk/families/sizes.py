"""Reads the sizes in a network's configuration: counts, lists of widths, blocks of a stack, for every family.

`of` is how messages call the configuration, such as 'dust3r configuration'. All raise PqkError naming the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pqk.errors import PqkError, nearest

LARGEST, DEEPEST = 2**18, 1024
"""Upper bounds of a width or head count, and of the blocks of a stack: far above every known network."""


@dataclass(frozen=True)
class BlockSize:
    """Sizes of one transformer block: attention heads, width of one head, hidden width of the MLP."""

    heads: int
    head_dim: int
    ffn: int


def known(of: str, given: Any, allowed: Sequence[str], part: str = "") -> dict[str, Any]:
    """Returns a mapping whose keys are all allowed; part: the key under which it lies."""
    where = f"{part} of the {of}" if part else f"the {of}"
    if not isinstance(given, Mapping):
        raise PqkError(f"{where} must be a mapping, got {given!r}")
    for key in given:
        if key not in allowed:
            raise PqkError(f"unknown key {key!r} in {where}{nearest(str(key), allowed)}")
    return dict(given)


def is_count(value: Any, least: int = 1) -> bool:
    """Whether the value is a whole number from `least` to `LARGEST`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def count(of: str, values: Mapping[str, Any], key: str, part: str = "", least: int = 1) -> int:
    """Returns the whole number under `key`; part: as in `known`."""
    value, name = values.get(key), f"{part}.{key}" if part else key
    if value is None:
        raise PqkError(f"{of}: {name} is missing")
    if not is_count(value, least):
        raise PqkError(f"{of}: {name} must be a whole number from {least} to {LARGEST}, got {value!r}")
    found: int = value
    return found


def levels(of: str, widths: Any, name: str, step: int = 1) -> tuple[int, int, int, int]:
    """Returns the four widths of a dense head's levels, each a multiple of `step`."""
    right = isinstance(widths, Sequence) and not isinstance(widths, str) and len(widths) == 4
    if not right or not all(is_count(width) and width % step == 0 for width in widths):
        what = "whole numbers from 1" if step == 1 else f"multiples of {step}"
        raise PqkError(f"{of}: {name} must be four {what} to {LARGEST}, got {widths!r}")
    return (widths[0], widths[1], widths[2], widths[3])


def stack(
    of: str,
    values: Mapping[str, Any],
    dim: int,
    ratio: Any,
    listed: Any,
    name: str,
    *,
    part: str = "",
    keys: tuple[str, str, str] = ("depth", "num_heads", "head_dim"),
    rotary: bool = False,
) -> tuple[BlockSize, ...]:
    """Returns the sizes of a stack's blocks: from the list `name` where it is given, else all alike.

    dim: width of the tokens. ratio: the MLP is so many times as wide. keys: of the number of blocks, the heads and the
    width of one head (default: an equal share of dim). rotary: the width of a head must be a multiple of 4.
    """
    depth, heads, width = keys
    dot = f"{part}." if part else ""
    if values.get(width) is not None:
        head_dim = count(of, values, width, part)
    else:
        many = count(of, values, heads, part)
        if dim % many:
            raise PqkError(f"{of}: a width of {dim} is not a multiple of {dot}{heads} {many}; give {dot}{width}")
        head_dim = dim // many
    if rotary and head_dim % 4:
        raise PqkError(f"{of}: {dot}{width} must be a multiple of 4 (rotary embedding), got {head_dim}")
    if listed is None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 1 <= dim * ratio <= LARGEST:
            raise PqkError(f"{of}: mlp_ratio must make the MLP 1 to {LARGEST} wide, got {ratio!r} times {dim}")
        # Rounded down as in the official constructors, but not for an error of the last digit.
        size = BlockSize(count(of, values, heads, part), head_dim, int(dim * ratio + 1e-6))
        deep = count(of, values, depth, part)
        if deep > DEEPEST:
            raise PqkError(f"{of}: {dot}{depth} must be at most {DEEPEST}, got {deep}")
        return (size,) * deep
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not 1 <= len(listed) <= DEEPEST:
        long = isinstance(listed, Sequence) and len(listed) > DEEPEST
        shown = f"{len(listed)} entries" if long else repr(listed)
        raise PqkError(f"{of}: {name} must be a list of 1 to {DEEPEST} blocks, got {shown}")
    sizes = []
    for index, block in enumerate(listed):
        if not isinstance(block, Mapping) or set(block) != {"heads", "ffn"} or not all(map(is_count, block.values())):
            raise PqkError(
                f"{of}: {name}[{index}] must be {{heads: ..., ffn: ...}} with numbers to {LARGEST}, got {block!r}"
            )
        sizes.append(BlockSize(block["heads"], head_dim, block["ffn"]))
    return tuple(sizes)
