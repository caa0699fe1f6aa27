"""What is written into a TSV comes back as it was, and no text can break the table or start a formula."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pqk.errors import PqkError
from pqk.record.tsv import Kind, cell_of, markdown_cell, read_table, table_text, value_of, write_table

COLUMNS: dict[str, Kind] = {"name": "text", "count": "int", "score": "float"}
NASTY = [
    "=1+1",
    "+1",
    "-x",
    "@a",
    "'=1",
    "''-",
    "'",
    '"',
    '"a\tb',
    "a\\tb",
    "\\",
    "\t=",
    "\r\n",
    "\u2028",
    "\x00",
    "\ud800",
]
texts = st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=()), min_size=1))
rows = st.fixed_dictionaries(
    {
        "name": st.one_of(st.none(), texts),
        "count": st.one_of(st.none(), st.integers(-(10**17), 10**17)),
        "score": st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    }
)
quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.lists(rows, max_size=5))
def test_round_trip(tmp_path: Path, given_rows: list[dict[str, object]]) -> None:
    path = tmp_path / "t.tsv"
    write_table(path, COLUMNS, given_rows)
    assert read_table(path, COLUMNS) == given_rows
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # as a spreadsheet on Windows saves it
    assert read_table(path, COLUMNS) == given_rows


@quick
@given(texts)
def test_a_text_is_one_cell_to_every_reader(text: str) -> None:
    table = table_text(COLUMNS, [{"name": text, "count": 7, "score": -0.5}], "t")
    assert len(table.splitlines()) == 2  # also for readers that split at form feeds and U+2028
    read = list(csv.reader(io.StringIO(table), dialect="excel-tab"))
    assert len(read) == 2 and read[1][1:] == ["7", "-0.5"]
    assert not read[1][0].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert value_of(read[1][0], "text") == text
    table.encode("utf-8")


@quick
@given(texts)
def test_markdown_cells_stay_one_cell(text: str) -> None:
    cell = markdown_cell(text)
    assert "\n" not in cell and all(char.isprintable() for char in cell)
    bare = cell.replace("\\\\", "")
    assert bare.count("|") == bare.count("\\|") and bare.count("<") == bare.count("\\<")


def test_numbers_are_exact_and_finite() -> None:
    assert cell_of(0.1 + 0.2) == "0.30000000000000004" and cell_of(3) == "3" and cell_of(None) == ""
    for value in (float("nan"), float("inf")):
        with pytest.raises(PqkError, match=r"t: score: .* is not a finite number"):
            table_text(COLUMNS, [{"score": value}], "t")
    for row in ({"count": True}, {"count": 0.5}, {"score": "1"}, {"name": 3}):
        with pytest.raises(PqkError, match="must be a"):
            table_text(COLUMNS, [row], "t")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"t\.tsv is empty"),
        ("name\tcount\n", r"t\.tsv:1: the column 'score' is missing"),
        ("name\tcount\tscor\n", r"t\.tsv:1: unknown or repeated column 'scor' \(did you mean 'score'\?\)"),
        ("name\tcount\tscore\tname\n", r"unknown or repeated column 'name'"),
        ("name\tcount\tscore\na\t1\n", r"t\.tsv:2: 2 cells where the first line has 3"),
        ("name\tcount\tscore\na\t1.5\t2\n", r"t\.tsv:2: count: '1\.5' is not a whole number"),
        ("name\tcount\tscore\na\t1\tnan\n", r"t\.tsv:2: score: 'nan' is not a number"),
        ("name\tcount\tscore\na\t1\t1_0\n", r"'1_0' is not a number"),
        ("name\tcount\tscore\na\t1\t1e999\n", r"score: '1e999' is too large"),
        ("name\tcount\tscore\na\\q\t1\t2\n", r"t\.tsv:2: name: .* is not an escape"),
        ("name\tcount\tscore\na\\UFFFFFFFF\t1\t2\n", r"is not an escape"),
        ("name\tcount\tscore\n\t1\t2\n", r"t\.tsv:2: name is empty"),
    ],
)
def test_wrong_tables_are_told_by_line(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "t.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PqkError, match=sentence):
        read_table(path, COLUMNS, ("name",))


@pytest.mark.parametrize("value", ["", None])
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, value: str | None) -> None:
    path = tmp_path / "t.tsv"
    write_table(path, COLUMNS, [{"name": "a", "count": 1, "score": 2.0}], ("name",))
    before = path.read_bytes()
    with pytest.raises(PqkError, match="name is empty"):
        write_table(path, COLUMNS, [{"name": value, "count": 1, "score": 2.0}], ("name",))
    assert path.read_bytes() == before


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_bytes(b"name\xff")
    with pytest.raises(PqkError, match="not UTF-8"):
        read_table(path, COLUMNS)
    with pytest.raises(PqkError, match="cannot read"):
        read_table(tmp_path / "none.tsv", COLUMNS)
