"""The CUDA device: which one is there, and buffers, copies, events and graphs through torch.cuda or pycuda.

Both providers offer the same few calls, so that an engine runs in a process with torch and on a host without it.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from backends.base import BackendError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, CUDA driver API


@dataclass(frozen=True)
class Device:
    """A CUDA device: its name and its compute capability, such as '8.9'."""

    name: str
    capability: str


def devices() -> list[Device]:
    """The CUDA devices that the driver reports; empty without a driver. Needs no Python package."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        handle, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        numbers = [ctypes.c_int(), ctypes.c_int()]
        done = [driver.cuDeviceGet(ctypes.byref(handle), index), driver.cuDeviceGetName(name, 256, handle)]
        for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
            done.append(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle))
        if not any(done):
            found.append(Device(name.value.decode(errors="replace"), ".".join(str(n.value) for n in numbers)))
    return found


class Provider(Protocol):
    """Device memory and one stream. `stream` is the CUDA handle; buffers are addresses that live until `close`."""

    stream: int

    def allocate(self, size: int) -> int: ...

    def upload(self, address: int, array: np.ndarray) -> None: ...

    def download(self, address: int, array: np.ndarray) -> None: ...

    def elapsed_ms(self, run: Callable[[], None]) -> float: ...

    def capture(self, run: Callable[[], None]) -> Callable[[], None]: ...

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


class TorchCuda:
    """Buffers, stream, events and graphs of torch.cuda."""

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch
        self._stream: Any = torch.cuda.Stream()
        self.stream = int(self._stream.cuda_stream)
        self._buffers: dict[int, Any] = {}

    def allocate(self, size: int) -> int:
        buffer = self._torch.empty(max(size, 1), dtype=self._torch.uint8, device="cuda")
        self._buffers[buffer.data_ptr()] = buffer
        return int(buffer.data_ptr())

    def upload(self, address: int, array: np.ndarray) -> None:
        flat = self._torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        with self._torch.cuda.stream(self._stream):
            self._buffers[address][: flat.numel()].copy_(flat)

    def download(self, address: int, array: np.ndarray) -> None:
        """Fill `array` (contiguous) after everything that the stream was given before."""
        with self._torch.cuda.stream(self._stream):
            found = self._buffers[address][: array.nbytes].cpu()
        array.reshape(-1).view(np.uint8)[:] = found.numpy()

    def elapsed_ms(self, run: Callable[[], None]) -> float:
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(self._stream)
        run()
        end.record(self._stream)
        end.synchronize()
        return float(begin.elapsed_time(end))

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
        self._buffers.clear()
        self._torch.cuda.empty_cache()


class PyCuda:
    """Buffers, stream and events of pycuda, on the first device's primary context. It has no CUDA graphs."""

    def __init__(self) -> None:
        import pycuda.driver as driver

        driver.init()
        self._driver: Any = driver
        self._context: Any = driver.Device(0).retain_primary_context()
        self._context.push()
        self._stream: Any = driver.Stream()
        self.stream = int(self._stream.handle)
        self._buffers: dict[int, Any] = {}

    def allocate(self, size: int) -> int:
        buffer = self._driver.mem_alloc(max(size, 1))
        self._buffers[int(buffer)] = buffer
        return int(buffer)

    def upload(self, address: int, array: np.ndarray) -> None:
        self._driver.memcpy_htod_async(address, np.ascontiguousarray(array), self._stream)
        self._stream.synchronize()  # the array may be gone before an asynchronous copy read it

    def download(self, address: int, array: np.ndarray) -> None:
        self._driver.memcpy_dtoh_async(array, address, self._stream)
        self._stream.synchronize()

    def elapsed_ms(self, run: Callable[[], None]) -> float:
        begin, end = self._driver.Event(), self._driver.Event()
        begin.record(self._stream)
        run()
        end.record(self._stream)
        end.synchronize()
        return float(begin.time_till(end))

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        raise BackendError("CUDA graphs need torch with CUDA: set option 'cuda_graph' to false with pycuda")

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self._stream.synchronize()
        self._buffers.clear()
        self._context.pop()


def provider() -> type[TorchCuda] | type[PyCuda] | None:
    """torch.cuda where torch sees a device, else pycuda where it is installed, else None: nothing can run."""
    if not devices():
        return None
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return TorchCuda
    return PyCuda if importlib.util.find_spec("pycuda") else None
