"""Starts commands and workers of pqk in processes that have imported all that they may need already, see `python`.

Importing torch, OpenVINO and NNCF takes five seconds, pqk a quarter of one, and a toy's work in a worker often less
than one. A process, `forks.py`, imports them once, and each command is a fork of it; where PYTHONPATH leads to another
pqk, the fork imports that one. Its memory is that of all these libraries. `start` of run_toys, and tests that say
`sys.executable`, start Python as users do.
"""

from __future__ import annotations

import atexit
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


@cache
def python() -> str:
    """A program that takes the arguments of Python's; for programs of pqk it asks for forks (`fork_door`)."""
    if sys.platform != "linux":  # no descriptors of processes
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="forks-")
    door, address = Path(folder.name, "python"), Path(folder.name, "socket")
    forks = subprocess.Popen(
        [sys.executable, "-P", str(HERE / "forks.py"), str(address), str(door)],
        stdin=subprocess.PIPE,  # its end is the end of the forks
        stdout=subprocess.PIPE,
        text=True,
    )
    assert forks.stdin and forks.stdout
    words = [sys.executable, "-IS", str(HERE / "fork_door.py"), str(address)]
    door.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    door.chmod(0o755)
    assert forks.stdout.readline() == "ready\n"

    def end() -> None:
        forks.stdin.close()
        forks.wait()
        folder.cleanup()

    atexit.register(end)
    return str(door)
