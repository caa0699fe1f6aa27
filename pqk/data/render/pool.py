"""Renders in several processes, `in_processes`, and tells what an earlier call has made, `is_made`."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import torch

from pqk.errors import PqkError

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Task], Result], tasks: Iterable[Task], jobs: int, what: str, chunk: int = 1
) -> Iterator[Result]:
    """Yields the result of `work`, a function of a module, for each task in order, from `jobs` processes.

    what: that is rendered, in the plural, for a message. chunk: tasks that a process takes at once. Raises PqkError
    when one of the processes was killed.
    """
    context = get_context("spawn")  # torch's thread pools do not survive a fork
    try:
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
            yield from pool.map(work, tasks, chunksize=chunk)
    except BrokenProcessPool:
        raise PqkError(
            f"one of the {jobs} processes that render {what} was killed (SIGKILL), probably out of memory; "
            "fewer at once need less (pqk data make --jobs 1)"
        ) from None


def _start_worker() -> None:
    """Sets one thread per process; ends the worker when its parent was killed, where the pool would wait forever."""
    torch.set_num_threads(1)
    parent = parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def is_made(folder: Path, about: str, asked: Mapping[str, Any], what: str) -> bool:
    """Returns whether what was asked for is there. about: the file in `folder` that says how it was made.

    what: that is made, for messages. Raises PqkError when something else has the name of the folder.
    """
    file = folder / about
    if not file.exists():
        if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise PqkError(f"{folder} exists and is no generated {what}; move it away or choose another folder")
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise PqkError(f"{file} is damaged; delete its folder to generate the {what} again")
    for key, value in asked.items():
        if found.get(key) != value:
            held = f"{folder} holds a {what} with {key} {found.get(key)}"
            raise PqkError(f"{held}, asked is {value}; delete it or use another folder")
    return True
