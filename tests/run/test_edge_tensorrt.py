"""The TensorRT side of edge_eval.py: which plan is taken, what is built, how memory moves.

With doubles of the libraries (see tensorrt_doubles.py); the builder also with the real TensorRT-RTX, which builds
without a GPU.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from edge_toys import QUICK, edge_eval, edge_power, outputs_of
from tensorrt_doubles import PREFIX, builds, modules

from pqk.files import sha256_file, write_json
from pqk.record.schema import validate


@pytest.fixture
def jetson(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT and pycuda can be imported; no power is read."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(edge_power.shutil, "which", lambda name: None)


def with_plans(folder: Path, content: dict[str, bytes], **changes: Any) -> None:
    """Put plans into an export, as `pqk export` with TensorRT does."""
    about = json.loads((folder / "manifest.json").read_text())
    for part, plan in content.items():
        (folder / f"{part}.plan").write_bytes(plan)
        about["graphs"][part]["plan"] = f"{part}.plan"
        about["files"][f"{part}.plan"] = {
            "sha256": sha256_file(folder / f"{part}.plan"),
            "bytes": len(plan),
            "kind": "plan",
        }
    write_json(folder / "manifest.json", {**about, **changes})


def record_of(folder: Path, out: Path) -> dict[str, Any]:
    assert edge_eval.main(["--export", str(folder), "--out", str(out), *QUICK]) == 0
    record: dict[str, Any] = json.loads(out.read_text())
    validate(record)
    return record


def test_plans_are_built_once_on_the_device(exported: Path, tmp_path: Path, jetson: None) -> None:
    folder = shutil.copytree(exported / "onnx", tmp_path / "export")
    before = builds()
    record = record_of(folder, tmp_path / "a.json")
    assert builds() == before + 2
    plans = sorted(path.name for path in folder.glob("*.plan"))
    assert [name.split(".")[0] for name in plans] == ["decoder", "encoder"]
    assert record["backend"] == "trt"
    assert "Orin" in record["device"] or edge_eval.jetson_name()
    assert record["versions"]["tensorrt"] == "10.3.0"
    assert record["versions"]["compute_capability"] == "8.7"
    assert record["size_MB"] == sum((folder / name).stat().st_size for name in plans) / 1e6
    assert record["peak_memory_GB"] is None  # that of the GPU is not known
    again = record_of(folder, tmp_path / "b.json")
    assert builds() == before + 2
    assert all(name in again["notes"] for name in plans)


def test_the_plans_of_the_export_win(exported: Path, tmp_path: Path, jetson: None) -> None:
    folder = shutil.copytree(exported / "onnx", tmp_path / "export")
    with_plans(folder, {part: PREFIX + str(folder / f"{part}.onnx").encode() for part in ("encoder", "decoder")})
    before = builds()
    record = record_of(folder, tmp_path / "a.json")
    assert builds() == before
    assert "plans encoder.plan, decoder.plan" in record["notes"]


def test_plans_of_another_device(
    exported: Path, tmp_path: Path, jetson: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """An f32 or int8 graph can be built again; an f16 plan cannot, as its precision is not in the graph."""
    folder = shutil.copytree(exported / "onnx", tmp_path / "export")
    with_plans(folder, {"encoder": b"of an RTX 4090", "decoder": b"of an RTX 4090"})
    before = builds()
    record_of(folder, tmp_path / "a.json")
    assert builds() == before + 2
    for plan in folder.glob("*.*.plan"):
        plan.unlink()
    with_plans(folder, {}, precision="f16", float_precision="f16")
    assert edge_eval.main(["--export", str(folder), "--out", str(tmp_path / "b.json"), *QUICK]) == 2
    assert "no f16 plan of encoder.onnx loads" in capsys.readouterr().err


def test_it_computes_what_onnx_runtime_computes(exported: Path, tmp_path: Path, jetson: None) -> None:
    folder = shutil.copytree(exported / "onnx", tmp_path / "export")
    first, second = outputs_of(folder, ("tensorrt", "onnxruntime"))
    for name, array in first.items():
        assert (array == second[name]).all()


def test_the_real_builder_takes_the_exported_graphs(exported: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    for part in ("encoder", "decoder"):
        plan = edge_eval.build_plan(trt, logger, exported / "onnx" / f"{part}.onnx")
        assert len(plan) > 10_000
    for name in ("set_tensor_address", "execute_async_v3"):
        assert hasattr(trt.IExecutionContext, name)
    for name in ("get_tensor_shape", "get_tensor_dtype", "create_execution_context"):
        assert hasattr(trt.ICudaEngine, name)
