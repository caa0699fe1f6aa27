"""Defines how weights are rounded, `Scheme`, the seven named schemes, and the bytes that each takes in theory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Literal, get_args

from pqk.errors import PqkError, nearest

Granularity = Literal["tensor", "channel", "group"]
BITS = (4, 8)
LEAST_GROUP = 2


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix (output channels x everything else) is rounded.

    bits: 4 or 8. symmetric: one scale per block; else also a zero point. granularity: what a block is: the whole
    matrix, a row, or `group_size` neighbouring columns of a row (the last group of a row may be shorter).
    Raises PqkError for other values.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise PqkError(f"weights can be rounded to 4 or 8 bits, not to {self.bits!r}")
        allowed = get_args(Granularity)
        if self.granularity not in allowed:
            raise PqkError(
                f"the granularity is one of {', '.join(allowed)}, not {self.granularity!r}"
                f"{nearest(str(self.granularity), allowed)}"
            )
        if self.granularity == "group":
            size = self.group_size
            if not isinstance(size, int) or isinstance(size, bool) or size < LEAST_GROUP:
                raise PqkError(f"group_size must be a whole number of at least {LEAST_GROUP}, not {size!r}")
        elif self.group_size is not None:
            raise PqkError(f"group_size {self.group_size} needs granularity 'group', not {self.granularity!r}")

    @property
    def full_range(self) -> bool:
        """Returns whether a symmetric scheme uses every code: with 4 bits the unused 16th is 6 % of the levels."""
        return self.bits < 8

    @property
    def low(self) -> int:
        """Returns the smallest code: 0 where there is a zero point, -8 with 4 bits, -127 with 8."""
        if not self.symmetric:
            return 0
        return -(2 ** (self.bits - 1)) + (0 if self.full_range else 1)

    @property
    def high(self) -> int:
        """Returns the largest code: 15 or 255 where there is a zero point, else 7 or 127."""
        return 2 ** (self.bits - (1 if self.symmetric else 0)) - 1

    @property
    def scale_bytes(self) -> int:
        """Returns the bytes of one scale: float16 for groups, which have many, else float32."""
        return 2 if self.granularity == "group" else 4

    @property
    def name(self) -> str:
        """Returns a name such as INT8_Per_Channel_Symmetric or INT4_Group_128 (symmetric unless it says so)."""
        if self.granularity == "group":
            return f"INT{self.bits}_Group_{self.group_size}{'' if self.symmetric else '_Asymmetric'}"
        return f"INT{self.bits}_Per_{self.granularity.title()}_{'S' if self.symmetric else 'As'}ymmetric"

    def groups(self, cols: int) -> int:
        """Returns how many blocks a row of `cols` columns has; 1 for the other granularities."""
        return ceil(cols / self.group_size) if self.group_size else 1

    def blocks(self, rows: int, cols: int) -> int:
        """Returns how many scales a matrix has."""
        return 1 if self.granularity == "tensor" else rows * self.groups(cols)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> Scheme:
        """Returns the scheme that `to_json` wrote. Raises PqkError for anything else."""
        if not isinstance(found, Mapping) or set(found) != set(cls.__dataclass_fields__):
            raise PqkError(f"no scheme: {str(found)[:80]}")
        if type(found["bits"]) is not int or type(found["symmetric"]) is not bool:
            raise PqkError(f"no scheme: {str(found)[:80]}")
        return cls(**found)


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(8, True, "tensor"),
        Scheme(8, False, "tensor"),
        Scheme(8, True, "channel"),
        Scheme(8, False, "channel"),
        Scheme(4, True, "group", 128),
        Scheme(4, True, "group", 64),
        Scheme(4, True, "group", 32),
    )
}
"""The seven schemes by name."""


def scheme_named(name: str) -> Scheme:
    """Returns one of the seven schemes; INT8_Per_Tensor_Sym and the like are short for ..._Symmetric.

    Upper and lower case are alike. Raises PqkError for other names.
    """
    lower = name.lower()
    for suffix in ("sym", "asym"):
        if lower.endswith(f"_{suffix}"):
            lower += "metric"
    found = {known.lower(): scheme for known, scheme in SCHEMES.items()}.get(lower)
    if found is None:
        raise PqkError(f"unknown scheme {name!r}{nearest(name, SCHEMES)}; known are {', '.join(SCHEMES)}")
    return found


@dataclass(frozen=True)
class Payload:
    """Bytes that a rounded matrix takes: its codes, scales and zero points."""

    codes: int
    scales: int
    zero_points: int

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.zero_points


def payload(rows: int, cols: int, scheme: Scheme) -> Payload:
    """Returns the theoretical bytes of a matrix: codes of `bits` bits, one scale per block, zero points of `bits` bits.

    Odd counts of 4-bit numbers end in half a byte that nothing uses. Names, shapes and the header of a file are no part
    of it.
    """
    blocks = scheme.blocks(rows, cols)
    return Payload(
        codes=ceil(rows * cols * scheme.bits / 8),
        scales=blocks * scheme.scale_bytes,
        zero_points=0 if scheme.symmetric else ceil(blocks * scheme.bits / 8),
    )
