"""Keeps the log of a card's runs, `logs/runs/CARD.jsonl`: attempts, stops and changes, in order (`RunLog`).

Append-only, one JSON object a line. A line is written in one piece, under a lock, and is on disk when `append` returns.
A process that is killed while it writes leaves at most one incomplete line, which readers skip.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pqk.errors import PqkError
from pqk.files import clear_write_errors, fsync_folder
from pqk.locks import lock
from pqk.oserrors import cannot_read


class RunLog:
    """The run log of one card of a project."""

    def __init__(self, root: Path, card: str) -> None:
        self.path = root / "logs" / "runs" / f"{card}.jsonl"

    def append(self, event: str, **fields: Any) -> dict[str, Any]:
        """Adds an entry and returns it: 'time' (ISO 8601, UTC), 'event', and the fields, which are plain data.

        Numbers that are not finite become null, as JSON has none. Raises PqkError when the file cannot be written, and
        TypeError for fields that are not plain data; nothing is written then.
        """
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        entry: dict[str, Any] = {"time": now, "event": event, **_plain(fields)}
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with clear_write_errors(self.path):
            new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                lock(handle, self.path)  # released when the file is closed
                if _torn(handle):
                    line = b"\n" + line
                while line:
                    line = line[os.write(handle, line) :]
                os.fsync(handle)
            finally:
                os.close(handle)
            if new:
                fsync_folder(self.path.parent)
        return entry

    def read(self) -> list[dict[str, Any]]:
        """Returns all entries in order, without lines that are not a JSON object, as a killed writer leaves them.

        Empty when the card never ran. Raises PqkError when the file cannot be read.
        """
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PqkError(cannot_read(self.path, error)) from error
        entries = []
        for line in raw.split(b"\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                entries.append(entry)
        return entries


def _torn(handle: int) -> bool:
    """Returns whether the file ends in the middle of a line."""
    size = os.fstat(handle).st_size
    return size > 0 and os.pread(handle, 1, size - 1) != b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
