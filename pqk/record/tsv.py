r"""Writes and reads tables as tab-separated text that any program reads, a line per row: `write_table`, `read_table`.

| in a text | in the file |
| --- | --- |
| backslash, tab, line feed, carriage return | `\\`, `\t`, `\n`, `\r` |
| any other character that is not printable | `\u` and four hexadecimal digits, or `\U` and eight |
| a quotation mark at the start, which readers of CSV take for a quoted cell | `\u0022` |
| a start that a spreadsheet takes for a formula (`pqk.record.formulas`) | an apostrophe before it |
| a semicolon, where a formula would start after one | `\u003b` |

An empty cell is null. Numbers are written so that reading returns the same float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pqk.errors import PqkError, nearest
from pqk.files import write_text
from pqk.oserrors import cannot_read
from pqk.record.formulas import escape_splits, holds_formula, starts_formula

Kind = Literal["text", "int", "float"]
Row = dict[str, Any]

_PLAIN = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_BACK = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}
_ESCAPE = re.compile(r"\\(?:([\\tnr])|u([0-9a-f]{4})|U([0-9a-f]{8})|(.?))", re.DOTALL)
_NUMBERS = {
    "int": re.compile(r"-?[0-9]{1,18}"),
    "float": re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", re.IGNORECASE),
}


def cell_of(value: Any) -> str:
    """Returns a value as text of a cell. Raises ValueError for a number that is not finite."""
    if value is None:
        return ""
    if not isinstance(value, str):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number; use null for unknown values")
        return repr(value)
    text = "".join(_escaped(char) for char in value)
    if text.startswith('"'):
        text = "\\u0022" + text[1:]
    if holds_formula(text):
        text = escape_splits(text)
    return f"'{text}" if starts_formula(text.lstrip("'")) else text


def _escaped(char: str) -> str:
    if char in _PLAIN:
        return _PLAIN[char]
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def value_of(cell: str, kind: Kind) -> Any:
    """Reads a cell, the inverse of `cell_of`. Raises ValueError for one that is not of this kind."""
    if not cell:
        return None
    if kind != "text":
        if not _NUMBERS[kind].fullmatch(cell):
            raise ValueError(f"{cell[:40]!r} is not a {'whole ' if kind == 'int' else ''}number")
        number = int(cell) if kind == "int" else float(cell)
        if not math.isfinite(number):
            raise ValueError(f"{cell[:40]!r} is too large")
        return number
    if cell.startswith("'") and starts_formula(cell.lstrip("'")):
        cell = cell[1:]
    return _ESCAPE.sub(_character, cell)


def _character(match: re.Match[str]) -> str:
    plain, short, long, wrong = match.groups()
    if plain:
        return _BACK[plain]
    if wrong is not None or int(short or long, 16) > 0x10FFFF:
        raise ValueError(f"{match[0]!r} is not an escape; write a backslash as two")
    return chr(int(short or long, 16))


def write_table(
    path: Path, columns: Mapping[str, Kind], rows: Iterable[Mapping[str, Any]], required: Sequence[str] = ()
) -> None:
    """Writes a table atomically: a line with the names of the columns, then a line per row.

    Raises PqkError for a value of the wrong kind, for a number that is not finite, and for an empty cell in a column
    that is `required`, which `read_table` would refuse.
    """
    write_text(path, table_text(columns, rows, str(path), required))


def table_text(
    columns: Mapping[str, Kind], rows: Iterable[Mapping[str, Any]], where: str, required: Sequence[str] = ()
) -> str:
    """Returns the text that `write_table` writes."""
    types: dict[str, tuple[type, ...]] = {"text": (str,), "int": (int,), "float": (int, float)}
    lines = ["\t".join(columns)]
    for row in rows:
        cells = []
        for name, kind in columns.items():
            value = row.get(name)
            if name in required and value in (None, ""):
                raise PqkError(f"{where}: {name} is empty, so the row is not written")
            if value is not None and (isinstance(value, bool) or not isinstance(value, types[kind])):
                raise PqkError(f"{where}: {name} must be a {kind}, not {value!r}")
            try:
                cells.append(cell_of(float(value) if kind == "float" and isinstance(value, int | float) else value))
            except ValueError as error:
                raise PqkError(f"{where}: {name}: {error}") from error
        lines.append("\t".join(cells))
    return "\n".join(lines) + "\n"


def header_of(path: Path) -> list[str]:
    """Returns the names of a table's columns. Raises PqkError for a file that is empty or not UTF-8 text."""
    return _lines(path)[0].rstrip("\r").split("\t")


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PqkError(cannot_read(path, error)) from error
    except UnicodeDecodeError as error:
        raise PqkError(f"{path} is not UTF-8 text") from error
    lines = text.split("\n")  # not splitlines: a cell may hold other characters that Python takes for a line's end
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise PqkError(f"{path} is empty; expected a line with the names of the columns")
    return lines


def read_table(
    path: Path, columns: Mapping[str, Kind], required: Sequence[str] = (), later: Sequence[str] = ()
) -> list[Row]:
    """Returns the rows of a table, in their order; its columns may have any order.

    later: columns that tables of older versions do not have; such a row has None there. Raises PqkError, with the line,
    for a file that is not UTF-8, a missing or unknown column, a row of another length, a cell of the wrong kind, and an
    empty cell in a column that is `required`.
    """
    lines = _lines(path)
    names = lines[0].rstrip("\r").split("\t")
    for name in names:
        if name not in columns or names.count(name) > 1:
            raise PqkError(f"{path}:1: unknown or repeated column {name[:60]!r}{nearest(name, columns)}")
    missing = [name for name in columns if name not in names and name not in later]
    if missing:
        raise PqkError(f"{path}:1: the column {missing[0]!r} is missing; this is another kind of table")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(names):
            raise PqkError(f"{path}:{number}: {len(cells)} cells where the first line has {len(names)}")
        row: Row = dict.fromkeys(later)
        for name, cell in zip(names, cells, strict=True):
            try:
                row[name] = value_of(cell, columns[name])
            except ValueError as error:
                raise PqkError(f"{path}:{number}: {name}: {error}") from None
            if row[name] is None and name in required:
                raise PqkError(f"{path}:{number}: {name} is empty")
        rows.append(row)
    return rows


def markdown_cell(text: str) -> str:
    """Returns text for a cell of a Markdown table: one line, no control characters, no markup and no HTML."""
    flat = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    return re.sub(r"([\\`*_{}\[\]<>|#~&$])", r"\\\1", flat)
