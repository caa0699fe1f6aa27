"""The joint recipe from the command line: one training, cut and quantized, its rows, its refusals, and SIGKILL."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import preloaded
import pytest
from run_toys import Outcome, kill, make_project, pqk, start, times_as_fast, written

from pqk.files import sha256_file
from pqk.models import load_model
from pqk.recipe.request import count_parameters

pytest.importorskip("openvino")
pytest.importorskip("nncf")

COMMAND = ("run", "G1", "--backend", "openvino", "--json")


def artifact(root: Path) -> Path:
    """The only result of the joint run in the store."""
    (found,) = (root / "outputs" / "store" / "joint").glob("[0-9a-f]*")
    return found


@pytest.fixture(scope="module")
def joined(
    tmp_path_factory: pytest.TempPathFactory, begun: Callable[[Path], Path], tiny_model: Path
) -> tuple[Path, Outcome]:
    """A project in which G1 has run, undisturbed."""
    root = begun(tmp_path_factory.mktemp("joint") / "project")
    outcome = pqk(root, *COMMAND, "--model", tiny_model)
    assert outcome.code in (0, 1, 4), outcome.err
    return root, outcome


def test_one_run_makes_a_smaller_int8_engine(joined: tuple[Path, Outcome], tiny_model: Path) -> None:
    root, outcome = joined
    record = outcome.record
    rows = {(r["role"], r["precision"]): r for r in written(root)}
    teacher, student = rows["teacher", "f32"], rows["baseline", "f32"]
    assert rows["candidate", "int8"] == record
    assert (record["combo"], record["model"], record["quantizer"]) == ("Joint PQK", "tiny+PQK", "nncf")
    assert record["params"] == student["params"] == count_parameters(load_model(artifact(root) / "model"))
    assert record["params"] < teacher["params"] and student["flops_G"] < teacher["flops_G"]
    assert record["size_MB"] < student["size_MB"] < teacher["size_MB"]
    assert record["executed_precision"]["int8"] > 0.9
    assert record["speedup_vs_own_f32"] == pytest.approx(times_as_fast(record, student), rel=1e-3)
    told = json.loads((artifact(root) / "trained.json").read_text())
    assert told["report"]["share"] >= told["report"]["flops_cut"] == record["rho"] == 0.06
    assert (told["steps"], len(told["history"]), len(told["gates_history"])) == (12, 3, 3)
    assert [entry["step"] for entry in told["history"]] == [6, 9, 12]
    assert record["gpu_hours"] == student["gpu_hours"] == pytest.approx(told["device_s"] / 3600)
    assert told["device_s"] > told["training_s"]
    assert "PQK: 12 steps in " in record["notes"] and " % of FLOPs cut" in record["notes"]
    assert "calibrated on 8 images" in record["notes"]
    assert record["verdict"] in ("pass", "fail", "undecided") and " drop " in record["verdict_reasons"][0]
    assert record["hashes"]["joint"] and record["hashes"]["teacher"] == teacher["hashes"]["model"]


def test_killed_in_both_phases_and_started_again(
    joined: tuple[Path, Outcome], tiny_model: Path, tmp_path: Path
) -> None:
    """SIGKILL while gates close, again after the cut, then to the end: the very engine of the undisturbed run."""
    root = Path(shutil.copytree(joined[0], tmp_path / "copy"))
    whole = {p.name: sha256_file(p) for p in artifact(root).glob("*coder.*")}
    assert set(whole) == {"encoder.xml", "encoder.bin", "decoder.xml", "decoder.bin"}
    shutil.rmtree(root / "outputs" / "store" / "joint")
    scratch = root / "outputs" / "store" / ".scratch"
    for phase in ("gates", "settle"):
        process = start((*COMMAND, "--model", tiny_model), root, preloaded.python())
        deadline = time.monotonic() + 200
        while not list(scratch.glob(f"joint-*/{phase}/checkpoint.pt")) and time.monotonic() < deadline:
            time.sleep(0.01)
        kill(process, root)
        assert list(scratch.glob(f"joint-*/{phase}/checkpoint.pt")), phase
        assert not list((root / "outputs" / "store" / "joint").glob("[0-9a-f]*")), phase
    outcome = pqk(root, *COMMAND, "--model", tiny_model)
    assert outcome.code in (0, 1, 4), outcome.err
    assert {p.name: sha256_file(p) for p in artifact(root).glob("*coder.*")} == whole
    assert not list(scratch.glob("*"))
    same = ("absrel", "params", "size_MB", "hashes")
    assert [outcome.record[name] for name in same] == [joined[1].record[name] for name in same]


def test_what_it_cannot_do_is_refused_before_anything_is_made(tmp_path: Path, tiny_model: Path) -> None:
    root = make_project(tmp_path / "project")
    refused = pqk(root, *COMMAND, "--model", tiny_model, "--no-qat")
    assert refused.code == 2 and refused.sentence.startswith("--no-qat: the one training of card G1 is quantization-aw")
    refused = pqk(root, *COMMAND, "--model", tiny_model, "--quantizer", "inc")
    assert refused.code == 3
    assert "'inc' of backend openvino cannot be trained; use --backend openvino --quantizer nncf" in refused.sentence
    refused = pqk(root, *COMMAND, "--model", tiny_model, "--set", "joint.gates.epochs=9")
    assert refused.code == 2 and "fewer gates.epochs than train.epochs" in refused.sentence
    assert not (root / "outputs").exists()
