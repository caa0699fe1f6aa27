"""TensorRT's engine on a device, played by doubles: device arrays, page-locked copies, device time, TF32, identity."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from contract_toys import ROWS, Network, network, write_graph
from cuda_doubles import DEVICE, RUN_MS, FakeCuda, install, no_array

from backends import registry
from backends.base import BackendError, Precision, executed_precision
from backends.trt import builder, cuda
from backends.trt.cuda import CudaArray, Device

FOUND = registry.get("trt").availability()
pytestmark = pytest.mark.skipif(not FOUND.available, reason=FOUND.reason)
NET = network()
CHAIN = network(32, 16, 64)  # takes what NET gives, and gives what NET takes


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> list[FakeCuda]:
    made: list[FakeCuda] = []
    install(monkeypatch, made)
    return made


def engine(folder: Path, net: Network = NET, precision: Precision = Precision.F32, **options: Any) -> Any:
    graph = write_graph(net, folder / f"{net.q1.shape[0]}.onnx", quantized=False)
    return registry.get("trt").compile(graph, precision, options)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_host_arrays_in_and_out(providers: list[FakeCuda], tmp_path: Path, cuda_graph: bool) -> None:
    first, second = NET.inputs(1), NET.inputs(2)
    with engine(tmp_path, cuda_graph=cuda_graph) as opened:
        assert opened.measured == "engine"
        assert opened.on_device
        assert opened.last_device_ms is None
        got = opened.infer({"x": first})["y"]
        np.testing.assert_allclose(got, NET.exact(first), rtol=1e-4, atol=1e-4)
        kept = got.copy()
        np.testing.assert_allclose(opened.infer({"x": second})["y"], NET.exact(second), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(got, kept)  # not the page-locked memory, which the next run overwrites
        assert opened.last_device_ms == RUN_MS
        assert opened.device_ms({"x": first}) == RUN_MS


def test_what_stays_on_the_device_is_read_there(
    providers: list[FakeCuda], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of one engine, both results into another engine, without a byte over the host between them."""
    first, second = NET.inputs(1), NET.inputs(2)
    with engine(tmp_path) as one, engine(tmp_path, CHAIN) as two:
        a, b = (one.infer_on_device({"x": x})["y"] for x in (first, second))
        assert isinstance(a, CudaArray)
        assert (a.shape, a.dtype) == ((ROWS, 32), np.float32)
        assert providers[0].moved["down"] == 0
        with monkeypatch.context() as guarded:
            guarded.setattr(CudaArray, "numpy", no_array)
            results = [two.infer({"x": tokens})["y"] for tokens in (a, b)]
        assert providers[1].moved["up"] == 0
        assert providers[1].moved["on the device"] == 2 * a.dtype.itemsize * ROWS * 32
        for x, tokens, result in zip((first, second), (a, b), results, strict=True):
            np.testing.assert_allclose(tokens.numpy(), NET.exact(x), rtol=1e-4, atol=1e-4)
            want = CHAIN.exact(tokens.numpy())
            np.testing.assert_allclose(result, want, rtol=1e-4, atol=1e-4)


def test_other_engines_take_device_arrays_over_the_host(providers: list[FakeCuda], tmp_path: Path) -> None:
    plain = write_graph(CHAIN, tmp_path / "plain.onnx", quantized=False)
    with engine(tmp_path) as one, registry.get("reference").compile(plain, Precision.F32) as host:
        tokens = one.infer_on_device({"x": NET.inputs()})["y"]
        want = host.infer({"x": tokens.numpy()})
        assert not host.on_device
        np.testing.assert_array_equal(host.infer({"x": tokens})["y"], want["y"])
        kept = host.infer_on_device({"x": tokens})["y"]
        assert isinstance(kept, np.ndarray)
        assert host.last_device_ms is None


def test_device_arrays_are_checked_and_end_with_their_engine(providers: list[FakeCuda], tmp_path: Path) -> None:
    with engine(tmp_path) as one:
        tokens = one.infer_on_device({"x": NET.inputs()})["y"]
        with pytest.raises(BackendError, match=r"float32\[8, 64\], got float32\[8, 32\]"):
            one.infer({"x": tokens})
    with pytest.raises(BackendError, match="closed"):
        tokens.numpy()
    with engine(tmp_path, CHAIN) as two, pytest.raises(BackendError, match="closed"):
        two.infer({"x": tokens})
    with pytest.raises(BackendError, match="this engine is closed"):
        one.infer_on_device({"x": NET.inputs()})


def test_f32_is_not_tf32_and_tf32_is_a_precision_of_its_own(providers: list[FakeCuda], tmp_path: Path) -> None:
    backend = registry.get("trt")
    assert list(backend.float_precisions()) == list(backend.baselines()) == ["f32", "tf32", "f16"]
    x = np.random.default_rng(0).normal(size=(ROWS, 64)).astype(np.float32)
    want = NET.exact(x)
    folder = {"cache_dir": str(tmp_path / "plans")}
    with engine(tmp_path, **folder) as exact, engine(tmp_path, precision=Precision.TF32, **folder) as rounded:
        errors = [np.abs(e.infer({"x": x})["y"] - want).max() / np.abs(want).max() for e in (exact, rounded)]
        assert exact.plan != rounded.plan
        assert executed_precision(exact.kernels()) == {"unknown": 1.0}  # the double's layer names no node
    assert errors[0] < 1e-6
    assert 1e-5 < errors[1] < 1e-2


