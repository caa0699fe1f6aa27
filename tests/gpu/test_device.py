"""What only a CUDA device can show: `sh tests/gpu/run.sh` runs it there. Elsewhere every test is skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_toys import network, write_graph
from run_toys import TINY

from backends import exchange, registry
from backends.base import Graph, Precision, executed_precision
from backends.trt import cuda
from backends.trt.cuda import CudaArray, provider
from backends.trt.engine import has_tf32
from pqk.engines.variant import Runner, Variant
from pqk.models import build_model
from pqk.recipe.request import Request, context

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(provider() is None, reason="needs a CUDA device")]
NET = network(1024, 2048)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return write_graph(NET, tmp_path_factory.mktemp("gpu") / "net.onnx", quantized=False)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return write_graph(NET, tmp_path_factory.mktemp("gpu") / "net.onnx", quantized=True)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graph]:
    folder = tmp_path_factory.mktemp("model")
    model = build_model("dust3r", TINY, generator=torch.Generator().manual_seed(1)).eval()
    return {
        name: exchange.export(spec.module, spec.inputs, spec.output_names, folder / f"{name}.onnx")
        for name, spec in model.graphs(64, 64).items()
    }


def opened(graph: Graph, precision: Precision = Precision.F32, **options: Any) -> Any:
    return registry.get("trt").compile(graph, precision, options)


def relative_error(engine: Any) -> float:
    """Of normal inputs, against exact arithmetic."""
    x = np.random.default_rng(0).normal(size=(8, 1024)).astype(np.float32)
    want = NET.exact(x)
    return float(np.abs(engine.infer({"x": x})["y"] - want).max() / np.abs(want).max())


def test_the_machine_is_the_device_with_driver_and_cuda(tmp_path: Path) -> None:
    backend = registry.get("trt")
    machine = context(Request("B1", "trt"), backend, tmp_path, lambda *_: None).machine
    assert machine["device"] == cuda.devices()[0].name
    assert "unknown" not in (machine["driver"], machine["cuda"])
    assert "MHz" in machine["clocks"]
    print(json.dumps({name: machine[name] for name in ("device", "driver", "cuda", "clocks")}))


def test_f32_is_f32(plain: Graph) -> None:
    with opened(plain) as engine:
        assert relative_error(engine) < 1e-5
        assert executed_precision(engine.kernels()) == {"f32": 1.0}


@pytest.mark.skipif(not has_tf32(), reason="this device has no TF32")
def test_tf32_is_tf32(plain: Graph) -> None:
    with opened(plain, Precision.TF32) as engine:
        assert 2e-5 < relative_error(engine) < 1e-2
        assert "f32" not in executed_precision(engine.kernels())


def test_the_inspector_of_this_version_is_read(quantized: Graph, tmp_path: Path) -> None:
    """Fails with the text that could not be read: a new form belongs into tests/backends/inspector."""
    with opened(quantized, Precision.INT8) as engine:
        text = engine._engine.create_engine_inspector().get_engine_information(
            engine._module.LayerInformationFormat.JSON
        )
        kernels = engine.kernels()
    assert executed_precision(kernels) == {"int8": 1.0}, text
    assert sum(k.time_us for k in kernels) > 0


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_tokens_stay_on_the_device(graphs: dict[str, Graph], cuda_graph: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32) for _ in range(2))
    variants = [
        Variant("fp32", backend, Precision.F32, graphs["encoder"], graphs["decoder"], options)
        for backend, options in (("reference", {}), ("trt", {"cuda_graph": cuda_graph}))
    ]
    with Runner(variants[0]) as host, Runner(variants[1]) as device:
        want = host.decode(host.encode(a), host.encode(b))
        tokens = device.encode(a), device.encode(b)
        assert all(isinstance(array, CudaArray) for array in tokens)
        got = device.decode(*tokens)
        over_the_host = device.decoder.infer({f"tokens_{k}": t.numpy() for k, t in enumerate(tokens, 1)})  # type: ignore[union-attr]
        times = [device.timed_pair(a, b) for _ in range(20)][10:]
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(got[name], over_the_host[name][0])
    for pair in times:
        assert pair.device_ms is not None
        assert 0 < pair.device_ms < pair.pair_ms
    print(f"host {times[-1].pair_ms:.3f} ms, device {times[-1].device_ms:.3f} ms")


def test_arrays_of_many_runs_do_not_disturb_each_other(plain: Graph) -> None:
    inputs = [NET.inputs(seed) for seed in range(20)]
    with opened(plain) as engine:
        kept = [engine.infer_on_device({"x": x})["y"] for x in inputs]
        for x, array in zip(inputs, kept, strict=True):
            np.testing.assert_array_equal(array.numpy(), engine.infer({"x": x})["y"])
