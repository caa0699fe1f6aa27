"""Keeps the source text of every module as this process first read it, so that the hashed code is the code that runs.

Call `keep_sources` when a process starts: from then on, modules of pqk and of backends are loaded from the kept text,
and `source_of` returns that text even when the file has been edited since. The keys of artifacts are made from it: see
`pqk.store.code`. This module imports nothing heavy, as every command starts with it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

ROOTS = ("pqk", "backends")
"""The packages whose modules are loaded from kept sources."""


def keep_sources() -> None:
    """Loads modules of `ROOTS` from kept sources from now on; keeps the sources of those that are loaded already."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name in list(sys.modules):
        if name.partition(".")[0] in ROOTS:
            source_of(name)
    sys.meta_path.insert(0, _Finder())


def source_of(name: str) -> bytes | None:
    """Returns the source text of a module as this process first read it; None when there is no such Python file.

    Nothing is imported. 'a.b.__init__' is the source of the package a.b, as is 'a.b'.
    """
    path = source_file(name)
    return None if path is None else _read(str(path))[0]


@cache
def source_file(name: str) -> Path | None:
    """Returns the file of a module or a package's __init__.py; None when there is none, as for a class in a module."""
    root, *rest = name.split(".")
    if not all(part.isidentifier() for part in (root, *rest)):
        return None
    for folder in _folders(root):
        path = Path(folder, *rest)
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if file.is_file() and (rest or file.name == "__init__.py"):
                return file
    if rest:
        return None
    spec = find_spec(root)
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def on_disk(name: str) -> bytes | None:
    """Returns the source text of a module as it is on the disk now; None when there is no such file any more."""
    path = source_file(name)
    try:
        return None if path is None else path.read_bytes()
    except OSError:
        return None


@cache
def _folders(root: str) -> tuple[str, ...]:
    """Returns the folders with the modules of a top package. Finding a top package imports nothing."""
    spec = find_spec(root)
    return tuple(spec.submodule_search_locations or ()) if spec is not None else ()


@cache
def _read(path: str) -> tuple[bytes, float]:
    """Returns text and modification time of a file, read once per process."""
    with Path(path).open("rb") as stream:
        return stream.read(), os.fstat(stream.fileno()).st_mtime


class _Loader(SourceFileLoader):
    """Loader of a module from its kept source, or from Python's cache of compiled modules if that is of this source."""

    def get_data(self, path: str) -> bytes:
        return _read(path)[0] if path == self.path else super().get_data(path)

    def path_stats(self, path: str) -> Mapping[str, float]:
        text, changed = _read(path)
        return {"mtime": changed, "size": len(text)}


class _Finder:
    """Finder of modules that works as Python's, but has modules of `ROOTS` loaded by `_Loader`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in ROOTS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
