"""Measurements in a process of their own: `python -m pqk.run.worker TASK REQUEST.json RESULT.json`.

A fresh process has no leftovers in its caches, its thread pools and its memory peak. The parent only waits. A worker
dies with its parent, so that a killed run leaves nothing behind that would disturb the next one.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pqk.errors import CheckFailed, NotBuilt, PqkError
from pqk.files import clear_write_errors, temporary_folder
from pqk.oserrors import refusal

Result = dict[str, Any]
_PR_SET_PDEATHSIG = 1
_TOLD = "pqk-progress "  # begins the lines on a worker's stdout that are meant for its parent
_CANNOT_WRITE = 73  # exit code (EX_CANTCREAT) of a worker that could not write its answer; its last line says why


class WorkerCrashed(Exception):
    """A worker that ended without an answer: a defect, hence no PqkError. Its text holds what the worker said."""


def call(task: str, request: dict[str, Any], on_progress: Callable[[dict[str, Any]], None] | None = None) -> Result:
    """Run a task in a fresh process and return its result.

    on_progress: gets what the task says with `tell` while it works.
    A PqkError or BackendError of the worker is raised here with its sentence. Raises PqkError when the worker was
    killed (SIGKILL) or the disk of the temporary files is full, WorkerCrashed when it ended in any other way.
    """
    with temporary_folder("worker") as folder:
        asked, answered = folder / "request.json", folder / "result.json"
        with clear_write_errors(asked):
            asked.write_text(json.dumps(request))
        # -P: the folder that the user stands in may hold a random.py of his own.
        command = [sys.executable, "-P", "-m", "pqk.run.worker", task, str(asked), str(answered), str(os.getpid())]
        code, said = _run(command, folder / "stderr", on_progress)
        if not answered.exists():
            raise _no_answer(task, code, said)
        result: Result = json.loads(answered.read_text())
    if "error" in result:
        kinds: dict[int, type[PqkError]] = {CheckFailed.exit_code: CheckFailed, NotBuilt.exit_code: NotBuilt}
        raise kinds.get(result["exit_code"], PqkError)(result["error"])
    return result


def _run(command: list[str], errors: Path, on_progress: Callable[[dict[str, Any]], None] | None) -> tuple[int, str]:
    """Exit code and stderr of a worker. Its stdout is read only for the lines of `tell`; a silent parent sleeps."""
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
                if on_progress and line.startswith(_TOLD):
                    on_progress(json.loads(line.removeprefix(_TOLD)))
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        stream.seek(0)
        return process.returncode, stream.read().strip()


def tell(news: dict[str, Any]) -> None:
    """Say how far this worker is; does nothing visible where the caller does not listen."""
    print(_TOLD + json.dumps(news), flush=True)


def _places(folder: Path) -> dict[str, str]:
    """Where a worker and its libraries may leave files: its own folder, which goes with it, however it ends."""
    try:
        Path.home()
    except RuntimeError:  # a container's user without a name; libraries ask for a home when they are imported
        return {"TMPDIR": str(folder), "HOME": str(folder)}
    return {"TMPDIR": str(folder)}


def _environment() -> dict[str, str]:
    """The parent's, with the folder of this pqk first: under -P a checkout is not found by standing in it."""
    here = str(Path(__file__).resolve().parents[2])
    # An empty entry would mean the current folder.
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([here, *others])}


def _no_answer(task: str, code: int, said: str) -> Exception:
    """What to raise for a worker that left no result."""
    if code == -signal.SIGKILL:
        return PqkError(f"the {task} process was killed, probably for want of memory")
    if code == _CANNOT_WRITE:
        return PqkError(said.splitlines()[-1] if said else f"the {task} process cannot write its result")
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return WorkerCrashed(f"the {task} process ended with {how}:\n{said or 'it said nothing'}")


def quality(request: dict[str, Any]) -> Result:
    """Scores of every pair of every scene for one variant, its executed precision, and a teacher reference if asked."""
    from pqk.run.evaluate import evaluate

    return evaluate(request)


