"""Reads `--on` and `--each`: where the cells of a plan, a matrix or a ledger run, and what each of them needs."""

from __future__ import annotations

from typing import NamedTuple

from pqk.errors import PqkError
from pqk.launch.launch import LOCAL, check_on
from pqk.launch.needs import Needs, needs_of


class Spread(NamedTuple):
    """Where cells run, as in `pqk.launch.launch.launcher`, and their needs."""

    on: str
    needs: Needs


def spread_of(on: str | None, each: str | None) -> Spread | None:
    """Returns what --on and --each ask for; None where the cells run here, one after another. Raises PqkError."""
    if on is None or on == LOCAL:
        if each is not None:
            raise PqkError(f"--each {each} goes with --on ray or --on slurm")
        return None
    check_on(on)
    return Spread(on, needs_of(each))
