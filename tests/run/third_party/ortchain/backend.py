"""A toolchain of another package: ONNX Runtime with its own static quantizer.

With ORTCHAIN_EMULATED=1 its engines say that they emulate, as those of a toolchain without its device do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from backends.base import (
    Availability,
    BackendError,
    Engine,
    Feeds,
    Graph,
    Kernel,
    Precision,
    Quantizer,
    QuantSpec,
    Source,
    sha256_files,
)
from backends.reference import OnnxRuntimeEngine


class _Reader:
    def __init__(self, items: Iterable[Feeds], wanted: int) -> None:
        self.items: Iterator[Feeds] = iter(items)
        self.left = wanted

    def get_next(self) -> dict[str, Any] | None:
        self.left -= 1
        item = next(self.items, None) if self.left >= 0 else None
        return dict(item) if item is not None else None


class OrtQuantizer:
    name = "ortq"
    starts_from = "graph"
    sources: tuple[str, ...] = ("ortchain.backend",)

    def quantize(self, source: Source, spec: QuantSpec, calibration: Iterable[Feeds]) -> Graph:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        if spec.keep:
            raise BackendError("ortq has no keep-list")
        path = spec.output_dir / f"{source.name}.onnx"
        quantize_static(
            str(source.graph.path),
            str(path),
            _Reader(calibration, spec.calibration_samples),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=spec.weights == "per_channel",
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
            extra_options={"ActivationSymmetric": True},
        )
        return Graph(path, source.graph.inputs, source.graph.outputs, sha256_files([path]))

    def notes(self) -> Sequence[str]:
        return ["quantized by ortq"]


class OrtEngine(OnnxRuntimeEngine):
    measured = "emulated" if os.environ.get("ORTCHAIN_EMULATED") else "engine"


class OrtChain:
    name = "ortchain"
    sources: tuple[str, ...] = ("ortchain.backend", "backends.reference")

    def availability(self) -> Availability:
        return Availability(available=True, devices=("CPU",), versions={"ortchain": "0.1"}, details={"cpu": "any"})

    def quantizers(self) -> Mapping[str, Quantizer]:
        return {"ortq": OrtQuantizer()}

    def float_precisions(self) -> Sequence[Precision]:
        return [Precision.F32]

    def compile(self, graph: Graph, precision: Precision, options: Mapping[str, Any] | None = None) -> Engine:
        return OrtEngine(graph)

    def kept_in_int8(self, engine: Engine, keep: Sequence[str], kernels: Sequence[Kernel]) -> list[Kernel]:
        return []
