"""Backend `onnxruntime` from end to end, in real processes, on a tiny workload and a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_toys import QUICK, SCRIPT, edge_eval, outputs_of
from run_toys import Outcome, pqk, written

from pqk.record.schema import validate

pytestmark = pytest.mark.whole
BACKEND = ("--backend", "onnxruntime")


@pytest.fixture(scope="module")
def ran(
    finished: tuple[Path, Outcome], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome]:
    """A project in which B1 has run on OpenVINO, then on ONNX Runtime; and what the second run said."""
    root = shutil.copytree(finished[0], tmp_path_factory.mktemp("ort") / "project", symlinks=True)
    outcome = pqk(root, "run", "B1", *BACKEND, "--model", tiny_model, "--json")
    assert outcome.code in (0, 1, 4), outcome.err
    return root, outcome


@pytest.fixture(scope="module")
def bundle(ran: tuple[Path, Outcome], tiny_model: Path) -> Path:
    made = pqk(ran[0], "export", "B1", *BACKEND, "--model", tiny_model, "-o", "int8")
    assert (made.code, made.out) == (0, "int8\n"), made.err
    return ran[0] / "int8"


def test_a_run_is_measured_on_real_kernels(ran: tuple[Path, Outcome]) -> None:
    root, outcome = ran
    record = outcome.record
    validate(record)
    assert (record["backend"], record["quantizer"], record["precision"]) == ("onnxruntime", "ort", "int8")
    assert record["measured"] == "engine"
    assert record["quality_drop_pct"] is not None
    assert record["t_pair_p50_ms"] > 0
    assert record["best_float"] == "f32"
    assert set(record["executed_precision"]) == {"f32", "int8"}
    assert record["executed_precision"]["int8"] > 0.5
    assert not any("were planned" in reason for reason in record["verdict_reasons"] if reason.startswith("FAILED"))
    assert record["size_ratio"] < 0.6
    assert record["ram_GB"] > 0.02
    assert "stay in float: ONNX Runtime's int8 ones write int8" in record["notes"]
    rows = [row for row in written(root) if row["backend"] == "onnxruntime"]
    assert sorted((row["role"], row["precision"]) for row in rows) == [("candidate", "int8"), ("teacher", "f32")]
    (plain,) = (row for row in rows if row["role"] == "teacher")
    assert plain["executed_precision"] == pytest.approx({"f32": 1.0})
    (other,) = (row for row in written(root) if row["backend"] == "openvino" and row["precision"] == "f32")
    assert plain["flops_G"] == pytest.approx(other["flops_G"])  # counted on the same graphs
    assert plain["absrel"] == pytest.approx(other["absrel"], rel=1e-3)


def test_an_export_runs_with_onnxruntime_alone(bundle: Path, pictures: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["hashes"]["engine"]
    assert {graph["format"] for graph in manifest["graphs"].values()} == {"onnx"}
    without = "import runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:]\n"
    without += "for name in ('pqk', 'backends', 'openvino', 'torch', 'onnx'): sys.modules[name] = None\n"
    without += "runpy.run_path(sys.argv[0], run_name='__main__')"
    out = tmp_path / "edge.json"
    for words in (
        [SCRIPT, "--export", bundle, "--out", out, *QUICK],
        [bundle / "sample.py", *sorted(pictures.iterdir())[:2]],
    ):
        command = [sys.executable, "-I", "-c", without, SCRIPT.parent, *words]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(out.read_text())
    validate(record)
    assert (record["backend"], record["quantizer"], record["precision"]) == ("onnxruntime", "ort", "int8")
    assert record["t_pair_p50_ms"] > 0


def test_the_export_computes_what_was_measured(bundle: Path) -> None:
    from backends import registry
    from backends.base import Precision
    from backends.exchange import describe_onnx

    about = edge_eval.read_export(bundle)
    (found,) = outputs_of(bundle, ["onnxruntime"])
    images, _ = edge_eval.load_images(None, about["preprocessing"])
    graphs = {name: describe_onnx(bundle / graph["file"]) for name, graph in about["graphs"].items()}
    backend = registry.get("onnxruntime")
    with (
        backend.compile(graphs["encoder"], Precision.INT8) as encoder,
        backend.compile(graphs["decoder"], Precision.INT8) as decoder,
    ):
        a, b = (encoder.infer({"image": image})["tokens"] for image in images)
        want = decoder.infer({"tokens_1": a, "tokens_2": b})
    for name, array in want.items():
        np.testing.assert_array_equal(found[name], array)


def test_toolchains_are_compared_with_it(ran: tuple[Path, Outcome], tiny_model: Path) -> None:
    outcome = pqk(ran[0], "parity", "B1", "--backends", "openvino,onnxruntime", "--json", "--model", tiny_model)
    assert outcome.code in (0, 1, 4), outcome.err
    found = json.loads(outcome.out.splitlines()[-1])
    sides = [(row["level"], row["side"]) for row in found["rows"]]
    assert ("float", "onnxruntime f32") in sides or ("float", "onnxruntime fp32") in sides
    assert ("recipe", "onnxruntime/ort int8") in sides
    assert next(v for v in found["verdicts"] if v["level"] == "float")["verdict"] == "agree"
    shared = {row["side"]: row for row in found["rows"] if row["level"] == "shared"}
    assert set(shared) == {"reference int8", "openvino int8"}
    for row in shared.values():
        assert row["note"].startswith("graph of onnxruntime/ort")
        assert 1e-4 < row["pts3d_1.relative"] < 0.5


def test_explain_ranks_its_nodes(ran: tuple[Path, Outcome], tiny_model: Path) -> None:
    command = ("parity", "B1", "--backends", "onnxruntime", "--explain", "--json", "--model", tiny_model)
    outcome = pqk(ran[0], *command)
    assert outcome.code in (0, 1, 4), outcome.err
    found = json.loads(outcome.out.splitlines()[-1])["explanation"]["onnxruntime/ort"]
    assert found["parted"] == {"encoder": None, "decoder": None}
    shares = [row["of_all"] for row in found["groups"]]
    assert len(shares) > 3
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[0] <= 1
    assert all(value > 0 for name, value in found["proof"].items() if name.startswith("t_pair"))


def test_a_profile_shows_its_kernels(ran: tuple[Path, Outcome], tiny_model: Path) -> None:
    outcome = pqk(ran[0], "profile", "B1", *BACKEND, "--model", tiny_model, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out.splitlines()[-1])
    kernels = found["kernels"]["int8"]
    assert {"QGemm", "QuantizeLinear"} <= {kernel["implementation"] for kernel in kernels}
    for name in ("linear layers", "attention"):
        assert found["classes"][name]["int8_ms"] > 0
    flops = {side: sum(kernel["flops"] for kernel in found["kernels"][side]) for side in ("f32", "int8")}
    assert flops["f32"] == pytest.approx(flops["int8"])
