"""Runs TensorRT engines on a CUDA device; without one builds the plan and lets ONNX Runtime compute the outputs.

An emulated engine computes the very graph that the plan was built from, Q/DQ nodes as they are defined, in floats: the
numbers that exact int8 arithmetic gives, up to rounding. Its time means nothing, and its kernels are those of the
graph: TensorRT does not open a plan without a driver, so which layers it fused is unknown here.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import (
    Array,
    BackendError,
    DeviceArray,
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
from backends.files import write_whole
from backends.onnx_graph import OnnxGraph
from backends.reference import OnnxRuntimeEngine
from backends.trt import builder
from backends.trt.cuda import Buffer, CudaArray, HostBuffer, devices, provider
from backends.trt.inspector import layer_kernels as layer_kernels

OPTIONS: dict[str, Any] = {
    **builder.OPTIONS,
    "build": True,  # False: only emulate (nothing ships then, and the size is unknown)
    "cuda_graph": False,  # record the engine's kernels once and replay them
    "threads": None,  # of the emulation; None: all cores
    "rest": "f32",  # of a quantized graph: the type that its floats have
}
_PROFILED_RUNS = 3


def make_engine(graph: Graph, precision: Precision, options: Mapping[str, Any] | None = None) -> Engine:
    """Builds the plan of an ONNX graph and opens it: on the device of this machine, else emulated.

    F32, TF32, F16 and BF16 take a float graph; INT8 takes a graph with Q/DQ nodes, which say what is int8 or fp8. Only
    TF32 lets products of 32-bit floats be rounded to it: TensorRT would do so by default.
    Raises BackendError for an option, a graph or a precision that does not fit, and when TensorRT refuses the graph.
    """
    if graph.format != "onnx":
        raise BackendError(f"TensorRT reads ONNX files, {graph.path.name} is {graph.format}")
    chosen = known_options(options, OPTIONS, "trt")
    builder.check_options(chosen)
    check_threads(chosen["threads"])
    if chosen["rest"] != "f32":
        raise BackendError(f"option 'rest' must be 'f32', in which TensorRT's Q/DQ graphs are, got {chosen['rest']!r}")
    kind = provider()
    if precision == Precision.TF32 and (kind is None or not has_tf32()):
        raise BackendError("tf32 is computed by CUDA devices of compute capability 8.0 and above, and none is here")
    found = OnnxGraph(graph.path)
    if precision == Precision.INT8 and not found.has_qdq() and not graph.left_float:
        raise BackendError(f"{graph.path.name} holds no Q/DQ nodes: quantize it before compiling it as int8")
    if precision != Precision.INT8 and found.has_qdq():
        raise BackendError(f"{graph.path.name} is quantized: compile it as int8, not {precision}")
    own = tempfile.mkdtemp(prefix="pqk-trt-")
    folder = Path(chosen["cache_dir"] or own)
    try:
        built_from = graph
        if precision in (Precision.F16, Precision.BF16):
            built_from = builder.half_graph(graph, precision, Path(own))
        tf32 = precision == Precision.TF32
        plan = builder.build_plan(built_from, chosen, folder, tf32) if chosen["build"] else None
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


def has_tf32() -> bool:
    """Returns whether the device here multiplies in TF32: from compute capability 8.0 on (CUDA C++ guide)."""
    here = devices()
    return bool(here) and int(here[0].capability.split(".")[0]) >= 8


class _PlanEngine(Engine):
    """The common part of both kinds: the plan that ships, and a temporary folder that is removed with the engine."""

    def __init__(self, graph: Graph, plan: Path | None, precision: Precision, own: Path) -> None:
        self.graph = graph
        self.precision = precision
        self.plan = plan
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self._forget = weakref.finalize(self, shutil.rmtree, str(own), ignore_errors=True)

    @property
    def size_bytes(self) -> int:
        """Returns the bytes of the plan file. Raises BackendError when it was not built."""
        if self.plan is None:
            raise BackendError(f"{self.graph.path.name} was not built (option 'build'): nothing ships, no size")
        return self.plan.stat().st_size

    def save(self, path: Path | str) -> Path:
        """Copys the plan to `path` (`.plan`) and its manifest beside it; returns the plan's path."""
        if self.plan is None:
            raise BackendError(f"{self.graph.path.name} was not built (option 'build'): there is no plan to save")
        target = Path(path)
        if target.suffix != ".plan":
            raise BackendError(f"a TensorRT engine is saved as .plan, got {target.name!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, self.plan.read_bytes())
        write_whole(target.with_suffix(".json"), self.plan.with_suffix(".json").read_bytes())
        return target

    def planned_flops(self) -> float | None:
        graph = OnnxGraph(self.graph.path)
        return sum(graph.flops(node) for node in graph.work() if graph.precision(node) in ("int8", "fp8"))

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
        """Returns the graph's nodes in order, with the precision of its Q/DQ nodes and types; times are 0, not known.

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
    """A plan on a CUDA device: one context, one stream, static buffers, and page-locked host memory for every copy."""

    measured = "engine"
    on_device = True

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
        self._host: dict[str, HostBuffer] = {}
        self._buffers: dict[str, Buffer] = {}
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
        self._host[info.name] = self._cuda.pinned(shape, dtype)
        self._buffers[info.name] = self._cuda.allocate(self._host[info.name].array.nbytes)
        self._context.set_tensor_address(info.name, self._buffers[info.name].address)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise BackendError(f"TensorRT could not run {self.graph.path.name}: {self._logger.errors[:1]}")

    def _upload(self, feeds: Mapping[str, Array]) -> None:
        if self._context is None:
            raise BackendError("this engine is closed")
        for name, array in feeds.items():
            if isinstance(array, CudaArray) and isinstance(array.cuda, type(self._cuda)):
                self._cuda.copy(self._buffers[name], array.buffer, self._host[name].array.nbytes)
                continue
            self._host[name].array[...] = array.numpy() if isinstance(array, DeviceArray) else array
            self._cuda.upload(self._buffers[name], self._host[name])

    def _infer(self, feeds: Mapping[str, Array]) -> Feeds:
        self._upload(feeds)
        spent = self._cuda.timed(self._launch)
        for info in self.outputs:
            self._cuda.download(self._host[info.name], self._buffers[info.name])
        self._finish(spent)
        return {info.name: self._host[info.name].array.copy() for info in self.outputs}

    def infer_on_device(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Runs once; each output is copied on the device into an array of its own, which later runs leave alone."""
        self._upload(self._checked(feeds))
        spent = self._cuda.timed(self._launch)
        made: dict[str, Array] = {}
        for info in self.outputs:
            host = self._host[info.name].array
            buffer = self._cuda.allocate(host.nbytes)
            self._cuda.copy(buffer, self._buffers[info.name], host.nbytes)
            made[info.name] = CudaArray(self._cuda, buffer, host.shape, host.dtype)
        self._finish(spent)
        return made

    def _finish(self, spent: Callable[[], float]) -> None:
        """Waits for the device, so that results may be read and the next run may overwrite what this one read."""
        self._cuda.synchronize()
        self.last_device_ms = spent()

    def device_ms(self, feeds: Feeds) -> float:
        """Runs once and returns the milliseconds on the device between two CUDA events, without the copies."""
        self._upload(feeds)
        spent = self._cuda.timed(self._launch)
        self._finish(spent)
        assert self.last_device_ms is not None
        return self.last_device_ms

    def kernels(self) -> list[Kernel]:
        """Returns the layers from TensorRT's inspector, with mean times of a few runs on zeros (microseconds)."""
        if self._context is None:
            raise BackendError("this engine is closed")
        form = self._module.LayerInformationFormat.JSON
        text = self._engine.create_engine_inspector().get_engine_information(form)
        self._upload({t.name: np.zeros(t.shape, t.dtype) for t in self.inputs})
        self._cuda.synchronize()
        return layer_kernels(
            text, self._layer_times(), OnnxGraph(self.graph.path), tf32=self.precision == Precision.TF32
        )

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
        for name, buffer in self._buffers.items():
            context.set_tensor_address(name, buffer.address)
        for _ in range(_PROFILED_RUNS):
            context.execute_async_v3(self._cuda.stream)
            self._cuda.synchronize()
        return times

    def close(self) -> None:
        if self._context is not None:
            self._launch = self._enqueue
            self._cuda.synchronize()
            self._context = self._engine = self._runtime = None
            self._buffers, self._host = {}, {}
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
