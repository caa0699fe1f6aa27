"""The contract of engines: one suite for every runtime and precision that is here.

A side that cannot run here skips and says why: a missing package, a CPU without bf16, no CUDA device.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from backend_toys import error, image, toy_flops
from contract_toys import ROWS, Network, network, write_graph

from backends import registry
from backends.base import BackendError, Engine, Feeds, Graph, Precision, executed_precision
from backends.reference import TorchEngine
from backends.trt.cuda import provider

TORCH = "torch"  # eager torch is no backend: it takes a module, not a graph
TOLERANCE = {Precision.F32: 1e-5, Precision.BF16: 3e-2, Precision.F16: 5e-3}  # mean error over mean value


@dataclass(frozen=True)
class Side:
    """A backend, or torch, at one precision. `measured` tells TensorRT's emulation from its execution on a device."""

    backend: str
    precision: Precision
    measured: str = "engine"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.backend, self.precision] + (["emulated"] if self.measured == "emulated" else []))

    def require(self) -> None:
        """Skip the test where this side cannot run."""
        if self.backend == TORCH:
            return
        found = registry.get(self.backend).availability()
        if not found.available:
            pytest.skip(f"{self.backend}: {found.reason}")
        if self.backend == "trt" and (provider() is None) == (self.measured == "engine"):
            needed = "needs a CUDA device and torch with CUDA or pycuda"
            pytest.skip(needed if provider() is None else "a CUDA device runs the engine here")
        if self.precision not in (Precision.INT8, *registry.get(self.backend).float_precisions()):
            pytest.skip(f"this machine has no {self.precision} arithmetic for {self.backend}")

    def open(self, graph: Graph, net: Network | None = None, **options: Any) -> Engine:
        """The engine of a graph; torch takes the module that the graph's network describes."""
        if self.backend == TORCH:
            assert net is not None
            return TorchEngine(net.module(), graph.inputs, graph.outputs, self.precision)
        return registry.get(self.backend).compile(graph, self.precision, {**self.options, **options})


EXACT = {"rest": "f32"}  # of an int8 graph's float parts, which would be bf16 where the CPU has it
SIDES = [
    Side(TORCH, Precision.F32),
    Side(TORCH, Precision.BF16),
    Side("reference", Precision.F32),
    Side("reference", Precision.INT8),
    Side("openvino", Precision.F32),
    Side("openvino", Precision.BF16),
    Side("openvino", Precision.INT8, options=EXACT),
    Side("onnxruntime", Precision.F32),
    Side("onnxruntime", Precision.INT8),
    *(Side("trt", p, "emulated") for p in (Precision.F32, Precision.F16, Precision.INT8)),
    *(Side("trt", p) for p in (Precision.F32, Precision.F16, Precision.INT8)),
]
FLOATS = [side for side in SIDES if side.precision is not Precision.INT8]
INTEGERS = [side for side in SIDES if side.precision is Precision.INT8]
COMPILED = [side for side in SIDES if side.backend != TORCH]


def each(sides: list[Side]) -> pytest.MarkDecorator:
    on_gpu = [side.backend == "trt" and side.measured == "engine" for side in sides]
    marked = [pytest.param(s, marks=[pytest.mark.gpu] if gpu else []) for s, gpu in zip(sides, on_gpu, strict=True)]
    return pytest.mark.parametrize("side", marked, ids=[str(side) for side in sides])


@pytest.fixture(autouse=True)
def _here(request: pytest.FixtureRequest) -> None:
    if "side" in request.fixturenames:
        request.getfixturevalue("side").require()


@cache
def small() -> Network:
    return network()


@pytest.fixture(scope="session")
def graph_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Side -> the small network's graph for it: with Q/DQ nodes for int8, else in floats."""
    folder = tmp_path_factory.mktemp("contract")
    made = {q: write_graph(small(), folder / f"{q}.onnx", q) for q in (False, True)}
    return lambda side: made[side.precision is Precision.INT8]


@pytest.fixture
def engine(side: Side, graph_of: Any) -> Any:
    with side.open(graph_of(side), small()) as opened:
        yield opened


def run(engine: Engine, x: np.ndarray) -> np.ndarray:
    return engine.infer({"x": x})["y"]


@each(SIDES)
def test_outputs_are_what_the_graph_declares(engine: Engine, side: Side, graph_of: Any) -> None:
    graph = graph_of(side)
    assert engine.measured == side.measured
    assert (engine.inputs, engine.outputs) == (graph.inputs, graph.outputs)
    found = engine.infer({"x": small().inputs()})
    assert [(name, array.shape, array.dtype.name) for name, array in found.items()] == [("y", (ROWS, 32), "float32")]


@each(SIDES)
@pytest.mark.parametrize(
    ("feeds", "says"),
    [
        ({"wrong": np.zeros((ROWS, 64), np.float32)}, "inputs must be ['x'], got ['wrong']"),
        ({}, "inputs must be ['x'], got []"),
        ({"x": np.zeros((ROWS, 63), np.float32)}, "float32[8, 64], got float32[8, 63]"),
        ({"x": np.zeros((ROWS, 64), np.float64)}, "float32[8, 64], got float64[8, 64]"),
    ],
    ids=["name", "none", "shape", "dtype"],
)
def test_wrong_feeds_are_refused(engine: Engine, feeds: Feeds, says: str) -> None:
    with pytest.raises(BackendError) as caught:
        engine.infer(feeds)
    assert says in str(caught.value)


