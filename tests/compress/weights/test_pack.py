"""Two 4-bit numbers in a byte, and packed weights of every shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqk.compress.weights.methods.method import Method, pack_weight
from pqk.compress.weights.pack import pack_int4, unpack_int4
from pqk.compress.weights.quantizers import as_matrix, decode, encode, from_matrix, grid_of
from pqk.compress.weights.schemes import SCHEMES, Scheme
from pqk.errors import PqkError

EVERY = [*SCHEMES.values(), Scheme(4, False, "group", 8), Scheme(4, False, "channel")]


@given(st.lists(st.integers(0, 15), max_size=9))
def test_packing_loses_nothing(numbers: list[int]) -> None:
    packed = pack_int4(torch.tensor(numbers, dtype=torch.uint8))
    assert packed.numel() == (len(numbers) + 1) // 2
    assert unpack_int4(packed, len(numbers)).tolist() == numbers


def test_the_first_number_is_the_low_half() -> None:
    assert pack_int4(torch.tensor([[1, 2], [15, 0], [9, 3]])).tolist() == [0x21, 0x0F, 0x39]
    assert pack_int4(torch.tensor([7, 8, 5])).tolist() == [0x87, 0x05]


def test_a_wrong_length_is_refused() -> None:
    with pytest.raises(PqkError, match="5 numbers of 4 bits take 3 bytes"):
        unpack_int4(torch.zeros(4, dtype=torch.uint8), 5)
    with pytest.raises(PqkError, match="not"):
        unpack_int4(torch.zeros(3, dtype=torch.int8), 5)


@given(
    st.sampled_from(EVERY),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.integers(0, 1),
    st.integers(0, 999),
)
def test_packed_weights_are_those_that_were_rounded(scheme: Scheme, shape: list[int], axis: int, seed: int) -> None:
    axis = axis if len(shape) > 1 else 0
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packed = pack_weight(weight, scheme, axis)
    packed.check()
    assert packed.nbytes == packed.theory and packed.count == weight.numel()
    matrix = as_matrix(weight, axis)
    scale, zero = grid_of(matrix, scheme)
    expected = decode(encode(matrix, scale, zero, scheme), scale, zero, scheme)
    assert torch.equal(packed.dequantized(), from_matrix(expected, tuple(shape), axis))
    assert torch.equal(from_matrix(matrix, tuple(shape), axis), weight)


def test_channels_of_a_transposed_convolution_are_its_second_dimension() -> None:
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[:, 2] *= 1000
    by_channel = pack_weight(weight, SCHEMES["INT8_Per_Channel_Symmetric"], 1)
    assert by_channel.scale.shape == (4,)
    assert float((by_channel.dequantized()[:, 0] - weight[:, 0]).abs().max()) < 0.02


def test_sizes_that_do_not_fit_are_noticed() -> None:
    packed = pack_weight(torch.randn(6, 40), SCHEMES["INT4_Group_32"])
    for field, wrong in (
        ("codes", packed.codes[:-1]),
        ("scale", packed.scale[:1]),
        ("scale", packed.scale.double()),
        ("zero_point", torch.zeros(6, dtype=torch.uint8)),
        ("smooth", torch.ones(39, dtype=torch.float16)),
        ("axis", 2),
        ("rotation", -1),
    ):
        with pytest.raises(PqkError, match="do not fit INT4_Group_32"):
            type(packed)(**{**packed.__dict__, field: wrong}).check()


def test_rotation_costs_no_bytes() -> None:
    weight = torch.randn(16, 96)
    plain, rotated = (pack_weight(weight, SCHEMES["INT4_Group_32"], 0, Method(name)) for name in ("rtn", "hadamard"))
    assert rotated.nbytes == plain.nbytes and rotated.rotation == 0
