"""Run as a program: asks `forks.py` for a fork that runs a module of pqk, and ends as the fork does.

    fork_door.py SOCKET ARGUMENTS      ARGUMENTS: those of Python

Where they are not `-m pqk.cli` or a worker, it becomes Python itself. It dies with its parent, and the fork with it.
"""

import ctypes
import json
import os
import signal
import socket
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    address, *arguments = sys.argv[1:]
    if arguments[arguments[:1] == ["-P"] :][:2] not in (["-m", "pqk.cli"], ["-m", "pqk.store.worker"]):
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


main()