@pytest.mark.parametrize(("tf32", "allowed"), [(False, False), (True, True)])
def test_the_builder_of_the_real_library_gets_the_flag(tmp_path: Path, tf32: bool, allowed: bool) -> None:
    module, seen = builder.load(), []
    build = module.Builder.build_serialized_network
    graph = write_graph(NET, tmp_path / "net.onnx", quantized=False)
    with pytest.MonkeyPatch.context() as patch:

        def spy(self: Any, network: Any, config: Any) -> Any:
            seen.append(config.get_flag(module.BuilderFlag.TF32))
            return build(self, network, config)

        patch.setattr(module.Builder, "build_serialized_network", spy)
        plan = builder.build_plan(graph, builder.OPTIONS, tmp_path, tf32=tf32)
    assert seen == [allowed]
    assert builder.read_manifest(plan)["tf32"] is tf32


def test_an_older_device_and_a_machine_without_one_have_no_tf32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = registry.get("trt")
    if cuda.provider() is None:
        assert Precision.TF32 not in backend.float_precisions()
        with pytest.raises(BackendError, match=r"compute capability 8\.0 and above, and none is here"):
            engine(tmp_path, precision=Precision.TF32)
    install(monkeypatch, [], Device("Old", "7.5"))
    assert list(backend.float_precisions()) == ["f32", "f16"]
    with pytest.raises(BackendError, match=r"compute capability 8\.0 and above"):
        engine(tmp_path, precision=Precision.TF32)


def driver(application: int | None = 1410) -> Any:
    """libcuda and libnvidia-ml with one device, as ctypes sees them. Without `application` a clock call is missing."""

    def number(value: int, target: int = 0) -> Any:
        def call(*arguments: Any) -> int:
            arguments[target]._obj.value = value
            return 0

        return call

    def text(value: bytes) -> Any:
        def call(target: Any, *_: Any) -> int:
            target.value = value
            return 0

        return call

    def attribute(target: Any, which: int, handle: Any) -> int:
        return int(number({75: 9, 76: 0}[which])(target))

    calls = {
        "cuInit": lambda flags: 0,
        "cuDeviceGetCount": number(1),
        "cuDeviceGet": number(0),
        "cuDeviceGetName": text(b"NVIDIA Double"),
        "cuDeviceGetAttribute": attribute,
        "cuDeviceGetPCIBusId": text(b"0000:3B:00.0"),
        "cuDriverGetVersion": number(12080),
        "nvmlInit_v2": lambda: 0,
        "nvmlShutdown": lambda: 0,
        "nvmlSystemGetDriverVersion": text(b"570.86.15"),
        "nvmlDeviceGetHandleByPciBusId_v2": lambda bus, handle: 0 if bus == b"0000:3B:00.0" else 6,
        "nvmlDeviceGetMaxClockInfo": number(1980, 2),
        "nvmlDeviceGetDefaultApplicationsClock": number(1980, 2),
    }
    if application is not None:
        calls["nvmlDeviceGetApplicationsClock"] = number(application, 2)
    return SimpleNamespace(**calls)


def with_driver(patch: pytest.MonkeyPatch, played: Any, *libraries: str) -> None:
    def load(name: str) -> Any:
        if name not in (libraries or ("libcuda.so.1", "libnvidia-ml.so.1")):
            raise OSError(name)
        return played

    patch.setattr(cuda, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": load}))


def test_device_driver_cuda_and_clocks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, driver())
    device = Device("NVIDIA Double", "9.0", "0000:3B:00.0")
    assert cuda.devices() == [device]
    unread = "whether it is locked cannot be read"
    set_clock = f"SM clock at most 1980 MHz, application clock 1410 MHz (set), {unread}"
    assert cuda.identity(device) == {"driver": "570.86.15", "cuda": "12.8", "clocks": set_clock}
    assert cuda.identity(Device("Another", "9.0", "0000:00:00.0"))["clocks"] == "unknown"
    with_driver(monkeypatch, driver(application=1980))
    assert "application clock 1980 MHz (default)" in cuda.identity(device)["clocks"]
    with_driver(monkeypatch, driver(application=None))
    assert cuda.identity(device)["clocks"] == f"SM clock at most 1980 MHz, {unread}"
    with_driver(monkeypatch, driver(), "libcuda.so.1")
    assert cuda.identity(device) == {"driver": "unknown", "cuda": "12.8", "clocks": "unknown"}
    with_driver(monkeypatch, driver(), "none")
    assert cuda.devices() == []
    assert set(cuda.identity(device).values()) == {"unknown"}


def test_the_gpu_is_the_machine_in_keys_and_records(
    providers: list[FakeCuda], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs behind one CPU, and one GPU under two drivers, never share a key; on a CPU nothing is added."""
    from pqk.recipe.request import Request, context

    backend = registry.get("trt")

    def machine() -> dict[str, Any]:
        return dict(context(Request("B1", "trt"), backend, tmp_path, lambda *_: None).machine)

    told = {"driver": "570.86.15", "cuda": "12.8", "clocks": "SM clock at most 1980 MHz"}
    monkeypatch.setattr(cuda, "identity", lambda device: told)
    first = machine()
    assert first["device"] == DEVICE.name
    assert first["cpu"]
    assert told.items() <= first.items()
    monkeypatch.setattr(cuda, "identity", lambda device: {**told, "driver": "580.1"})
    assert machine() != first
    monkeypatch.setattr(cuda, "devices", lambda: [Device("Another", "9.0")])
    assert machine()["device"] == "Another"
    monkeypatch.undo()
    if cuda.provider() is None:
        assert {"driver", "cuda", "clocks"}.isdisjoint(machine())
        assert machine()["device"] == backend.availability().details["cpu"]


@pytest.mark.skipif(bool(cuda.devices()), reason="a device is here")
def test_the_checks_for_a_device_say_that_there_is_none() -> None:
    script = Path(__file__).parents[1] / "gpu" / "run.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 3
    assert done.stderr.strip() == "there is no CUDA device here: nothing was checked"
