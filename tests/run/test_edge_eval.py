"""scripts/edge_eval.py on real exports, in a process that cannot import pqk; its record in pqk's table."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_toys import QUICK, SCRIPT, edge_eval, edge_power, outputs_of
from PIL import Image
from run_toys import REPOSITORY, Outcome, pqk

from pqk.data.scenes.open import open_scene
from pqk.data.scenes.pairs import pair_graph
from pqk.data.scenes.preprocess import fit_to_shape
from pqk.data.scenes.scene import View
from pqk.record.log import read_records
from pqk.record.schema import empty_record, validate

sys.path.insert(0, str(REPOSITORY / "tests" / "data"))

from picture_toys import TURNED, exif, png16, tiff, with_exif

WITHOUT_PQK = (
    "import runpy, sys; sys.modules['pqk'] = sys.modules['backends'] = None; sys.path.insert(0, sys.argv[1]); "
    "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def edge(*arguments: str | Path) -> Outcome:
    command = [sys.executable, "-I", "-c", WITHOUT_PQK, SCRIPT.parent, SCRIPT, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)


def sentence(outcome: Outcome) -> str:
    """The one line of a user's error."""
    (line,) = outcome.err.splitlines()
    return line.removeprefix("edge_eval: ")


def test_a_record_that_the_table_shows(exported: Path, tmp_path: Path) -> None:
    root = shutil.copytree(exported, tmp_path / "project", symlinks=True)
    log = root / "logs" / "B1-edge.json"
    done = edge("--export", exported / "int8", "--out", log, "--seconds", "0.2")
    assert done.code == 0, done.err
    record: dict[str, Any] = json.loads(log.read_text())
    validate(record)
    assert list(record) == list(empty_record())
    assert (record["exp_id"], record["role"], record["status"], record["measured"]) == (
        "B1",
        "candidate",
        "ok",
        "engine",
    )
    assert (record["backend"], record["quantizer"], record["precision"]) == ("openvino", "nncf", "int8")
    pairs = record["samples"]["pair"]
    assert len(pairs) >= 30
    assert sum(pairs) > 150  # ms: --seconds counts too, less what lies between the pairs
    assert len(record["samples"]["encoder"]) == 2 * len(record["samples"]["decoder"]) == 2 * len(pairs)
    assert record["t_pair_p50_ms"] == pytest.approx(np.percentile(pairs, 50), abs=1e-3)
    p95 = record["t_pair_p95_ms"]  # null below 100 pairs
    assert p95 is None if len(pairs) < 100 else p95 == pytest.approx(np.percentile(pairs, 95), abs=1e-3)
    assert record["pairs_per_sec"] == pytest.approx(1000 / np.mean(pairs), rel=1e-3)
    assert record["t_scene_s"] is None  # two images of noise are no scene
    weights = sum(p.stat().st_size for p in (exported / "int8").iterdir() if p.suffix in (".xml", ".bin"))
    assert record["size_MB"] == weights / 1e6
    assert record["device"] and record["ram_compile_GB"] == record["peak_memory_GB"] > 0.02
    assert record["ram_GB"] is None  # the steady state is not measured
    has_power = shutil.which("tegrastats") or edge_power.read_rapl()
    assert (record["power_avg_W"] is None) == (not has_power)
    assert "two images of noise" in record["notes"]
    assert (
        record["hashes"]["engine"] == json.loads((exported / "int8" / "manifest.json").read_text())["hashes"]["engine"]
    )
    assert json.loads(done.out.splitlines()[-1])["t_pair_p50_ms"] == record["t_pair_p50_ms"]

    assert [item.record for item in read_records(root / "logs")] == [record]
    shown = pqk(root, "table")
    assert shown.code == 0, shown.err
    assert "candidate int8" in shown.out and f"{record['t_pair_p50_ms']:.2f}" in shown.out
    summary = json.loads((root / "reports" / "summary.json").read_text())
    assert summary[0]["pairs_per_sec"] == record["pairs_per_sec"]


def test_pictures_make_a_scene(exported: Path, pictures: Path, tmp_path: Path) -> None:
    done = edge("--engine", exported / "int8", "--images", pictures, "--log", tmp_path / "r.json", *QUICK)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "r.json").read_text())
    validate(record)
    assert record["t_scene_s"] > 0
    assert len(record["samples"]["pair"]) == 3
    expected = len(pair_graph(4, "neighbor", k=4, symmetrize=False))
    assert f"scene of 4 images, {expected} pairs" in record["notes"]


def test_onnx_on_either_runtime(exported: Path, tmp_path: Path) -> None:
    for runtime in ("openvino", "onnxruntime"):
        out = tmp_path / f"{runtime}.json"
        done = edge("--export", exported / "onnx", "--out", out, "--runtime", runtime, *QUICK)
        assert done.code == 0, done.err
        record = json.loads(out.read_text())
        validate(record)
        assert (record["backend"], record["role"], record["precision"]) == (runtime, "teacher", "f32")
        assert runtime in record["versions"]
    assert len(read_records(tmp_path)) == 2


