"""Finds digest and imports of a Python source, `facts`, and keeps them beside Python's compiled modules.

To parse all modules that a run depends on takes a second. Kept facts are named by the sha256 of their source, so that
they are true whatever is edited. A new minor version of Python, and another text of this module, begin a new file.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from importlib.util import cache_from_source
from pathlib import Path
from typing import NamedTuple

from pqk.store.sources import source_of

_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
_MOST = 2000  # kept sources; each edit of a module adds one


class Import(NamedTuple):
    """An import statement: the dots and the module behind `from` (0 and '' for a plain import), the imported names, and
    whether it runs when the module is loaded, not when a function is called."""

    level: int
    origin: str
    names: tuple[str, ...]
    top: bool


class Facts(NamedTuple):
    digest: str
    imports: tuple[Import, ...]


@cache
def facts(source: bytes) -> Facts:
    """Returns digest and imports of a source, kept ones or new ones."""
    return _kept().get(sha256(source).hexdigest()) or parsed(source)


def keep_facts(sources: Iterable[bytes]) -> None:
    """Writes the facts of sources to the file that the next process reads.

    Nothing is written where Python itself may keep no compiled module.
    """
    if sys.dont_write_bytecode:
        return
    new = {name: facts(source) for source in sources if (name := sha256(source).hexdigest()) not in _kept()}
    if not new:
        return
    if len(_kept()) + len(new) > _MOST:
        _kept().clear()
    _kept().update(new)
    file = _file()
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(_kept()))
        temporary.replace(file)


@cache
def _kept() -> dict[str, Facts]:
    """Returns the facts of earlier processes; none when the file is absent or damaged."""
    try:
        return {
            name: Facts(
                digest, tuple(Import(level, origin, tuple(names), top) for level, origin, names, top in imports)
            )
            for name, (digest, imports) in json.loads(_file().read_bytes()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


@cache
def _file() -> Path:
    """Returns the file of the kept facts, which has this module's own text in its name."""
    own = sha256(source_of(__name__) or b"").hexdigest()[:16]
    return Path(cache_from_source(__file__)).with_suffix(f".{own}.json")


def parsed(source: bytes) -> Facts:
    """Returns digest and imports of a source. The syntax tree is not kept: it takes megabytes, and a worker may be
    measuring its memory.
    """
    collects = gc.isenabled()
    gc.disable()  # it would look for cycles among the nodes again and again: a third of the time without
    try:
        tree = ast.parse(source)
        _strip(tree)
        text = ast.dump(tree).encode("utf-8", "surrogatepass")
        return Facts(sha256(text).hexdigest(), tuple(_imports(tree, True)))
    except (SyntaxError, ValueError, RecursionError):
        return Facts(sha256(source).hexdigest(), ())
    finally:
        if collects:
            gc.enable()


def _strip(node: ast.AST) -> None:
    """Removes from a syntax tree the statements that do nothing when a program runs."""
    for name in _BLOCKS:
        listed = getattr(node, name, None)
        if isinstance(listed, list):
            setattr(node, name, list(_running(listed)))
    for child in _children(node):
        _strip(child)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the statements, handlers and cases inside a statement."""
    for name in _BLOCKS:
        listed = getattr(node, name, None)
        if isinstance(listed, list):
            yield from listed


def _running(statements: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yields the statements that do something when a program runs."""
    for statement in statements:
        if isinstance(statement, ast.If) and _for_type_checkers(statement.test):
            yield from _running(statement.orelse)
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            yield statement


def _for_type_checkers(test: ast.expr) -> bool:
    name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
    return name == "TYPE_CHECKING"


def _imports(node: ast.AST, top: bool) -> Iterator[Import]:
    for child in _children(node):
        if isinstance(child, ast.Import):
            yield Import(0, "", tuple(alias.name for alias in child.names), top)
        elif isinstance(child, ast.ImportFrom):
            yield Import(child.level, child.module or "", tuple(alias.name for alias in child.names), top)
        else:
            yield from _imports(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))
