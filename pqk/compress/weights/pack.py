"""Packs 4-bit numbers two per byte, and unpacks them."""

from __future__ import annotations

import torch
from torch import Tensor

from pqk.errors import PqkError


def pack_int4(numbers: Tensor) -> Tensor:
    """Returns uint8 of length ceil(n / 2): numbers 2i and 2i + 1 in the low and the high half of byte i.

    numbers: any shape, integers of 0..15, flattened in row order. An odd count leaves the last high half 0.
    """
    flat = numbers.reshape(-1).to(torch.uint8)
    whole = flat.numel() // 2 * 2
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    torch.bitwise_left_shift(flat[1:whole:2], 4, out=packed[: whole // 2])
    packed[: whole // 2] |= flat[0:whole:2]
    if whole < flat.numel():
        packed[-1] = flat[-1]
    return packed


def unpack_int4(packed: Tensor, count: int) -> Tensor:
    """Returns the first `count` numbers that `pack_int4` packed, uint8 of 0..15. Raises PqkError for a wrong length."""
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != (count + 1) // 2:
        raise PqkError(
            f"{count} numbers of 4 bits take {(count + 1) // 2} bytes (uint8), "
            f"not {tuple(packed.shape)} of {str(packed.dtype).removeprefix('torch.')}"
        )
    numbers = torch.empty(2 * packed.numel(), dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(packed, 15, out=numbers[0::2])
    torch.bitwise_right_shift(packed, 4, out=numbers[1::2])
    return numbers[:count]
