"""Writes what the docs say of a record from the log schema: the table of fields in docs/howto-read-the-record.md, and
docs/schema/record.schema.json, a JSON Schema that any validator reads. `--check` only compares.

Exit codes: 0 fine, 1 `--check` found one of them out of date, 2 the page has no place for the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pqk.errors import PqkError
from pqk.files import write_text
from pqk.record.schema import GROUPS, Column, columns, load_schema, schema_version

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "howto-read-the-record.md"
SCHEMA = DOCS / "schema" / "record.schema.json"
BEYOND = (
    "pqk also refuses what a JSON Schema cannot express: shares of executed_precision that add up to more than 1, a "
    "metric whose column is not its value in `metrics`, a main_metric that is not in `metrics`, days that do not exist "
    "and numbers that are not finite. Records of older versions are converted when pqk reads them."
)
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


def published() -> str:
    """Returns the JSON Schema of a record, with its version in `$id`."""
    schema = dict(load_schema())
    head: dict[str, Any] = {"$schema": schema.pop("$schema"), "$id": f"urn:pqk:record:{schema_version()}"}
    return json.dumps({**head, "$comment": BEYOND, **schema}, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when one of them is out of date")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--schema", type=Path, default=SCHEMA)
    options = parser.parse_args()
    try:
        page = options.page.read_text(encoding="utf-8")
        schema = options.schema.read_text(encoding="utf-8") if options.schema.is_file() else ""
        new = {options.page: (page, renewed(page)), options.schema: (schema, published())}
    except (OSError, PqkError) as error:
        print(f"{options.page}: {error}", file=sys.stderr)
        return PqkError.exit_code
    old = [path for path, (was, now) in new.items() if was != now]
    for path in old:
        if options.check:
            print(f"{path} is out of date; run python scripts/describe_record.py", file=sys.stderr)
        else:
            write_text(path, new[path][1])
    return int(options.check and bool(old))


if __name__ == "__main__":
    raise SystemExit(main())
