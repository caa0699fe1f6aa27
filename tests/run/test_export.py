"""`pqk export`: the folder is whole, true, and runs without pqk."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_toys import pqk, script, small_experiment

from backends import registry
from backends.base import BackendError, Precision
from pqk.data.scenes.preprocess import fit_to_shape
from pqk.data.scenes.scene import View
from pqk.engines.calls import compiled
from pqk.engines.variant import Variant, graphs_from_json
from pqk.errors import PqkError
from pqk.export import export as module
from pqk.families.contract import Sample
from pqk.families.dust3r.predict import predict
from pqk.files import sha256_file, sha256_json
from pqk.recipe.request import Request
from pqk.record.schema import validate

# No module of this project can be imported in what this runs.
WITHOUT_PQK = "import runpy, sys; sys.modules['pqk'] = sys.modules['backends'] = None; " + (
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def through_pqk(folder: Path, pictures: list[Path]) -> dict[str, np.ndarray]:
    """The pair through pqk's own preprocessing and engines, on the exported graphs."""
    about = manifest(folder)
    graphs = graphs_from_json(
        {part: {**entry, "path": entry["file"]} for part, entry in about["graphs"].items()}, folder
    )
    variant = Variant("x", about["backend"], Precision(about["precision"]), graphs)
    height, width = about["preprocessing"]["size"]
    frames = tuple(fit_to_shape(View(p.name, p), height, width) for p in pictures)
    with compiled(variant) as engines:
        return predict(engines, Sample(0, "a pair", frames), small_experiment().workload, 0)


def quiet(*_: object) -> None:
    pass


@pytest.mark.parametrize("kind", ["int8", "onnx"])
def test_the_manifest_is_true(exported: Path, kind: str) -> None:
    folder = exported / kind
    about = manifest(folder)
    suffixes = (".xml", ".bin") if kind == "int8" else (".onnx",)
    graphs = {f"{part}{suffix}" for part in ("encoder", "decoder") for suffix in suffixes}
    assert names(folder) == graphs | {"sample.py", "manifest.json"}
    assert set(about["files"]) == graphs | {"sample.py"}
    for name, entry in about["files"].items():
        assert entry["sha256"] == sha256_file(folder / name)
        assert entry["bytes"] == (folder / name).stat().st_size
        assert entry["kind"] == ("sample" if name == "sample.py" else "weights")
    assert (about["card"], about["recipe"], about["measured"]) == ("B1", ["Q"], "engine")
    found = about["graphs"]
    assert found["encoder"]["inputs"] == [{"name": "image", "shape": [1, 3, 64, 64], "dtype": "float32"}]
    assert found["encoder"]["outputs"][0]["shape"] == found["decoder"]["inputs"][0]["shape"]
    assert [port["name"] for port in found["decoder"]["outputs"]] == ["pts3d_1", "conf_1", "pts3d_2", "conf_2"]
    assert about["hashes"]["engine"] == sha256_json({part: found[part]["sha256"] for part in found})
    record = {**about["record"], "status": "ok", "datetime": about["created"]}
    validate(record)
    if kind == "int8":
        assert (record["role"], record["quantizer"], record["precision"]) == ("candidate", "nncf", "int8")
        assert (about["float_precision"], record["images_calibration"]) == ("best", 8)
        assert "calibration" in record["hashes"]
    else:
        assert (record["role"], record["quantizer"], record["precision"]) == ("teacher", None, "f32")
        assert "calibration" not in record["hashes"]


