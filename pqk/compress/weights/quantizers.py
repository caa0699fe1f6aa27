"""Rounds weight matrices to integers and back: `grid_of`, `encode`, `decode`, and the three quantizer classes.

A value x of a block becomes `q = clamp(round(x / scale) + zero_point, low, high)` and is read as
`scale (q - zero_point)`. Scale and zero point follow from the smallest and the largest value of the block, a <= x <= b:

| | scale | zero point | codes |
| --- | --- | --- | --- |
| symmetric, 8 bits | max(-a, b) / 127 | none | -127..127 |
| symmetric, 4 bits | -sign(m) max(abs(m) / 8, abs(o) / 7.5) | none | -8..7 |
| asymmetric | (max(b, 0) - min(a, 0)) / (2^bits - 1) | round(-min(a, 0) / scale) | 0..2^bits - 1 |

m is the one of min(a, 0) and max(b, 0) that is further from 0, o the other one. 8 bits leave -128 unused, as integer
kernels want it (Jacob et al., CVPR 2018, appendix B; Wu et al., arXiv 2004.09602, section 3.1). With 4 bits that would
be one level in 16, so m gets the code -8 and the scale its sign, as in the 4-bit formats of ggml and NNCF; but these
take abs(m) / 8 alone, which cuts up to a step off the other side and shrinks weights. With o / 7.5 no value is off by
more than half a step. The asymmetric range always holds 0, or the zero point would be no code (Jacob et al., section
2.1). Codes are computed from the scale as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from pqk.compress.weights.schemes import Scheme
from pqk.errors import PqkError

CHUNK = 2**18
"""Values that are rounded at once: 1 MB in float32 stays in a core's cache."""
HALF = torch.finfo(torch.float16)


