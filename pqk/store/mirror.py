"""Shares artifacts between machines that have no folder in common, through an fsspec URL such as s3://bucket/store.

`PQK_STORE` names the URL. An artifact that the local store lacks is fetched before it would be made, and a new one is
sent when it is made. Its manifest is sent last, so that another machine finds a whole artifact or none; what was
fetched is compared with the sha256 of every file before it is used. The local store stays the one that is read.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

from pqk.errors import PqkError, first_line
from pqk.files import below

VARIABLE = "PQK_STORE"
_MANIFEST = "manifest.json"


class Mirror:
    """The store behind a URL. Raises PqkError where fsspec or the package of its protocol is missing."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            from fsspec.core import url_to_fs

            self._files: Any
            self._files, self._root = url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:
            raise PqkError(f"{VARIABLE} is {url!r}, which fsspec cannot open: {first_line(error)}") from None

    def fetch(self, stage: str, short: str, folder: Path) -> bool:
        """Copies an artifact into the empty `folder`; returns False where the URL has none."""
        there = f"{self._root}/{stage}/{short}"
        try:
            if not self._files.exists(f"{there}/{_MANIFEST}"):
                return False
            self._files.invalidate_cache()  # of listings, which another machine may have changed
            for file in self._files.find(there):
                name = PurePosixPath(file).relative_to(PurePosixPath(there))
                if ".." in name.parts:
                    raise PqkError(f"{self.url}: {stage}/{short} holds a file outside it: {name}")
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(file, str(folder / name))
        except (OSError, ValueError) as error:
            raise PqkError(f"cannot read {stage}/{short} of {self.url}: {first_line(error)}") from error
        return True

    def send(self, stage: str, short: str, folder: Path) -> None:
        """Copies an artifact to the URL, unless it is there. Raises PqkError where that cannot be written."""
        there = f"{self._root}/{stage}/{short}"
        try:
            if self._files.exists(f"{there}/{_MANIFEST}"):
                return
            names = [path.relative_to(folder).as_posix() for path in below(folder) if path.is_file()]
            for name in sorted(names, key=lambda name: (name == _MANIFEST, name)):
                self._files.makedirs(str(PurePosixPath(there, name).parent), exist_ok=True)
                self._files.put_file(str(folder / name), f"{there}/{name}")
        except (OSError, ValueError) as error:
            raise PqkError(f"cannot write {stage}/{short} to {self.url}: {first_line(error)}") from error

    def drop(self, stage: str, short: str) -> None:
        """Makes others find no artifact where a damaged one lies; the next one that is sent replaces it."""
        with contextlib.suppress(OSError):
            self._files.rm_file(f"{self._root}/{stage}/{short}/{_MANIFEST}")


def mirror() -> Mirror | None:
    """Returns the store of `PQK_STORE`; None where it is not set."""
    url = os.environ.get(VARIABLE)
    return Mirror(url) if url else None
