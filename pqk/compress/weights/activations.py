"""Rounds the inputs of layers as they come: `fake_rounded` in float (emulated), `per_position` to real int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pqk.errors import PqkError


@dataclass(frozen=True)
class Activations:
    """How the inputs of linear layers are rounded, with ranges of the very input (dynamic).

    bits: 8 or 4. per: "token", one range per position, or "tensor", one for all of a call. symmetric: -127..127
    (-7..7), else 0..255 (0..15) with a zero point. Computed in float: what runs this way is emulated and has no time.
    Raises PqkError for other values.
    """

    bits: int = 8
    per: Literal["token", "tensor"] = "token"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.per not in ("token", "tensor"):
            raise PqkError(
                f"inputs can be rounded to 8 or 4 bits per token or tensor, not {self.bits} per {self.per!r}"
            )

    @property
    def name(self) -> str:
        return f"A{self.bits} per {self.per}{'' if self.symmetric else ', asymmetric'} (emulated)"


def fake_rounded(inputs: Tensor, spec: Activations) -> Tensor:
    """Returns the inputs (..., features) rounded as `spec` says and back in float."""
    found = inputs.reshape(1, -1) if spec.per == "tensor" else inputs
    if spec.symmetric:
        high = 2 ** (spec.bits - 1) - 1
        scale = _above_zero(found.abs().amax(-1, keepdim=True) / high)
        return ((found / scale).round_().clamp_(-high, high) * scale).reshape(inputs.shape)
    high = 2**spec.bits - 1
    least, most = (end.unsqueeze(-1) for end in torch.aminmax(found, dim=-1))
    least = least.clamp(max=0)
    scale = _above_zero((most.clamp(min=0) - least) / high)
    zero = (-least / scale).round_()
    codes = ((found / scale).round_() + zero).clamp_(0, high)
    return ((codes - zero) * scale).reshape(inputs.shape)


def per_position(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 codes -127..127 of the inputs (positions, features), and the scales (positions, 1)."""
    inputs = inputs.float()
    scale = _above_zero(inputs.abs().amax(-1, keepdim=True) / 127)
    return (inputs / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def _above_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
