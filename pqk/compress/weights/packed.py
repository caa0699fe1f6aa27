"""Holds one rounded weight, `PackedTensor`: packed codes, scales, zero points, and what was done before rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pqk.compress.weights.pack import pack_int4, unpack_int4
from pqk.compress.weights.quantizers import as_matrix, decode, from_matrix
from pqk.compress.weights.rotation import rotate, unrotate
from pqk.compress.weights.schemes import Scheme, payload
from pqk.errors import PqkError


@dataclass(frozen=True)
class PackedTensor:
    """A rounded weight W of `shape`, seen as a matrix with the channels of `axis` in rows.

    What is rounded is `W' = (W diag(smooth)) R`: smooth (float16, one number per column) and R, the rotation of the
    seed `rotation`, are None where they were not asked for. A layer computes `W' R^T (x / smooth)`, so that in float
    nothing changes.
    codes: with 8 bits int8 (symmetric) or uint8, with 4 bits two per byte, flat. Symmetric 4-bit codes are stored
    plus 8.
    scale, zero_point: as `grid_of` has them; 4-bit zero points are packed as well.
    method: how it was rounded, in words.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    axis: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    smooth: Tensor | None = None
    rotation: int | None = None
    method: str = "rtn"

    @classmethod
    def of(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        scheme: Scheme,
        shape: tuple[int, ...],
        axis: int,
        smooth: Tensor | None = None,
        rotation: int | None = None,
        method: str = "rtn",
    ) -> PackedTensor:
        """Returns the packed form of codes (rows, cols) as `encode` returns them."""
        if scheme.bits == 4:
            flat = (codes - scheme.low).to(torch.uint8) if scheme.symmetric else codes
            packed = pack_int4(flat)
            zero_point = None if zero_point is None else pack_int4(zero_point)
        else:
            packed = codes.reshape(-1)
        return cls(scheme, tuple(shape), axis, packed, scale, zero_point, smooth, rotation, method)

    @property
    def rows(self) -> int:
        return self.shape[self.axis] if len(self.shape) > 1 else 1

    @property
    def cols(self) -> int:
        return self.count // self.rows

    @property
    def count(self) -> int:
        """Returns how many weights it holds."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Returns the bytes of its tensors: what a file holds, without names and header."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def theory(self) -> int:
        """Returns the bytes that the scheme takes in theory, and two for each number of `smooth`."""
        return payload(self.rows, self.cols, self.scheme).total + (0 if self.smooth is None else 2 * self.cols)

    def tensors(self) -> dict[str, Tensor]:
        """Returns its tensors by the name of their field."""
        found = {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point, "smooth": self.smooth}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def unpacked(self) -> tuple[Tensor, Tensor | None]:
        """Returns the codes (rows, cols), int8 when symmetric, else uint8, and the zero points (uint8)."""
        if self.scheme.bits == 8:
            return self.codes.reshape(self.rows, self.cols), self.zero_point
        codes, zero = unpack_int4(self.codes, self.count), self.zero_point
        if self.scheme.symmetric:
            codes = codes.to(torch.int8).add_(self.scheme.low)
        if zero is not None:
            zero = unpack_int4(zero, self.scale.numel()).reshape(self.scale.shape)
        return codes.reshape(self.rows, self.cols), zero

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns W' as it was rounded, (rows, cols)."""
        codes, zero = self.unpacked()
        return decode(codes, self.scale, zero, self.scheme, dtype)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weight in its own shape, rotation and smoothing undone: what a plain layer uses."""
        found = self.matrix()
        if self.rotation is not None:
            found = unrotate(found, self.rotation)
        if self.smooth is not None:
            found = found / self.smooth.float()
        return from_matrix(found, self.shape, self.axis).to(dtype).contiguous()

    def carried(self, inputs: Tensor) -> Tensor:
        """Returns the inputs of the layer (..., cols) as W' takes them: smoothed and rotated."""
        if self.smooth is not None:
            inputs = inputs / self.smooth.to(inputs.dtype)
        return inputs if self.rotation is None else rotate(inputs, self.rotation)

    def error(self, weight: Tensor) -> float:
        """Returns the error relative to the weight it was made of: norm(dequantized - weight) / norm(weight)."""
        weight = weight.detach().float()
        return float((self.dequantized() - weight).norm() / weight.norm().clamp(min=1e-30))

    def check(self) -> None:
        """Raises PqkError when sizes or types of the tensors are not those that scheme and shape ask for."""
        placed = all(size > 0 for size in self.shape) and 0 <= self.axis < max(1, len(self.shape))
        if not placed or not (self.rotation is None or (type(self.rotation) is int and self.rotation >= 0)):
            raise PqkError(
                f"axis {self.axis} or rotation {self.rotation} do not fit {self.scheme.name} of {list(self.shape)}"
            )
        asked, blocks = payload(self.rows, self.cols, self.scheme), self.scheme.blocks(self.rows, self.cols)
        codes = torch.int8 if self.scheme.symmetric and self.scheme.bits == 8 else torch.uint8
        scales = (torch.float16, torch.float32) if self.scheme.granularity == "group" else (torch.float32,)
        zeros = 0 if self.zero_point is None else self.zero_point.numel()
        fits = (
            self.codes.dtype == codes
            and self.codes.numel() == asked.codes
            and self.scale.dtype in scales
            and self.scale.numel() == blocks
            and (self.zero_point is None) == self.scheme.symmetric
            and zeros == asked.zero_points
            and (self.zero_point is None or self.zero_point.dtype == torch.uint8)
            and (self.smooth is None or self.smooth.shape == (self.cols,))
        )
        if not fits:
            raise PqkError(f"codes, scales and zero points do not fit {self.scheme.name} of {list(self.shape)}")

    def to(self, device: torch.device | str) -> PackedTensor:
        """Returns the same on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return PackedTensor(
            self.scheme,
            self.shape,
            self.axis,
            moved["codes"],
            moved["scale"],
            moved.get("zero_point"),
            moved.get("smooth"),
            self.rotation,
            self.method,
        )


def matrix_of(weight: Tensor, axis: int) -> Tensor:
    """Returns a weight as the float32 matrix that is rounded; of a contiguous float32 weight it is a view."""
    return as_matrix(weight.detach(), axis).float()
