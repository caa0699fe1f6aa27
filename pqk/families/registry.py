"""Which model families there are: the built-in ones by name, and those that other packages offer.

Another package adds a family with the entry-point group `pqk.families`:

    [project.entry-points."pqk.families"]
    mynet = "mypackage.family:FAMILY"

Nothing is imported until a family is asked for, and of it only the parts that are used (`pqk.families.contract`).
"""

from __future__ import annotations

import importlib
from importlib import metadata

from pqk.errors import PqkError, nearest
from pqk.families.contract import Family

GROUP = "pqk.families"
BUILT_IN = {name: f"pqk.families.{name}:FAMILY" for name in ("dust3r", "vggt", "diffusiondet", "detr")}


def table() -> dict[str, str]:
    """Family name -> 'module:object'. A built-in name cannot be replaced by an entry point."""
    found = {point.name: point.value for point in metadata.entry_points(group=GROUP)}
    return {**found, **BUILT_IN}


def names() -> list[str]:
    """All known families, the built-in ones first."""
    return [*BUILT_IN, *sorted(set(table()) - set(BUILT_IN))]


def family(name: str) -> Family:
    """The family of this name. Raises PqkError for an unknown one, or one that cannot be loaded."""
    known = BUILT_IN if name in BUILT_IN else table()  # to read the entry points of all packages takes its time
    if name not in known:
        raise PqkError(f"unknown model family {name!r}{nearest(name, known)}; known: {', '.join(names())}")
    module, _, attribute = known[name].partition(":")
    try:
        found: Family = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PqkError(f"model family {name!r} ({known[name]}) cannot be loaded: {error}") from error
    return found


def families() -> list[Family]:
    """All known families, the built-in ones first. Raises PqkError when one cannot be loaded."""
    return [family(name) for name in names()]