def test_pictures_are_fed_as_pqk_feeds_them(exported: Path, pictures: Path) -> None:
    how = edge_eval.read_export(exported / "int8")["preprocessing"]
    images, _ = edge_eval.load_images(pictures, how)
    files = sorted(pictures.iterdir())
    assert len(images) == len(files) == 4
    for image, file in zip(images, files, strict=True):
        np.testing.assert_array_equal(image[0], fit_to_shape(View(file.name, file), 64, 64).image)


def test_pictures_are_ordered_as_pqk_orders_them(pictures: Path, tmp_path: Path) -> None:
    for k, file in zip((12, 9, 10, 100), sorted(pictures.iterdir()), strict=True):
        (tmp_path / f"frame_{k}.png").symlink_to(file)
    how = {"size": [64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}
    images, _ = edge_eval.load_images(tmp_path, how)
    views = open_scene(tmp_path).views
    assert [view.name for view in views] == [f"frame_{k}.png" for k in (9, 10, 12, 100)]
    for image, view in zip(images, views, strict=True):
        np.testing.assert_array_equal(image[0], fit_to_shape(view, 64, 64).image)


def test_both_runtimes_compute_what_torch_exported(exported: Path) -> None:
    """The functions that are timed give the same numbers on the same ONNX."""
    first, second = outputs_of(exported / "onnx", ("openvino", "onnxruntime"))
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["neighbor", "complete"])
@pytest.mark.parametrize("symmetrize", [False, True])
def test_pairs_of_a_scene_are_those_of_pqk(kind: str, symmetrize: bool) -> None:
    for n in range(2, 8):
        for k in range(1, 6):
            found = edge_eval.scene_pairs(n, {"kind": kind, "k": k, "symmetrize": symmetrize})
            known = kind == "neighbor" and n > 2
            assert found == (pair_graph(n, kind, k=k, symmetrize=symmetrize) if known else [])


def test_wrong_input_is_one_sentence(exported: Path, pictures: Path, tmp_path: Path) -> None:
    int8, out = exported / "int8", tmp_path / "r.json"
    damaged = shutil.copytree(int8, tmp_path / "damaged")
    data = bytearray((damaged / "decoder.bin").read_bytes())
    data[100] ^= 1
    (damaged / "decoder.bin").write_bytes(data)
    partly = shutil.copytree(int8, tmp_path / "partly")
    (partly / "encoder.bin").unlink()
    halves = shutil.copytree(exported / "onnx", tmp_path / "halves")
    about = json.loads((halves / "manifest.json").read_text())
    (halves / "manifest.json").write_text(json.dumps({**about, "float_precision": "f16", "precision": "f16"}))
    later = tmp_path / "later"
    later.mkdir()
    (later / "manifest.json").write_text(json.dumps({**about, "format": 2}))
    (tmp_path / "note.json").write_text('["mine"]')
    (tmp_path / "empty").mkdir()
    cases = [
        (("--export", tmp_path / "nowhere", "--out", out), 2, "is no export of pqk"),
        (("--export", damaged, "--out", out), 2, "decoder.bin is damaged"),
        (("--export", partly, "--out", out), 2, "copy the whole folder"),
        (("--export", later, "--out", out), 2, "has format 2, this script reads 1"),
        (("--export", halves, "--out", out, "--runtime", "openvino"), 2, "the export asks for f16"),
        (("--export", halves, "--out", out, "--runtime", "onnxruntime"), 2, "the export asks for f16"),
        (("--export", int8, "--out", tmp_path / "note.json"), 2, "is no record"),
        (("--export", int8, "--out", tmp_path / "r.txt"), 2, ".json file"),
        (("--export", int8, "--out", out, "--pairs", "0"), 2, "--pairs must be at least 1"),
        (("--export", int8, "--out", out, "--images", tmp_path / "empty"), 2, "a pair needs 2"),
        (("--export", int8, "--out", out, "--runtime", "onnxruntime"), 2, "use --runtime openvino"),
        (("--export", int8, "--out", out, "--runtime", "tensorrt"), 2, "made for OpenVINO"),
    ]
    for arguments, code, reason in cases:
        done = edge(*arguments)
        assert (done.code, reason in sentence(done)) == (code, True), (arguments, done.err)
    assert (tmp_path / "note.json").read_text() == '["mine"]'
    assert not out.exists()


@pytest.fixture
def odd_pictures(pictures: Path, tmp_path: Path) -> dict[str, Path]:
    """One file each that no picture can be made of, and what is said of it."""
    folder = tmp_path / "odd"
    folder.mkdir()
    files = {
        "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image, or not 8-bit JPEG"),
        "16 bits": (png16(np.full((64, 64, 3), 4000, np.uint16)), "16 bits per channel"),
        "strip": (None, "20 times the short one"),
        "bomb": (None, "the image is too large (Image size (196000000 pixels)"),
        "cut": ((pictures / "a.png").read_bytes()[:200], "the image is damaged"),
    }
    found = {}
    for name, (content, reason) in files.items():
        path = folder / f"{name}.jpg"
        if content is None:
            Image.new("1", (14_000, 14_000) if name == "bomb" else (2100, 100)).save(path, "PNG")
        else:
            path.write_bytes(content)
        found[reason] = path
    return found


