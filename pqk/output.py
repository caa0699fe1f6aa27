"""The standard streams of a command: what their encoding lacks is replaced, and a stream that fails is one sentence."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import NoReturn, TextIO

from pqk.oserrors import cannot_write

EXIT_PIPE_CLOSED = 141
"""What a shell reports for a program that SIGPIPE ended: 128 + 13."""


_REPLACED = "pqk.replaced"  # the name of `_replaced` among the error handlers of codecs
_PLAIN = {"✓": "+", "…": ".", "·": "-", "▸": ">", "–": "-", "—": "-", "→": ">", "×": "x", "≥": ">", "≤": "<"}


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """Returns a plain character for each that the encoding lacks, so that tables keep their columns: '?' for most.

    A byte of a file's name that is not UTF-8 (a lone surrogate in Python's texts) becomes \\xNN.
    """
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end]
    plain = [
        f"\\x{ord(sign) - 0xDC00:02x}" if "\udc80" <= sign <= "\udcff" else _PLAIN.get(sign, "?") for sign in signs
    ]
    return "".join(plain), error.end


codecs.register_error(_REPLACED, _replaced)


class StreamFailed(Exception):
    """A standard stream that cannot be written; its text is one sentence. Exit code 2."""

    exit_code = 2


class _Stream(io.TextIOWrapper):
    """Takes the place of a standard stream. A closed pipe, as of `| head -1`, ends the program without a word."""

    def __init__(self, stream: io.TextIOWrapper, called: str) -> None:
        # a second wrapper around the same bytes: `detach` gives them back
        super().__init__(
            stream.buffer, encoding=stream.encoding, errors=_REPLACED, line_buffering=stream.line_buffering
        )
        self.called = called

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._fail(error)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> NoReturn:
        """Sends the rest to /dev/null, so that the interpreter's last flush does not fail too, and raises."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if error.errno == errno.EPIPE:
            raise SystemExit(EXIT_PIPE_CLOSED) from None
        raise StreamFailed(cannot_write(self.called, error) or f"cannot write {self.called}: {error}") from error


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Puts `_Stream`s in the place of stdout and stderr for the block; streams of someone else, as a test's, stay.

    A descriptor 0, 1 or 2 that the caller closed is opened on /dev/null: a file of ours would get its number, and then
    what a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _safe(sys.stdout, "stdout"), _safe(sys.stderr, "stderr")
    mine = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in mine:
            if isinstance(stream, _Stream):
                with contextlib.suppress(StreamFailed, SystemExit):
                    stream.detach()  # else its end would close the bytes that both share


def flush_streams() -> None:
    """Writes what is still in memory. Raises SystemExit(141) for a closed pipe, StreamFailed for a full disk."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # the caller closed it
            stream.flush()


def _safe(stream: TextIO, called: str) -> TextIO:
    return _Stream(stream, called) if type(stream) is io.TextIOWrapper else stream
