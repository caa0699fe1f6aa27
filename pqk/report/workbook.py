"""Writes result_table.xlsx, `write_workbook`: records in four sheets, all columns in one, and their meaning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk.files import atomic_path
from pqk.record.formulas import safe_text
from pqk.record.schema import Column, schema_version
from pqk.report.cells import Record, best_rows, cell_text, with_ends

if TYPE_CHECKING:
    from openpyxl import Workbook
    from openpyxl.worksheet.worksheet import Worksheet

SHEETS = ("quality", "efficiency", "resources", "edge")
HEADER_ROWS = 2

_CELL_LENGTH = 32_000  # Excel holds 32,767 characters in a cell
_EXACT_INTEGER = 2**53  # Excel keeps numbers as float64
_CUT = " … (cut; whole in summary.json)"


def write_workbook(path: Path | str, records: Sequence[Record]) -> None:
    """Writes records, in the order given, to an .xlsx file, atomically.

    Each of the four sheets has the identity columns and those of its group; 'all' has every column; 'about' explains
    them. Row 1 holds the names, row 2 the units. Best values are bold, null cells are empty, text that looks like a
    formula is escaped, and every column name is from the schema. A column with an interval in any record is followed by
    the two ends, NAME_low and NAME_high.
    """
    from openpyxl import Workbook

    book = Workbook()
    book.remove(book.worksheets[0])
    every, rows = with_ends(records)
    best = best_rows(records)
    identity = [column for column in every if column.group == "identity"]
    for sheet in SHEETS:
        own = [column for column in every if sheet in (column.group, column.also)]
        _fill(book.create_sheet(sheet), [*identity, *own], rows, best)
    _fill(book.create_sheet("all"), every, rows, best)
    _explain(book, every)
    with atomic_path(path) as temporary:
        book.save(temporary)


def number_format(printf: str) -> str:
    """Returns Excel's number format for '.3f', '+.2f' or 'd'; 'General' for anything else."""
    if printf == "d":
        return "0"
    match = re.fullmatch(r"(\+?)\.([0-9])f", printf)
    if match is None:
        return "General"
    digits = int(match[2])
    plain = "0." + "0" * digits if digits else "0"
    return f"+{plain};-{plain};{plain}" if match[1] else plain


def _fill(sheet: Worksheet, shown: Sequence[Column], records: Sequence[Record], best: Mapping[str, set[int]]) -> None:
    from openpyxl.styles import Font
    from openpyxl.utils import get_column_letter

    bold = Font(bold=True)
    _style_header(sheet, [column.name for column in shown], [column.unit for column in shown])
    for index, record in enumerate(records):
        for position, column in enumerate(shown, start=1):
            value = _cell_value(record[column.name], column)
            if value is None:
                continue
            cell = sheet.cell(row=index + HEADER_ROWS + 1, column=position)
            put(cell, value)
            if isinstance(cell.value, int | float) and not isinstance(cell.value, bool):
                cell.number_format = number_format(column.format)
            if index in best.get(column.name, ()):
                cell.font = bold
    for position, column in enumerate(shown, start=1):
        longest = max([len(column.name), *(len(cell_text(record[column.name], column)) for record in records)])
        sheet.column_dimensions[get_column_letter(position)].width = min(longest, 40) + 2
    sheet.freeze_panes = sheet.cell(row=HEADER_ROWS + 1, column=2)


def _style_header(sheet: Worksheet, *rows: Sequence[str]) -> None:
    from openpyxl.styles import Font, PatternFill

    for number, row in enumerate(rows, start=1):
        for position, text in enumerate(row, start=1):
            cell = sheet.cell(row=number, column=position)
            put(cell, text or None)
            cell.font = Font(bold=number == 1, italic=number == 2, color="FFFFFF")
            cell.fill = PatternFill("solid", start_color="1F3A5F")


def _cell_value(value: Any, column: Column) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) <= _EXACT_INTEGER else str(value)
    return cell_text(value, column) if value not in ({}, []) else None


def put(cell: Any, value: str | int | float | bool | None) -> None:
    """Sets a cell; text stays text (no formula, no control characters, not longer than a cell can hold)."""
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    if isinstance(value, str):
        text = ILLEGAL_CHARACTERS_RE.sub("\N{REPLACEMENT CHARACTER}", safe_text(value))
        cell.value = text if len(text) <= _CELL_LENGTH else text[:_CELL_LENGTH] + _CUT
        cell.data_type = "s"  # openpyxl guesses errors ("#N/A") from text
    else:
        cell.value = value


def _explain(book: Workbook, every: Sequence[Column]) -> None:
    from openpyxl.styles import Alignment

    sheet = book.create_sheet("about")
    _style_header(sheet, ["column", "unit", "sheet", "better", "meaning"])
    for number, column in enumerate(every, start=2):
        sheets = [name for name in (column.group, column.also) if name in SHEETS]
        texts = [column.name, column.unit, ", ".join(sheets) or "all", column.better, column.description]
        for position, text in enumerate(texts, start=1):
            put(sheet.cell(row=number, column=position), text or None)
        sheet.cell(row=number, column=5).alignment = Alignment(wrap_text=True, vertical="top")
    put(sheet.cell(row=len(every) + 3, column=1), f"schema {schema_version()}; bold is the best value of its column")
    for letter, width in zip("ABCDE", (24, 14, 14, 10, 90), strict=True):
        sheet.column_dimensions[letter].width = width
    sheet.freeze_panes = "A2"