def test_odd_pictures_are_one_sentence(
    exported: Path, pictures: Path, odd_pictures: dict[str, Path], tmp_path: Path
) -> None:
    """In edge_eval.py, and in the sample.py of the export; broken EXIF is none of them."""
    how = edge_eval.read_export(exported / "int8")["preprocessing"]
    for number, (reason, path) in enumerate(odd_pictures.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in (path, pictures / "b.png"):
            (folder / file.name).symlink_to(file)
        with pytest.raises(edge_eval.EdgeError, match=re.escape(reason)):
            edge_eval.load_images(folder, how)
    sample = [sys.executable, "-I", exported / "int8" / "sample.py", pictures / "a.png"]
    for reason in ("16 bits per channel", "the image is too large (Image size (196000000 pixels)"):
        done = subprocess.run(
            list(map(str, [*sample, odd_pictures[reason]])), capture_output=True, text=True, check=False
        )
        (line,) = done.stderr.splitlines()
        assert (done.returncode, line.startswith("sample: ")) == (2, True)
        assert reason in line
    done = edge("--export", exported / "int8", "--out", tmp_path / "r.json", "--images", tmp_path / "0", *QUICK)
    assert done.code == 2
    assert "not an image" in sentence(done)


def test_odd_exif_turns_a_picture_here_as_in_pqk(exported: Path, tmp_path: Path) -> None:
    how = edge_eval.read_export(exported / "int8")["preprocessing"]
    pixels = np.random.default_rng(1).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    odd = exif(TURNED, (0x010E, 12, 1, b"\x08\0\0\0"), (0x8769, 2, 1, b"\x08\0\0\0"))
    (tmp_path / "a.jpg").write_bytes(with_exif(pixels, "JPEG", odd))
    (tmp_path / "b.png").write_bytes(with_exif(pixels, "PNG", b"II*\0\xff\xff\xff\xff"))
    (tmp_path / "c.tif").write_bytes(tiff(pixels, TURNED, (0x8769, 2, 1, b"\x08\0\0\0")))
    (tmp_path / "d.heic").write_bytes(b"x")
    images, fed = edge_eval.load_images(tmp_path, how)
    assert fed == "3 pictures (not read: 1 HEIC)"
    for image, name in zip(images, ("a.jpg", "b.png", "c.tif"), strict=True):
        np.testing.assert_array_equal(image[0], fit_to_shape(View(name, tmp_path / name), 64, 64).image)
    np.testing.assert_array_equal(images[2][0], fit_to_shape(upright_view(tmp_path, pixels), 64, 64).image)


def upright_view(folder: Path, pixels: np.ndarray) -> View:
    Image.fromarray(np.rot90(pixels, -1)).save(folder / "upright.bmp")
    return View("upright.bmp", folder / "upright.bmp")


def test_a_timing_outlives_the_power_tool(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "tegrastats"
    tool.write_text("#!/bin/sh\ntrap '' TERM\nwhile :; do echo VDD_IN 5000mW/5000mW; sleep 0.05; done\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = edge("--export", exported / "int8", "--out", tmp_path / "r.json", *QUICK)
    assert (done.code, done.err) == (0, "")
    record = json.loads((tmp_path / "r.json").read_text())
    validate(record)
    assert record["power_avg_W"] is record["power_peak_W"] is None
    assert "power: none (tegrastats did not end" in record["notes"] and len(record["samples"]["pair"]) == 3


def test_a_record_that_cannot_be_written_is_printed(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, _: bytes) -> None:
        raise edge_eval.EdgeError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(edge_eval, "write_atomically", refuse)
    code = edge_eval.main(["--export", str(exported / "int8"), "--out", str(tmp_path / "r.json"), *QUICK])
    out, err = capsys.readouterr()
    assert code == 2
    assert "No space left" in err
    record = json.loads(out)
    validate(record)
    assert len(record["samples"]["pair"]) == 3


def test_without_tensorrt_there_is_a_reason(exported: Path, tmp_path: Path) -> None:
    try:
        import pycuda.autoinit  # noqa: F401
    except Exception:  # no package, no driver, no device
        done = edge("--export", exported / "onnx", "--out", tmp_path / "r.json", "--runtime", "tensorrt")
        assert done.code == 3
        assert "no runtime can run this export here (tensorrt: " in sentence(done)
        assert "pip install pycuda, or the extra 'edge'" in sentence(done)
    else:
        pytest.skip("a CUDA device and pycuda are here")


def test_a_record_is_replaced_by_a_newer_one(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    for _ in range(2):
        assert edge("--export", exported / "int8", "--out", out, *QUICK).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
