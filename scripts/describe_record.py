"""Writes the table of record fields in docs/howto-read-the-record.md from the log schema; `--check` only compares.

Exit codes: 0 fine, 1 `--check` found the page out of date, 2 the page has no place for the table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pqk.errors import PqkError
from pqk.files import write_text
from pqk.record.schema import GROUPS, Column, columns

PAGE = Path(__file__).resolve().parents[1] / "docs" / "howto-read-the-record.md"
BEGIN, END = "<!-- fields: made by scripts/describe_record.py -->", "<!-- end of fields -->"


def field_row(column: Column) -> str:
    """Returns one line of the table."""
    better = {"lower": "↓", "higher": "↑"}.get(column.better, "")
    shown = f"`{column.short}`" if column.short else ""
    unit = "" if column.unit == "1" else column.unit
    text = column.description.replace("|", "\\|")
    return f"| `{column.name}` | {column.kind} | {unit} | {better} | {shown} | {text} |"


def fields_text() -> str:
    """Returns a section per group with its fields, in the order of the schema."""
    every = columns()
    sections = []
    for group in GROUPS:
        rows = [field_row(column) for column in every if column.group == group]
        head = ["| field | type | unit | better | heading | meaning |", "| --- | --- | --- | --- | --- | --- |"]
        sections.append("\n".join([f"### {group}", "", *head, *rows]))
    return "\n\n".join(sections)


def renewed(page: str) -> str:
    """Returns the page with a fresh table between its two marks. Raises PqkError for a mark missing or given twice."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise PqkError(f"the page needs one line {BEGIN!r} and after it one line {END!r}")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{fields_text()}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    try:
        old = options.page.read_text(encoding="utf-8")
        new = renewed(old)
    except (OSError, PqkError) as error:
        print(f"{options.page}: {error}", file=sys.stderr)
        return PqkError.exit_code
    if options.check:
        if new != old:
            print(f"{options.page} is out of date; run python scripts/describe_record.py", file=sys.stderr)
        return int(new != old)
    write_text(options.page, new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
