"""Rounding weights: error bounds, the order of errors, and the cases where the plain formulas fail."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pqk.compress.weights import quantizers
from pqk.compress.weights.quantizers import (
    AsymmetricQuantizer,
    GroupWiseQuantizer,
    SymmetricQuantizer,
    decode,
    encode,
    grid_of,
)
from pqk.compress.weights.schemes import SCHEMES, Scheme, payload, scheme_named
from pqk.errors import PqkError

EVERY = [
    *SCHEMES.values(),
    Scheme(4, False, "group", 32),
    Scheme(4, True, "channel"),
    Scheme(4, False, "tensor"),
    Scheme(8, False, "group", 16),
]


def gaussian(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def there_and_back(matrix: Tensor, scheme: Scheme) -> Tensor:
    scale, zero = grid_of(matrix, scheme)
    return decode(encode(matrix, scale, zero, scheme), scale, zero, scheme)


def error(matrix: Tensor, scheme: Scheme) -> float:
    return float((there_and_back(matrix, scheme) - matrix).norm() / matrix.norm())


def steps(matrix: Tensor, scheme: Scheme) -> Tensor:
    """The step between two levels at every place of the matrix."""
    scale = grid_of(matrix, scheme)[0].float().abs()
    if scheme.granularity == "group":
        assert scheme.group_size is not None
        return scale.repeat_interleave(scheme.group_size, 1)[:, : matrix.shape[1]]
    return scale.reshape(-1, 1).expand_as(matrix)


@given(
    st.sampled_from(EVERY),
    st.integers(1, 7),
    st.integers(1, 150),
    st.integers(0, 2**16),
    st.sampled_from([1e-20, 1e-6, 1e-3, 1.0, 1e6]),
    st.sampled_from([-5.0, 0.0, 0.5, 5.0]),
)
@example(Scheme(4, False, "group", 32), 2, 1, 1746, 1e-3, 0.0)  # the scale of a row is below those of float16
def test_no_value_is_off_by_more_than_half_a_step(
    scheme: Scheme, rows: int, cols: int, seed: int, size: float, shift: float
) -> None:
    matrix = (gaussian(rows, cols, seed) + shift) * size
    halves = 2.0**-21 if grid_of(matrix, scheme)[0].dtype == torch.float16 else 0.0  # whose least unit is 2^-24
    off = ((there_and_back(matrix, scheme) - matrix).abs() - halves).clamp(min=0) / steps(matrix, scheme)
    assert float(off.max()) <= 0.51


@pytest.mark.parametrize("scheme", EVERY, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("value", [0.0, 3.7, -0.02])
def test_a_constant_weight_survives(scheme: Scheme, value: float) -> None:
    """`(max - min) / 255` is 0 there, and the division by it NaN."""
    matrix = torch.full((3, 40), value)
    torch.testing.assert_close(there_and_back(matrix, scheme), matrix, rtol=1e-3, atol=0)


def test_the_zero_point_is_a_code_where_all_weights_are_of_one_sign() -> None:
    matrix = 100 + gaussian(4, 50).abs()
    codes, scale, zero = AsymmetricQuantizer(per_channel=True).quantize_tensor(matrix)
    assert zero.dtype == torch.uint8 and bool((zero == 0).all())
    assert float((codes.float() * scale[:, None] - matrix).abs().max()) <= 0.51 * float(scale.max())
    low, high = matrix.min(), matrix.max()
    assert float(torch.round(-low / ((high - low) / 255))) < -255  # what the plain formula would have to store


def test_symmetric_8_bits_are_the_formula_of_the_comparison() -> None:
    matrix = gaussian(16, 48)
    codes, scale = SymmetricQuantizer(bits=8).quantize_tensor(matrix)
    assert torch.equal(scale, matrix.abs().max() / 127)
    assert torch.equal(codes, torch.clamp(torch.round(matrix / scale), -128, 127).to(torch.int8))
    assert int(codes.min()) >= -127


def test_asymmetric_8_bits_are_the_formula_of_the_comparison_where_0_is_inside() -> None:
    matrix = gaussian(16, 48) + 0.7
    codes, scale, zero = AsymmetricQuantizer(bits=8).quantize_tensor(matrix)
    plain = (matrix.max() - matrix.min()) / 255
    torch.testing.assert_close(scale, plain)
    assert int(zero) == int(torch.round(-matrix.min() / plain))
    expected = torch.clamp(torch.round(matrix / plain + zero.float()), 0, 255)
    assert float((codes.float() - expected).abs().max()) <= 1
    assert float((codes.float() != expected).float().mean()) < 0.01


@given(st.integers(0, 2**16), st.sampled_from([32, 64, 128]))
def test_4_bits_with_all_16_levels_lose_less(seed: int, size: int) -> None:
    matrix = gaussian(32, 256, seed)
    codes, scale = GroupWiseQuantizer(bits=4, group_size=size).quantize_tensor(matrix)
    groups = matrix.reshape(-1, size)
    plain_scale = groups.abs().amax(1, keepdim=True) / 7
    plain = (groups / plain_scale).round().clamp(-8, 7) * plain_scale
    assert float((codes.reshape(-1, size).min(1).values == -8).float().mean()) > 0.98
    assert bool((scale < 0).any() and (scale > 0).any())
    found = GroupWiseQuantizer(bits=4, group_size=size).dequantize_tensor(codes, scale)
    assert float((found - matrix).norm()) < float((plain - groups).norm())


@given(st.integers(0, 2**16))
def test_smaller_blocks_lose_less(seed: int) -> None:
    matrix = gaussian(32, 256, seed)
    assert error(matrix, SCHEMES["INT8_Per_Channel_Symmetric"]) < error(matrix, SCHEMES["INT8_Per_Tensor_Symmetric"])
    assert error(matrix, SCHEMES["INT8_Per_Channel_Asymmetric"]) < error(matrix, SCHEMES["INT8_Per_Tensor_Asymmetric"])
    by_size = [error(matrix, SCHEMES[f"INT4_Group_{size}"]) for size in (32, 64, 128)]
    assert by_size == sorted(by_size)
    assert error(matrix, SCHEMES["INT8_Per_Tensor_Symmetric"]) < by_size[0]


def test_a_skewed_weight_is_better_with_a_zero_point() -> None:
    matrix = gaussian(16, 64).abs()
    assert error(matrix, SCHEMES["INT8_Per_Channel_Asymmetric"]) < error(matrix, SCHEMES["INT8_Per_Channel_Symmetric"])


def test_groups_end_at_the_end_of_a_channel() -> None:
    matrix = gaussian(5, 200)
    matrix[1] *= 1000
    codes, scale = GroupWiseQuantizer(bits=4, group_size=128).quantize_tensor(matrix)
    assert codes.shape == (5, 200) and scale.shape == (5, 2)
    found = GroupWiseQuantizer(bits=4, group_size=128).dequantize_tensor(codes, scale)
    assert float((found[0] - matrix[0]).abs().max()) < 1  # the large neighbour is no part of its groups


def test_scales_of_groups_are_float16_where_it_holds_them() -> None:
    for size, dtype in ((1e-8, torch.float32), (1e-2, torch.float16), (1e7, torch.float32)):
        assert grid_of(gaussian(4, 64) * size, SCHEMES["INT4_Group_32"])[0].dtype == dtype
        assert error(gaussian(4, 64) * size, SCHEMES["INT4_Group_32"]) < 0.12


@pytest.mark.parametrize("scheme", EVERY, ids=lambda scheme: scheme.name)
def test_rows_in_parts_are_rounded_as_all_at_once(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gaussian(37, 75)
    whole = there_and_back(matrix, scheme)
    monkeypatch.setattr(quantizers, "CHUNK", 200)
    assert torch.equal(there_and_back(matrix, scheme), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_float_are_rounded_as_float32(dtype: torch.dtype) -> None:
    tensor = gaussian(8, 32).to(dtype)
    codes, scale = SymmetricQuantizer(per_channel=True).quantize_tensor(tensor)
    expected, _ = SymmetricQuantizer(per_channel=True).quantize_tensor(tensor.float())
    assert scale.dtype == torch.float32 and torch.equal(codes, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    matrix = gaussian(4, 4)
    matrix[2, 1] = bad
    for scheme in EVERY:
        with pytest.raises(PqkError, match="NaN or infinite"):
            grid_of(matrix, scheme)


def test_tensors_of_any_shape() -> None:
    for shape in ((7,), (3, 5), (4, 3, 2, 2)):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for quantizer in (SymmetricQuantizer(), GroupWiseQuantizer(group_size=4)):
            codes, scale = quantizer.quantize_tensor(tensor)
            assert codes.shape == tensor.shape
            torch.testing.assert_close(quantizer.dequantize_tensor(codes, scale), tensor, atol=0.4, rtol=0)
    for empty in (torch.zeros(0), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(PqkError, match="floating-point"):
            SymmetricQuantizer().quantize_tensor(empty)


def test_the_seven_schemes() -> None:
    assert list(SCHEMES) == [
        "INT8_Per_Tensor_Symmetric",
        "INT8_Per_Tensor_Asymmetric",
        "INT8_Per_Channel_Symmetric",
        "INT8_Per_Channel_Asymmetric",
        "INT4_Group_128",
        "INT4_Group_64",
        "INT4_Group_32",
    ]
    assert scheme_named("INT8_Per_Channel_Asym") == Scheme(8, False, "channel")
    assert scheme_named("int4_group_64") == Scheme(4, True, "group", 64)
    with pytest.raises(PqkError, match="did you mean 'INT4_Group_32'"):
        scheme_named("INT4_Group_33")


def test_theory_counts_codes_scales_and_zero_points() -> None:
    rows, cols = 1000, 1024
    ratio = {name: 4 * rows * cols / payload(rows, cols, scheme).total for name, scheme in SCHEMES.items()}
    assert [round(value, 2) for value in ratio.values()] == [4.0, 4.0, 3.98, 3.98, 7.76, 7.53, 7.11]
    odd = payload(3, 5, Scheme(4, False, "group", 2))
    assert (odd.codes, odd.scales, odd.zero_points) == (8, 18, 5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((3, True, "tensor"), "4 or 8 bits"),
        ((8, True, "chanel"), "did you mean 'channel'"),
        ((4, True, "group"), "group_size must be"),
        ((4, True, "group", 1), "at least 2"),
        ((8, True, "channel", 64), "needs granularity 'group'"),
    ],
)
def test_schemes_that_are_none(wrong: tuple[object, ...], said: str) -> None:
    with pytest.raises(PqkError, match=said):
        Scheme(*wrong)  # type: ignore[arg-type]
