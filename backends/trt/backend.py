"""TensorRT: says honestly what is missing. This version has no TensorRT engine, only the answer why not."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backends.base import Availability, Engine, Graph, Kernel, Precision, Quantizer, Unavailable

MEND = "use --backend openvino"


class TensorRTBackend:
    """The place of the TensorRT toolchain; every request that needs an engine raises Unavailable."""

    name = "trt"
    sources: tuple[str, ...] = ("backends.trt.backend",)

    def availability(self) -> Availability:
        """Never available in this version; the reason names what the machine lacks, then what this version lacks."""
        missing = []
        if not (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
            missing.append("there is no NVIDIA GPU on this machine")
        if not any(importlib.util.find_spec(name) for name in ("tensorrt_rtx_bindings", "tensorrt")):
            missing.append("no TensorRT Python package is installed")
        missing.append("this version of pqk cannot build TensorRT engines yet")
        return Availability(available=False, reason=", and ".join(missing), mend=MEND)

    def quantizers(self) -> Mapping[str, Quantizer]:
        return {}

    def float_precisions(self) -> Sequence[Precision]:
        return []

    def compile(self, graph: Graph, precision: Precision, options: Mapping[str, Any] | None = None) -> Engine:
        """Always raises Unavailable."""
        found = self.availability()
        raise Unavailable(f"cannot compile {graph.path.name} to {precision} with trt: {found.reason}; {found.mend}")

    def kept_in_int8(self, engine: Engine, keep: Sequence[str], kernels: Sequence[Kernel]) -> list[Kernel]:
        """Always raises Unavailable: there is no engine to look into."""
        raise Unavailable("backend 'trt' has no engines in this version; use --backend openvino")
