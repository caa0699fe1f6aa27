"""What edge_eval.py uses of TensorRT and pycuda, played by ONNX Runtime: its own logic runs where no GPU is.

The doubles are strict where the real ones are: a plan of another device does not load, memory is addressed by number,
copies must fit, nothing can be run before every address is set. They say nothing about the real libraries.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

PREFIX = b"plan of this device:"


class _Memory:
    """Device memory, known by its address."""

    known: dict[int, bytearray] = {}  # noqa: RUF012

    def __init__(self, size: int) -> None:
        self.address = 4096 * (len(self.known) + 1)
        self.known[self.address] = bytearray(size)

    def __int__(self) -> int:
        return self.address


def _copy(target: Any, source: Any) -> None:
    if isinstance(target, _Memory):
        assert source.flags.c_contiguous and source.nbytes == len(_Memory.known[int(target)])
        _Memory.known[int(target)][:] = source.tobytes()
    else:
        target[...] = np.frombuffer(_Memory.known[int(source)], target.dtype).reshape(target.shape)


class _Engine:
    def __init__(self, path: str) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.ports = {p.name: p for p in [*self.session.get_inputs(), *self.session.get_outputs()]}

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self.ports[name].shape)

    def get_tensor_dtype(self, name: str) -> str:
        assert self.ports[name].type == "tensor(float)"
        return "FLOAT"

    def create_execution_context(self) -> _Context:
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.addresses = engine, dict[str, int]()

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        if set(self.addresses) != set(self.engine.ports):
            return False
        feeds = {
            p.name: np.frombuffer(_Memory.known[self.addresses[p.name]], np.float32).reshape(p.shape)
            for p in self.engine.session.get_inputs()
        }
        names = [p.name for p in self.engine.session.get_outputs()]
        for name, array in zip(names, self.engine.session.run(names, feeds), strict=True):
            _Memory.known[self.addresses[name]][:] = array.tobytes()
        return True


def _load(content: bytes) -> _Engine | None:
    return _Engine(content.removeprefix(PREFIX).decode()) if content.startswith(PREFIX) else None


class _Parser:
    def __init__(self, network: dict[str, str], logger: object) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network["path"] = path
        return True


class _Builder:
    built = 0

    def __init__(self, logger: object) -> None:
        pass

    def create_network(self, flags: int) -> dict[str, str]:
        assert flags == 2, "not strongly typed"
        return {}

    def create_builder_config(self) -> Any:
        return SimpleNamespace(clear_flag=lambda flag: None)

    def build_serialized_network(self, network: dict[str, str], config: object) -> bytes:
        _Builder.built += 1
        return PREFIX + network["path"].encode()


def modules() -> dict[str, ModuleType]:
    """For sys.modules: tensorrt, pycuda, pycuda.autoinit, pycuda.driver."""
    trt, pycuda = ModuleType("tensorrt"), ModuleType("pycuda")
    autoinit, driver = ModuleType("pycuda.autoinit"), ModuleType("pycuda.driver")

    def logger(level: int) -> object:
        return object()

    logger.ERROR = 1  # type: ignore[attr-defined]
    vars(trt).update(
        __version__="10.3.0",
        Logger=logger,
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=_load),
        Builder=_Builder,
        OnnxParser=_Parser,
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        BuilderFlag=SimpleNamespace(TF32=7),
        nptype={"FLOAT": np.float32}.__getitem__,
    )
    device = SimpleNamespace(name=lambda: "Orin", pci_bus_id=lambda: "0000:00:00.0", compute_capability=lambda: (8, 7))
    vars(autoinit).update(device=device)
    vars(driver).update(
        get_driver_version=lambda: 12060,
        Stream=lambda: SimpleNamespace(handle=1, synchronize=lambda: None),
        pagelocked_empty=lambda shape, dtype: np.empty(shape, dtype),
        mem_alloc=_Memory,
        memcpy_htod_async=lambda target, source, stream: _copy(target, source),
        memcpy_dtoh_async=lambda target, source, stream: _copy(target, source),
    )
    vars(pycuda).update(autoinit=autoinit, driver=driver)
    return {"tensorrt": trt, "pycuda": pycuda, "pycuda.autoinit": autoinit, "pycuda.driver": driver}


def builds() -> int:
    """How many plans were built so far."""
    return _Builder.built