@pytest.mark.parametrize("kind", ["int8", "onnx"])
def test_the_sample_runs_without_pqk_and_computes_the_same(exported: Path, pictures: Path, kind: str) -> None:
    pair = [pictures / "a.png", pictures / "c.png"]
    command = [sys.executable, "-I", "-c", WITHOUT_PQK, exported / kind / "sample.py", *pair]
    done = subprocess.run(list(map(str, command)), cwd=pictures, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    expected = through_pqk(exported / kind, pair)
    assert set(lines) == set(expected)
    for name, array in expected.items():
        shape, low, high = re.fullmatch(r"\((.*)\) min (\S+) max (\S+)", lines[name]).groups()  # type: ignore[union-attr]
        assert tuple(map(int, shape.split(", "))) == (1, *array.shape)
        assert float(low) == pytest.approx(array.min(), rel=1e-5, abs=1e-5)
        assert float(high) == pytest.approx(array.max(), rel=1e-5, abs=1e-5)
    assert np.ptp(expected["pts3d_1"]) > 0.1  # a dead model would agree with anything


def test_exporting_again_replaces_an_earlier_export(exported: Path, tiny_model: Path, tmp_path: Path) -> None:
    root = shutil.copytree(exported, tmp_path / "project", symlinks=True)
    (root / "onnx" / "encoder.0123456789ab.plan").write_bytes(b"built on a device")
    command = ("export", "B1", "--backend", "openvino", "--model", tiny_model, "-o", "onnx")
    again = pqk(root, *command)
    assert again.code == 0, again.err
    assert "… " not in again.err and "quantization  kept from before" in again.err  # the decision too
    assert names(root / "onnx") == names(root / "int8")
    for name in ("encoder.xml", "decoder.bin", "sample.py"):
        assert (root / "onnx" / name).read_bytes() == (root / "int8" / name).read_bytes()
    assert not [path.name for path in root.iterdir() if path.name.startswith(".onnx")]
    (root / "onnx" / "mine.txt").write_text("precious")
    with pytest.raises(PqkError, match=r"'mine\.txt', which would be lost"):
        module.export(Request("B1", "openvino", model=str(tiny_model)), None, root / "onnx", root, quiet, quiet)
    assert (root / "onnx" / "mine.txt").read_text() == "precious"


def test_what_is_no_export_is_left_alone(project: Path, tiny_model: Path) -> None:
    (project / "photos").mkdir()
    (project / "photos" / "a.jpg").write_bytes(b"x")
    (project / "file").write_text("x")
    outcome = pqk(project, "export", "B1", "--backend", "openvino", "--model", tiny_model, "-o", "photos")
    assert outcome.code == 2
    assert "holds no earlier export" in outcome.sentence
    for out, reason in (("file", "is a file"), ("configs", "no earlier export")):
        with pytest.raises(PqkError, match=reason):
            module.export(Request("B1", "openvino", model=str(tiny_model)), None, project / out, project, quiet, quiet)
    assert (project / "photos" / "a.jpg").read_bytes() == b"x"
    assert not (project / "outputs").exists()  # refused before anything was computed


@pytest.mark.parametrize(
    ("asked", "precision", "code", "reason"),
    [
        (Request("B1", "openvino"), "int9", 2, "--precision int9: backend openvino here has"),
        (Request("B1", "openvino", model="nowhere"), None, 2, "nowhere"),
        (Request("B1", "openvino", "nnfc"), None, 2, "did you mean 'nncf'?"),
        (Request("B1", "reference"), None, 2, "has no quantizer"),
        (Request("B1", "reference", "nncf"), "f32", 2, "is not quantized"),
        (Request("B1", "openvinoo"), None, 2, "did you mean 'openvino'?"),
        (Request("G1", "openvino", "inc"), None, 3, "cannot be trained"),
    ],
)
def test_wrong_input_is_one_sentence(
    project: Path, asked: Request, precision: str | None, code: int, reason: str
) -> None:
    with pytest.raises((PqkError, BackendError)) as caught:
        module.export(asked, precision, project / "out", project, quiet, quiet)
    assert caught.value.exit_code == code
    assert reason in str(caught.value)
    assert not (project / "out").exists()


def test_the_plans_are_taken_along_and_emulation_is_said(project: Path, tiny_model: Path) -> None:
    found = registry.get("trt").availability()
    if not found.available:
        pytest.skip(found.reason)
    from backends.trt.cuda import provider

    request = Request("B1", "trt", model=str(tiny_model))
    folder = module.export(request, "f32", project / "out", project, quiet, quiet)
    about = manifest(folder)
    assert about["measured"] == ("emulated" if provider() is None else "engine")
    for part in ("encoder", "decoder"):
        graph = about["graphs"][part]
        assert (graph["file"], graph["plan"]) == (f"{part}.onnx", f"{part}.plan")
        plan = about["files"][f"{part}.plan"]
        assert plan["kind"] == "plan"
        assert plan["bytes"] == (folder / graph["plan"]).stat().st_size > 1000


def test_a_failure_leaves_nothing_behind(project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PqkError("no")

    monkeypatch.setattr(module, "_compile", fail)
    request = Request("B1", "reference", model=str(tiny_model))
    for out in (project / "out", project / "new" / "out"):
        with pytest.raises(PqkError, match="no"):
            module.export(request, "f32", out, project, quiet, quiet)
        assert not out.exists()
        assert not list(out.parent.glob(".out*"))


def test_the_door_of_the_lab(exported: Path, tiny_model: Path, tmp_path: Path) -> None:
    """scripts/export_onnx_trt.py, here on a backend that every machine has."""
    root = shutil.copytree(exported, tmp_path / "project", symlinks=True)
    words = ("--workload", "configs/workload.yaml", "--backend", "reference", "--precision", "f32")
    done = script(root, "export_onnx_trt", "--ckpt", tiny_model, *words)
    assert (done.code, done.out) == (0, "outputs/export/trt\n"), done.err
    found = manifest(root / "outputs" / "export" / "trt")
    assert found["graphs"]["encoder"]["sha256"] == manifest(root / "onnx")["graphs"]["encoder"]["sha256"]
