"""A backend of another package, found through its entry point, in `pqk env`, `run` and `parity`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import preloaded
import pytest
from run_toys import REPOSITORY, Outcome, environment

from pqk.record.schema import validate

PACKAGES = Path(__file__).parent / "third_party"
OWN = ("--set", "quant.ptq.keep_list=[]")


def pqk(root: Path, *arguments: str | Path, **variables: str) -> Outcome:
    """Run `pqk ...` where the other package is installed."""
    done = subprocess.run(
        [preloaded.python(), "-m", "pqk.cli", *map(str, arguments)],
        cwd=root,
        env={**environment(), **variables, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(PACKAGES)])},
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def root(finished: tuple[Path, Outcome], tmp_path: Path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "project", symlinks=True)


def test_it_is_listed(root: Path) -> None:
    outcome = pqk(root, "env", "--json")
    assert json.loads(outcome.out)["backends"]["ortchain"]["versions"] == {"ortchain": "0.1"}


def test_it_runs_a_card_and_is_compared(root: Path, tiny_model: Path) -> None:
    outcome = pqk(root, "run", "B1", "--backend", "ortchain", "--model", tiny_model, "--json", *OWN)
    assert outcome.code in (0, 1, 4), outcome.err
    record = outcome.record
    validate(record)
    assert (record["backend"], record["quantizer"], record["measured"]) == ("ortchain", "ortq", "engine")
    assert record["notes"].startswith("quantized by ortq; encoder calibrated on 8 images, decoder on 1 pairs")
    assert record["t_pair_p50_ms"] > 0
    # The same Q/DQ graph on two runtimes: small rounding differences, but the same answer within the int8 noise.
    options = ("--backends", "openvino,ortchain", "--quantizers", "nncf,ortq", "--json", "--model", tiny_model, *OWN)
    outcome = pqk(root, "parity", "B1", *options)
    assert outcome.code in (0, 1, 4), outcome.err
    found: dict[str, Any] = json.loads(outcome.out.splitlines()[-1])
    sides = [(row["level"], row["side"]) for row in found["rows"]]
    assert ("float", "ortchain fp32") in sides
    assert ("shared", "reference int8") in sides
    assert ("shared", "openvino int8") in sides
    assert ("recipe", "ortchain/ortq int8") in sides
    shared = {row["side"]: row for row in found["rows"] if row["level"] == "shared"}
    for row in shared.values():
        assert row["note"].startswith("graph of ortchain/ortq")
        assert 1e-4 < row["pts3d_1.relative"] < 0.5, "int8 differs from f32, and is no nonsense"
    judged = {v["level"]: v for v in found["verdicts"]}
    assert judged["float"]["verdict"] == "agree"
    assert judged["shared"]["verdict"] in ("agree", "differ", "undecided")
    assert len(judged["shared"]["sentences"]) == 2
    assert len(judged["recipe"]["sentences"]) == 1


def test_an_emulating_engine_is_not_timed(root: Path, tiny_model: Path) -> None:
    outcome = pqk(
        root, "run", "B1", "--backend", "ortchain", "--model", tiny_model, "--json", *OWN, ORTCHAIN_EMULATED="1"
    )
    assert outcome.code in (0, 1, 4), outcome.err
    record = outcome.record
    validate(record)
    assert record["measured"] == "emulated"
    assert record["quality_drop_pct"] is not None
    for column in (
        "t_pair_p50_ms",
        "pairs_per_sec",
        "speedup_vs_own_f32",
        "best_float",
        "samples",
        "peak_memory_GB",
        "executed_precision",
    ):
        assert record[column] is None, column
    assert any("compiled, not timed" in reason for reason in record["verdict_reasons"])
    assert "no kernel ran" in " ".join(record["verdict_reasons"])
    assert "planned, not measured" in record["notes"]
    assert "… timing" not in outcome.err


def test_a_quantizer_that_fails_is_a_row(root: Path, tiny_model: Path) -> None:
    """With the keep-list of quant.yaml, which ortq does not have."""
    outcome = pqk(root, "parity", "B1", "--backends", "openvino,ortchain", "--json", "--model", tiny_model)
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out.splitlines()[-1])["rows"]
    (failed,) = (row for row in rows if row["side"] == "ortchain/ortq")
    assert "failed: ortq has no keep-list" in failed["note"]
