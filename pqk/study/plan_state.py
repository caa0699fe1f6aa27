"""Keeps what a plan has run: every attempt of each experiment, and with which backend and model.

    outputs/plans/NAME/state.json       all attempts: start, duration, exit code and reason
    outputs/plans/NAME/state.jsonl      the attempts that began or ended since state.json was written, a line each
    outputs/plans/NAME/.lock            held (flock) while the plan runs

A line is added when an attempt begins and when it ends; state.json is replaced in one step when a plan begins and ends.
So after a kill the next call knows which attempts were running, and a plan of ten thousand experiments does not write
ten thousand attempts for each. A line replaces the attempt of its number: reading it twice does no harm.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pqk.errors import PqkError
from pqk.files import clear_write_errors, write_json
from pqk.locks import locked
from pqk.oserrors import cannot_read, says_nothing

_VERSION = 1
_FIELDS = {"key", "began", "seconds", "exit_code", "said"}

Attempt = dict[str, Any]
State = dict[str, Any]
"""version, asked ({backend, model} of the last run, or None), attempts (a list for each experiment)."""


class Journal:
    """The state of a plan that is running: `state` in memory, each change of it on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.state = read_state(folder)
        for name, attempts in self.state["attempts"].items():
            for attempt in attempts:  # before their log grows again
                attempt["seconds"] = round(seconds_of(attempt, folder, name), 3)

    def begin(self, asked: Mapping[str, Any]) -> None:
        """Notes with what the plan runs now, and puts everything into state.json."""
        self.state["asked"] = dict(asked)
        self.fold()

    def attempts(self, name: str) -> list[Attempt]:
        """Returns the attempts of an experiment."""
        found: list[Attempt] = self.state["attempts"].setdefault(name, [])
        return found

    def note(self, name: str) -> None:
        """Writes the last attempt of an experiment; it is on disk when this returns."""
        attempts = self.attempts(name)
        line = json.dumps([name, len(attempts) - 1, attempts[-1]], ensure_ascii=False, allow_nan=False)
        path = _journal(self._folder)
        with clear_write_errors(path), path.open("ab") as stream:
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def fold(self) -> None:
        """Puts everything into state.json, and removes the lines that it now has."""
        write_json(self._folder / "state.json", self.state)
        with clear_write_errors(self._folder):
            _journal(self._folder).unlink(missing_ok=True)


def read_state(folder: Path) -> State:
    """Returns the state in a plan's folder. Raises PqkError where it is damaged, other than by a line cut short."""
    path = folder / "state.json"
    try:
        state = _read(path)
        for name, number, attempt in _lines(_journal(folder)):
            attempts = state["attempts"].setdefault(name, [])
            if not 0 <= number <= len(attempts):
                raise ValueError(f"attempt {number} of {name} has none before it")
            attempts[number:] = [attempt]
        _check(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and says_nothing(error):
            raise PqkError(cannot_read(path, error)) from error
        raise PqkError(f"{path}: not the state of a plan ({error}); remove it to start over") from error
    return state


def _read(path: Path) -> State:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {"version": _VERSION, "asked": None, "attempts": {}}


def _lines(path: Path) -> Iterator[tuple[str, int, Attempt]]:
    """Yields the changes since state.json; the last line may be cut short, as a killed plan leaves it."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines[:-1]:
        name, number, attempt = json.loads(line)
        yield str(name), int(number), dict(attempt)


def _check(state: State) -> None:
    if state["version"] != _VERSION:
        raise ValueError(f"version {state['version']}")
    if state["asked"] is not None and state["asked"].keys() != {"backend", "model"}:
        raise ValueError("asked is not backend and model")
    for attempts in state["attempts"].values():
        for attempt in attempts:
            if not attempt.keys() >= _FIELDS:
                raise ValueError("an attempt lacks a field")


def _journal(folder: Path) -> Path:
    return folder / "state.jsonl"


def seconds_of(attempt: Attempt, folder: Path, name: str) -> float:
    """Returns the wall seconds of an attempt; for a running or killed one, up to the last line that it printed."""
    if attempt["seconds"] is not None:
        return float(attempt["seconds"])
    with contextlib.suppress(OSError):
        return max(0.0, (folder / f"{name}.log").stat().st_mtime - float(attempt["began"]))
    return 0.0


@contextlib.contextmanager
def only_run(folder: Path, name: str) -> Iterator[None]:
    """Holds the lock of a plan. Raises PqkError when another process runs it."""
    with locked(folder / ".lock", timeout=0.5) as free:  # `pqk plan status` may be looking at it
        if not free:
            raise PqkError(f"plan {name} is running already; see `pqk plan status {name}`")
        yield
