"""The command in a record makes its row again, from what is there."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from run_toys import Outcome, pqk, written

pytest.importorskip("nncf")


def test_a_model_elsewhere_is_named_without_its_folder(finished: tuple[Path, Outcome]) -> None:
    record = json.loads(finished[1].out.splitlines()[-1])
    assert record["command"] == "pqk run B1 --backend openvino --model OUTSIDE/tiny"


def test_the_command_of_a_record_finds_everything_made(
    tmp_path: Path, begun: Callable[[Path], Path], tiny_model: Path
) -> None:
    root = begun(tmp_path / "project")
    shutil.copytree(tiny_model, root / "models" / "own")
    setting = "quant.ptq.keep_list=[LayerNorm, Softmax]"
    words = ["run", "B1", "--backend", "openvino", "--model", str(root / "models" / "own"), "--set", setting]
    assert pqk(root, *words, "--no-rollback").code in (0, 1, 4)
    (command,) = {record["command"] for record in written(root)}
    program, *again = shlex.split(command)
    assert program == "pqk" and again == [*words[:5], "models/own", *words[6:], "--no-rollback"]
    outcome = pqk(root, *again)
    assert outcome.code in (0, 1, 4)
    made = [
        line for line in outcome.err.splitlines() if "✓" in line and " s" in line and "kept from before" not in line
    ]
    assert "kept from before" in outcome.err and not [line for line in made if "records" not in line], outcome.err
