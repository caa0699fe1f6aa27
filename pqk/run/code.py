"""Hashes the code that makes an artifact: a module and everything that it imports, without prose.

`code_of` is part of the key of every artifact. A changed docstring, comment or line break leaves it as it is; any other
change of a file that the code imports, at its top or inside a function, gives another one. A worker process returns
what it `loaded`, and its parent refuses a result of other code than the key says.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from hashlib import sha256

from pqk.errors import PqkError
from pqk.files import sha256_json
from pqk.sources import ROOTS, on_disk, source_file, source_of

Reader = Callable[[str], bytes | None]
"""Returns the source of a module by its name, None when there is no such module."""

_hashed: dict[str, str] = {}
"""Digest by module of everything that `code_of` has hashed in this process."""


class Top(str):
    """The name of a module that counts with what it imports at its top, without what its functions import.

    For modules whose functions import parts that are not always used, such as the toolchain of a backend: these parts
    are then named where they are used.
    """


def code_of(*modules: str, read: Reader = source_of) -> str:
    """sha256 over the code of modules and of everything that they import; see `closure` and `digest`.

    Raises PqkError when one of `modules` has no source file.
    """
    found = {name: digest(source) for name, source in closure(*modules, read=read).items()}
    if read is source_of:
        _hashed.update(found)
    return sha256_json(found)


def closure(*modules: str, read: Reader = source_of) -> dict[str, bytes]:
    """Sources by name: of `modules`, of the modules of their own packages, of pqk and of backends that they import, and
    of the packages that these lie in.

    Imports inside functions count, those for the type checker only do not. What is imported by a name in a text is not
    seen: who does that lists these modules, as backends and quantizers do in `sources`. Raises PqkError when one of
    `modules` has no source file.
    """
    roots = {*ROOTS, *(name.partition(".")[0] for name in modules)}
    found: dict[str, bytes] = {}
    whole: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in whole or (name in found and isinstance(name, Top)):
            continue
        source = read(name)
        if source is None:
            if name in modules:
                raise PqkError(f"module {name} has no source file")
            continue  # an object of a module, not a module of a package
        found[str(name)] = source
        if not isinstance(name, Top):
            whole.add(name)
        for imported, deep in _imports(source, name, _is_package(name)):
            if imported.partition(".")[0] in roots and (deep or not isinstance(name, Top)):
                waiting.append(imported)
        # The top packages of ROOTS hold a version number, which decides nothing.
        parts = name.split(".")
        waiting += [".".join(parts[:n]) for n in range(1, len(parts)) if n > 1 or parts[0] not in ROOTS]
    return found


@cache
def digest(source: bytes) -> str:
    """sha256 of a Python source as it is parsed: without docstrings and other bare texts, comments, positions, and
    imports for the type checker. A source that cannot be parsed counts byte for byte.
    """
    try:
        return sha256(ast.dump(_parsed(source)).encode("utf-8", "surrogatepass")).hexdigest()
    except (SyntaxError, ValueError):
        return sha256(source).hexdigest()


def loaded() -> dict[str, str]:
    """The digest of every module of pqk and backends that this process has loaded."""
    names = [name for name in list(sys.modules) if name.partition(".")[0] in ROOTS]
    return {name: digest(source) for name in names if (source := source_of(name)) is not None}


def hashed() -> dict[str, str]:
    """The digest of every module that a key of this process depends on."""
    return dict(_hashed)


def refuse_other(task: str, expected: Mapping[str, str], ran: Mapping[str, str]) -> None:
    """Raise PqkError when code that ran is not the code that was hashed. Modules of only one of the two do not count.

    expected: of `hashed`; ran: of `loaded`, in the process that ran the task.
    """
    other = sorted(name for name, found in ran.items() if expected.get(name, found) != found)
    if other:
        raise PqkError(_changed(other, task))


def refuse_edited(task: str, *modules: str) -> None:
    """Raise PqkError when the code of `modules` on the disk is no longer what this process has hashed.

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
def _parsed(source: bytes) -> ast.Module:
    """The syntax tree of a source without prose and without what only type checkers read."""
    tree = ast.parse(source)
    _strip(tree)
    return tree


def _strip(node: ast.AST) -> None:
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        listed = getattr(node, name, None)
        if isinstance(listed, list):
            kept = list(_running(listed))
            setattr(node, name, kept)
            for child in kept:
                _strip(child)


def _running(statements: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Statements that do something when a program runs."""
    for statement in statements:
        if isinstance(statement, ast.If) and _for_type_checkers(statement.test):
            yield from _running(statement.orelse)
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            yield statement


def _for_type_checkers(test: ast.expr) -> bool:
    name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
    return name == "TYPE_CHECKING"


@cache
def _imports(source: bytes, module: str, is_package: bool) -> tuple[tuple[str, bool], ...]:
    """What a source imports, or might: an imported name can be a module of its package or an object in it.

    Each with whether it is imported at the top, when the module is loaded, and not by a function.
    """
    try:
        tree = _parsed(source)
    except (SyntaxError, ValueError):
        return ()
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: dict[str, bool] = {}
    waiting: list[tuple[ast.AST, bool]] = [(tree, True)]
    while waiting:
        node, top = waiting.pop()
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        for name in names:
            found[name] = found.get(name, False) or top
        inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            listed = getattr(node, field, None)
            if isinstance(listed, list):
                waiting += [(child, inner) for child in listed]
    return tuple(sorted(found.items()))


def _is_package(name: str) -> bool:
    path = source_file(name)
    return path is not None and path.name == "__init__.py"
