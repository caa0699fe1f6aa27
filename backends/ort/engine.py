"""Runs ONNX graphs on the CPU with ONNX Runtime, and reports the kernels that its profiler saw."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import (
    BackendError,
    Engine,
    Feeds,
    Graph,
    Kernel,
    Precision,
    check_threads,
    first_line,
    known_options,
)
from backends.onnx_graph import OnnxGraph
from backends.ort.kernels import executed_kernels

OPTIONS: dict[str, Any] = {
    "threads": None,  # None: all cores that the process may use
    "rest": "f32",  # float precision of what an int8 graph leaves unquantized: 'best' is f32 too
    "cache_dir": None,  # not used: loading a graph takes about a second, and the runtime keeps nothing of it
}
_PROFILED_RUNS = 3


class ORTEngine(Engine):
    """A session of the CPU provider with all graph optimizations, one run at a time.

    F32 takes a float graph. INT8 takes a graph with Q/DQ nodes: what they enclose runs in int8 kernels where the
    runtime has one, the rest in f32; `kernels` says which.
    """

    def __init__(self, graph: Graph, precision: Precision, options: Mapping[str, Any] | None = None) -> None:
        """Raises BackendError for an option, a graph or a precision that does not fit, or that the runtime refuses."""
        if graph.format != "onnx":
            raise BackendError(f"ONNX Runtime reads ONNX files, {graph.path.name} is {graph.format}")
        self.graph = graph
        self.precision = precision
        self.options = known_options(options, OPTIONS, "onnxruntime")
        check_threads(self.options["threads"])
        if self.options["rest"] not in ("best", Precision.F32):
            raise BackendError(f"option 'rest' must be 'best' or 'f32' for ONNX Runtime, got {self.options['rest']!r}")
        if precision not in (Precision.F32, Precision.INT8):
            raise BackendError(f"ONNX Runtime runs f32 and int8 on the CPU here, not {precision}")
        found = OnnxGraph(graph.path)
        quantized = found.has_qdq()
        if precision == Precision.INT8 and not quantized and not graph.left_float:
            raise BackendError(f"{graph.path.name} holds no Q/DQ nodes: quantize it before compiling it as int8")
        if precision == Precision.F32 and quantized:
            raise BackendError(f"{graph.path.name} is quantized: compile it as int8, not {precision}")
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        # It makes one Gemm of MatMul and Add before int8 kernels are chosen: there is none for one with a float bias.
        self._left_out = ["MatMulAddFusion"] if _adds_floats(found) else []
        self._session: Any = self._start(None)

    @property
    def threads(self) -> int:
        """Threads that the session uses."""
        return int(self.options["threads"] or _allowed_cores())

    def _start(self, profile: Path | None) -> Any:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        # By itself it counts the cores of the machine, and pins its threads to cores that may not be allowed.
        settings.intra_op_num_threads = self.threads
        # Its threads wait in a loop during a run; after it they would take the cores from another engine.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        if profile is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(profile)
        try:
            return onnxruntime.InferenceSession(
                str(self.graph.path), settings, providers=["CPUExecutionProvider"], disabled_optimizers=self._left_out
            )
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load {self.graph.path.name}: {first_line(error)}") from error

    def _infer(self, feeds: Feeds) -> Feeds:
        if self._session is None:
            raise BackendError("this engine is closed")
        return self._run(self._session, feeds)

    def _run(self, session: Any, feeds: Feeds) -> Feeds:
        names = [t.name for t in self.outputs]
        found = session.run(names, {name: np.ascontiguousarray(array) for name, array in feeds.items()})
        return {name: _floats(array) for name, array in zip(names, found, strict=True)}

    def kernels(self) -> list[Kernel]:
        """Returns executed nodes with their precision, mean time of a few runs on zeros (microseconds) and FLOPs.

        They run in a session of their own, which profiles; its first run is slow and does not count.
        """
        if self._session is None:
            raise BackendError("this engine is closed")
        zeros = {t.name: np.zeros(t.shape, t.dtype) for t in self.inputs}
        with tempfile.TemporaryDirectory(prefix="pqk-profile-") as folder:
            session = self._start(Path(folder) / "run")
            for _ in range(1 + _PROFILED_RUNS):
                self._run(session, zeros)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return executed_kernels(events, OnnxGraph(self.graph.path), first=1)

    def planned_flops(self) -> float | None:
        graph = OnnxGraph(self.graph.path)
        return sum(graph.flops(node) for node in graph.work() if graph.precision(node) == "int8")

    def close(self) -> None:
        self._session = None


def _adds_floats(graph: OnnxGraph) -> bool:
    """Returns whether a float constant is added to the result of a quantized matmul (`ort` stores it as int32)."""
    quantized = {n.output[0] for n in graph.work() if n.op_type == "MatMul" and graph.precision(n) == "int8"}
    for node in graph.nodes:
        if node.op_type == "Add" and not quantized.isdisjoint(node.input):
            makers = [graph.maker.get(name) for name in node.input if name not in graph.live]
            if any(maker is None or maker.op_type != "DequantizeLinear" for maker in makers):
                return True
    return False


def _allowed_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _floats(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.kind == "f" and array.dtype != np.float32 else array
