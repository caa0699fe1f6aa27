"""Describes this CPU: its name, its vector and matrix instructions, and the range of int8 weights that they allow."""

from __future__ import annotations

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
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


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """Returns the CPU's model name from Linux; elsewhere its architecture, such as 'arm64'."""
    return _field(cpuinfo, "model name") or platform.processor() or platform.machine()


def instruction_sets(cpuinfo: Path = _CPUINFO) -> list[str]:
    """Returns this CPU's vector and matrix instruction sets that matter for inference; empty outside Linux on x86."""
    flags = _field(cpuinfo, "flags").split()
    return [flag for flag in _FLAGS if flag in flags]


def _field(cpuinfo: Path, name: str) -> str:
    """Returns the first value of a field that is not empty; '' when there is none."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next((value for value in values if value), "")


def saturates() -> bool:
    """Returns whether int8 products are summed in 16 bits here: on x86 without a dot-product instruction (VNNI, AMX).

    False where the instruction sets are not known: outside Linux, and on other processors.
    """
    found = instruction_sets()
    dot_product = {"avx_vnni", "avx512_vnni", "amx_int8"}
    return platform.machine().lower() in ("x86_64", "amd64") and bool(found) and dot_product.isdisjoint(found)


def half_range(weight_range: str) -> bool:
    """Returns whether weights use 7 of their 8 bits: for 'half', and for 'auto' where int8 sums saturate.

    An x86 CPU without VNNI multiplies int8 with an instruction (vpmaddubsw) whose sums of two products saturate at 16
    bits; weights of half the range cannot reach that (Intel's oneDNN documentation, "Nuances of int8 computations").
    """
    return saturates() if weight_range == "auto" else weight_range == "half"


def weight_range_notes(half: bool) -> list[str]:
    """Returns the note for the results of weights that use half their range; empty for the full range."""
    if not half:
        return []
    why = ": int8 sums saturate on this CPU (no VNNI)" if saturates() else ""
    return [f"weights use 7 of their 8 bits{why}"]