@each(SIDES)
def test_the_same_input_gives_the_same_bits_in_every_engine(engine: Engine, side: Side, graph_of: Any) -> None:
    first, second = small().inputs(1), small().inputs(2)
    returned = run(engine, first)
    want = returned.copy()
    assert not np.array_equal(run(engine, second), want)
    np.testing.assert_array_equal(returned, want)  # a copy, not the engine's own memory
    np.testing.assert_array_equal(run(engine, first), want)
    wide = np.concatenate([first, second], axis=1)
    np.testing.assert_array_equal(run(engine, wide[:, :64]), want)  # strides are followed
    with side.open(graph_of(side), small()) as again:
        np.testing.assert_array_equal(run(again, first), want)


@each(SIDES)
def test_two_engines_at_once_do_not_disturb_each_other(side: Side, graph_of: Any) -> None:
    """Two of one graph, each in its own thread, with inputs of its own."""
    inputs = [small().inputs(seed) for seed in (1, 2)]
    with side.open(graph_of(side), small()) as one, side.open(graph_of(side), small()) as two:
        want = [run(one, x).copy() for x in inputs]
        found: list[list[np.ndarray]] = [[], []]

        def work(index: int) -> None:
            found[index] = [run((one, two)[index], inputs[index]).copy() for _ in range(50)]

        threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        one.close()
        found[1].append(run(two, inputs[1]))  # what one frees is not the other's
    for index, count in ((0, 50), (1, 51)):
        assert len(found[index]) == count
        for array in found[index]:
            np.testing.assert_array_equal(array, want[index])


@each(FLOATS)
def test_floats_agree_with_torch_and_the_kernels_are_those_asked_for(side: Side, source: Any) -> None:
    """On a small transformer with a convolution head; every FLOP counted by hand is found in the kernels."""
    feeds = {"image": image(3).numpy()}
    plain = TorchEngine(source.module, source.graph.inputs, source.graph.outputs)
    want = plain.infer(feeds)
    if side.backend == TORCH:
        opened: Engine = TorchEngine(source.module, source.graph.inputs, source.graph.outputs, side.precision)
    else:
        opened = side.open(source.graph)
    with opened as engine:
        got, kernels = engine.infer(feeds), engine.kernels()
    assert list(got) == list(want) == ["tokens", "map"]
    for name, reference in want.items():
        assert (got[name].shape, got[name].dtype) == (reference.shape, np.float32)
        assert error(got[name], reference) < TOLERANCE[side.precision]
        assert side.precision is Precision.F32 or error(got[name], reference) > 1e-5
    if side.backend == TORCH:  # torch chooses its kernels call by call and does not report them
        assert kernels == []
        return
    assert executed_precision(kernels) == {str(side.precision): 1.0}
    # ONNX Runtime pads the four channels of the last convolution to sixteen.
    assert sum(k.flops for k in kernels) == pytest.approx(
        toy_flops(), rel=0.03 if side.backend == "reference" else 1e-9
    )
    assert all(k.time_us >= 0 for k in kernels)
    assert (sum(k.time_us for k in kernels) > 0) == (side.measured == "engine")


@each([side for side in FLOATS if side.precision is Precision.F32])
def test_f32_is_within_its_rounding_of_exact_arithmetic(engine: Engine) -> None:
    x, net = small().inputs(), small()
    h = np.maximum(x @ (np.abs(net.q1) * net.step1) + np.abs(net.b1), 0)
    size = h @ (np.abs(net.q2) * net.step2) + np.abs(net.b2)  # of the sums' terms, an upper bound
    count = sum(net.q1.shape) + 4  # additions and multiplications behind one output
    assert (np.abs(run(engine, x) - net.exact(x)) <= count * 2.0**-24 * size).all()


@each(INTEGERS)
@pytest.mark.parametrize("seed", range(3))
def test_int8_is_within_the_bound_of_the_simulation(engine: Engine, side: Side, seed: int) -> None:
    """The bound is derived from the steps of the quantizers; it is far below what quantization itself does."""
    x = small().inputs(seed)
    want, bound = small().simulated(x)
    difference = np.abs(run(engine, x) - want)
    assert (difference <= bound).all(), f"{(difference / bound).max():.3g} times the bound"
    assert 20 * bound.mean() < np.abs(want - small().exact(x)).mean()
    if side.backend != "reference":  # ONNX Runtime may compute Q/DQ nodes in floats, as they are defined
        kernels = engine.kernels()
        # With AVX-512, OpenVINO makes one float kernel of two small layers, and that is what must be told then.
        fused = all(k.type == "Subgraph" and "avx512" in k.implementation for k in kernels)
        assert executed_precision(kernels) == {"f32" if fused else "int8": 1.0}


