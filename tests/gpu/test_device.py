"""What only a CUDA device can show: `sh tests/gpu/run.sh` runs it there. Elsewhere every test is skipped."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_toys import network, write_graph
from run_toys import TINY, small_experiment

from backends import exchange, registry
from backends.base import Graph, Precision, executed_precision
from backends.trt import cuda
from backends.trt.cuda import CudaArray, provider
from backends.trt.engine import has_tf32
from pqk.engines.calls import Stopwatch, compiled
from pqk.engines.variant import Variant
from pqk.families.dust3r.data import example
from pqk.families.dust3r.predict import predict
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
    workload: Any = small_experiment().workload
    pair = example(workload)
    variants = [
        Variant("fp32", backend, Precision.F32, graphs, options)
        for backend, options in (("reference", {}), ("trt", {"cuda_graph": cuda_graph}))
    ]
    with compiled(variants[0]) as host, compiled(variants[1]) as device:
        want, got = (predict(call, pair, workload, 0) for call in (host, device))
        tokens = [device("encoder", {"image": frame.image[None]}, stay=True)["tokens"] for frame in pair.inputs]
        assert all(isinstance(array, CudaArray) for array in tokens)
        over_the_host = device("decoder", {f"tokens_{k}": array.numpy() for k, array in enumerate(tokens, 1)})
        watch, times = Stopwatch(device), []
        for _ in range(20):
            watch.reset()
            begin = time.perf_counter()
            predict(watch, pair, workload, 0)
            times.append((1e3 * (time.perf_counter() - begin), watch.device_ms))
    assert set(got) == set(want) == {"pts3d_1", "conf_1", "pts3d_2", "conf_2"}
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(got[name], over_the_host[name][0])
    for pair_ms, device_ms in times[10:]:
        assert device_ms is not None
        assert 0 < device_ms < pair_ms
    print(f"host {times[-1][0]:.3f} ms, device {times[-1][1]:.3f} ms")


def test_arrays_of_many_runs_do_not_disturb_each_other(plain: Graph) -> None:
    inputs = [NET.inputs(seed) for seed in range(20)]
    with opened(plain) as engine:
        kept = [engine.infer_on_device({"x": x})["y"] for x in inputs]
        for x, array in zip(inputs, kept, strict=True):
            np.testing.assert_array_equal(array.numpy(), engine.infer({"x": x})["y"])
