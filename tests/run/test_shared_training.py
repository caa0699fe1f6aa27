"""Trainings of a recipe that two processes share: refused, one process lost, gone on with, and in the store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import preloaded
import psutil
import pytest
from run_toys import pqk, start

LONGER = ("--set", "distill.train.epochs=8", "--set", "distill.train.stages=[{size: 32, batch: 2, until: 1.0}]")
COMMON = ("run", "A1", "--backend", "openvino", "--no-rollback", "--json", *LONGER)


def second_in(root: Path) -> psutil.Process:
    """The process of rank 1 of the training that runs in a project."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("RANK") == "1" and process.cwd() == str(root.resolve()):
                return process
        except psutil.Error:  # of another user, or it ended meanwhile
            continue
    raise AssertionError("no training in two processes runs")


@pytest.mark.slow
def test_a_lost_process_ends_all_and_the_next_run_goes_on(
    tmp_path: Path, begun: Callable[[Path], Path], tiny_model: Path
) -> None:
    root = begun(tmp_path / "project")
    asked = (*COMMON, "--model", tiny_model, "--processes")
    refused = pqk(root, *asked, "9")
    assert refused.code == 2
    assert "distill.train.stages: a batch of " in refused.err and "9 processes of --processes" in refused.err

    process = start((*asked, "2"), root, preloaded.python())
    saved, deadline = root / "outputs" / "store", time.monotonic() + 200
    while not (found := list(saved.glob("**/distilled-*/checkpoint.pt"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found
    second = second_in(root)
    parent = second.parent()
    assert parent is not None
    gang = [parent, *parent.children()]
    assert len(gang) == 3
    second.kill()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2, err
    assert "process 1 of 2 was ended (SIGKILL), and the others with it" in err.strip().splitlines()[-1]
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in gang)

    done = pqk(root, *asked, "2")
    assert done.code in (0, 1, 4), done.err
    (trained,) = (root / "outputs" / "store" / "distilled").glob("*/model")
    card = json.loads((trained / "model_card.json").read_text())
    assert card["steps"] == 8 * 3 and [h["step"] for h in card["history"]] == list(range(0, 25, 3))
