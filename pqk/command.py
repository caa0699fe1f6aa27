"""Tells the command that this process was started with, `given_command`, as a record keeps it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pqk import paths

OUTSIDE = "OUTSIDE"
"""Stands before the name of a path that is not below the project: a record names no folder of one machine."""
_NO_PART = {"--json": 0, "--fresh": 0, "--retime": 0, "--track": 1}
"""Options that change nothing of what is measured, and how many words follow them. A tracker's may hold a password."""


def given_command(argv: Sequence[str] | None = None) -> str | None:
    """Returns the command in the words of a shell, to be given in the project's folder; None inside another program.

    Paths below the project's folder are relative to it; of others the name is left, behind `OUTSIDE`.
    argv: that of the process by default.
    """
    program, *words = sys.argv if argv is None else argv
    name, given = Path(program).name, iter(words)
    if name in ("pqk", "__main__.py"):
        begin = ["pqk"]
    elif Path(program).resolve().parent.name == "scripts":
        begin = ["python", f"scripts/{name}"]
    else:
        return None
    kept = []
    for word in given:
        option = word.split("=")[0]
        if option in _NO_PART:
            for _ in range(_NO_PART[option] if option == word else 0):
                next(given, None)
        else:
            kept.append(_placed(word))
    return shlex.join([*begin, *kept])


def _placed(word: str) -> str:
    """Returns a word with its path, alone or behind an =, as seen from the project's folder."""
    option, sign, value = word.partition("=")
    if not sign or not _is_path(value):
        option, sign, value = "", "", word
    if not _is_path(value):
        return word
    path, root = Path(os.path.normpath(Path(value).expanduser().absolute())), paths.project_root()
    for inside, base in ((path, root), (path.resolve(), root.resolve())):
        if inside.is_relative_to(base):
            return option + sign + inside.relative_to(base).as_posix()
    return f"{option}{sign}{OUTSIDE}/{path.name}"


def _is_path(text: str) -> bool:
    """Returns whether a text is an absolute path, or leads to something that is there."""
    return "://" not in text and (text.startswith(("/", "~")) or ("/" in text and Path(text).exists()))
