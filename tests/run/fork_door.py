"""Run as a program: asks `forks.py` for a fork that runs a program of pqk, and ends as the fork does.

    fork_door.py SOCKET ARGUMENTS      ARGUMENTS: those of Python

A program is a module of `MODULES`, a file of scripts/, or `many_commands.py`; for anything else it becomes Python
itself. It dies with its parent, and the fork with it.
"""

import ctypes
import json
import os
import signal
import socket
import sys

MODULES = ("pqk.cli", "pqk.store.worker", "pqk.bench.engine_child")
_PR_SET_PDEATHSIG = 1


def main() -> None:
    address, *arguments = sys.argv[1:]
    if not is_program(arguments[arguments[:1] == ["-P"] :]):
        os.execv(sys.executable, [sys.executable, *arguments])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as forks:
        forks.connect(address)
        asked = json.dumps([arguments, dict(os.environ)]).encode()
        socket.send_fds(forks, [asked], [0, 1, 2, os.open(".", os.O_PATH)])
        code = int(forks.recv(16))
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def is_program(arguments):
    """Tells whether a fork runs this."""
    if arguments[:1] == ["-m"]:
        return arguments[1] in MODULES
    here = os.path.realpath(f"{__file__}/..")  # to import pathlib would take as long as all else
    scripts, path = os.path.realpath(f"{here}/../../scripts"), os.path.realpath(arguments[0])
    return path == f"{here}/many_commands.py" or (path.endswith(".py") and path.startswith(f"{scripts}/"))


main()
