"""Carries out one cell, commands of pqk that belong together, on the machine that it was sent to: `carry_out`.

A cell works in the project's folder, which every machine sees under the same path. It hands back how it ended, the last
lines that it printed, and the kind of its machine.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pqk.errors import EXIT_CHECK_FAILED, EXIT_OK, EXIT_UNAVAILABLE, EXIT_UNDECIDED
from pqk.files import clear_write_errors
from pqk.launch.machine import Kind, agreed, difference, kind, own_cores
from pqk.result import VARIABLE
from pqk.store.worker import _die_with_parent, _environment

_SAID = 300  # characters of a cell's reason that are kept
_TAIL = 20  # lines of its output that are handed back
_JUDGED = {EXIT_CHECK_FAILED: "fail", EXIT_UNDECIDED: "undecided"}
"""Verdicts by exit code, for runs that were measured to their end without success."""
_NOTED = ("run_id", "verdict", "record", "stopped")
_FROM_OUTSIDE = (
    -signal.SIGKILL,
    -signal.SIGTERM,
)  # exit codes; a crash is a fault of the command, and would come again

Echo = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """Commands that run one after another on one machine; the first decides whether the others run.

    root: the project's folder. log: gets what they print; the result of each command lies beside it. kind: the file
    with the kind of machine that all cells of this work run on. refuses: whether the cell refuses a machine of another
    kind. variables: of the environment, in addition to those of the machine. cores: that it is bound to, None: all.
    gpus: that it asked for.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    root: Path
    log: Path
    kind: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    refuses: bool = True
    cores: int | None = None
    gpus: int = 0


@dataclass(frozen=True)
class Done:
    """The end of a cell.

    outcome: exit_code (None: its machine or its process was lost), said (the reason, one sentence), measured (to its
    end: with a verdict, also a bad one), and of what the first command noted run_id, verdict, record and stopped.
    began: seconds since 1970; seconds: wall time of its last attempt. tail: its last lines. result: what its last
    command noted (`pqk.result`). refused: its machine is of another kind, and nothing ran.
    """

    name: str
    outcome: Mapping[str, Any]
    began: float
    seconds: float
    machine: Kind | None = None
    node: str | None = None
    tail: tuple[str, ...] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    refused: bool = False

    @property
    def killed(self) -> bool:
        """Whether its command was killed from outside, such as by a kernel that is short of memory."""
        return self.outcome["exit_code"] in _FROM_OUTSIDE


def pqk_command(*words: str) -> tuple[str, ...]:
    """Returns the command line of `pqk WORDS`, for a cell."""
    # -P: the project's folder, in which it runs, may hold another pqk or a random.py
    return (sys.executable, "-P", "-m", "pqk.cli", *words)


def placed(given: Path | str | None) -> str | None:
    """Returns a path as a cell, which runs in the project's folder, can take it; a name that is no path unchanged."""
    if given is None:
        return None
    return str(Path(given).resolve()) if Path(given).exists() else str(given)


def why_not(done: Done) -> str:
    """Returns why a cell has no result, in one sentence."""
    if done.killed:
        return f"its command was killed by signal {-done.outcome['exit_code']}"
    return str(done.outcome["said"] or next(reversed(done.tail), "") or f"exit code {done.outcome['exit_code']}")


def lost(cell: Cell, why: str, began: float) -> Done:
    """Returns the end of a cell of which nothing came back."""
    return Done(cell.name, {"exit_code": None, "said": why[:_SAID], "measured": False}, began, time.time() - began)


def carry_out(cell: Cell, echo: Echo = lambda line: None) -> Done:
    """Runs the commands of a cell; `echo` gets every line that they print.

    The first command decides: after a verdict, also 'fail' and 'undecided', the other commands run; after anything else
    the cell ends. The commands die with this process. Raises PqkError when the log cannot be written.
    """
    began, clock = time.time(), time.monotonic()
    tail: deque[str] = deque(maxlen=_TAIL)
    outcome: dict[str, Any]
    result: dict[str, Any] = {}

    def heard(line: str) -> None:
        tail.append(line)
        echo(line)

    with own_cores(cell.cores) as cores:
        here = kind(cell.gpus) | {"cores": len(cores) or kind()["cores"]}
        other = difference(here, agreed(cell.kind, here))
        refused = other is not None and cell.refuses
        if refused:
            said = f"refused: {platform.node()} is {other}, which the others run on; {cell.kind} names that kind"
            outcome = {"exit_code": EXIT_UNAVAILABLE, "said": said[:_SAID], "measured": False}
        else:
            outcome, result = _outcome(cell, cores, heard)
    seconds = round(time.monotonic() - clock, 3)
    return Done(cell.name, outcome, began, seconds, here, platform.node(), tuple(tail), result, refused)


def _outcome(cell: Cell, cores: Iterable[int], echo: Echo) -> tuple[dict[str, Any], dict[str, Any]]:
    code, result = execute(cell, cell.commands[0], cores, echo)
    judged = code == EXIT_OK or (code in _JUDGED and result.get("verdict") == _JUDGED[code])
    outcome = {"exit_code": code, "said": _reason(result), "measured": judged}
    outcome |= {name: result[name] for name in _NOTED if name in result}
    for words in cell.commands[1:] if judged else ():
        code, result = execute(cell, words, cores, echo)
        if code != EXIT_OK:
            return outcome | {"exit_code": code, "said": _reason(result), "measured": False}, result
    return outcome, result


def _reason(result: Mapping[str, Any]) -> str:
    """Returns the reason for a command's end in one sentence: its error, or the deciding threshold; '' for none."""
    return str(result.get("error") or result.get("why") or "")[:_SAID]


def execute(cell: Cell, words: Sequence[str], cores: Iterable[int], echo: Echo) -> tuple[int, dict[str, Any]]:
    """Runs a command to its end; its output goes to the cell's log and to `echo`, and is not interpreted.

    Returns its exit code and its result (see `pqk.result`), which is empty when there is none, as after a kill.
    """
    answer = cell.log.with_suffix(".result.json")
    with clear_write_errors(answer):
        answer.unlink(missing_ok=True)
    with clear_write_errors(cell.log), cell.log.open("ab", buffering=0) as kept:
        kept.write(f"== {datetime.now(UTC).isoformat(timespec='seconds')}: {shlex.join(words)}\n".encode())
        process = subprocess.Popen(
            list(words),
            cwd=cell.root,
            env={**_environment(), **cell.variables, VARIABLE: str(answer)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=functools.partial(_begin, os.getpid(), frozenset(cores)),
        )
        assert process.stdout is not None
        try:
            for raw in process.stdout:
                kept.write(raw)
                echo(raw.decode("utf-8", errors="replace").rstrip())
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
    return code, _read_result(answer)


def _begin(parent: int, cores: frozenset[int]) -> None:
    """Runs in the new process: it dies with its parent, and stays on its cores."""
    _die_with_parent(parent)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _read_result(path: Path) -> dict[str, Any]:
    """Returns the result file of a command as data; empty when there is none, or an invalid one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
