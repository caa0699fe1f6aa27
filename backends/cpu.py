"""Which vector and matrix instructions this CPU has, and the range of int8 weights that they ask for."""

from __future__ import annotations

import platform
from pathlib import Path

_FLAGS = [
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
]


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Vector and matrix instruction sets of this CPU that matter for inference; empty where Linux does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in _FLAGS if flag in flags]


def saturates() -> bool:
    """Whether int8 products are summed in 16 bits here: on x86 without a dot-product instruction (VNNI or AMX).

    False where the instruction sets are not known: outside Linux, and on other processors.
    """
    found = instruction_sets()
    dot_product = {"avx_vnni", "avx512_vnni", "amx_int8"}
    return platform.machine().lower() in ("x86_64", "amd64") and bool(found) and dot_product.isdisjoint(found)


def half_range(weight_range: str) -> bool:
    """Whether weights keep to 7 of their 8 bits, for 'full', 'half' or 'auto': where int8 sums saturate.

    An x86 CPU without VNNI multiplies int8 with an instruction (vpmaddubsw) whose sums of two products saturate at 16
    bits; weights of half the range cannot reach that (Intel's oneDNN documentation, "Nuances of int8 computations").
    """
    return saturates() if weight_range == "auto" else weight_range == "half"


def weight_range_notes(half: bool) -> list[str]:
    """What belongs beside the results of weights that keep to half their range; empty for the full range."""
    if not half:
        return []
    why = ": int8 sums saturate on this CPU (no VNNI)" if saturates() else ""
    return [f"weights use 7 of their 8 bits{why}"]
