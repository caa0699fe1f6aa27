"""Describes OpenVINO on this machine, lists its quantizers, and compiles graphs with it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any, ClassVar

from backends.base import (
    Availability,
    BackendError,
    Engine,
    Graph,
    Kernel,
    Pieces,
    Precision,
    Quantizer,
    Surgery,
    Unavailable,
)
from backends.cpu import instruction_sets

REMEDY = 'pip install -e ".[openvino]"'
INC = "neural-compressor-pt"


class OpenVINOBackend:
    """ONNX -> NNCF, or torch -> Intel Neural Compressor -> OpenVINO on the CPU."""

    name = "openvino"
    sources: tuple[str, ...] = ("backends.openvino.engine", "backends.openvino.flops", "backends.cpu")
    counting: ClassVar[Mapping[str, Any]] = {"perf_count": True}

    def availability(self) -> Availability:
        """Returns versions, devices, the CPU's name and instructions, OpenVINO's capabilities; or what to install."""
        try:
            import openvino as ov

            versions = {name: metadata.version(name) for name in ("openvino", "nncf")}
        except (ImportError, metadata.PackageNotFoundError) as error:
            return Availability(available=False, reason=f"a package is missing: {error}", remedy=REMEDY)
        with contextlib.suppress(metadata.PackageNotFoundError):  # only the quantizer `inc` needs it
            versions[INC] = metadata.version(INC)
        core = ov.Core()
        devices = tuple(core.available_devices)
        if "CPU" not in devices:
            return Availability(
                available=False, reason="OpenVINO finds no CPU device", remedy=REMEDY, versions=versions
            )
        details = {
            "cpu": str(core.get_property("CPU", "FULL_DEVICE_NAME")).strip(),
            "capabilities": " ".join(sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))),
            "isa": " ".join(instruction_sets()),
        }
        return Availability(available=True, devices=devices, versions=versions, details=details)

    def quantizers(self) -> Mapping[str, Quantizer]:
        """Returns the quantizers by name; their tools are imported at their first use."""
        from backends.openvino.inc import INCQuantizer
        from backends.openvino.nncf import NNCFQuantizer

        return {"nncf": NNCFQuantizer(), "inc": INCQuantizer()}

    def float_precisions(self) -> Sequence[Precision]:
        """Returns F32, and BF16 where the CPU computes in it; the last is the fastest. Raises Unavailable."""
        self._require()
        from backends.openvino.engine import best_float

        return list(dict.fromkeys([Precision.F32, best_float()]))

    def compile(self, graph: Graph, precision: Precision, options: Mapping[str, Any] | None = None) -> Engine:
        """Compiles an ONNX or IR graph; options are those of `engine.OPTIONS`. Raises Unavailable or BackendError."""
        self._require()
        from backends.openvino.engine import OpenVINOEngine

        return OpenVINOEngine(graph, Precision(precision), options)

    def kept_in_int8(self, engine: Engine, keep: Sequence[str], kernels: Sequence[Kernel]) -> list[Kernel]:
        """Returns the kernels of `keep.check_keep`. Raises BackendError for an engine of another backend."""
        from backends.openvino.engine import OpenVINOEngine
        from backends.openvino.keep import check_keep

        if not isinstance(engine, OpenVINOEngine):
            raise BackendError(f"the keep-list of {type(engine).__name__} cannot be checked by OpenVINO")
        return check_keep(engine, keep, kernels)

    def forms(self, graph: Graph) -> Mapping[str, Mapping[str, Any]]:
        """Returns the form of an IR whose linear layers are 1x1 convolutions, where they are work enough to matter."""
        from backends.openvino.engine import read_model
        from backends.openvino.linear import linear_nodes

        names = linear_nodes(read_model(graph.path)) if graph.format == "openvino" else []
        return {"linear layers as 1x1 convolutions": {"as_convolutions": names}} if names else {}

    def surgery(self) -> type[Surgery]:
        """Returns the class that puts nodes of NNCF's and INC's graphs back to float in the IR."""
        from backends.openvino.rank import IRSurgery

        return IRSurgery

    def pieces(self) -> Pieces:
        """Returns what cuts graphs into parts that are timed alone."""
        from backends.openvino.pieces import OpenVINOPieces

        return OpenVINOPieces()

    def _require(self) -> None:
        found = _found_once()
        if not found.available:
            raise Unavailable(f"backend 'openvino' cannot run: {found.reason}; {found.remedy}")


@cache
def _found_once() -> Availability:
    """Returns what `availability` does, looked for once per process: each graph that is compiled asks."""
    return OpenVINOBackend().availability()
