"""Refuses scenes and pictures that two splits of a run would share."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from pqk.data.scenes.scene import Scene, unreadable
from pqk.errors import PqkError


def refuse_overlap(splits: Mapping[str, Sequence[Scene]]) -> None:
    """Raises PqkError when two splits share a scene folder, a picture file, or a picture byte for byte.

    splits: the scenes of each split by its name: validation, test, calibration, train. Links are followed: a link to a
    folder or file is that folder or file. Of a scene, the folder itself and those of its pictures count. Generated
    splits need no check: their seeds differ. Pictures that were saved again, with other bytes, are not recognised. Only
    files whose size occurs in two splits are read. The message names both splits and both files or folders.
    """
    for (a, first), (b, second) in combinations(splits.items(), 2):
        for one, other in _same_folders(first, second):
            raise PqkError(
                f"splits {a} and {b} share a folder: {a} has {one}, {b} has {other}; give each scene to one split"
            )
        for one, other in _same_pictures(first, second):
            raise PqkError(
                f"splits {a} and {b} share a picture: {a} has {one}, {b} has {other}, which is the same; "
                "give each picture to one split"
            )


def _same_folders(first: Sequence[Scene], second: Sequence[Scene]) -> Iterator[tuple[Path, Path]]:
    there = _folders(second)
    return ((path, there[real]) for real, path in _folders(first).items() if real in there)


def _folders(scenes: Sequence[Scene]) -> dict[Path, Path]:
    """Returns the folders of scenes and of their pictures, by their resolved paths."""
    every = dict.fromkeys(
        path for scene in scenes for path in (scene.root, *(v.image_path.parent for v in scene.views))
    )
    return {path.resolve(): path for path in every}


def _same_pictures(first: Sequence[Scene], second: Sequence[Scene]) -> Iterator[tuple[Path, Path]]:
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in _pictures(second):
        by_size[_size(path)].append(path)
    digests: dict[int, dict[bytes, Path]] = {}
    for path in _pictures(first):
        size = _size(path)
        if size not in by_size:
            continue
        if size not in digests:
            digests[size] = {_digest(other): other for other in by_size[size]}
        if (same := digests[size].get(_digest(path))) is not None:
            yield path, same


def _pictures(scenes: Sequence[Scene]) -> Iterator[Path]:
    return (view.image_path for scene in scenes for view in scene.views)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(error, path) from error


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise unreadable(error, path) from error
