"""Run as a program: asks `forks.py` for a fork that runs a program of pqk, and ends as the fork does.

    fork_door.py SOCKET ARGUMENTS      ARGUMENTS: those of Python

A program is a module of `MODULES`, a file of scripts/, or `many_commands.py`; for anything else it becomes Python
itself. It dies with its parent, and the fork with it. Every command and worker of the suite starts with it: to import
`socket`, `json` and `signal` would take twice as long as all else here.
"""

import _socket
import ctypes
import marshal
import os
import sys

MODULES = ("pqk.cli", "pqk.store.worker", "pqk.bench.engine_child")
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9
_SCM_RIGHTS = 1


def main() -> None:
    address, *arguments = sys.argv[1:]
    if not is_program(arguments[arguments[:1] == ["-P"] :]):
        os.execv(sys.executable, [sys.executable, *arguments])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    forks = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    forks.connect(address)
    descriptors = b"".join(one.to_bytes(4, sys.byteorder) for one in (0, 1, 2, os.open(".", os.O_PATH)))
    asked = marshal.dumps((arguments, dict(os.environ)))
    forks.sendmsg([asked], [(_socket.SOL_SOCKET, _SCM_RIGHTS, descriptors)])
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
