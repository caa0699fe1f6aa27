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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pqk.errors import CheckFailed, NotBuilt, PqkError

Result = dict[str, Any]
_PR_SET_PDEATHSIG = 1


def call(task: str, request: dict[str, Any]) -> Result:
    """Run a task in a fresh process and return its result.

    A PqkError or BackendError of the worker is raised here with its sentence; a crash is a PqkError that names the
    signal or exit code and the last line of stderr.
    """
    with tempfile.TemporaryDirectory(prefix="pqk-worker-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", "pqk.run.worker", task, str(asked), str(answered), str(os.getpid())]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if not answered.exists():
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
            how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
            raise PqkError(f"the {task} process ended with {how}: {lines[-1] if lines else 'no message'}")
        result: Result = json.loads(answered.read_text())
    if "error" in result:
        kinds: dict[int, type[PqkError]] = {CheckFailed.exit_code: CheckFailed, NotBuilt.exit_code: NotBuilt}
        raise kinds.get(result["exit_code"], PqkError)(result["error"])
    return result


def quality(request: dict[str, Any]) -> Result:
    """Scores of every pair of every scene for one variant, its executed precision, and a teacher reference if asked."""
    from pqk.run.evaluate import evaluate

    return evaluate(request)


def timing(request: dict[str, Any]) -> Result:
    """Interleaved timing of several variants; see `pqk.measure.latency`."""
    from pqk.run.timing import time_variants

    return time_variants(request)


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


def agreement(request: dict[str, Any]) -> Result:
    """How far two sides are apart on the same pairs; see `pqk.run.agreement`."""
    from pqk.run.agreement import compare

    return compare(request)


TASKS: dict[str, Callable[[dict[str, Any]], Result]] = {
    "quality": quality,
    "timing": timing,
    "memory": memory,
    "quantize": quantize,
    "agreement": agreement,
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
        code = getattr(error, "exit_code", None)
        if not isinstance(code, int):
            raise
        result = {"error": str(error), "exit_code": code}
    temporary = Path(answered + ".tmp")
    temporary.write_text(json.dumps(result, allow_nan=False))
    temporary.replace(answered)
    gc.disable()
    os._exit(0)  # engines and thread pools need no tidying; some runtimes crash while unloading


if __name__ == "__main__":
    main()
