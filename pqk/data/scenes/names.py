"""Sorts names of files in natural order, and finds names that only look alike."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path, PurePosixPath

_DIGITS = re.compile(r"([0-9]+)")


def natural(name: str) -> tuple[tuple[str | int, ...], str]:
    """Returns a sort key by which frame_2 comes before frame_10: runs of digits count as numbers, all else as text.

    Equal keys (1 and 01) go by the name. Text and numbers take turns in a key, so any two can be compared.
    """
    words = _DIGITS.split(name)
    return tuple(int(word) if index % 2 else word for index, word in enumerate(words)), name


def folded(name: str) -> str:
    """Returns the name in one Unicode form, without case, with slashes for backslashes, so that alike names are equal.

    Systems differ in all three: macOS stores letters and accents apart, Windows separates folders by a backslash.
    """
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


def stays_inside(name: str) -> bool:
    """Returns whether a path stays inside the folder it is relative to: not empty, not absolute, and without `..`.

    A name that would leave the folder where a backslash separates folders does not stay inside either.
    """
    outside = PurePosixPath(name).is_absolute() or ".." in re.split(r"[/\\]", name)
    return bool(PurePosixPath(name).parts) and not (outside or re.match(r"(?:[A-Za-z]:)?\\", name) or "\0" in name)


def look_alike(folder: Path, name: str) -> str:
    """Returns ' (X is there, ...)' for something below `folder` whose relative path looks like `name`, or ''.

    Non-ASCII letters are escaped in it, since the two would look the same. Raises OSError for a folder that cannot be
    read.
    """
    here = folder
    for part in PurePosixPath(name.replace("\\", "/")).parts:
        entries = sorted(here.iterdir()) if here.is_dir() else []
        alike = next((entry for entry in entries if folded(entry.name) == folded(part)), None)
        if alike is None:
            return ""
        here = here / part if (here / part).exists() else alike
    found = here.relative_to(folder).as_posix()
    return f" ({found!a} is there, but {name!a} is another name; rename one of them)" if found != name else ""
