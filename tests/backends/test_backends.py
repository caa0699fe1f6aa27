"""The registry of backends, what a missing package gives, and what may import what. Engines: see test_contract."""

from __future__ import annotations

import ast
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from backend_toys import image

import backends
from backends import registry
from backends.base import BackendError, Precision
from backends.cpu import cpu_name, instruction_sets
from backends.reference import TorchEngine

ROOT = Path(backends.__file__).parent
RUNNABLE = [name for name, found in registry.availabilities().items() if found.available]


def test_reference_always_runs():
    assert "reference" in RUNNABLE


def test_the_cpu_is_described_by_cpuinfo(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t: sse avx2 avx512f amx_tile amx_int8\n")
    assert instruction_sets(path) == ["avx2", "avx512f", "amx_tile", "amx_int8"]
    assert cpu_name(path) == "Some CPU @ 2 GHz"
    assert instruction_sets(tmp_path / "absent") == []
    assert cpu_name(tmp_path / "absent") in (platform.processor(), platform.machine())


def test_torch_engine_refuses_what_it_cannot_do(source):
    parts = (source.module, source.graph.inputs, source.graph.outputs)
    with pytest.raises(BackendError, match="f32 or bf16"):
        TorchEngine(*parts, Precision.INT8)
    with pytest.raises(BackendError, match="2 outputs, 1 are named"):
        TorchEngine(source.module, source.graph.inputs, source.graph.outputs[:1]).infer({"image": image().numpy()})


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
print(found.available, "|", found.reason, "|", found.remedy)
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
print(backend.availability().reason, "|", backend.availability().remedy)
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
