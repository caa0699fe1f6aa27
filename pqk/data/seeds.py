"""Seeds of generated scenes: one number per split, base seed and index, and never the same number twice."""

from __future__ import annotations

SPLITS = {"train": 0, "validation": 1, "calibration": 2, "test": 3}
LIMIT = 2**10  # of base seeds
INDICES = 2**20  # of items of one split and base seed


def split_seed(split: str, base: int, index: int) -> int:
    """Seed of item `index` of a split: (code of the split) * 2^30 + base * 2^20 + index, below 2^32.

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
