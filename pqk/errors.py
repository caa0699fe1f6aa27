"""The one root error of the package; the CLI prints it as a single sentence and exits with its code."""

from __future__ import annotations

import contextlib
import difflib
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from pqk.oserrors import refusal
from pqk.output import StreamFailed, flush_streams, safe_streams

EXIT_OK = 0
EXIT_CHECK_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_UNDECIDED = 4  # the measurement is too coarse to tell whether a threshold held
# of `pqk verify`, one for each rule of a deliverable; where several are broken, the highest of them is returned
EXIT_FILE_CHANGED = 10  # a file is not the one that was frozen
EXIT_NUMBER_WRONG = 11  # a number does not follow from what it was computed from
EXIT_SEED_MISSING = 12  # the grid of train and eval seeds has a hole
EXIT_RECORD_INVALID = 13  # a record or table that no schema allows
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_CRASH = 70  # a defect of pqk itself: never to be mistaken for a failed threshold


class PqkError(Exception):
    """Something the user can mend: wrong file, key, value or argument. Exit code 2."""

    exit_code = EXIT_USAGE


class CheckFailed(PqkError):
    """A threshold or a parity check did not hold. Exit code 1."""

    exit_code = EXIT_CHECK_FAILED


class NotBuilt(PqkError):
    """A recipe, method or backend that this version does not offer (yet). Exit code 3."""

    exit_code = EXIT_UNAVAILABLE


class Interrupted(PqkError):
    """Ctrl-C (SIGINT). Exit code 130."""

    exit_code = EXIT_INTERRUPTED

    def __init__(self) -> None:
        super().__init__("interrupted; finished stages are kept, and the same command continues from there")


def told(work: Callable[[], int]) -> int:
    """Run `work` and return its exit code; a user's error becomes one sentence on stderr and its own exit code.

    A user's error is any exception with an `exit_code`, so that `backends` needs no import from here, and what the
    system refuses (`pqk.oserrors.refusal`). Ctrl-C becomes one line and code 130, a closed pipe code 141. Any other
    exception is a defect: its traceback is printed and the code is 70.
    """
    with safe_streams():
        try:
            try:
                Path.cwd()  # at once: libraries that load others crash without one
                code = work()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except KeyboardInterrupt:
                raise Interrupted from None
            flush_streams()
            return code
        except SystemExit as end:  # of a stream that is closed
            return int(end.code or 0)
        except Exception as error:
            return _explain(error)


def _explain(error: Exception) -> int:
    """Print what the user must know of an error, and return the exit code; a stderr that fails gets nothing."""
    code, said = getattr(error, "exit_code", None), refusal(error)
    with contextlib.suppress(StreamFailed, SystemExit):
        if isinstance(code, int) or said is not None:
            print(f"pqk: {' '.join((said or str(error)).split())}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
            sys.stderr.flush()
    return code if isinstance(code, int) else EXIT_CRASH if said is None else EXIT_USAGE


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ' (did you mean X?)' for the closest allowed word, or '' when none is close."""
    match = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def first_line(error: Exception) -> str:
    """Returns the first sentence of a library's error, at most 160 characters of it."""
    return str(error).strip().split("\n")[0].split(". ")[0][:160].rstrip(".") or type(error).__name__
