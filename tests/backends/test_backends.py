"""One suite over every backend that can run here: contract, float accuracy, precision read-back, bad input."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from backend_toys import error, image, linear_graph, toy_flops

import backends
from backends import registry
from backends.base import BackendError, Graph, Precision, executed_precision
from backends.reference import TorchEngine

ROOT = Path(backends.__file__).parent
RUNNABLE = [name for name, found in registry.availabilities().items() if found.available]
PAIRS = [(name, precision) for name in RUNNABLE for precision in registry.get(name).float_precisions()]
TOLERANCE = {Precision.F32: 1e-5, Precision.BF16: 3e-2, Precision.F16: 5e-3}


def test_reference_always_runs():
    assert "reference" in RUNNABLE


@pytest.mark.parametrize(("name", "precision"), PAIRS)
def test_float_engine_agrees_with_torch_and_executes_what_was_asked(name, precision, source):
    feeds = {"image": image(3).numpy()}
    want = TorchEngine(source.module, source.graph.inputs, source.graph.outputs).infer(feeds)
    with registry.get(name).compile(source.graph, precision) as engine:
        got = engine.infer(feeds)
        kernels = engine.kernels()
    assert list(got) == ["tokens", "map"]
    for key, reference in want.items():
        assert got[key].dtype == np.float32
        assert got[key].shape == reference.shape
        assert error(got[key], reference) < TOLERANCE[precision]
    assert executed_precision(kernels) == {str(precision): 1.0}
    # ONNX Runtime pads the four channels of the last convolution to sixteen.
    tolerance = 0.03 if name == "reference" else 1e-9
    assert sum(k.flops for k in kernels) == pytest.approx(toy_flops(), rel=tolerance)
    assert all(k.time_us >= 0 for k in kernels)
    assert (sum(k.time_us for k in kernels) > 0) == (engine.measured == "engine")


@pytest.mark.parametrize("name", RUNNABLE)
def test_one_layer_agrees_in_f32(name, tmp_path):
    module, graph = linear_graph(tmp_path)
    x = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    with torch.no_grad():
        want = module(torch.from_numpy(x)).numpy()
    with registry.get(name).compile(graph, Precision.F32, {"threads": 1}) as engine:
        np.testing.assert_allclose(engine.infer({"x": x})["y"], want, atol=1e-5)


@pytest.mark.parametrize("name", RUNNABLE)
def test_infer_returns_copies_and_repeats_itself(name, tmp_path):
    _, graph = linear_graph(tmp_path)
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((8, 64), dtype=np.float32) for _ in range(2))
    with registry.get(name).compile(graph, Precision.F32) as engine:
        before = engine.infer({"x": first})["y"]
        kept = before.copy()
        engine.infer({"x": second})
        np.testing.assert_array_equal(before, kept)
        np.testing.assert_array_equal(engine.infer({"x": first})["y"], kept)
        # An array that is a view with strides must be read as its values, not its memory.
        wide = np.concatenate([first, second], axis=1)
        np.testing.assert_array_equal(engine.infer({"x": wide[:, :64]})["y"], kept)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize(
    ("feeds", "says"),
    [
        ({"wrong": np.zeros((8, 64), np.float32)}, "inputs must be"),
        ({}, "inputs must be"),
        ({"x": np.zeros((8, 63), np.float32)}, "float32[8, 64], got float32[8, 63]"),
        ({"x": np.zeros((8, 64), np.float64)}, "float32[8, 64], got float64[8, 64]"),
    ],
)
def test_bad_feeds(name, feeds, says, tmp_path):
    _, graph = linear_graph(tmp_path)
    with registry.get(name).compile(graph, Precision.F32) as engine, pytest.raises(BackendError) as caught:
        engine.infer(feeds)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", RUNNABLE)
def test_bad_requests(name, tmp_path):
    _, graph = linear_graph(tmp_path)
    backend = registry.get(name)
    with pytest.raises(BackendError, match=r"no option 'thread' \(did you mean 'threads'\?\)"):
        backend.compile(graph, Precision.F32, {"thread": 1})
    for threads in (0, -1, 1.5, "two", True):
        with pytest.raises(BackendError, match="'threads' must be a whole number from 1"):
            backend.compile(graph, Precision.F32, {"threads": threads})
    if Precision.F16 not in backend.float_precisions():
        with pytest.raises(BackendError, match="not f16"):
            backend.compile(graph, Precision.F16)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no protobuf at all")
    with pytest.raises(BackendError, match=r"broken\.onnx"):
        backend.compile(Graph(broken, graph.inputs, graph.outputs, ""), Precision.F32)
    engine = backend.compile(graph, Precision.F32)
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine.infer({"x": np.zeros((8, 64), np.float32)})


def test_torch_engine_bf16_is_near_and_kernels_are_not_known(source):
    feeds = {"image": image(3).numpy()}
    parts = (source.module, source.graph.inputs, source.graph.outputs)
    f32, bf16 = TorchEngine(*parts).infer(feeds), TorchEngine(*parts, Precision.BF16).infer(feeds)
    assert 1e-5 < error(bf16["map"], f32["map"]) < 3e-2
    assert TorchEngine(*parts).kernels() == []
    with pytest.raises(BackendError, match="f32 or bf16"):
        TorchEngine(*parts, Precision.INT8)
    with pytest.raises(BackendError, match="2 outputs, 1 are named"):
        TorchEngine(source.module, source.graph.inputs, source.graph.outputs[:1]).infer(feeds)


def test_registry():
    assert registry.names() == sorted(registry.table())
    assert {"openvino", "trt", "reference"} <= set(registry.names())
    with pytest.raises(BackendError, match=r"unknown backend 'openvin' \(did you mean 'openvino'\?\)"):
        registry.get("openvin")


def test_entry_points_add_backends_but_never_replace_ours(monkeypatch):
    from importlib.metadata import EntryPoint

    points = [
        EntryPoint("mine", "backends.reference:ReferenceBackend", registry.GROUP),
        EntryPoint("openvino", "nowhere:Nothing", registry.GROUP),
        EntryPoint("broken", "nowhere_at_all:Nothing", registry.GROUP),
    ]
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: points if group == registry.GROUP else [])
    assert registry.get("mine").name == "reference"
    assert registry.get("openvino").name == "openvino"
    assert registry.availabilities()["broken"].reason.startswith("backend 'broken'")


NO_TENSORRT = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.startswith("tensorrt") else real(name, *a)
from pathlib import Path
from backends import registry
from backends.base import Graph, Precision, Unavailable
backend = registry.get("trt")
found = backend.availability()
print(found.available, "|", found.reason, "|", found.mend)
try:
    backend.compile(Graph(Path("x.onnx"), (), (), ""), Precision.F32)
except Unavailable as error:
    print(error.exit_code, error)
"""


