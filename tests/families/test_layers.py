"""The defining properties of the rotary embedding (its numbers and those of the blocks: test_vectors.py)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk.errors import PqkError
from pqk.families.layers import Rope, apply_rope, grid_rope, rope_arrays


def rope_at(positions: np.ndarray, head_dim: int) -> Rope:
    """Tables for positions (B, N, 2), one set per sample."""
    cos, sin = (torch.from_numpy(table)[:, None] for table in rope_arrays(positions, head_dim))
    return Rope(cos, sin, positions.shape[1])


@settings(max_examples=40, deadline=None)
@given(
    head_dim=st.sampled_from([4, 8, 12, 64]),
    first=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    second=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    shift=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    seed=st.integers(0, 1000),
)
def test_rope_sees_only_offsets(head_dim, first, second, shift, seed):
    """<rope(q, p), rope(k, r)> depends on p - r alone, norms stay, and position (0, 0) changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, head_dim, generator=generator)

    def turn(x, position):
        return apply_rope(x, rope_at(np.array([[position]]), head_dim), head_dim)

    moved = [tuple(a + b for a, b in zip(position, shift, strict=True)) for position in (first, second)]
    here = (turn(q, first) * turn(k, second)).sum()
    there = (turn(q, moved[0]) * turn(k, moved[1])).sum()
    scale = q.norm() * k.norm()
    assert abs(here - there) <= 3e-5 * scale
    assert torch.allclose(turn(q, first).norm(), q.norm(), rtol=1e-5)
    assert torch.equal(turn(q, (0, 0)), q)


def test_rope_keeps_the_dtype_and_refuses_odd_widths():
    q = torch.randn(1, 2, 6, 8, dtype=torch.bfloat16)
    assert apply_rope(q, grid_rope(2, 3, 8), 8).dtype == torch.bfloat16
    with pytest.raises(PqkError, match="multiple of 4"):
        grid_rope(2, 2, 6)
