"""The one root error of the package; the CLI prints it as a single sentence and exits with its code."""

from __future__ import annotations

import difflib
import errno
import sys
import traceback
from collections.abc import Callable, Iterable

EXIT_OK = 0
EXIT_CHECK_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_UNDECIDED = 4  # the measurement is too coarse to tell whether a threshold held
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


def told(work: Callable[[], int]) -> int:
    """Run `work` and return its exit code; a user's error becomes one sentence on stderr and its own exit code.

    A user's error is any exception with an `exit_code`, so that `backends` needs no import from here; and the system's
    word that a name is too long, which any look at a given path may raise. Any other is a defect: its traceback is
    printed and the code is 70.
    """
    try:
        return work()
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"pqk: {error.filename}: the name is too long", file=sys.stderr)
            return EXIT_USAGE
        if not isinstance(code, int):
            traceback.print_exc()
            return EXIT_CRASH
        print(f"pqk: {' '.join(str(error).split())}", file=sys.stderr)
        return code


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ' (did you mean X?)' for the closest allowed word, or '' when none is close."""
    match = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
