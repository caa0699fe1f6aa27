"""Computes seeds of generated data from split, base seed and index (`split_seed`); reads and writes lists of seeds."""

from __future__ import annotations

from collections.abc import Iterable

from pqk.errors import PqkError

SPLITS = {"train": 0, "validation": 1, "calibration": 2, "test": 3}
LIMIT = 2**10  # of base seeds
INDICES = 2**20  # of items of one split and base seed


def split_seed(split: str, base: int, index: int) -> int:
    """Returns the seed of item `index` of a split: (code of the split) * 2^30 + base * 2^20 + index, below 2^32.

    The three numbers can be read back from the result, so no two items of any two splits ever share a seed, whatever
    their base seeds: test scenes are never seen in calibration or training. It must fit into 32 bits, because torch's
    CPU generator (MT19937) ignores all higher bits of a seed.
    Raises ValueError when base is not in 0..2^10-1 or index not in 0..2^20-1, KeyError for an unknown split.
    """
    if not 0 <= base < LIMIT:
        raise ValueError(f"the base seed must be from 0 to {LIMIT - 1}, got {base}")
    if not 0 <= index < INDICES:
        raise ValueError(f"the index must be from 0 to {INDICES - 1}, got {index}")
    return SPLITS[split] * 2**30 + base * INDICES + index


def seeds_text(seeds: Iterable[int]) -> str:
    """Returns seeds as text: {0, 1, 2, 5} -> '0..2,5'; the inverse of `parse_seeds`."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def parse_seeds(text: str, limit: int = 1024) -> tuple[int, ...]:
    """Returns ascending seeds below `limit` from '0..4', '3' or '0,2,5..7'. Raises PqkError for other text."""
    seeds: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        ends = (first, last if dots else first)
        if not all(end.isascii() and end.isdigit() and len(end) < 10 for end in ends) or int(ends[0]) > int(ends[1]):
            raise PqkError(f"seeds {text!r}: write them as 0..4, or 0,2,5")
        if int(ends[1]) >= limit:
            raise PqkError(f"seeds {text!r}: a seed must be below {limit}")
        seeds.update(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(seeds))
