"""Finds the CUDA device and gives buffers, copies, events and graphs on it through torch.cuda or pycuda.

Both providers offer the same few calls, so that an engine runs in a process with torch and on a host without it. All
work of a provider goes to one stream, in order; host memory is page-locked, without which no copy is asynchronous.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from backends.base import BackendError, DeviceArray

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, CUDA driver API
_SM_CLOCK = 1  # NVML_CLOCK_SM


@dataclass(frozen=True)
class Device:
    """A CUDA device: its name, its compute capability, such as '8.9', and its PCI bus, such as '0000:3B:00.0'."""

    name: str
    capability: str
    bus: str = ""


def devices() -> list[Device]:
    """Returns the CUDA devices that the driver reports; empty without a driver. Needs no Python package."""
    driver = _driver()
    count = ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        handle, name, bus = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.create_string_buffer(64)
        numbers = [ctypes.c_int(), ctypes.c_int()]
        done = [driver.cuDeviceGet(ctypes.byref(handle), index), driver.cuDeviceGetName(name, 256, handle)]
        for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
            done.append(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle))
        if not any(done):
            known = driver.cuDeviceGetPCIBusId(bus, 64, handle) == 0
            capability = ".".join(str(n.value) for n in numbers)
            found.append(Device(_text(name), capability, _text(bus) if known else ""))
    return found


def identity(device: Device) -> dict[str, str]:
    """Returns what decides a device's times beside its name, as text: `driver`, `cuda` (the newest CUDA version that
    the driver runs) and `clocks`, its settings; what cannot be read is 'unknown'.

    NVML, the driver's management library, gives the highest clock and the application clock that somebody may have set.
    It has no query for clocks locked with `nvidia-smi --lock-gpu-clocks`, so the text says so.
    """
    driver, number = _driver(), ctypes.c_int()
    known = driver is not None and driver.cuDriverGetVersion(ctypes.byref(number)) == 0
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}" if known else "unknown"
    found = {"driver": "unknown", "cuda": cuda, "clocks": "unknown"}
    management = _library("libnvidia-ml.so.1")
    if management is None or management.nvmlInit_v2() != 0:
        return found
    version = ctypes.create_string_buffer(96)
    if management.nvmlSystemGetDriverVersion(version, 96) == 0:
        found["driver"] = _text(version)
    handle = ctypes.c_void_p()
    if management.nvmlDeviceGetHandleByPciBusId_v2(device.bus.encode(), ctypes.byref(handle)) == 0:
        found["clocks"] = _clocks(management, handle)
    management.nvmlShutdown()
    return found


def _clocks(management: Any, handle: Any) -> str:
    def read(name: str) -> int | None:
        value = ctypes.c_uint()
        query = getattr(management, name, None)  # newer drivers may drop application clocks
        return value.value if query is not None and query(handle, _SM_CLOCK, ctypes.byref(value)) == 0 else None

    most = read("nvmlDeviceGetMaxClockInfo")
    chosen, default = read("nvmlDeviceGetApplicationsClock"), read("nvmlDeviceGetDefaultApplicationsClock")
    parts = ["SM clock unknown" if most is None else f"SM clock at most {most} MHz"]
    if chosen is not None:
        parts.append(f"application clock {chosen} MHz ({'default' if chosen == default else 'set'})")
    return ", ".join([*parts, "whether it is locked cannot be read"])


def _library(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _driver() -> Any:
    """Returns the driver's library, initialised; None without a usable one."""
    found = _library("libcuda.so.1")
    return found if found is not None and found.cuInit(0) == 0 else None


def _text(buffer: Any) -> str:
    return str(buffer.value.decode(errors="replace"))


@dataclass(frozen=True, eq=False)
class Buffer:
    """Device memory: its address, and what keeps it allocated as long as the buffer is referred to."""

    address: int
    holder: Any


@dataclass(frozen=True, eq=False)
class HostBuffer:
    """Page-locked host memory as an array, and what keeps it allocated as long as the buffer is referred to."""

    array: np.ndarray
    holder: Any


