"""A CUDA device and TensorRT, played by a queue and ONNX Runtime: the engine's own logic runs where no GPU is.

The doubles are strict where the real ones are. Work that is queued happens at `synchronize` and not before, in order,
and reads host memory only then: a buffer that is overwritten too early, or read too early, gives wrong numbers. Memory
is known by its address, copies must fit, a run needs every address, a plan of another flag is another plan. They say
nothing about the real libraries.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from backends.base import BackendError
from backends.trt.cuda import Buffer, Device, HostBuffer

DEVICE = Device("NVIDIA Double", "8.9", "0000:3B:00.0")
MEMORY: dict[int, np.ndarray] = {}
_BY_STREAM: dict[int, FakeCuda] = {}
RUN_MS = 0.25


class FakeCuda:
    """A provider whose stream is a list of what is still to be done. `moved` counts bytes by direction."""

    def __init__(self) -> None:
        self.stream = len(_BY_STREAM) + 1
        _BY_STREAM[self.stream] = self
        self.closed = False
        self.queue: list[Callable[[], None]] = []
        self.moved = {"up": 0, "down": 0, "on the device": 0}

    def allocate(self, size: int) -> Buffer:
        address = 4096 * (len(MEMORY) + 1)
        MEMORY[address] = np.full(size, 0xAB, np.uint8)
        return Buffer(address, None)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> HostBuffer:
        return HostBuffer(np.empty(shape, dtype), None)

    def upload(self, target: Buffer, source: HostBuffer) -> None:
        self._later("up", target.address, lambda: source.array, source.array.nbytes)

    def download(self, target: HostBuffer, source: Buffer) -> None:
        size = target.array.nbytes
        self.moved["down"] += size

        def write() -> None:
            target.array.reshape(-1).view(np.uint8)[:] = MEMORY[source.address][:size]

        self.queue.append(write)

    def copy(self, target: Buffer, source: Buffer, size: int) -> None:
        self._later("on the device", target.address, lambda: MEMORY[source.address][:size], size)

    def _later(self, way: str, address: int, read: Callable[[], np.ndarray], size: int) -> None:
        self.moved[way] += size

        def write() -> None:
            assert len(MEMORY[address]) == size
            MEMORY[address][:] = np.frombuffer(read().tobytes(), np.uint8)

        self.queue.append(write)

    def timed(self, run: Callable[[], None]) -> Callable[[], float]:
        run()

        def spent() -> float:
            assert not self.queue, "an event is read before the stream has come to it"
            return RUN_MS

        return spent

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def synchronize(self) -> None:
        while self.queue:
            self.queue.pop(0)()

    def close(self) -> None:
        self.synchronize()
        self.closed = True


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.addresses = engine, dict[str, int]()

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        ports = self.engine.ports
        if set(self.addresses) != set(ports):
            return False
        addresses = dict(self.addresses)

        def work() -> None:
            feeds = {}
            for port in self.engine.session.get_inputs():
                value = MEMORY[addresses[port.name]].view(np.float32).reshape(port.shape)
                feeds[port.name] = _to_tf32(value) if self.engine.tf32 else value
            names = [port.name for port in self.engine.session.get_outputs()]
            for name, array in zip(names, self.engine.session.run(names, feeds), strict=True):
                MEMORY[addresses[name]][:] = np.frombuffer(array.tobytes(), np.uint8)

        _BY_STREAM[stream].queue.append(work)
        return True


def _to_tf32(x: np.ndarray) -> np.ndarray:
    """Rounds to the 10 bits of mantissa that TF32 has, half away from zero."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


class _Engine:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.session = onnxruntime.InferenceSession(plan["path"], providers=["CPUExecutionProvider"])
        self.ports = {p.name: p for p in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.tf32 = plan["tf32"]

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self.ports[name].shape)

    def get_tensor_dtype(self, name: str) -> str:
        return "FLOAT"

    def create_execution_context(self) -> _Context:
        return _Context(self)

    def create_engine_inspector(self) -> Any:
        tensor = {"Name": "x", "Format": "Row major linear FP32 format (kLINEAR)", "DataType": "Float"}
        layers = [{"Name": "all", "LayerType": "gemm", "Inputs": [tensor], "Outputs": [tensor]}]
        return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": layers, "I/O Tensors": []}))


class _Config:
    """As TensorRT's: TF32 is allowed unless somebody says otherwise."""

    def __init__(self) -> None:
        self.flags = {"TF32"}

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: object, size: int) -> None:
        pass

    def create_timing_cache(self, content: bytes) -> Any:
        return content

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
        pass

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"timings")


class _Builder:
    def __init__(self, logger: object) -> None:
        pass

    def create_network(self, flags: int) -> dict[str, str]:
        return {}

    def create_builder_config(self) -> _Config:
        return _Config()

    def build_serialized_network(self, network: dict[str, str], config: _Config) -> bytes:
        return json.dumps({"path": network["path"], "tf32": "TF32" in config.flags}).encode()


class _Parser:
    num_errors = 0

    def __init__(self, network: dict[str, str], logger: object) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network["path"] = path
        return True


def tensorrt() -> Any:
    """The module, as `builder.load` gives it."""

    class Logger:
        ERROR, INTERNAL_ERROR = 1, 0

    class Profiler:
        def report_layer_time(self, layer_name: str, ms: float) -> None: ...

    return SimpleNamespace(
        __name__="tensorrt",
        __version__="11.0.0",
        ILogger=Logger,
        IProfiler=Profiler,
        Builder=_Builder,
        OnnxParser=_Parser,
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: _Engine(json.loads(plan))),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        BuilderFlag=SimpleNamespace(TF32="TF32"),
        ProfilingVerbosity=SimpleNamespace(DETAILED=1),
        MemoryPoolType=SimpleNamespace(WORKSPACE=0),
        LayerInformationFormat=SimpleNamespace(JSON=1),
        nptype={"FLOAT": np.float32}.__getitem__,
    )


def install(monkeypatch: Any, made: list[FakeCuda], device: Device = DEVICE) -> None:
    """Puts the doubles in the place of the device and of TensorRT; every provider that is made is added to `made`."""
    from backends.trt import builder, cuda, engine

    def provider() -> FakeCuda:
        made.append(FakeCuda())
        return made[-1]

    for module in (builder, cuda, engine):
        monkeypatch.setattr(module, "devices", lambda: [device])
    for module in (cuda, engine):
        monkeypatch.setattr(module, "provider", lambda: provider)
    monkeypatch.setattr(builder, "load", tensorrt)
    monkeypatch.setattr(builder, "package", lambda: "tensorrt")


def no_array(*_: object) -> np.ndarray:
    """Stands in for `numpy` of a device array that nobody may copy to the host."""
    raise BackendError("a device array was copied to the host")