def grid_of(matrix: Tensor, scheme: Scheme, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Returns scale and zero point (None when symmetric) of every block of a matrix (rows, cols).

    Their shape is () for one block, (rows,) for rows and (rows, groups) for groups. Zero points are uint8. Scales are
    of `dtype`; None: float32, and float16 of groups, unless the largest one is outside its normal range, 6.1e-5..65504.
    float16 tells smaller scales to 2^-25: values of such a block may be off by 2^-21 more than half a step.
    Raises PqkError when a value is NaN or infinite.
    """
    low, high = _ranges(matrix, scheme)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise PqkError("a weight is NaN or infinite, and cannot be rounded")
    return _grid_between(low, high, scheme, dtype)


def _grid_between(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    if scheme.symmetric:
        if scheme.full_range:
            below, above = -low.clamp(max=0), high.clamp(min=0)
            size = torch.maximum(
                torch.maximum(below, above) / -scheme.low, torch.minimum(below, above) / (scheme.high + 0.5)
            )
            scale = torch.where(below >= above, size, -size)
        else:
            scale = torch.maximum(-low, high) / scheme.high
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = high / scheme.high - low / scheme.high  # the difference of both may not fit into float32
    if dtype is None:
        halves = scheme.granularity == "group" and HALF.tiny <= float(scale.abs().max()) <= HALF.max
        dtype = torch.float16 if halves else torch.float32
    if dtype == torch.float16:
        scale = scale.clamp(-HALF.max, HALF.max).half()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if scheme.symmetric:
        return scale, None
    return scale, (-low / scale.float()).round_().clamp_(scheme.low, scheme.high).to(torch.uint8)


def rounded(values: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """Returns the codes of values, as float32; scale and zero point broadcast against them."""
    codes = (values / scale).round_()
    if zero_point is not None:
        codes.add_(zero_point)
    return codes.clamp_(scheme.low, scheme.high)


def encode(matrix: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """Returns the codes of a matrix (rows, cols), int8 when symmetric, else uint8. Works on a few rows at a time."""
    dtype = torch.int8 if scheme.symmetric else torch.uint8
    codes = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for rows in _chunks(*matrix.shape):
        blocks = _blocked(matrix[rows].float(), scheme)
        found = rounded(blocks, *_of_rows(scale, zero_point, rows, scheme), scheme)
        codes[rows] = _unblocked(found, matrix.shape[1], scheme)
    return codes


def decode(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns the values of codes (rows, cols). Works on a few rows at a time, in float32."""
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows in _chunks(*codes.shape):
        blocks = _blocked(codes[rows].float(), scheme)
        of_rows, zero = _of_rows(scale, zero_point, rows, scheme)
        if zero is not None:
            blocks = blocks - zero
        values[rows] = _unblocked(blocks * of_rows, codes.shape[1], scheme)
    return values


def as_matrix(tensor: Tensor, axis: int = 0) -> Tensor:
    """Returns a weight as a matrix: channels of `axis` in rows, everything else in columns."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1) if tensor.dim() > 1 else tensor.reshape(1, -1)


def from_matrix(matrix: Tensor, shape: tuple[int, ...], axis: int = 0) -> Tensor:
    """Returns the weight of this shape that `as_matrix` made a matrix of."""
    if len(shape) < 2:
        return matrix.reshape(shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return matrix.reshape(moved).movedim(0, axis)


class SymmetricQuantizer:
    """Rounds tensors with one scale per tensor or per channel (the first dimension), and no zero point."""

    def __init__(self, bits: int = 8, per_channel: bool = False) -> None:
        self.scheme = Scheme(bits, True, "channel" if per_channel else "tensor")

    def quantize_tensor(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Returns int8 codes of the tensor's shape, and the scale: float32 of shape () or (channels,)."""
        codes, scale, _ = _quantize(tensor, self.scheme)
        return codes, scale

    def dequantize_tensor(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Returns the float32 values that the codes stand for."""
        return _dequantize(codes, scale, None, self.scheme)


class AsymmetricQuantizer:
    """Rounds tensors with a scale and a zero point per tensor or per channel (the first dimension)."""

    def __init__(self, bits: int = 8, per_channel: bool = False) -> None:
        self.scheme = Scheme(bits, False, "channel" if per_channel else "tensor")

    def quantize_tensor(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns uint8 codes of the tensor's shape, the scale (float32) and the zero point (uint8)."""
        codes, scale, zero_point = _quantize(tensor, self.scheme)
        assert zero_point is not None
        return codes, scale, zero_point

    def dequantize_tensor(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Returns the float32 values that the codes stand for."""
        return _dequantize(codes, scale, zero_point, self.scheme)


class GroupWiseQuantizer:
    """Rounds tensors with one scale per `group_size` neighbouring values of a channel, and no zero point.

    Groups never reach over the end of a channel (the first dimension); the last one of each may be shorter.
    """

    def __init__(self, bits: int = 4, group_size: int = 128) -> None:
        self.scheme = Scheme(bits, True, "group", group_size)

    def quantize_tensor(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Returns int8 codes of the tensor's shape (not packed), and scales (channels, groups), float16."""
        codes, scale, _ = _quantize(tensor, self.scheme)
        return codes, scale

    def dequantize_tensor(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Returns the float32 values that the codes stand for."""
        return _dequantize(codes, scale, None, self.scheme)


def _quantize(tensor: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    if not tensor.numel() or not tensor.is_floating_point():
        raise PqkError(
            f"only floating-point tensors with values can be rounded, not {tensor.dtype} {list(tensor.shape)}"
        )
    matrix = as_matrix(tensor.detach())
    scale, zero_point = grid_of(matrix, scheme)
    return encode(matrix, scale, zero_point, scheme).reshape(tensor.shape), scale, zero_point


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    return decode(as_matrix(codes), scale, zero_point, scheme).reshape(codes.shape)


def _chunks(rows: int, cols: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, cols))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _ranges(matrix: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest value of every block, float32, in the shape of its scales."""
    found = [torch.aminmax(_blocked(matrix[rows].float(), scheme), dim=1) for rows in _chunks(*matrix.shape)]
    low, high = (torch.cat([part[end] for part in found]) for end in (0, 1))
    if scheme.granularity == "tensor":
        return low.amin(), high.amax()
    if scheme.granularity == "group":
        return low.reshape(matrix.shape[0], -1), high.reshape(matrix.shape[0], -1)
    return low, high


def _of_rows(scale: Tensor, zero_point: Tensor | None, rows: slice, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Returns scales and zero points of some rows, float32, one line per block as `_blocked` has them."""
    if scheme.granularity == "tensor":
        return scale.float(), None if zero_point is None else zero_point.float()
    part = scale[rows].float().reshape(-1, 1)
    return part, None if zero_point is None else zero_point[rows].float().reshape(-1, 1)


def _blocked(matrix: Tensor, scheme: Scheme) -> Tensor:
    """Returns a matrix with one line per block: rows, or groups (the last one of a row filled up with zeros)."""
    if scheme.group_size is None:
        return matrix
    missing = scheme.groups(matrix.shape[1]) * scheme.group_size - matrix.shape[1]
    return (F.pad(matrix, (0, missing)) if missing else matrix).reshape(-1, scheme.group_size)


def _unblocked(blocks: Tensor, cols: int, scheme: Scheme) -> Tensor:
    if scheme.group_size is None:
        return blocks
    return blocks.reshape(-1, scheme.groups(cols) * scheme.group_size)[:, :cols]
