"""A run that is killed with SIGKILL leaves no process behind, goes on when it is started again, and ends the same."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import preloaded
import psutil
import pytest
from run_toys import Outcome, environment, kill, pqk, start

from pqk.record.log import read_records
from pqk.record.schema import columns

Finished = tuple[Path, Outcome]

# What a clock or the allocator decides, and what follows from it. Everything else must be equal.
TIMED = {column.name for column in columns() if column.timing}
MAY_DIFFER = TIMED | {
    "datetime", "measured_at", "run_id", "wall_s", "gpu_hours", "best_float", "ram_GB", "vram_GB", "peak_memory_GB",
    "ram_compile_GB", "intervals",
    "verdict", "verdict_reasons",
}  # fmt: skip


def lasting(record: dict[str, Any]) -> dict[str, Any]:
    notes = re.sub(r"took at most [\d.]+ GB", "took at most N GB", record["notes"])  # peak_memory_GB in words
    return {name: value for name, value in {**record, "notes": notes}.items() if name not in MAY_DIFFER}


def command(model: Path) -> tuple[str | Path, ...]:
    return ("run", "B1", "--backend", "openvino", "--model", model, "--json")


def kill_at(root: Path, model: Path, line: str, delay: float) -> bool:
    """Start a run, kill it `delay` seconds after stderr says that `line` begins; whether it came that far."""
    process = start(command(model), root, preloaded.python())
    assert process.stderr is not None
    for said in iter(process.stderr.readline, ""):
        if f"… {line}" in said:
            time.sleep(delay)
            kill(process, root)
            return True
    process.communicate()
    return False


def whole(root: Path) -> None:
    """What a killed run left is whole: every record in logs/ is valid, every artifact has its manifest."""
    for _ in read_records(root / "logs"):
        pass
    for folder in (root / "outputs" / "store").glob("*/*"):
        if not folder.name.startswith(".") and folder.parent.name != ".locks":
            assert (folder / "manifest.json").is_file(), folder


@pytest.mark.slow
def test_killed_at_every_stage(project: Path, finished: Finished, tiny_model: Path) -> None:
    moments = random.Random(0)
    stages = {
        "scenes": "generated scenes:",
        "graphs": "ONNX export",
        "calibration": "calibration images",
        "quantized": "quantization",
        "predictions": "predictions, ",
        "scores": "quality, ",
        "timing": "timing",
        "memory": "peak memory",
    }
    for folder, stage in stages.items():
        # on a quick machine the run before may have finished this stage before it was killed
        shutil.rmtree(project / "outputs" / "store" / folder, ignore_errors=True)
        assert kill_at(project, tiny_model, stage, delay=moments.uniform(0.0, 0.3)), stage
        whole(project)
        assert not list((project / "logs").glob("B1-*"))
    last = pqk(project, *command(tiny_model))
    assert last.code in (0, 1, 4), last.err
    assert last.err.count("kept from before") >= 5
    assert lasting(last.record) == lasting(finished[1].record)
    assert len(read_records(project / "logs")) == len(read_records(finished[0] / "logs"))
    assert not list((project / "outputs" / "store").glob("*/.*.tmp"))


@pytest.fixture
def half(copy_of: Callable[[], Path]) -> Iterator[Path]:
    """The finished project without its later stages and compiled models."""
    root = copy_of()
    for stage in ("quantized", "predictions", "scores", "timing", "memory"):
        shutil.rmtree(root / "outputs" / "store" / stage)
    shutil.rmtree(root / "outputs" / "engines")
    for record in (root / "logs").glob("B1-*.json"):
        record.unlink()
    yield root


@pytest.mark.slow
def test_killed_at_random_moments(half: Path, finished: Finished, tiny_model: Path) -> None:
    """Also while compiled models, artifacts and records are being written; the first one imports what a user's does."""
    moments = random.Random(1)
    for python, first, last_s in ((sys.executable, 2.0, 7.0), (preloaded.python(), 0.3, 3.0)):
        process = start(command(tiny_model), half, python)
        time.sleep(moments.uniform(first, last_s))
        kill(process, half)
        whole(half)
    last = pqk(half, *command(tiny_model))
    assert last.code in (0, 1, 4), last.err
    assert lasting(last.record) == lasting(finished[1].record)


@pytest.mark.slow
def test_two_at_once(half: Path, finished: Finished, tiny_model: Path) -> None:
    processes = [start(command(tiny_model), half, preloaded.python()) for _ in range(2)]
    outcomes = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        outcomes.append(Outcome(process.returncode, out, err))
    first, second = outcomes
    assert first.code in (0, 1, 4), first.err
    assert second.code == first.code, second.err
    assert lasting(first.record) == lasting(second.record) == lasting(finished[1].record)
    assert first.record["samples"] == second.record["samples"]  # one of them timed, the other waited for it
    made = sum(o.err.count("… quantization\n") for o in outcomes)
    assert made == 1
    whole(half)


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """PR_SET_PDEATHSIG in a real worker: its parent is killed while it measures."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from pqk.store import worker\n"
        "worker.TASKS['sleep'] = 'time:sleep'\n"
        "if len(sys.argv) > 3:\n"
        "    worker.main()\n"
        "else:\n"
        "    import os, subprocess\n"
        "    open('request.json', 'w').write('{\"request\": 60, \"code\": {}, \"known\": {}}')\n"
        "    subprocess.run([sys.executable, __file__, 'sleep', 'request.json', 'result.json', str(os.getpid())])\n"
    )
    parent = subprocess.Popen([sys.executable, script], cwd=tmp_path, env=environment())
    deadline = time.monotonic() + 30
    children: list[psutil.Process] = []
    while not children and time.monotonic() < deadline:
        time.sleep(0.05)
        children = psutil.Process(parent.pid).children()
    time.sleep(1.0)  # the worker has asked for its signal by now
    assert children[0].is_running()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert not (tmp_path / "result.json").exists()
