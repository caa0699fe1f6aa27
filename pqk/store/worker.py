"""Runs tasks in a fresh process with `call`, which starts `python -m pqk.store.worker TASK REQUEST.json RESULT.json`.

A fresh process has no leftovers in its caches, its thread pools and its memory peak. The parent only waits. A worker
dies with its parent, so that a killed run leaves no process that would disturb the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pqk.errors import CheckFailed, NotBuilt, PqkError
from pqk.files import clear_write_errors, temporary_folder
from pqk.locks import locked, machine_folder
from pqk.oserrors import refusal
from pqk.store.code import hashed, known, loaded, refuse_other, remember
from pqk.store.progress import PREFIX
from pqk.store.progress import tell as tell
from pqk.store.sources import keep_sources

Result = dict[str, Any]
_PR_SET_PDEATHSIG = 1
_CANNOT_WRITE = 73  # exit code (EX_CANTCREAT) of a worker that could not write its answer; its last line says why


class WorkerCrashed(Exception):
    """Error for a worker that ended without an answer: a defect, so no PqkError. Its text has the worker's stderr."""


def call(
    task: str,
    request: dict[str, Any],
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    processes: int = 1,
) -> Result:
    """Runs a task in a fresh process and returns its result.

    processes: how many processes share the task, a training, if more than one; see `pqk.store.ranks`.
    on_progress: gets the reports that the task sends with `tell` while it works.
    A PqkError or BackendError of the worker is raised here with its sentence. Raises PqkError when the worker was
    killed (SIGKILL), when the disk of the temporary files is full, and when the worker ran other code than this process
    has hashed for its keys (see `pqk.store.code`); WorkerCrashed when it ended in any other way.
    """
    with temporary_folder("worker") as folder:
        asked, answered = folder / "request.json", folder / "result.json"
        with clear_write_errors(asked):
            asked.write_text(json.dumps({"request": request, "code": hashed(), "known": known()}))
        # -P: the current folder may hold a random.py of the user's.
        shared = [str(processes)] if processes > 1 else []
        command = [sys.executable, "-P", "-m", "pqk.store.worker", task, str(asked), str(answered), *shared]
        command.append(str(os.getpid()))
        with _alone(task):
            code, said = _run(command, folder / "stderr", on_progress)
        if not answered.exists():
            raise _no_answer(task, code, said)
        answer = json.loads(answered.read_text())
    if "error" in answer:
        kinds: dict[int, type[PqkError]] = {CheckFailed.exit_code: CheckFailed, NotBuilt.exit_code: NotBuilt}
        raise kinds.get(answer["exit_code"], PqkError)(answer["error"])
    refuse_other(task, hashed(), answer["code"])
    result: Result = answer["result"]
    return result


@contextlib.contextmanager
def _alone(task: str) -> Iterator[None]:
    """Lets one process of this user on this machine measure times at once, whichever project or cell it belongs to."""
    if task not in _TIMED:
        yield
        return
    with locked(machine_folder() / "timing.lock"):
        yield


def _run(command: list[str], errors: Path, on_progress: Callable[[dict[str, Any]], None] | None) -> tuple[int, str]:
    """Runs a worker; returns its exit code and stderr. From its stdout only the lines of `tell` are read."""
    with clear_write_errors(errors):
        stream = errors.open("w+", encoding="utf-8", errors="replace")
    with stream:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE if on_progress else subprocess.DEVNULL,
            stderr=stream,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=_environment() | _places(errors.parent),
        )
        try:
            for line in process.stdout or ():
                if on_progress and line.startswith(PREFIX):
                    on_progress(json.loads(line.removeprefix(PREFIX)))
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        stream.seek(0)
        return process.returncode, stream.read().strip()


def _places(folder: Path) -> dict[str, str]:
    """Returns variables that make a worker and its libraries keep their files in `folder`, which is removed."""
    try:
        Path.home()
    except RuntimeError:  # a container's user without a name; libraries ask for a home when they are imported
        return {"TMPDIR": str(folder), "HOME": str(folder)}
    return {"TMPDIR": str(folder)}


