"""Describes ONNX Runtime on this machine, lists its quantizer, and compiles graphs with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from backends.base import Availability, BackendError, Engine, Graph, Kernel, Precision, Quantizer, Surgery, Unavailable
from backends.cpu import cpu_name, instruction_sets

REMEDY = 'pip install -e "."'


class ONNXRuntimeBackend:
    """ONNX -> ONNX Runtime's static quantizer -> ONNX Runtime on the CPU."""

    name = "onnxruntime"
    rests = (Precision.F32,)  # in what a quantized graph computes what it does not quantize
    sources: tuple[str, ...] = ("backends.ort.engine", "backends.ort.kernels", "backends.onnx_graph", "backends.cpu")

    def availability(self) -> Availability:
        """Returns versions, devices, the CPU's name and instructions; or what to install."""
        try:
            versions = {name: metadata.version(name) for name in ("onnxruntime", "onnx")}
            import onnxruntime
        except (ImportError, metadata.PackageNotFoundError) as error:
            return Availability(available=False, reason=f"a package is missing: {error}", remedy=REMEDY)
        if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
            reason = "ONNX Runtime has no CPU provider"
            return Availability(available=False, reason=reason, remedy=REMEDY, versions=versions)
        details = {"cpu": cpu_name(), "isa": " ".join(instruction_sets())}
        return Availability(available=True, devices=("CPU",), versions=versions, details=details)

    def quantizers(self) -> Mapping[str, Quantizer]:
        """Returns the quantizer `ort`; its tool is imported at its first use."""
        from backends.ort.quantizer import ORTQuantizer

        return {"ort": ORTQuantizer()}

    def float_precisions(self) -> Sequence[Precision]:
        """Returns F32 alone: the CPU provider has few kernels of other floats. Raises Unavailable."""
        self._require()
        return [Precision.F32]

    def compile(self, graph: Graph, precision: Precision, options: Mapping[str, Any] | None = None) -> Engine:
        """Opens an ONNX graph; options are those of `engine.OPTIONS`. Raises Unavailable or BackendError."""
        self._require()
        from backends.ort.engine import ORTEngine

        return ORTEngine(graph, Precision(precision), options)

    def kept_in_int8(self, engine: Engine, keep: Sequence[str], kernels: Sequence[Kernel]) -> list[Kernel]:
        """Returns the int8 kernels that ran a kept node. A kernel that only moves int8 values computes nothing."""
        from backends.onnx_graph import MOVES, OnnxGraph, kept_nodes
        from backends.ort.engine import ORTEngine

        if not isinstance(engine, ORTEngine):
            raise BackendError(f"the keep-list of {type(engine).__name__} cannot be checked by ONNX Runtime")
        kept = kept_nodes(OnnxGraph(engine.graph.path), keep)
        return [
            kernel
            for kernel in kernels
            if kernel.precision == "int8" and kernel.type not in MOVES and not kept.keys().isdisjoint(kernel.originals)
        ]

    def surgery(self) -> type[Surgery]:
        """Returns the class that puts nodes of the quantizer's graphs back to float."""
        from backends.ort.rank import ORTSurgery

        return ORTSurgery

    def _require(self) -> None:
        found = self.availability()
        if not found.available:
            raise Unavailable(f"backend 'onnxruntime' cannot run: {found.reason}; {found.remedy}")
