"""Tells machines apart: the kind of the one that a cell runs on, and the kind that a folder of cells began with."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backends.cpu import cpu_name, instruction_sets
from pqk.cores import affinity_cores
from pqk.files import clear_write_errors
from pqk.locks import locked, machine_folder

KIND_FILE = "machine.json"
_GPUS = Path("/proc/driver/nvidia/gpus")

Kind = dict[str, Any]


def kind(gpus: int = 0, folder: Path = _GPUS) -> Kind:
    """Returns what decides times: device (the GPU of a cell that asked for one, else the CPU), isa, cores.

    folder: where NVIDIA's driver lists its devices. Cores are those of the affinity mask.
    """
    device = _gpu_name(folder) if gpus else None
    return {"device": device or cpu_name(), "isa": " ".join(instruction_sets()), "cores": affinity_cores()}


def agreed(path: Path, here: Mapping[str, Any]) -> Kind:
    """Returns the kind in the file `path`; where there is none, `here`, which is written to it.

    The first of many processes on many machines decides: a link is made in one step, on NFS too. Raises PqkError where
    the folder is not writable. A damaged file counts as another kind.
    """
    if not path.exists():
        own = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
        with clear_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(here) + "\n", encoding="utf-8")
            try:
                with contextlib.suppress(FileExistsError):
                    os.link(own, path)
            finally:
                own.unlink()
    return read_kind(path) or {}


def read_kind(path: Path) -> Kind | None:
    """Returns the kind in a file; None where there is no such file, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def kind_text(found: Mapping[str, Any]) -> str:
    """Returns 'NVIDIA H200, 16 cores' and so on; the instruction sets are left out, unless the rest is unknown."""
    return f"{found.get('device') or 'an unknown device'}, {found.get('cores') or '?'} cores"


def difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """Returns what differs between the kind here and another one, in words; None where they are equal."""
    if dict(here) == dict(there):
        return None
    if kind_text(here) == kind_text(there):
        return f"{kind_text(here)} with {here.get('isa')}, not with {there.get('isa')}"
    return f"{kind_text(here)}, not {kind_text(there)}"


@contextlib.contextmanager
def own_cores(count: int | None, folder: Path | None = None) -> Iterator[frozenset[int]]:
    """Yields `count` cores of this machine that no other cell of this user holds; all allowed ones for None.

    A scheduler that counts cores does not bind a process to some of them, and an engine starts a thread on each that it
    may use. The kernel releases the lock of a killed cell. Where fewer are free, such as on a machine whose nodes
    promise more cores than it has, the rest is shared. folder: of the locks, by default `machine_folder`.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if count is None or count >= len(allowed):
        yield frozenset(allowed)
        return
    places = folder or machine_folder()
    with contextlib.ExitStack() as held:
        mine: list[int] = []
        for core in allowed:
            if len(mine) < count and held.enter_context(locked(places / f"core-{core}.lock", timeout=0)):
                mine.append(core)
        mine += [core for core in allowed if core not in mine][: count - len(mine)]
        yield frozenset(mine)


def _gpu_name(folder: Path) -> str | None:
    """Returns the name of the first GPU that the driver lists; None without one."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob("*/information")):
            for line in path.read_text(errors="replace").splitlines():
                if line.startswith("Model:"):
                    return line.partition(":")[2].strip()
    return None