def _environment() -> dict[str, str]:
    """Returns the parent's variables, with this pqk first on the path, as -P hides the current folder."""
    here = str(Path(__file__).resolve().parents[2])
    # An empty entry would mean the current folder.
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([here, *others])}


def _no_answer(task: str, code: int, said: str) -> Exception:
    """Returns the error for a worker that left no result."""
    if code == -signal.SIGKILL:
        return PqkError(f"the {task} process was killed (SIGKILL), probably out of memory")
    if code == _CANNOT_WRITE:
        return PqkError(said.splitlines()[-1] if said else f"the {task} process cannot write its result")
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return WorkerCrashed(f"the {task} process ended with {how}:\n{said or 'it printed no error'}")


_TIMED = ("timing", "parts", "pieces", "forms")

TASKS = {
    "predictions": "pqk.measure.predict:predict",
    "shown": "pqk.measure.shown:predict",
    "quality": "pqk.measure.evaluate:evaluate",
    "timing": "pqk.measure.timing:time_variants",
    "parts": "pqk.measure.block_profile:profile",
    "memory": "pqk.measure.memory:measure_memory",
    "forms": "pqk.measure.forms:choose_forms",
    "pieces": "pqk.measure.pieces:time_pieces",
    "quantize": "pqk.compress.tasks.quantize:quantize_graphs",
    "prune": "pqk.compress.tasks.pruned:train_pruned",
    "distill": "pqk.compress.tasks.distilled:train_distilled",
    "qat": "pqk.compress.tasks.qat:train_quantized",
    "joint": "pqk.compress.tasks.joint:train_joint",
    "agreement": "pqk.measure.output_difference:compare",
    "parted": "pqk.measure.node_ranking:part_graphs",
    "ranking": "pqk.measure.node_ranking:rank_graphs",
    "mixed": "pqk.measure.node_ranking:mix_graphs",
    "quantized_nodes": "pqk.measure.node_ranking:quantized_nodes",
}
"""Task -> module:function, which takes a request and returns a result, both plain data. They are named by strings, so
that the code of a task, which is part of the keys of its artifacts, is only its own module and the imports of that."""


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)


def main() -> None:
    """Runs a worker; see the module."""
    task, asked, answered, *shared, parent = sys.argv[1:]
    _die_with_parent(int(parent))
    if shared:
        from pqk.store.ranks import run_shared

        lost = run_shared(["-P", "-m", "pqk.store.worker", task, asked, answered, str(os.getpid())], int(shared[0]))
        if lost:
            print(f"the {task} training: {lost}", file=sys.stderr, flush=True)
        os._exit(_CANNOT_WRITE if lost else 0)
    first = os.environ.get("RANK", "0") == "0"
    keep_sources()
    began = time.monotonic()
    try:
        given = json.loads(Path(asked).read_text())
        module, _, function = TASKS[task].partition(":")
        work = getattr(importlib.import_module(module), function)
        remember(given["known"])
        refuse_other(task, given["code"], loaded())  # before hours of work
        result = work(given["request"])
        result["seconds"] = time.monotonic() - began
        if not first:
            os._exit(0)
        answer = {"result": result, "code": loaded()}
    except Exception as error:
        code, said = getattr(error, "exit_code", None), str(error)
        refused = refusal(error)
        if code is None and refused is not None:
            code, said = PqkError.exit_code, refused
        if not isinstance(code, int):
            raise
        answer = {"error": said, "exit_code": code}
    temporary = Path(f"{answered}.{os.getpid()}.tmp")  # of several processes each may have an error to tell
    text = json.dumps(answer, allow_nan=False)
    try:
        with clear_write_errors(answered):
            temporary.write_text(text)
            temporary.replace(answered)
    except PqkError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(_CANNOT_WRITE)
    gc.disable()
    os._exit(0)  # engines and thread pools need no cleanup; some runtimes crash while unloading


if __name__ == "__main__":
    main()
