"""Runs cells here one after another, on Ray or on SLURM, behind one interface: `run` with `launcher`.

A launcher has `places()`, how many more cells may begin now; `begin(cell)`; and `wait()`, which returns the cells that
ended since. What it runs ends when its block ends. The order of the cells, and which of them may begin, is the
caller's; so is what is known about them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pqk.errors import PqkError, nearest
from pqk.launch.cell import Cell, Done, Echo, carry_out
from pqk.launch.needs import Needs

LOCAL, RAY, SLURM, SLURM_LOCAL = "local", "ray", "slurm", "slurm-local"
PLACES = (LOCAL, RAY, SLURM, SLURM_LOCAL)
More = Callable[[int], Sequence[Cell]]
"""Returns at most so many cells that may begin now; asked again whenever a cell has ended."""


class Launcher(Protocol):
    """Where cells run."""

    def places(self) -> int:
        """Returns how many more cells may begin now. Raises PqkError where none ever can."""

    def begin(self, cell: Cell) -> None:
        """Begins a cell, or queues it."""

    def wait(self) -> list[Done]:
        """Waits until a cell has ended, and returns all that have."""


class Here:
    """Runs cells in this process, one after another, on a machine of any kind."""

    def __init__(self, echo: Echo) -> None:
        self._echo = echo
        self._next: Cell | None = None

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def places(self) -> int:
        return int(self._next is None)

    def begin(self, cell: Cell) -> None:
        self._next = replace(cell, refuses=False)

    def wait(self) -> list[Done]:
        assert self._next is not None
        cell, self._next = self._next, None
        return [carry_out(cell, self._echo)]


def run(more: More, launched: Launcher) -> Iterator[Done]:
    """Yields the cells as they end, until none runs and `more` has none that may begin."""
    running = 0
    while True:
        places = launched.places()
        for cell in more(places) if places > 0 else ():
            launched.begin(cell)
            running += 1
        if not running:
            return
        for done in launched.wait():
            running -= 1
            yield done


def check_on(on: str) -> None:
    """Raises PqkError where `on` names no place that cells can run, before anything else is done."""
    name, colon, where = on.partition(":")
    if name not in PLACES or (colon and (not where or name in (LOCAL, SLURM_LOCAL))):
        raise PqkError(
            f"--on {on}: it is local, ray[:ADDRESS], slurm[:PARTITION] or slurm-local{nearest(name, PLACES)}"
        )


def launcher(
    on: str, needs: Needs, folder: Path, echo: Echo, say: Callable[[str], None]
) -> AbstractContextManager[Any]:
    """Returns the launcher of `on`: local, ray[:ADDRESS], slurm[:PARTITION], or slurm-local (jobs of this machine).

    folder: for the files of SLURM's jobs. echo: gets the output of cells that run here; say: a line about the cluster.
    Raises PqkError for another name, NotBuilt where the extra is not installed, PqkError where no cluster answers.
    """
    check_on(on)
    name, _, where = on.partition(":")
    if name == LOCAL:
        return Here(echo)
    if name == RAY:
        from pqk.launch.on_ray import OnRay

        return OnRay(where, needs, say)
    from pqk.launch.on_slurm import OnSlurm

    return OnSlurm(where, needs, folder, here=name == SLURM_LOCAL)
