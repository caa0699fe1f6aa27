"""TensorRT engines: on a CUDA device they run; without one the plan is built and ONNX Runtime computes the outputs.

An emulated engine computes the very graph that the plan was built from, Q/DQ nodes as they are defined, in floats: the
numbers that exact int8 arithmetic gives, up to rounding. Its time means nothing, and its kernels are those of the
graph: TensorRT does not open a plan without a driver, so which layers it fused is unknown here.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
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
    TensorInfo,
    check_threads,
    known_options,
    sha256_files,
)
from backends.reference import OnnxRuntimeEngine
from backends.trt import builder
from backends.trt.cuda import devices, provider
from backends.trt.onnx_graph import CONVOLUTIONS, MATMULS, OnnxGraph

OPTIONS: dict[str, Any] = {
    **builder.OPTIONS,
    "build": True,  # False: only emulate (nothing ships then, and the size is unknown)
    "cuda_graph": False,  # record the engine's kernels once and replay them
    "threads": None,  # of the emulation; None: all cores
    "rest": "f32",  # of a quantized graph: the type that its floats have
}
_PROFILED_RUNS = 3
_WEIGHTED = {"CONVOLUTION", "DECONVOLUTION", "GEMM", "MATRIX_MULTIPLY", "MATRIXMULTIPLY", "FULLYCONNECTED"}
_DATATYPES = [("int8", "int8"), ("fp8", "fp8"), ("e4m3", "fp8"), ("bf16", "bf16"), ("bfloat16", "bf16")]
_DATATYPES += [("half", "f16"), ("fp16", "f16"), ("float16", "f16"), ("float", "f32"), ("fp32", "f32")]


def make_engine(graph: Graph, precision: Precision, options: Mapping[str, Any] | None = None) -> Engine:
    """Build the plan of an ONNX graph and open it: on the device that is here, else emulated.

    F32, F16 and BF16 take a float graph; INT8 takes a graph with Q/DQ nodes and lets them say what is int8 or fp8.
    Raises BackendError for an option, a graph or a precision that does not fit, and when TensorRT refuses the graph.
    """
    if graph.format != "onnx":
        raise BackendError(f"TensorRT reads ONNX files, {graph.path.name} is {graph.format}")
    chosen = known_options(options, OPTIONS, "trt")
    builder.check_options(chosen)
    check_threads(chosen["threads"])
    if chosen["rest"] != "f32":
        raise BackendError(f"option 'rest' must be 'f32', in which TensorRT's Q/DQ graphs are, got {chosen['rest']!r}")
    found = OnnxGraph(graph.path)
    if precision == Precision.INT8 and not found.has_qdq():
        raise BackendError(f"{graph.path.name} holds no Q/DQ nodes: quantize it before compiling it as int8")
    if precision != Precision.INT8 and found.has_qdq():
        raise BackendError(f"{graph.path.name} is quantized: compile it as int8, not {precision}")
    own = tempfile.mkdtemp(prefix="pqk-trt-")
    folder = Path(chosen["cache_dir"] or own)
    try:
        built_from = graph
        if precision in (Precision.F16, Precision.BF16):
            built_from = builder.half_graph(graph, precision, Path(own))
        plan = builder.build_plan(built_from, chosen, folder) if chosen["build"] else None
        kind = provider()
        if kind is None or plan is None:
            return EmulatedEngine(graph, built_from, plan, precision, chosen, Path(own))
        cuda = kind()
        try:
            return TensorRTEngine(graph, plan, precision, chosen, cuda, Path(own))
        except BaseException:
            cuda.close()
            raise
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)
        raise


class _PlanEngine(Engine):
    """What both kinds share: the plan that ships, and a folder of their own that goes with them."""

    def __init__(self, graph: Graph, plan: Path | None, precision: Precision, own: Path) -> None:
        self.graph = graph
        self.precision = precision
        self.plan = plan
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self._forget = weakref.finalize(self, shutil.rmtree, str(own), ignore_errors=True)

    @property
    def size_bytes(self) -> int:
        """Bytes of the plan file. Raises BackendError when it was not built."""
        if self.plan is None:
            raise BackendError(f"{self.graph.path.name} was not built (option 'build'): nothing ships, no size")
        return self.plan.stat().st_size

    def save(self, path: Path | str) -> Path:
        """Copy the plan to `path` (`.plan`) and its manifest beside it; returns the plan's path."""
        if self.plan is None:
            raise BackendError(f"{self.graph.path.name} was not built (option 'build'): there is no plan to save")
        target = Path(path)
        if target.suffix != ".plan":
            raise BackendError(f"a TensorRT engine is saved as .plan, got {target.name!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        builder.write_whole(target, self.plan.read_bytes())
        builder.write_whole(target.with_suffix(".json"), self.plan.with_suffix(".json").read_bytes())
        return target

    def close(self) -> None:
        self._forget()


class EmulatedEngine(_PlanEngine):
    """A built plan whose outputs ONNX Runtime computes on the CPU from the graph that the plan was built from."""

    measured = "emulated"

    def __init__(
        self,
        graph: Graph,
        built_from: Graph,
        plan: Path | None,
        precision: Precision,
        options: Mapping[str, Any],
        own: Path,
    ) -> None:
        super().__init__(graph, plan, precision, own)
        self._built_from = built_from
        self._emulation = OnnxRuntimeEngine(built_from, {"threads": options["threads"], "fuse_qdq": False})

    def _infer(self, feeds: Feeds) -> Feeds:
        return self._emulation.infer(feeds)

    def kernels(self) -> list[Kernel]:
        """The graph's nodes in order, their precision read from its Q/DQ nodes and types; times are 0: none is known.

        A strongly typed network must compute in these precisions, but which nodes become one kernel is decided when
        the plan meets a device. `implementation` says so: 'graph'.
        """
        graph = OnnxGraph(self._built_from.path)
        return [
            Kernel(n.name, n.op_type, "graph", graph.precision(n), 0.0, graph.flops(n), (n.name,)) for n in graph.work()
        ]

    def close(self) -> None:
        self._emulation.close()
        super().close()


class TensorRTEngine(_PlanEngine):
    """A plan on a CUDA device: one context, one stream, static buffers."""

    measured = "engine"

    def __init__(
        self, graph: Graph, plan: Path, precision: Precision, options: Mapping[str, Any], cuda: Any, own: Path
    ) -> None:
        """Raises BackendError when plan, TensorRT and device do not fit together."""
        super().__init__(graph, plan, precision, own)
        self._module = builder.load()
        check_plan(plan, self._module)
        self._cuda = cuda
        self._logger = builder.make_logger(self._module)
        self._runtime = self._module.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            reason = self._logger.errors[0].splitlines()[0] if self._logger.errors else "no reason given"
            raise BackendError(f"{plan.name} cannot be loaded on this device: {reason}")
        self._context = self._engine.create_execution_context()
        self._arrays: dict[str, np.ndarray] = {}
        self._addresses: dict[str, int] = {}
        for info in (*self.inputs, *self.outputs):
            self._bind(info)
        self._launch = self._enqueue
        if options["cuda_graph"]:
            self._enqueue()  # the first run sets up what may not happen while recording
            self._launch = self._cuda.capture(self._enqueue)

    def _bind(self, info: TensorInfo) -> None:
        dtype = self._module.nptype(self._engine.get_tensor_dtype(info.name))
        shape = tuple(self._engine.get_tensor_shape(info.name))
        if shape != info.shape or np.dtype(dtype).name != info.dtype:
            raise BackendError(
                f"the engine's {info.name!r} is {np.dtype(dtype).name}{list(shape)}, not as in its graph"
            )
        self._arrays[info.name] = np.empty(shape, dtype)
        self._addresses[info.name] = self._cuda.allocate(self._arrays[info.name].nbytes)
        self._context.set_tensor_address(info.name, self._addresses[info.name])

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise BackendError(f"TensorRT could not run {self.graph.path.name}: {self._logger.errors[:1]}")

    def _upload(self, feeds: Feeds) -> None:
        if self._context is None:
            raise BackendError("this engine is closed")
        for name, array in feeds.items():
            self._cuda.upload(self._addresses[name], array)

    def _infer(self, feeds: Feeds) -> Feeds:
        self._upload(feeds)
        self._launch()
        found = {}
        for info in self.outputs:
            self._cuda.download(self._addresses[info.name], self._arrays[info.name])
            found[info.name] = self._arrays[info.name].copy()
        return found

    def device_ms(self, feeds: Feeds) -> float:
        """Milliseconds of one run on the device between two CUDA events, without the copies."""
        self._upload(feeds)
        return float(self._cuda.elapsed_ms(self._launch))

    def kernels(self) -> list[Kernel]:
        """The engine's layers from TensorRT's inspector, with mean times of a few runs on zeros (microseconds)."""
        if self._context is None:
            raise BackendError("this engine is closed")
        form = self._module.LayerInformationFormat.JSON
        text = self._engine.create_engine_inspector().get_engine_information(form)
        self._upload({t.name: np.zeros(t.shape, t.dtype) for t in self.inputs})
        return layer_kernels(text, self._layer_times(), OnnxGraph(self.graph.path))

    def _layer_times(self) -> dict[str, float]:
        times: dict[str, float] = {}

        class Profiler(self._module.IProfiler):  # type: ignore[name-defined]
            def __init__(self, base: Any) -> None:
                base.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times[layer_name] = times.get(layer_name, 0.0) + 1e3 * ms / _PROFILED_RUNS

        # A context of its own: a profiler makes every run synchronous, and cannot be taken off again.
        context = self._engine.create_execution_context()
        context.profiler = Profiler(self._module.IProfiler)
        for name, address in self._addresses.items():
            context.set_tensor_address(name, address)
        for _ in range(_PROFILED_RUNS):
            context.execute_async_v3(self._cuda.stream)
            self._cuda.synchronize()
        return times

    def close(self) -> None:
        if self._context is not None:
            self._launch = self._enqueue
            self._cuda.synchronize()
            self._context = self._engine = self._runtime = None
            self._cuda.close()
        super().close()


def check_plan(plan: Path, module: Any) -> None:
    """Raises BackendError unless the plan is whole and was built by this TensorRT for the device that is here."""
    manifest = builder.read_manifest(plan)
    made_by = f"{manifest.get('tensorrt')} {manifest.get('version')}"
    here = f"{builder.flavour(module)} {module.__version__}"
    if manifest.get("plan_sha256") != sha256_files([plan]):
        raise BackendError(f"{plan} is damaged: its sha256 is not the one in its manifest")
    if made_by != here:
        raise BackendError(f"{plan.name} was built by {made_by}, this is {here}: build it again")
    found = [device.capability for device in devices()]
    if manifest.get("target") not in found:
        raise BackendError(
            f"{plan.name} was built for {manifest.get('target')}, the devices here are {found or 'none'}"
        )


def layer_kernels(inspected: str, times: Mapping[str, float], graph: OnnxGraph) -> list[Kernel]:
    """Kernels of the inspector's JSON (detailed verbosity; TensorRT's Developer Guide, 'Engine Inspector').

    A layer's `Metadata` names its ONNX nodes as `[ONNX Layer: NAME]`; a node's FLOPs go to the first layer that names
    it with a matmul's or convolution's type, else to the first one. What no layer names becomes a kernel 'unknown'.
    A layer's precision is the one of its first input, in whose type a matmul reads its operands.
    """
    layers = [layer for layer in json.loads(inspected).get("Layers", []) if isinstance(layer, dict)]
    work = {n.name: graph.flops(n) for n in graph.work() if n.op_type in MATMULS | CONVOLUTIONS}
    names = [re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer.get("Metadata", "")) for layer in layers]
    owner: dict[str, int] = {}
    order = sorted(range(len(layers)), key=lambda k: (_kind(layers[k]) not in _WEIGHTED, k))
    for k in order:
        for name in names[k]:
            owner.setdefault(name, k)
    kernels = []
    for k, layer in enumerate(layers):
        title = str(layer.get("Name", f"layer {k}"))
        flops = sum(work[name] for name in dict.fromkeys(names[k]) if name in work and owner[name] == k)
        tactic = str(layer.get("TacticName") or layer.get("LayerType", ""))
        precision, originals = _layer_precision(layer), tuple(dict.fromkeys(names[k]))
        kernels.append(
            Kernel(title, str(layer.get("LayerType", "")), tactic, precision, times.get(title, 0.0), flops, originals)
        )
    missing = tuple(name for name in work if name not in owner)
    if missing:
        total = sum(work[name] for name in missing)
        kernels.append(Kernel("(not attributed)", "unknown", "unknown", "unknown", 0.0, total, missing))
    return kernels


def _kind(layer: Mapping[str, Any]) -> str:
    return str(layer.get("ParameterType") or layer.get("LayerType", "")).upper()


def _layer_precision(layer: Mapping[str, Any]) -> str:
    ports = layer.get("Inputs") or layer.get("Outputs") or [{}]
    text = str(ports[0].get("Format/Datatype") or ports[0].get("Format") or "").lower()
    return next((precision for word, precision in _DATATYPES if word in text), "unknown")
