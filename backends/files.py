"""Writes files that are whole or absent, also when the process is killed while it writes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from backends.base import BackendError


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes `data` to a temporary file beside `path` and renames it. Raises BackendError when that fails."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise BackendError(f"cannot write {path}: {error.strerror or error}") from error
