"""Says what a cell needs of its machine, as read from `--each`, and what an optional launcher needs installed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pqk.errors import NotBuilt, PqkError, nearest


@dataclass(frozen=True)
class Needs:
    """What each cell needs.

    cores: None is all cores of a machine, so that nothing disturbs its timings. gpus, memory_gb: of a machine. hours:
    after which SLURM ends it. retries: how often a cell is begun again when its process was killed or its machine lost.
    """

    cores: int | None = None
    gpus: int = 0
    memory_gb: float | None = None
    hours: float = 24.0
    retries: int = 3


def needs_of(text: str | None) -> Needs:
    """Returns the needs in 'cores=4,memory_gb=16'. Raises PqkError for another key or value."""
    found: dict[str, Any] = {}
    known = {field.name: field for field in fields(Needs)}
    for item in filter(None, (part.strip() for part in (text or "").split(","))):
        key, _, value = (word.strip() for word in item.partition("="))
        if key not in known or key in found:
            why = "is given twice" if key in found else f"is unknown{nearest(key, known)}"
            raise PqkError(f"--each {text}: {key!r} {why}; write it as cores=4,gpus=1, of {', '.join(known)}")
        whole = key in ("cores", "gpus", "retries")
        try:
            number: float = int(value) if whole else float(value)
        except ValueError:
            number = -1
        least = 0 if key in ("gpus", "retries") else 1 if whole else 0.01
        if not least <= number <= 1_000_000:
            raise PqkError(f"--each {text}: {key} is {value!r} but must be a {'whole ' * whole}number from {least} on")
        found[key] = number
    return Needs(**found)


def missing(package: str, extra: str) -> NotBuilt:
    """Returns the error for a package that is not installed."""
    return NotBuilt(f"{package} is not installed; install pqk's extra {extra}: pip install 'pqk[{extra}]'")
