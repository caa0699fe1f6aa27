import pytest
from openpyxl import load_workbook

from pqk.record.schema import columns
from pqk.report.cells import ordered
from pqk.report.workbook import HEADER_ROWS, SHEETS, number_format, write_workbook


@pytest.fixture
def book(tmp_path, make_record):
    records = ordered(
        [
            make_record(role="teacher", precision="f32", absrel=0.05, t_pair_p50_ms=20.0, seed=2**60, power_avg_W=50.0),
            make_record(
                precision="int8",
                absrel=0.06,
                quality_drop_pct=-0.5,
                t_pair_p50_ms=10.0,
                throttle=False,
                executed_precision={"int8": 0.91, "bf16": 0.09},
                keep_list=["LayerNorm", "Softmax"],
                notes="=1+1",
                commit="#N/A",
                samples={"pair": [1.25] * 20_000},
                versions={"tool": "a\x07b"},
            ),
        ]
    )
    path = tmp_path / "reports" / "result_table.xlsx"
    write_workbook(path, records)
    return load_workbook(path)


def cell(sheet, name, row):
    names = [c.value for c in sheet[1]]
    return sheet.cell(row=HEADER_ROWS + 1 + row, column=names.index(name) + 1)


def test_sheets_and_their_columns_come_from_the_schema(book):
    assert book.sheetnames == [*SHEETS, "all", "about"]
    identity = [c.name for c in columns() if c.group == "identity"]
    for sheet in SHEETS:
        own = [c.name for c in columns() if sheet in (c.group, c.also)]
        assert own and [c.value for c in book[sheet][1]] == identity + own
        assert book[sheet].freeze_panes == "B3" and book[sheet].max_row == HEADER_ROWS + 2
    assert {"t_pair_p50_ms", "t_pair_p95_ms", "pairs_per_sec", "power_avg_W"} <= {c.value for c in book["edge"][1]}
    assert [c.value for c in book["all"][1]] == [c.name for c in columns()]
    assert [c.value for c in book["all"][2]] == [c.unit or None for c in columns()]
    about = book["about"]
    rows = {r[0]: r for r in about.iter_rows(min_row=2, values_only=True)}
    for column in columns():
        assert rows[column.name][4] == column.description


def test_values_formats_and_bold(book):
    quality, efficiency = book["quality"], book["efficiency"]
    assert cell(quality, "absrel", 0).value == 0.05 and cell(quality, "absrel", 0).number_format == "0.0000"
    assert cell(quality, "absrel", 0).font.bold and not cell(quality, "absrel", 1).font.bold
    assert cell(efficiency, "t_pair_p50_ms", 1).font.bold and not cell(efficiency, "t_pair_p50_ms", 0).font.bold
    assert cell(quality, "quality_drop_pct", 1).value == -0.5
    assert cell(quality, "quality_drop_pct", 1).number_format == "+0.00;-0.00;0.00"
    assert cell(quality, "rmse", 0).value is None
    assert cell(efficiency, "executed_precision", 1).value == "int8 91 % / bf16 9 %"
    assert cell(book["edge"], "throttle", 1).value is False
    assert cell(book["all"], "keep_list", 1).value == "LayerNorm, Softmax"
    assert cell(book["all"], "seed", 0).value == str(2**60)  # a float64 could not hold it


def test_text_stays_text(book):
    sheet = book["all"]
    notes = cell(sheet, "notes", 1)
    assert notes.value == "'=1+1" and notes.data_type == "s"
    assert cell(sheet, "commit", 1).value == "#N/A" and cell(sheet, "commit", 1).data_type == "s"
    assert "a\\u0007b" in cell(sheet, "versions", 1).value
    samples = cell(sheet, "samples", 1).value
    assert len(samples) < 32_767 and samples.endswith("(cut; whole in summary.json)")
    assert not any(c.data_type in ("f", "e") for s in book for row in s.iter_rows() for c in row)


@pytest.mark.parametrize(
    ("printf", "excel"), [(".3f", "0.000"), (".0f", "0"), ("d", "0"), ("+.2f", "+0.00;-0.00;0.00"), ("", "General")]
)
def test_number_formats(printf, excel):
    assert number_format(printf) == excel


def test_control_characters_in_text(tmp_path, make_record):
    write_workbook(tmp_path / "t.xlsx", [make_record(exp_id="a\x07b", notes="\r=1")])
    sheet = load_workbook(tmp_path / "t.xlsx")["all"]
    assert cell(sheet, "exp_id", 0).value == "a\N{REPLACEMENT CHARACTER}b"
    assert cell(sheet, "notes", 0).value.startswith("'")


def test_ends_of_intervals_are_numbers_beside_their_column(tmp_path, make_record):
    records = [make_record(quality_drop_pct=0.5, intervals={"quality_drop_pct": [-0.25, 1.25]}), make_record(seed=1)]
    write_workbook(tmp_path / "t.xlsx", records)
    book = load_workbook(tmp_path / "t.xlsx")
    for sheet in (book["quality"], book["all"]):
        names = [c.value for c in sheet[1]]
        place = names.index("quality_drop_pct")
        assert names[place + 1 : place + 3] == ["quality_drop_pct_low", "quality_drop_pct_high"]
        assert cell(sheet, "quality_drop_pct_low", 0).value == -0.25
        assert cell(sheet, "quality_drop_pct_high", 0).value == 1.25
        assert cell(sheet, "quality_drop_pct_low", 0).number_format == "+0.00;-0.00;0.00"
        assert cell(sheet, "quality_drop_pct_high", 1).value is None
    about = {row[0]: row[4] for row in book["about"].iter_rows(min_row=2, values_only=True)}
    assert about["quality_drop_pct_low"] == "Lower end of the 95 % interval of quality_drop_pct."


@pytest.mark.parametrize("bad", ["\n=1+1", "\uff1d1+1", " @x", "a;=1+1"])
def test_look_alikes_of_formulas(tmp_path, make_record, bad):
    write_workbook(tmp_path / "t.xlsx", [make_record(model=bad, notes=bad)])
    sheet = load_workbook(tmp_path / "t.xlsx")["all"]
    for name in ("model", "notes"):
        found = cell(sheet, name, 0)
        assert found.value.startswith("'") and found.data_type == "s" and ";=" not in found.value