def timing(request: dict[str, Any]) -> Result:
    """Interleaved timing of several variants; see `pqk.measure.latency`."""
    from pqk.run.timing import time_variants

    return time_variants(request)


def parts(request: dict[str, Any]) -> Result:
    """Parameters, FLOPs and time of every part of two models; see `pqk.run.parts`."""
    from pqk.run.parts import profile

    return profile(request)


def memory(request: dict[str, Any]) -> Result:
    """Peak resident memory of a process that compiles one variant, always anew, and runs two pairs."""
    from dataclasses import replace

    import numpy as np

    from pqk.measure.footprint import peak_ram_bytes
    from pqk.run.variants import Runner, Variant

    variant = Variant.from_json(request["variant"])
    # a model read from the cache of compiled ones takes another peak than one compiled
    variant = replace(variant, options={k: v for k, v in variant.options.items() if k != "cache_dir"})
    shape = variant.encoder.inputs[0].shape
    image = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    with Runner(variant) as runner:
        for _ in range(2):
            runner.timed_pair(image, image)
        return {"peak_bytes": peak_ram_bytes()}


def quantize(request: dict[str, Any]) -> Result:
    """Quantize both graphs; see `pqk.run.quantize`."""
    from pqk.run.quantize import quantize_graphs

    return quantize_graphs(request)


def train(request: dict[str, Any]) -> Result:
    """Prune or distil and train; see `pqk.run.training`."""
    from pqk.run.training import train

    return train(request)


def qat(request: dict[str, Any]) -> Result:
    """Quantization-aware training; see `pqk.run.qat`."""
    from pqk.run.qat import train_quantized

    return train_quantized(request)


def joint(request: dict[str, Any]) -> Result:
    """Pruning, distillation and quantization in one training; see `pqk.run.joint`."""
    from pqk.run.joint import train_joint

    return train_joint(request)


def agreement(request: dict[str, Any]) -> Result:
    """How far two sides are apart on the same pairs; see `pqk.run.agreement`."""
    from pqk.run.agreement import compare

    return compare(request)


def parted(request: dict[str, Any]) -> Result:
    """Where runtimes part on the float graphs; see `pqk.run.nodes`."""
    from pqk.run.nodes import part_graphs

    return part_graphs(request)


def ranking(request: dict[str, Any]) -> Result:
    """Which parts and nodes cause the int8 error; see `pqk.run.nodes`."""
    from pqk.run.nodes import rank_graphs

    return rank_graphs(request)


def mixed(request: dict[str, Any]) -> Result:
    """Int8 graphs with nodes in float; see `pqk.run.nodes`."""
    from pqk.run.nodes import mix_graphs

    return mix_graphs(request)


TASKS: dict[str, Callable[[dict[str, Any]], Result]] = {
    "quality": quality,
    "timing": timing,
    "parts": parts,
    "memory": memory,
    "quantize": quantize,
    "train": train,
    "qat": qat,
    "joint": joint,
    "agreement": agreement,
    "parted": parted,
    "ranking": ranking,
    "mixed": mixed,
}


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def main() -> None:
    """Entry point of a worker; see the module."""
    task, asked, answered, parent = sys.argv[1:5]
    _die_with_parent(int(parent))
    began = time.monotonic()
    try:
        result = TASKS[task](json.loads(Path(asked).read_text()))
        result["seconds"] = time.monotonic() - began
    except Exception as error:
        code, said = getattr(error, "exit_code", None), str(error)
        refused = refusal(error)
        if code is None and refused is not None:
            code, said = PqkError.exit_code, refused
        if not isinstance(code, int):
            raise
        result = {"error": said, "exit_code": code}
    temporary = Path(answered + ".tmp")
    text = json.dumps(result, allow_nan=False)
    try:
        with clear_write_errors(answered):
            temporary.write_text(text)
            temporary.replace(answered)
    except PqkError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(_CANNOT_WRITE)
    gc.disable()
    os._exit(0)  # engines and thread pools need no tidying; some runtimes crash while unloading


if __name__ == "__main__":
    main()
