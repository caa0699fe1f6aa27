"""Processes that share a training: how they are started, and what is said when one is lost."""

from __future__ import annotations

import subprocess
import sys

import pytest
from run_toys import environment

SCRIPT = """
import sys
from pqk.store.ranks import run_shared
for what in sys.argv[1:]:
    print(run_shared(["-c", "import os, sys, time; first = os.environ['RANK'] == '0'; " + what], 2), flush=True)
"""


def said(*programs: str) -> subprocess.CompletedProcess[str]:
    """What `run_shared` returned for each program, and stderr."""
    command = [sys.executable, "-c", SCRIPT, *programs]
    return subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=100)


@pytest.mark.whole
def test_each_knows_the_others_and_one_that_is_lost_ends_all() -> None:
    names = "('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')"
    known = f"os.write(1, (' '.join(os.environ[n] for n in {names}) + chr(10)).encode())"  # in one piece
    killed = "time.sleep(60) if first else os.kill(os.getpid(), 9)"
    ran = said(known, killed)
    assert ran.returncode == 0, ran.stderr
    *told, well, lost = ran.stdout.splitlines()
    assert sorted(told) == ["0 2 0 127.0.0.1", "1 2 1 127.0.0.1"] and well == "None"
    assert lost.startswith("process 1 of 2 was ended (SIGKILL), and the others with it; the same command goes on from")
    defect = said("time.sleep(60) if first else sys.exit('a defect')")
    assert defect.returncode == 1 and "a defect" in defect.stderr and "ChildFailedError" in defect.stderr
