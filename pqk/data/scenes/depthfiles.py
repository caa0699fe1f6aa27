"""Matches depth files to images, and names those that match none."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from pqk.data.scenes.names import folded, natural
from pqk.errors import PqkError

DEPTH = "ground_truth_depth"


def match_depth(names: Iterable[str], folders: Iterable[Path]) -> dict[str, Path]:
    """Returns the depth file of each image name that has one; `folders` are searched in turn.

    A depth file has the image's name, or else the same stem in the same subfolder with another ending: a.png, a.raw or
    a.jpg.bin for a.jpg. Raises PqkError when several files fit one image, or one file fits several images.
    """
    names, folders = list(names), [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    found = {name: path for name in names for folder in reversed(folders) if (path := folder / name).is_file()}
    rest = [name for name in names if name not in found]
    if not rest or not folders:
        return found
    taken = set(found.values())
    fitting: dict[str, list[Path]] = {}
    for folder in folders:
        for path in _files(folder):
            if path not in taken:
                name = path.relative_to(folder).as_posix()
                for key in {_stem(name), _stem(_stem(name))}:
                    fitting.setdefault(key, []).append(path)
    users: dict[Path, str] = {}
    for name in rest:
        paths = fitting.get(_stem(name), [])
        if len(paths) > 1:
            raise PqkError(
                f"{paths[0].parent}: {paths[0].name} and {paths[1].name} could both be the depth of {name!r}"
            )
        if paths and paths[0] in users:
            raise PqkError(
                f"{paths[0]}: this could be the depth of {users[paths[0]]!r} and of {name!r}; name it in full"
            )
        for path in paths:
            users[path], found[name] = name, path
    return found


def unused_depth(root: Path, used: Collection[Path], why: str) -> Iterator[str]:
    """Yields notes about depth that no view of the scene uses: files in ground_truth_depth, folders of other names."""
    files = _files(root / DEPTH)
    unused = [path for path in files if path not in used]
    if unused:
        yield (
            f"{root / DEPTH}: {len(unused)} of {len(files)} depth files are not used, the first is "
            f"{unused[0].relative_to(root / DEPTH).as_posix()!r}: {why}"
        )
    if not used and not files:
        for folder in sorted(root.iterdir()):
            if "depth" in folder.name.lower() and folder.is_dir():
                yield f"{folder}: this depth is not read; it is looked for in {root / DEPTH}"


def _files(folder: Path) -> list[Path]:
    """Returns files in the folder and below, in natural order, links followed; each real folder once, so loops end."""
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(here) / file for file in files if not file.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: natural(path.as_posix()))


def _stem(name: str) -> str:
    """Returns the name without its last ending, in one form of Unicode and case."""
    return folded(PurePosixPath(name).with_suffix("").as_posix())
