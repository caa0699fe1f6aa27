"""Counts the device hours of work that may be killed and resumed: `clock`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pqk.files import write_json

_EVERY_S = 5.0


class Clock:
    """Wall seconds of a piece of work over all its parts, saved in `folder`, which remains when a process is killed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "clock.json"
        self._before = 0.0
        with suppress(OSError, ValueError, TypeError, KeyError):  # a damaged file counts from 0
            self._before = float(json.loads(self._path.read_text())["seconds"])
        self._began = self._kept = time.monotonic()

    @property
    def seconds(self) -> float:
        """Returns the wall seconds so far, earlier processes included."""
        return self._before + time.monotonic() - self._began

    def keep(self, now: bool = False) -> None:
        """Saves the seconds, at most every few seconds unless `now`; a killed process loses the time since then."""
        if now or time.monotonic() - self._kept > _EVERY_S:
            self._kept = time.monotonic()
            write_json(self._path, {"seconds": round(self.seconds, 3)})


@contextmanager
def clock(folder: Path) -> Iterator[Clock]:
    """Yields a clock that is also saved when the work fails, such as when its hours are used up."""
    running = Clock(folder)
    try:
        yield running
    except BaseException:
        running.keep(now=True)
        raise
