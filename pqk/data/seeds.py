"""Seeds of generated scenes: one number per split, base seed and index, and never the same number twice."""

from __future__ import annotations

SPLITS = {"train": 1, "validation": 2, "calibration": 3, "test": 4}
LIMIT = 2**24


def split_seed(split: str, base: int, index: int) -> int:
    """Seed of item `index` of a split: (code of the split) * 2^48 + base * 2^24 + index, below 2^51.

    The three numbers can be read back from the result, so no two items of any two splits ever share a seed, whatever
    their base seeds: test scenes are never seen in calibration or training.
    Raises ValueError when base or index is not in 0..2^24-1, KeyError for an unknown split.
    """
    if not (0 <= base < LIMIT and 0 <= index < LIMIT):
        raise ValueError(f"base seed and index must be in 0..2^24-1, got {base} and {index}")
    return SPLITS[split] * 2**48 + base * 2**24 + index