@each(COMPILED)
def test_wrong_files_are_refused_by_name(side: Side, graph_of: Any, tmp_path: Path) -> None:
    graph = graph_of(side)
    whole = graph.path.read_bytes()
    for name, content in {
        "text.onnx": b"no protobuf at all",
        "cut.onnx": whole[: len(whole) // 2],
        "none.onnx": b"",
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BackendError, match=name.replace(".", r"\.")):
            side.open(Graph(path, graph.inputs, graph.outputs, name))
    with pytest.raises(BackendError, match=r"absent\.onnx"):
        side.open(Graph(tmp_path / "absent.onnx", graph.inputs, graph.outputs, "absent"))
    with pytest.raises(BackendError, match=r"text\.xml"):
        (tmp_path / "text.xml").write_text("no IR at all")
        side.open(Graph(tmp_path / "text.xml", graph.inputs, graph.outputs, "text"))


@each(COMPILED)
def test_wrong_requests_are_refused(side: Side, graph_of: Any) -> None:
    with pytest.raises(BackendError, match=r"no option 'thread' \(did you mean 'threads'\?\)"):
        side.open(graph_of(side), thread=1)
    for threads in (0, -1, 1.5, "two", True):
        with pytest.raises(BackendError, match="'threads' must be a whole number from 1"):
            side.open(graph_of(side), threads=threads)
    backend = registry.get(side.backend)
    if Precision.F16 not in backend.float_precisions():
        with pytest.raises(BackendError, match="not f16"):
            backend.compile(graph_of(side), Precision.F16)
    if side.precision is Precision.INT8 and side.backend != "reference":
        with pytest.raises(BackendError, match="is quantized"):
            backend.compile(graph_of(side), Precision.F32)
    elif side.backend != "reference":
        with pytest.raises(BackendError, match="quantize it before compiling it as int8"):
            backend.compile(graph_of(side), Precision.INT8)


@each(SIDES)
def test_a_closed_engine_says_so(side: Side, graph_of: Any) -> None:
    engine = side.open(graph_of(side), small())
    with engine:
        pass
    engine.close()  # twice is once
    with pytest.raises(BackendError, match="this engine is closed"):
        run(engine, small().inputs())


@each([side for side in SIDES if side.backend == "openvino"])
def test_a_saved_engine_is_loaded_with_the_same_outputs(engine: Engine, side: Side, tmp_path: Path) -> None:
    from backends.openvino.engine import OpenVINOEngine

    assert isinstance(engine, OpenVINOEngine)
    want = run(engine, small().inputs())
    saved = engine.save(tmp_path / "ship" / "net.xml")
    assert [t.name for t in saved.outputs] == ["y"]
    assert sorted(p.name for p in saved.path.parent.iterdir()) == ["net.bin", "net.xml"]
    with OpenVINOEngine.load(saved.path, side.precision, side.options) as again:
        np.testing.assert_array_equal(run(again, small().inputs()), want)
    with pytest.raises(BackendError, match=r"\.xml"):
        engine.save(tmp_path / "net.onnx")


@each([side for side in SIDES if side.backend == "trt"])
def test_a_saved_plan_carries_its_manifest(side: Side, graph_of: Any, tmp_path: Path) -> None:
    from backends.base import sha256_files
    from backends.trt.builder import read_manifest

    with side.open(graph_of(side)) as opened:
        engine: Any = opened
        own = engine.plan.parent
        saved = engine.save(tmp_path / "ship" / "net.plan")
        assert saved.stat().st_size == engine.size_bytes > 0
        with pytest.raises(BackendError, match=r"saved as \.plan"):
            engine.save(tmp_path / "net.engine")
    assert not own.exists()
    assert read_manifest(saved)["plan_sha256"] == sha256_files([saved])


def held_bytes(side: Side) -> int:
    """What this process holds: on the device for an engine that runs there, else in memory."""
    gc.collect()
    if side.backend == "trt" and side.measured == "engine":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("device memory is read through torch with CUDA")
        free, total = torch.cuda.mem_get_info()
        return total - free
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # the allocator keeps freed blocks back otherwise
    return psutil.Process().memory_info().rss


@each(SIDES)
def test_memory_is_free_on_exit(side: Side, tmp_path: Path) -> None:
    """Six closed engines that are still referred to keep less than half of the weights that they were made of."""
    int8 = side.precision is Precision.INT8
    net = network(1024, 8192 if int8 else 2048)
    graph = write_graph(net, tmp_path / "wide.onnx", quantized=int8)
    weights, rounds = net.q1.size * (1 if int8 else 4), 6  # 8 MB each
    options = {"cache_dir": str(tmp_path)} if side.backend == "trt" else {}
    x, closed = net.inputs(), []
    for number in range(2 + rounds):  # the first two fill pools of the process
        with side.open(graph, net, **options) as engine:
            run(engine, x)
        closed.append(engine)
        if number == 1:
            before = held_bytes(side)
    assert held_bytes(side) - before < rounds * weights / 2
    assert len(closed) == 2 + rounds
