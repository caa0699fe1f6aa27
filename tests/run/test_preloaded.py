"""Commands that tests start as forks behave as those that users start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import psutil
from run_toys import pqk, start


def test_a_command_in_a_fork(project: Path) -> None:
    outcome = pqk(project, "plan", "bst")
    assert (outcome.code, outcome.out) == (2, "") and outcome.sentence.startswith("there is no plan 'bst'")
    outcome = pqk(project, "plan", "best", "--json")
    assert (outcome.code, outcome.record["plan"]) == (0, "best") and outcome.err.startswith("plan best: ")


def test_other_programs_are_python_itself(tmp_path: Path) -> None:
    script = "import os, sys; print(os.getcwd(), sys.executable, 'torch' in sys.modules); sys.exit(7)"
    done = subprocess.run([preloaded.python(), "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, f"{tmp_path} {sys.executable} False\n")


def test_another_pqk_on_the_path_is_the_one_that_runs(tmp_path: Path) -> None:
    command = tmp_path / "pqk" / "cli"
    command.mkdir(parents=True)
    for folder in (command.parent, command):
        (folder / "__init__.py").touch()
    (command / "__main__.py").write_text("import pqk.cli; print(pqk.cli.__file__)")
    other = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([preloaded.python(), "-m", "pqk.cli"], env=other, cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{command / '__init__.py'}\n"), done.stderr


def test_a_fork_and_its_workers_die_with_the_door(project: Path, tiny_model: Path) -> None:
    command = ("run", "B1", "--backend", "openvino", "--model", tiny_model)
    door = start(command, project, preloaded.python())
    assert door.stderr is not None
    for said in iter(door.stderr.readline, ""):
        if "… quantization" in said:
            break
    forks: list[psutil.Process] = []
    while len(forks) < 3:  # the command, the door of the worker that quantizes, and that worker
        time.sleep(0.05)
        assert door.poll() is None
        running = [found for found in psutil.process_iter(["cwd"]) if found.info["cwd"] == str(project)]
        forks = [found for found in running if found.pid != door.pid]
    door.kill()
    door.communicate()
    _, alive = psutil.wait_procs(forks, timeout=20)
    assert not [found for found in alive if found.status() != psutil.STATUS_ZOMBIE]