def test_without_tensorrt_the_message_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", NO_TENSORRT], capture_output=True, text=True, cwd=ROOT.parent, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("False | packages are missing: tensorrt-rtx")
    assert '| pip install -e ".[trt]"' in lines[0]
    assert lines[1].startswith("3 backend 'trt' cannot run")


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"openvino", "nncf"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from pathlib import Path
from backends import registry
from backends.base import Graph, Precision, Unavailable
backend = registry.get("openvino")
print(backend.availability().reason, "|", backend.availability().mend)
try:
    backend.compile(Graph(Path("x.onnx"), (), (), ""), Precision.F32)
except Unavailable as error:
    print("Unavailable:", error)
print(type(registry.availabilities()["reference"]).__name__)
"""


def test_without_openvino_the_message_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, cwd=ROOT.parent, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "a package is missing: No module named 'openvino' | pip install -e \".[openvino]\""
    assert lines[1].startswith("Unavailable: backend 'openvino' cannot run")


def test_contracts_import_without_vendor_packages():
    code = "import sys, backends.base, backends.registry, backends.openvino, backends.trt, backends.exchange\n"
    code += "import backends.openvino.backend, backends.trt.backend\n"
    code += "print(sorted({'torch', 'openvino', 'nncf', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.strip() == "[]"


def imported_roots(source: str) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.split(".")[0])
    return roots


def test_backends_never_import_pqk():
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 8
    assert [str(f) for f in files if "pqk" in imported_roots(f.read_text(encoding="utf-8"))] == []
    assert "pqk" in imported_roots("def f():\n    from pqk.errors import PqkError\n")
