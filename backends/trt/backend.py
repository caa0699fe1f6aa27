"""Describes TensorRT on this machine, lists its quantizers, and compiles graphs, emulated without a CUDA device."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from backends.base import Availability, BackendError, Engine, Graph, Kernel, Precision, Quantizer, Surgery, Unavailable
from backends.cpu import cpu_name, instruction_sets

REMEDY = 'pip install -e ".[trt]", or use --backend openvino'
AHEAD_OF_TIME = "builds engines ahead of time; no CUDA device: quality is emulated by ONNX Runtime, nothing is timed"
NO_PROVIDER = (
    'neither torch with CUDA nor pycuda (pip install -e ".[edge]"): quality is emulated by ONNX Runtime, '
    "nothing is timed"
)
_NEEDED = {
    "modelopt": "nvidia-modelopt",
    "onnx_graphsurgeon": "onnx-graphsurgeon",
    "onnxslim": "onnxslim",
    "lief": "lief",
    "onnxruntime": "onnxruntime",
}
_RTX_WHEELS = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx")


class TensorRTBackend:
    """ONNX -> ModelOpt -> TensorRT or TensorRT-RTX."""

    name = "trt"
    rests = (Precision.F32,)  # in what a quantized graph computes what it does not quantize
    sources: tuple[str, ...] = (
        "backends.trt.engine",
        "backends.trt.builder",
        "backends.trt.inspector",
        "backends.onnx_graph",
        "backends.trt.cuda",
        "backends.reference",
    )

    def availability(self) -> Availability:
        """Returns versions, devices and what this machine can do; or what is missing and what installs it.

        `details` holds `gpu` (names and compute capabilities) where there is one, else `cpu`; `isa` of the CPU; `can`.
        Where a GPU runs the engines, `device` is its name; `driver`, `cuda` and `clocks` are what else decides its
        times (see `cuda.identity`).
        """
        from backends.trt import builder, cuda

        missing = [package for module, package in _NEEDED.items() if not importlib.util.find_spec(module)]
        package = builder.package()
        here = cuda.devices()
        if package is None:
            if importlib.util.find_spec("tensorrt"):
                missing.insert(0, "tensorrt-rtx-cu13-libs (plain TensorRT builds only where there is a CUDA device)")
            else:
                missing.insert(0, "tensorrt-rtx-cu13-libs or tensorrt")
        if missing or package is None:
            return Availability(available=False, reason=f"packages are missing: {', '.join(missing)}", remedy=REMEDY)
        details = {"isa": " ".join(instruction_sets())}
        if here:
            details["gpu"] = ", ".join(f"{d.name} ({d.capability})" for d in here)
            details["can"] = "builds and runs engines" if cuda.provider() else NO_PROVIDER
            if cuda.provider():
                details |= {"device": here[0].name, **cuda.identity(here[0])}
        else:
            details["cpu"] = cpu_name()
            details["can"] = AHEAD_OF_TIME
        devices = tuple(d.name for d in here) or ("CPU (emulated)",)
        return Availability(True, devices, _versions(package), details, emulated=cuda.provider() is None)

    def quantizers(self) -> Mapping[str, Quantizer]:
        """Returns `modelopt` (int8; int4 weights for W4A16), `modelopt-torch` (int8, SmoothQuant), `modelopt-fp8`."""
        from backends.trt.modelopt import ModelOptQuantizer
        from backends.trt.modelopt_torch import ModelOptTorchQuantizer

        listed = (ModelOptQuantizer("int8"), ModelOptTorchQuantizer(), ModelOptQuantizer("fp8"))
        return {quantizer.name: quantizer for quantizer in listed}

    def float_precisions(self) -> Sequence[Precision]:
        """Returns F32, TF32 where the device has it, and F16; emulated without a device. Raises Unavailable."""
        self._require()
        from backends.trt.cuda import provider
        from backends.trt.engine import has_tf32

        return [Precision.F32, *([Precision.TF32] if provider() and has_tf32() else []), Precision.F16]

    def baselines(self) -> Sequence[Precision]:
        """Returns the float precisions that deserve a row. Without a device that is F32 alone: a speedup needs a timed
        base. F16 can still be built ahead of time."""
        from backends.trt.cuda import provider

        return [p for p in self.float_precisions() if p is Precision.F32 or provider()]

    def compile(self, graph: Graph, precision: Precision, options: Mapping[str, Any] | None = None) -> Engine:
        """Builds an ONNX graph; options are those of `engine.OPTIONS`. Raises Unavailable or BackendError."""
        self._require()
        from backends.trt.engine import make_engine

        return make_engine(graph, Precision(precision), options)

    def kept_in_int8(self, engine: Engine, keep: Sequence[str], kernels: Sequence[Kernel]) -> list[Kernel]:
        """Returns the kernels that ran a kept node in int8 or fp8. Elementwise nodes that are fused into a matmul's
        kernel are computed in float there, so of a kernel with several nodes only kept matmuls and convolutions
        count."""
        from backends.onnx_graph import CONVOLUTIONS, MATMULS, OnnxGraph, kept_nodes
        from backends.trt.engine import EmulatedEngine, TensorRTEngine

        if not isinstance(engine, EmulatedEngine | TensorRTEngine):
            raise BackendError(f"the keep-list of {type(engine).__name__} cannot be checked by TensorRT")
        kept = kept_nodes(OnnxGraph(engine.graph.path), keep)
        heavy = {name for name, kind in kept.items() if kind in MATMULS | CONVOLUTIONS}
        offending = []
        for kernel in kernels:
            names = heavy if len(kernel.originals) > 1 else kept.keys()
            if kernel.precision in ("int8", "fp8") and not names.isdisjoint(kernel.originals):
                offending.append(kernel)
        return offending

    def surgery(self) -> type[Surgery]:
        """Returns the class that puts nodes of ModelOpt's graphs back to float; ONNX Runtime computes the ranking."""
        from backends.qdq_surgery import QDQSurgery

        return QDQSurgery

    def _require(self) -> None:
        found = self.availability()
        if not found.available:
            raise Unavailable(f"backend 'trt' cannot run: {found.reason}; {found.remedy}")


def _versions(package: str) -> dict[str, str]:
    found = {}
    wheels = ("tensorrt",) if package == "tensorrt" else _RTX_WHEELS
    for name in (*wheels, "nvidia-modelopt", "onnxruntime"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