class Provider(Protocol):
    """Memory of one device and a stream on it. `stream` is the CUDA handle.

    Copies and runs are queued: what they read must stay as it is, and what they write is there, after `synchronize`.
    """

    stream: int
    closed: bool

    def allocate(self, size: int) -> Buffer:
        """Returns device memory of `size` bytes."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> HostBuffer:
        """Returns page-locked host memory of an array."""
        ...

    def upload(self, target: Buffer, source: HostBuffer) -> None:
        """Queues a copy of the whole of `source` to the start of `target`."""
        ...

    def download(self, target: HostBuffer, source: Buffer) -> None:
        """Queues a copy of the start of `source` into the whole of `target`."""
        ...

    def copy(self, target: Buffer, source: Buffer, size: int) -> None:
        """Queues a copy of `size` bytes on the device."""
        ...

    def timed(self, run: Callable[[], None]) -> Callable[[], float]:
        """Queues `run` between two events; what is returned gives the milliseconds between them after `synchronize`."""
        ...

    def capture(self, run: Callable[[], None]) -> Callable[[], None]: ...

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


class CudaArray(DeviceArray):
    """An array in device memory of its own, written before it is handed on."""

    def __init__(self, cuda: Provider, buffer: Buffer, shape: tuple[int, ...], dtype: Any) -> None:
        self.cuda, self.shape, self.dtype = cuda, shape, np.dtype(dtype)
        self._buffer = buffer

    @property
    def buffer(self) -> Buffer:
        """Raises BackendError when the engine that made the array is closed."""
        if self.cuda.closed:
            raise BackendError("the engine that made this device array is closed")
        return self._buffer

    def numpy(self) -> np.ndarray:
        host = self.cuda.pinned(self.shape, self.dtype)
        self.cuda.download(host, self.buffer)
        self.cuda.synchronize()
        return host.array.copy()


class TorchCuda:
    """Buffers, stream, events and graphs of torch.cuda."""

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch
        self._stream: Any = torch.cuda.Stream()
        self.stream = int(self._stream.cuda_stream)
        self.closed = False

    def allocate(self, size: int) -> Buffer:
        with self._torch.cuda.stream(self._stream):
            memory = self._torch.empty(max(size, 1), dtype=self._torch.uint8, device="cuda")
        return Buffer(int(memory.data_ptr()), memory)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> HostBuffer:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        memory = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True)
        return HostBuffer(memory.numpy().view(dtype).reshape(shape), memory)

    def upload(self, target: Buffer, source: HostBuffer) -> None:
        self._copy(target.holder[: source.array.nbytes], source.holder)

    def download(self, target: HostBuffer, source: Buffer) -> None:
        self._copy(target.holder, source.holder[: target.array.nbytes])

    def copy(self, target: Buffer, source: Buffer, size: int) -> None:
        self._copy(target.holder[:size], source.holder[:size])

    def _copy(self, target: Any, source: Any) -> None:
        with self._torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def timed(self, run: Callable[[], None]) -> Callable[[], float]:
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(self._stream)
        run()
        end.record(self._stream)
        return lambda: float(begin.elapsed_time(end))

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = self._torch.cuda.CUDAGraph()
        self._stream.synchronize()
        with self._torch.cuda.graph(graph, stream=self._stream):
            run()

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return replay

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self._stream.synchronize()
        self.closed = True
        self._torch.cuda.empty_cache()


class PyCuda:
    """Buffers, stream and events of pycuda, on the first device's primary context. It has no CUDA graphs."""

    def __init__(self) -> None:
        import pycuda.driver as driver
        import pycuda.tools as tools

        driver.init()
        self._driver: Any = driver
        self._context: Any = driver.Device(0).retain_primary_context()
        self._context.push()
        self._pool: Any = tools.DeviceMemoryPool()  # an allocation of its own would wait for the whole device
        self._stream: Any = driver.Stream()
        self.stream = int(self._stream.handle)
        self.closed = False

    def allocate(self, size: int) -> Buffer:
        memory = self._pool.allocate(max(size, 1))
        return Buffer(int(memory), memory)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> HostBuffer:
        array = self._driver.pagelocked_empty(shape, dtype)
        return HostBuffer(array, array)

    def upload(self, target: Buffer, source: HostBuffer) -> None:
        self._driver.memcpy_htod_async(target.address, source.array, self._stream)

    def download(self, target: HostBuffer, source: Buffer) -> None:
        self._driver.memcpy_dtoh_async(target.array, source.address, self._stream)

    def copy(self, target: Buffer, source: Buffer, size: int) -> None:
        self._driver.memcpy_dtod_async(target.address, source.address, size, self._stream)

    def timed(self, run: Callable[[], None]) -> Callable[[], float]:
        begin, end = self._driver.Event(), self._driver.Event()
        begin.record(self._stream)
        run()
        end.record(self._stream)
        return lambda: float(begin.time_till(end))

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        raise BackendError("CUDA graphs need torch with CUDA: set option 'cuda_graph' to false with pycuda")

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self._stream.synchronize()
        self.closed = True
        self._pool.free_held()
        self._context.pop()


def provider() -> type[TorchCuda] | type[PyCuda] | None:
    """Returns torch.cuda where torch sees a device, else pycuda where it is installed, else None: nothing can run."""
    if not devices():
        return None
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return TorchCuda
    return PyCuda if importlib.util.find_spec("pycuda") else None
