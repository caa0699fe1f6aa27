"""Writes how a command ended as data, for the program that started it and named a file in `PQK_RESULT`.

`pqk plan --run` starts commands so, and does not read what they print. The file is one JSON object: exit_code; error, a
sentence or null; and what the command noted, such as run_id, status and verdict of `pqk run`. A command that was killed
leaves none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pqk.errors import EXIT_USAGE
from pqk.oserrors import refusal

VARIABLE = "PQK_RESULT"
_noted: dict[str, Any] = {}


def note(**fields: Any) -> None:
    """Add plain data to the result of this command."""
    _noted.update(fields)


def reported(work: Callable[[], int]) -> Callable[[], int]:
    """Have `work` write its result, where one is asked for; it returns and raises what it did before.

    The request is for this command alone: programs that it starts do not see it. A file that cannot be written is left
    out, as the exit code still tells.
    """

    def run() -> int:
        asked = os.environ.pop(VARIABLE, None)
        _noted.clear()
        try:
            code = work()
        except SystemExit as end:  # how the parser of the command line ends, also when all went well
            _write(asked, end.code if isinstance(end.code, int) else int(end.code is not None), None)
            raise
        except Exception as error:
            known, refused = getattr(error, "exit_code", None), refusal(error)
            if isinstance(known, int) or refused is not None:
                code = known if isinstance(known, int) else EXIT_USAGE
                _write(asked, code, " ".join((refused or str(error)).split()))
            else:  # a defect
                _write(asked, None, repr(error))
            raise
        _write(asked, code, None)
        return code

    return run


def _write(asked: str | None, code: int | None, error: str | None) -> None:
    if asked is None:
        return
    from pqk.errors import PqkError
    from pqk.files import write_json

    with contextlib.suppress(PqkError, OSError):
        write_json(Path(asked), {"exit_code": code, "error": error, **_noted})
