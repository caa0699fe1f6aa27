"""Run as a program: imports pqk and large libraries, then forks for each program that `fork_door.py` asks for.

    forks.py SOCKET PYTHON      PYTHON: what the forks take for Python when they start processes

Prints a line when it can be asked, and ends when its stdin does. A fork has the descriptors, the folder, the variables
and the arguments of the door, and runs the module or script that is asked for. It is killed when the door is.
What only makes times surer is done less, see `measure_briefly`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import marshal
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

LIBRARIES = (
    "PIL.Image",
    "filelock",
    "jsonschema",
    "matplotlib.pyplot",
    "nncf",
    "onnxscript",
    "openvino",
    "psutil",
    "pydantic.fields",
    "rich.console",
    "rich.progress",
    "rich.table",
    "safetensors.torch",
    "scipy.special",
    "torch._dynamo",  # which every optimizer imports
    "torch.onnx",
    "typer",
    "yaml",
)
ROOTS = ("pqk", "backends")
REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = "pqk.store.worker"
MAINS = (WORKER, "pqk.bench.engine_child")  # run as the main module


def main() -> None:
    """Serves until stdin ends; in a fork returns from there, and is the program that was asked for."""
    address, python = sys.argv[1:]
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as backends/openvino does
    for name in LIBRARIES:
        with suppress(ImportError):  # a toolchain that is not installed
            importlib.import_module(name)
    import_pqk()
    gc.freeze()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        program = asked_program(listening)
    if program:
        sys.executable = python
        os._exit(exit_code(program))  # to take the libraries down, too, costs a second


def import_pqk() -> None:
    """Imports every module of pqk and of backends, parses their sources for keys of artifacts, and makes textures."""
    sys.path.insert(0, str(REPOSITORY))
    for root in ROOTS:
        for module in pkgutil.walk_packages([str(REPOSITORY / root)], f"{root}."):
            if module.name not in MAINS and not module.name.endswith("__main__"):
                with suppress(ImportError):
                    importlib.import_module(module.name)
    importlib.import_module("pqk.store.code").loaded()
    importlib.import_module("pqk.data.render.synthetic").texture_bank()
    measure_briefly()
    sys.path.pop(0)


def measure_briefly() -> None:
    """Looks at the load of other processes for a tenth of a second, twice in each timing; times parts in few rounds."""
    from pqk.measure import noise, pieces
    from pqk.recipe import block_profile

    noise.load_now.__defaults__ = (0.1, noise.read_clocks)
    pieces.ROUNDS, block_profile.ROUNDS = 5, 2


def forget_other_pqk() -> None:
    """Forgets pqk and backends where the path of this fork leads to others."""
    first = next((p for place in sys.path if (p := Path(place, "pqk", "__init__.py")).is_file()), None)
    if first is None or not first.samefile(REPOSITORY / "pqk" / "__init__.py"):
        for name in list(sys.modules):
            if name.partition(".")[0] in ROOTS:
                del sys.modules[name]


def exit_code(program: str) -> int:
    """Runs a module or a script as a program, and what it wants done at its end; returns the exit code."""
    code: object = 0
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    assert isinstance(code, int)
    return code


def asked_program(listening: socket.socket) -> str | None:
    """In this process None, once stdin has ended; in each fork the name of what it has to run."""
    while sys.stdin not in (ready := select.select([listening, sys.stdin], [], [])[0]):
        assert listening in ready
        door, _ = listening.accept()
        with door:
            program = forked(door) if os.fork() == 0 else None
        if program:
            return program
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    return None


def forked(door: socket.socket) -> str:
    """Forks once more: the fork is set up and returns its program, this process waits for it and tells the door."""
    message, descriptors, _, _ = socket.recv_fds(door, 1 << 20, 4)
    child = os.fork()
    if child == 0:
        return become(*marshal.loads(message), *descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    process = os.pidfd_open(child)
    if process not in select.select([process, door], [], [])[0]:  # the door was killed
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with suppress(OSError):
        door.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(arguments: list[str], variables: dict[str, str], *descriptors: int) -> str:
    """Takes what the door sent: arguments and variables, standard streams and current folder; returns the program."""
    *streams, folder = descriptors
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.fchdir(folder)
    os.close(folder)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # TMPDIR may be another
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in variables
    safe = arguments[0] == "-P"
    places = [place for place in variables.get("PYTHONPATH", "").split(os.pathsep) if place]
    program, *rest = arguments[safe:]
    if program == "-m":
        program, *rest = rest
        here = Path.cwd()
    else:
        here = Path(program).parent
    sys.path[:0] = [*([] if safe else [str(here)]), *places]
    if program == WORKER:
        rest[-1] = str(os.getppid())  # a worker dies with the parent that it is told
    sys.argv[:] = [program, *rest]
    importlib.invalidate_caches()
    forget_other_pqk()
    sys.modules.pop("sitecustomize", None)
    with suppress(ImportError):  # as when Python starts
        importlib.import_module("sitecustomize")
    return program


if __name__ == "__main__":
    main()
