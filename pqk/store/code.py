"""Hashes the code that makes an artifact: a module and everything that it imports, without prose.

`code_of` is part of the key of every artifact. Changes of docstrings, comments and line breaks do not change it; any
other change of a file that the code imports, at its top or inside a function, does. A worker process returns the code
that it `loaded`, and its parent refuses a result of other code than that of the key.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256

from pqk.errors import PqkError
from pqk.files import sha256_json
from pqk.store.facts import Import, facts, keep_facts
from pqk.store.sources import ROOTS, on_disk, source_file, source_of

Reader = Callable[[str], bytes | None]
"""Returns the source of a module by its name, None when there is no such module."""

_hashed: dict[str, str] = {}
"""Digests, by module, of everything that `code_of` has hashed in this process."""
_known: dict[str, str] = {}
"""Digests, by the sha256 of the source, that another process has found."""


class Top(str):
    """Name of a module whose imports at its top count, but not the imports inside its functions.

    For modules whose functions import parts that are not always used, such as the toolchain of a backend. These parts
    are then named where they are used.
    """


def code_of(*modules: str, read: Reader = source_of) -> str:
    """Returns the sha256 over the code of modules and of everything that they import; see `closure` and `digest`.

    Raises PqkError when one of `modules` has no source file.
    """
    sources = closure(*modules, read=read)
    found = {name: digest(source) for name, source in sources.items()}
    if read is source_of:
        _hashed.update(found)
        keep_facts(sources.values())
    return sha256_json(found)


def closure(*modules: str, read: Reader = source_of) -> dict[str, bytes]:
    """Returns sources by name: of `modules`, of the modules of their own packages, of pqk and of backends that they
    import, and of the packages that contain these. The top packages pqk and backends hold a version number, and do not
    count.

    Imports inside functions count; imports for the type checker alone do not. Modules imported by a name in a string
    are not found: code that does so must list them, as backends and quantizers do in `sources`. Raises PqkError when
    one of `modules` has no source file.
    """
    roots = {*ROOTS, *(name.partition(".")[0] for name in modules)}
    found: dict[str, bytes] = {}
    whole: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in ROOTS or name in whole or (name in found and isinstance(name, Top)):
            continue
        source = read(name)
        if source is None:
            if name in modules:
                raise PqkError(f"module {name} has no source file")
            continue  # an object of a module, not a module of a package
        found[str(name)] = source
        if not isinstance(name, Top):
            whole.add(name)
        for statement in facts(source).imports:
            if statement.top or not isinstance(name, Top):
                waiting += [m for m in _modules(statement, name) if m.partition(".")[0] in roots]
        parts = name.split(".")
        waiting += [".".join(parts[:n]) for n in range(1, len(parts))]
    return found


def digest(source: bytes) -> str:
    """Returns the sha256 of a parsed Python source: without docstrings and other bare texts, comments, positions, and
    imports for the type checker. A source that cannot be parsed counts byte for byte.
    """
    told = _known.get(sha256(source).hexdigest()) if _known else None
    return told or facts(source).digest


def known() -> dict[str, str]:
    """Returns the digests of `hashed` by the sha256 of the source, for a worker, which then parses no such source."""
    return {sha256(source_of(name) or b"").hexdigest(): found for name, found in _hashed.items()}


def remember(digests: Mapping[str, str]) -> None:
    """Makes this process use the digests that its parent has found; see `known`."""
    _known.update(digests)


def loaded() -> dict[str, str]:
    """Returns the digest of every module of pqk and backends that this process has loaded."""
    names = [name for name in list(sys.modules) if name.partition(".")[0] in ROOTS]
    return {name: digest(source) for name in names if (source := source_of(name)) is not None}


def hashed() -> dict[str, str]:
    """Returns the digest of every module that a key of this process depends on."""
    return dict(_hashed)


def refuse_other(task: str, expected: Mapping[str, str], ran: Mapping[str, str]) -> None:
    """Raises PqkError when the code that ran is not the code that was hashed. Modules in only one of both do not count.

    expected: result of `hashed`; ran: result of `loaded` in the process that ran the task.
    """
    other = sorted(name for name, found in ran.items() if expected.get(name, found) != found)
    if other:
        raise PqkError(_changed(other, task))


def refuse_edited(task: str, *modules: str) -> None:
    """Raises PqkError when the code of `modules` on the disk is no longer the code that this process has hashed.

    For work in processes that load their code from the disk and return no hash of it.
    """
    other = sorted(
        name for name, source in closure(*modules).items() if digest(on_disk(name) or b"0") != digest(source)
    )
    if other:
        raise PqkError(_changed(other, task))


def _changed(modules: list[str], task: str) -> str:
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return f"the code changed while the {task} process ran ({modules[0]}{more}): its result is not kept, run again"


@cache
def _modules(found: Import, module: str) -> list[str]:
    """Returns names that an import of `module` may load: an imported name is a module of its package or an object."""
    if not found.level and not found.origin:
        return list(found.names)
    above: list[str] = []
    if found.level:
        package = module.split(".") if _is_package(module) else module.split(".")[:-1]
        above = package[: len(package) - found.level + 1]
    origin = ".".join(filter(None, [*above, found.origin]))
    return [origin, *(f"{origin}.{name}" for name in found.names)]


def _is_package(name: str) -> bool:
    path = source_file(name)
    return path is not None and path.name == "__init__.py"
