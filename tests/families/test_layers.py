"""Rotary embedding and transformer blocks against golden vectors and their defining properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk.errors import PqkError
from pqk.families.dust3r.configs import BlockSize
from pqk.families.dust3r.layers import (
    DecoderBlock,
    EncoderBlock,
    Rope,
    apply_rope,
    grid_positions,
    grid_rope,
    rope_arrays,
)


def rope_at(positions: np.ndarray, head_dim: int) -> Rope:
    """Tables for positions (B, N, 2), one set per sample."""
    cos, sin = (torch.from_numpy(table)[:, None] for table in rope_arrays(positions, head_dim))
    return Rope(cos, sin, positions.shape[1])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_rope_golden(golden, difference, index):
    case = golden("dust3r_rope")
    positions = grid_positions(3, 4)[None] if index == 1 else case[f"in_pos{index}"].numpy()
    if index == 1:
        assert np.array_equal(positions, case["mid_pos1"].numpy())
    q = case[f"in_q{index}"]
    assert difference(apply_rope(q, rope_at(positions, q.shape[-1]), q.shape[-1]), case[f"out_{index}"]) < 1e-6


def test_blocks_golden(golden, difference):
    """Tiny input amplitude: an epsilon other than 1e-6 in the norms changes the result by about 40 %."""
    case = golden("dust3r_blocks")
    encoder, decoder = EncoderBlock(24, BlockSize(2, 12, 96)), DecoderBlock(32, BlockSize(4, 8, 128))
    encoder.load_state_dict(case.weights("enc."))
    decoder.load_state_dict(case.weights("dec."))
    with torch.no_grad():
        got = encoder(case["in_enc_x"], rope_at(case["in_enc_pos"].numpy(), 12))
        assert difference(got, case["out_enc"]) < 1e-5
        ropes = rope_at(case["in_dec_xpos"].numpy(), 8), rope_at(case["in_dec_ypos"].numpy(), 8)
        assert difference(decoder(case["in_dec_x"], case["in_dec_y"], *ropes), case["out_dec"]) < 1e-5


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
