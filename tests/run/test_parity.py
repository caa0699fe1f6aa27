"""`pqk parity` from end to end in real processes, on a tiny workload and a tiny model."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preloaded
import pytest
from openpyxl import load_workbook
from run_toys import Outcome, kill, pqk, start

from backends import registry
from backends.cpu import saturates
from pqk.parity.parity import Verdict

Copy = Callable[[], Path]
PARITY = ("parity", "B1", "--backends", "openvino", "--quantizers", "nncf", "--json")


def data(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(outcome.out.splitlines()[-1])
    return found


def verdicts(outcome: Outcome) -> dict[str, str]:
    return {v["level"]: v["verdict"] for v in data(outcome)["verdicts"]}


@pytest.fixture(scope="module")
def compared(finished: tuple[Path, Outcome], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import shutil

    root = shutil.copytree(finished[0], tmp_path_factory.mktemp("parity") / "project", symlinks=True)
    return root, pqk(root, *PARITY, "--model", tiny_model)


def test_the_float_graph_agrees_with_torch_on_every_runtime(compared: tuple[Path, Outcome]) -> None:
    _, outcome = compared
    assert outcome.code == 0, outcome.err
    found = data(outcome)
    sides = {row["side"]: row for row in found["rows"] if row["level"] == "float"}
    assert {"torch f32", "reference fp32", "openvino fp32"} <= set(sides)
    for name in ("reference fp32", "openvino fp32"):
        for head in ("pts3d_1", "pts3d_2", "conf_1", "conf_2"):
            assert 0 < sides[name][f"{head}.relative"] < 1e-4, (name, head)
            assert sides[name][f"{head}.cosine"] == pytest.approx(1, abs=1e-6)
    assert verdicts(outcome)["float"] == "agree"
    # ONNX Runtime plays no part in the recipe: it has no record, so no size and no time
    assert sides["reference fp32"]["t_pair_p50_ms"] is None
    assert sides["openvino fp32"]["t_pair_p50_ms"] > 0


def test_the_finished_run_is_reused(compared: tuple[Path, Outcome]) -> None:
    assert compared[1].err.count("… quantization") == 0


def test_what_cannot_be_compared_says_why(compared: tuple[Path, Outcome]) -> None:
    found = {v["level"]: v for v in data(compared[1])["verdicts"]}
    assert found["recipe"]["verdict"] == "not compared"
    assert found["recipe"]["sentences"] == ["only one quantizer ran"]
    assert found["shared"]["verdict"] == "not compared"
    assert "Q/DQ" in found["shared"]["sentences"][0]


def test_the_files_hold_the_same_rows(compared: tuple[Path, Outcome]) -> None:
    root, outcome = compared
    folder = root / "reports" / "parity"
    found = json.loads((folder / "B1.json").read_text())
    assert found == data(outcome)
    rows = list(csv.DictReader((folder / "B1.csv").open(newline="")))
    assert [row["side"] for row in rows] == [row["side"] for row in found["rows"]]
    openvino = next(row for row in rows if row["side"] == "openvino fp32")
    want = next(row for row in found["rows"] if row["side"] == "openvino fp32")
    assert float(openvino["pts3d_1.relative"]) == want["pts3d_1.relative"]
    sheet = load_workbook(folder / "B1.xlsx")["parity"]
    assert [cell.value for cell in sheet["B"]][1:] == [row["side"] for row in found["rows"]]
    assert "| openvino fp32 | torch f32 |" in (folder / "B1.md").read_text()


def test_a_stricter_tolerance_differs_with_exit_code_1(compared: tuple[Path, Outcome], tiny_model: Path) -> None:
    root, _ = compared
    outcome = pqk(root, *PARITY, "--model", tiny_model, "--set", "eval.parity.float_relative=1.0e-12")
    assert outcome.code == 1, outcome.err
    assert verdicts(outcome)["float"] == "differ"
    assert any(s.startswith("DIFFERS: openvino fp32") for s in data(outcome)["verdicts"][0]["sentences"])


def check_explained(found: dict[str, Any], root: Path) -> None:
    """The parts are ranked, the worst is proved, and the sentence is in the report."""
    parts = {(row["graph"], row["name"]) for row in found["groups"]}
    assert {("encoder", "enc_blocks.0"), ("decoder", "dec_blocks.0")} <= parts
    assert len(parts) == len(found["groups"]) > 3
    assert found["worst"] == found["groups"][0]
    shares = [row["of_all"] for row in found["groups"]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[0] <= 1
    # AbsRel is taken in view 1, which the only block of the second decoder, and the second head, have no way to reach
    of_view_2 = found["worst"]["name"] in ("dec_blocks2.0", "downstream_head2")
    assert (found["proof"]["drop_after_pct"] == found["proof"]["drop_before_pct"]) == of_view_2
    assert found["worst"]["name"] in found["sentence"]
    assert found["sentence"] in (root / "reports" / "parity" / "B1.md").read_text()


def killed_while_ranking(root: Path, *command: str | Path) -> tuple[list[str], float]:
    """Kill `pqk` when some errors are measured, change one of those it kept, and return its nodes and the new value."""
    process = start(command, root, preloaded.python())
    kept: dict[str, float] = {}
    deadline = time.monotonic() + 120
    while len(kept) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        for path in (root / "outputs" / "store" / ".scratch").glob("ranking-*/encoder.json"):
            kept = json.loads(path.read_text())
    kill(process, root)
    (path,) = (root / "outputs" / "store" / ".scratch").glob("ranking-*/encoder.json")
    kept = json.loads(path.read_text())
    nodes = max(kept, key=len)  # those of a whole part
    kept[nodes] *= 1.5
    path.write_text(json.dumps(kept))
    return nodes.split("\n"), kept[nodes]


def test_explain_ranks_the_parts_and_proves_the_worst(compared: tuple[Path, Outcome], tiny_model: Path) -> None:
    root, _ = compared
    command = (*PARITY, "--explain", "--model", tiny_model)
    nodes, error = killed_while_ranking(root, *command)
    outcome = pqk(root, *command)
    assert outcome.code == 0, outcome.err
    found = data(outcome)["explanation"]["openvino/nncf"]
    check_explained(found, root)
    assert found["parted"] == {"encoder": None, "decoder": None}
    proof = found["proof"]
    assert all(value is not None and value > 0 for name, value in proof.items() if name.startswith("t_pair"))
    assert f"{proof['drop_after_pct']:.2f} % and a pair takes" in found["sentence"]
    assert "explained" in outcome.err  # the table goes to stderr beside --json
    assert "0.0 %  encoder, 1 of" in outcome.err  # of a large model the ranking takes an hour
    # what was measured before the kill was not measured again
    (resumed,) = [row for row in found["groups"] if row["nodes"] == nodes]
    assert resumed["error_without"] == error
    assert not list((root / "outputs" / "store" / ".scratch").glob("ranking-*"))


def test_explain_of_an_emulated_backend_has_no_time(compared: tuple[Path, Outcome], tiny_model: Path) -> None:
    available = registry.get("trt").availability()
    if not available.available or not available.emulated:
        pytest.skip(available.reason or "a CUDA device runs the engines here")
    root, _ = compared
    outcome = pqk(root, "parity", "B1", "--backends", "trt", "--explain", "--json", "--model", tiny_model)
    assert outcome.code in (0, 1, 4), outcome.err
    found = data(outcome)["explanation"]["trt/modelopt"]
    check_explained(found, root)
    assert found["parted"] is None
    assert {name: value for name, value in found["proof"].items() if name.startswith("t_pair")} == {
        "t_pair_p50_before_ms": None,
        "t_pair_p50_after_ms": None,
    }
    assert "was not measured, as these engines are emulated" in found["sentence"]
    # its graph has weights of 8 bits, which int8 kernels of a CPU without VNNI cannot all sum
    shared = [row["note"] for row in data(outcome)["rows"] if row["level"] == "shared"]
    assert ["its weights at 7 of their 8 bits" in note for note in shared] == [saturates()] * 2
    (level,) = [verdict for verdict in data(outcome)["verdicts"] if verdict["level"] == "shared"]
    assert ("weights have 7 bits here" in level["sentences"][0]) == saturates()


def test_explain_needs_a_backend_that_can(copy_of: Copy) -> None:
    outcome = pqk(copy_of(), "parity", "B1", "--backends", "reference", "--explain")
    assert outcome.code == 2
    assert "no backend of reference can do: add openvino, onnxruntime or trt" in outcome.sentence
    assert "…" not in outcome.err


def test_unknown_names(copy_of: Copy) -> None:
    root = copy_of()
    outcome = pqk(root, "parity", "B1", "--backends", "openvno")
    assert (outcome.code, "did you mean 'openvino'" in outcome.sentence) == (2, True)
    outcome = pqk(root, "parity", "B1", "--backends", "openvino", "--quantizers", "nncv")
    assert (outcome.code, "did you mean 'nncf'" in outcome.sentence) == (2, True)


def test_one_failed_comparison_decides_a_level() -> None:
    verdict = Verdict("float")
    assert verdict.verdict == "not compared"
    verdict.judge(True, "a")
    assert verdict.verdict == "agree"
    verdict.judge(False, "b")
    verdict.judge(True, "c")
    assert verdict.verdict == "differ"
    verdict.judge(None, "d")
    assert verdict.verdict == "differ"
    assert verdict.sentences == ["ok: a", "DIFFERS: b", "ok: c", "undecided: d"]
    other = Verdict("recipe")
    other.judge(None, "a")
    other.judge(True, "b")
    assert other.verdict == "undecided"
