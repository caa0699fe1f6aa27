"""Which vector and matrix instructions this CPU has, as far as they matter for inference."""

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
