import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pqk.errors import PqkError
from pqk.record.formulas import safe_text
from pqk.record.log import read_records, write_record, write_records
from pqk.record.schema import columns, empty_record, load_schema, validate
from pqk.report.cells import DASH, best_rows, columns_of, headline, ordered, shares_text, told_apart
from pqk.report.files import all_records, write_csv, write_reports
from pqk.report.plots import tradeoff
from pqk.report.table import main, print_table

ROOT = Path(__file__).parents[2]


def values_of(name, rules):
    """A strategy for the values that the rules of a field allow."""
    if "const" in rules:
        return st.just(rules["const"])
    if "enum" in rules:
        return st.sampled_from(rules["enum"])
    if name == "datetime":
        return st.datetimes().map(lambda moment: f"{moment:%Y-%m-%dT%H:%M:%S}Z".rjust(20, "0"))
    if name == "executed_precision":
        shares = st.dictionaries(st.sampled_from(["int8", "bf16", "f32"]), st.floats(0, 0.33))
        return st.none() | shares
    kinds = [rules["type"]] if isinstance(rules["type"], str) else rules["type"]
    return st.one_of([of_kind(kind, rules) for kind in kinds])


def of_kind(kind, rules):
    low = rules.get("minimum", rules.get("exclusiveMinimum"))
    if kind == "null":
        return st.none()
    if kind == "boolean":
        return st.booleans()
    if kind == "integer":
        return st.integers(low, rules.get("maximum", 2**63 - 1))
    if kind == "number":
        high = rules.get("maximum")
        return st.floats(low, high, allow_nan=False, allow_infinity=False, exclude_min="exclusiveMinimum" in rules)
    if kind == "array":
        return st.lists(
            values_of("", rules["items"]), min_size=rules.get("minItems", 0), max_size=rules.get("maxItems", 3)
        )
    if kind == "object":
        names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
        if "properties" in rules:
            return st.fixed_dictionaries({part: values_of("", found) for part, found in rules["properties"].items()})
        return st.dictionaries(names, values_of("", rules["additionalProperties"]), max_size=3)
    if "pattern" in rules:
        return st.from_regex(rules["pattern"], fullmatch=True)
    return st.text(min_size=rules.get("minLength", 0), max_size=30)


@st.composite
def valid_records(draw):
    schema = load_schema()
    record = {name: draw(values_of(name, rules), label=name) for name, rules in schema["properties"].items()}
    if record["measured"] == "emulated":
        record |= dict.fromkeys(schema["then"]["properties"])
    if record["metrics"] is not None:
        record["metrics"] = {name: about for name, about in record["metrics"].items() if name not in record}
        record["main_metric"] = draw(st.sampled_from([None, *record["metrics"]]))
    return record


@settings(max_examples=40, deadline=None)
@given(records=st.lists(valid_records(), min_size=1, max_size=4))
def test_random_records_survive_file_and_table(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("logs")
    for record in records:
        validate(record)
    write_records(folder / "log.json", records)
    read = [item.record for item in read_records(folder)]
    assert read == records

    rows = ordered(read)
    write_csv(folder / "table.csv", rows)
    with (folder / "table.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        for column in columns():
            value, text = row[column.name], line[column.name]
            if value is None:
                assert text == ""
            elif column.kind == "string":
                assert text == safe_text(value)
            else:
                assert json.loads(text) == value

    console = Console(width=120, record=True, file=io.StringIO())
    print_table(rows, console)
    shown = console.export_text()
    assert all(char.isprintable() or char == "\n" for char in shown)


def toy_row(make_record, value, **known):
    """A record of a family whose metric has no column of its own."""
    metrics = {"error": {"value": value, "unit": "K", "better": "higher"}}
    return make_record(family="toy", metrics=metrics, main_metric="error", **known)


def test_a_metric_without_a_column_is_in_every_table(tmp_path, make_record):
    """With the unit and the direction that the record gives; beside rows of another family, which have none."""
    rows = [toy_row(make_record, value, seed=value, t_pair_p50_ms=3.0) for value in (2, 4)]
    rows.append(make_record(exp_id="A1", family="dust3r", absrel=0.25, main_metric="absrel"))
    assert best_rows(rows) == {"error": {1}}
    write_reports(rows, tmp_path)
    with (tmp_path / "summary.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["error"] for line in lines] == ["2", "4", ""]
    assert [line["absrel"] for line in lines] == ["", "", "0.25"]
    sheet = openpyxl.load_workbook(tmp_path / "result_table.xlsx")["quality"]
    (column,) = [cells for cells in sheet.iter_cols(values_only=True) if cells[0] == "error"]
    assert column == ("error", "K", 2, 4, None)
    console = Console(width=160, record=True, file=io.StringIO())
    print_table(rows, console)
    heading, *_ = [line.split() for line in console.export_text().splitlines() if "error" in line]
    assert {"absrel", "error"} <= set(heading) and "chamfer" not in heading
    assert [column.name for column in headline(rows)] == ["absrel", "error"]
    axes = tradeoff(rows).axes[0]
    assert axes.get_ylabel() == "error (K), higher is better"


def test_units_that_differ_are_both_named(make_record):
    metres = {"chamfer": {"value": 0.5, "unit": "m", "better": "lower"}}
    rows = [make_record(chamfer=0.5, metrics=metres), make_record(chamfer=0.5, metrics=None)]
    assert {column.name: column.unit for column in columns_of(rows)}["chamfer"] == "m"
    other = {"chamfer": {**metres["chamfer"], "unit": "scene unit"}}
    rows[1]["metrics"] = other
    assert {column.name: column.unit for column in columns_of(rows)}["chamfer"] == "m or scene unit"


def bench(make_record):
    """The rows of one experiment on one backend, and a failed one."""
    common = {"backend": "openvino", "main_metric": "absrel", "measured": "engine", "best_float": "bf16"}
    return [
        make_record(
            **common,
            role="candidate",
            quantizer="nncf",
            precision="int8",
            absrel=0.0615,
            quality_drop_pct=0.49,
            t_pair_p50_ms=500.0,
            t_pair_p95_ms=540.0,
            speedup_vs_own_f32=4.0,
            speedup_vs_best_float=2.0,
            executed_precision={"int8": 0.91, "bf16": 0.07, "f32": 0.02},
            size_MB=600.5,
            verdict="pass",
        ),
        make_record(**common, role="teacher", precision="bf16", absrel=0.0613, t_pair_p50_ms=1000.0, size_MB=2280.0),
        make_record(**common, role="teacher", precision="f32", absrel=0.0612, t_pair_p50_ms=2000.0, size_MB=2280.0),
        make_record(exp_id="A10", role="candidate", status="failed", absrel=0.01, t_pair_p50_ms=1.0),
        make_record(exp_id="A2", role="candidate", precision="int8", measured="emulated", absrel=0.07),
    ]


def lines_of(records, width):
    console = Console(width=width, record=True, file=io.StringIO())
    print_table(records, console)
    return console.export_text().splitlines()


def test_order_is_natural_and_stable(make_record):
    rows = bench(make_record)
    key = [(r["exp_id"], r["role"], r["precision"]) for r in ordered(rows)]
    assert key == [
        ("A2", "candidate", "int8"),
        ("A10", "candidate", None),
        ("B1", "teacher", "f32"),
        ("B1", "teacher", "bf16"),
        ("B1", "candidate", "int8"),
    ]
    assert ordered(reversed(rows)) == ordered(rows)


def test_best_values_come_from_runs_that_ended_well(make_record):
    rows = ordered(bench(make_record))
    best = best_rows(rows)
    assert best["t_pair_p50_ms"] == {4} and best["absrel"] == {2} and best["size_MB"] == {4}
    assert "delta1" not in best and "speedup_vs_own_f32" not in best  # nobody, and nobody to compare with


def test_table_fits_120_columns(make_record):
    lines = lines_of(bench(make_record), 120)
    assert max(map(len, lines)) <= 120
    text = "\n".join(lines)
    assert text.count("absrel") == 1 and "quality" not in text
    row = next(line for line in lines if line.startswith("B1") and "int8" in line)
    assert " ".join(row.split()) == "B1 candidate int8 0.0615 +0.49 500.00 540.00 4.00 2.00 int8 91 % 600.5 pass"
    assert any("openvino/nncf" in line and "bf16 7 %" in line for line in lines)
    failed = lines.index(next(line for line in lines if line.startswith("A10")))
    assert DASH in lines[failed] and "failed" in lines[failed + 1]
    assert "emulated" in text


def test_equal_rows_of_unlike_settings_are_told_apart(make_record):
    int8 = {"precision": "int8", "backend": "trt", "quantizer": "modelopt"}
    rows = [make_record(**int8, absrel=0.1 + k / 100, hashes={"quant": str(k) * 64}) for k in (1, 2)]
    text = "\n".join(lines_of(rows, 120))
    assert "quant 111111" in text and "quant 222222" in text
    rows[1]["hashes"] = rows[0]["hashes"]
    assert "quant" not in "\n".join(lines_of(rows, 120))
    rows[1] |= {"quantizer": "nncf", "hashes": {"quant": "2" * 64}}
    assert "quant" not in "\n".join(lines_of(rows, 120))


def test_table_stacks_at_80_columns(make_record):
    lines = lines_of(bench(make_record), 80)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "quality" in text and "speed and size" in text and "…" not in text
    assert text.index("absrel") < text.index("speed and size") < text.index("p50 ms")


def test_best_is_bold(make_record):
    console = Console(width=120, force_terminal=True, color_system="standard", record=True, file=io.StringIO())
    print_table(bench(make_record), console)
    text = console.export_text(styles=True)
    assert "\x1b[1m 500.00\x1b[0m" in text and "\x1b[1m1000.00" not in text and "\x1b[1m1.00\x1b" not in text


def of_two(make_record, **second):
    """Two pairs of rows that differ in `second` only."""
    sha = {"scenes": "1" * 64, "eval": "2" * 64, "model": "3" * 64}
    first = {"model": "small", "scenes": ["a", "b"], "hashes": sha}
    second = {**first, **second, "hashes": {**sha, **second.get("hashes", {})}}
    return [
        make_record(**kind, seed=i, absrel=value)
        for i, (kind, value) in enumerate(zip((first, first, second, second), (0.1, 0.2, 0.3, 0.4), strict=True))
    ]


def test_models_and_scenes_are_shown_where_they_differ(make_record):
    same = "\n".join(lines_of(of_two(make_record), 120))
    assert "small" not in same and "a +1" not in same
    models = "\n".join(lines_of(of_two(make_record, model="large", hashes={"model": "4" * 64}), 120))
    assert models.count("small") == models.count("large") == 2 and "a +1" not in models
    scenes = "\n".join(lines_of(of_two(make_record, scenes=["c"], hashes={"scenes": "4" * 64}), 120))
    assert "small" not in scenes and scenes.count("a +1") == 2
    renewed = of_two(make_record, hashes={"model": "4" * 64})
    assert told_apart(renewed, "model") == ["small 333333"] * 2 + ["small 444444"] * 2
    assert told_apart(renewed, "scenes") is None


@pytest.mark.parametrize(
    "second, best",
    [
        ({}, {0}),
        ({"model": "large", "hashes": {"model": "4" * 64}}, {0}),  # on the same scenes two models may be compared
        ({"scenes": ["c"], "hashes": {"scenes": "4" * 64}}, {0, 2}),
        ({"hashes": {"eval": "4" * 64}}, {0, 2}),
        ({"quality_reference": "teacher"}, {0, 2}),
    ],
)
def test_best_is_among_what_is_comparable(make_record, second, best):
    assert best_rows(of_two(make_record, **second))["absrel"] == best


def test_text_of_records_is_neither_markup_nor_escape_codes(make_record):
    record = make_record(exp_id="[red]X[/red]", backend="a\x1b[31mb", precision="int8")
    text = "\n".join(lines_of([record], 120))
    assert "[red]X[/red]" in text
    assert "\x1b" not in text and "a\N{REPLACEMENT CHARACTER}[31mb" in text
    assert lines_of([], 80) == ["no records"]


def test_shares():
    assert shares_text({"bf16": 0.07, "int8": 0.91, "f32": 0.004, "f16": 0.0}) == "int8 91 % / bf16 7 % / f32 <1 %"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_formulas_are_defused(tmp_path, make_record, start):
    bad = start + 'HYPERLINK("http://x","y")'
    write_csv(tmp_path / "t.csv", [make_record(exp_id=bad, notes=bad, quality_drop_pct=-0.5, keep_list=[bad])])
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as stream:
        row = next(csv.DictReader(stream))
    assert row["exp_id"] == row["notes"] == "'" + bad
    assert row["quality_drop_pct"] == "-0.5"
    assert json.loads(row["keep_list"]) == [bad]
    assert not any(row[c.name].startswith(("=", "+", "@", "\t", "\r")) for c in columns())


LOOK_ALIKE = [
    "\n=1+1",
    "\n\n =1+1",
    " =1+1",
    "\u00a0=1+1",
    "\ufeff=1+1",
    "\u200b@SUM(A1)",
    "\x00-1",
    "\uff1d1+1",
    "\uff0b1",
    "\uff0d1",
    "\uff20SUM(A1)",
    "\ufe661",
    "\u22121",
    "\u207a1",
    "a;=1+1",
    "a; \uff1d1+1",
    "a\n=1+1",
    "a\t=1+1",
    "a\u2028=1+1",
    ";;@x",
    '=HYPERLINK("http://x";"y");=2',
]


def runs(cell):
    """Whether a spreadsheet may run a cell, told apart from the code: by names, not by categories."""
    seen = cell.lstrip("".join(map(chr, (*range(33), 0x85, 0xA0, 0x200B, 0x2028, 0x2029, 0x3000, 0xFEFF))))
    return seen[:1] in set("=+-@\uff1d\uff0b\uff0d\uff20\ufe66\u2212\u207a")


@pytest.mark.parametrize("bad", LOOK_ALIKE)
def test_no_reader_finds_a_formula(tmp_path, make_record, bad):
    """Whatever it splits at: also a semicolon, which ignores quotes that do not begin a cell, or a line break."""
    record = make_record(exp_id="x" + bad, model=bad, notes=bad, keep_list=[bad, "x" + bad], versions={"tool": bad})
    write_csv(tmp_path / "t.csv", [record])
    text = (tmp_path / "t.csv").read_bytes().decode()
    head, line = csv.reader(io.StringIO(text, newline=""))
    row = dict(zip(head, line, strict=True))
    assert row["notes"].startswith("'") and row["model"] == row["notes"] == safe_text(bad)
    assert f"""\"{safe_text(bad).replace('"', '""')}\"""" in text  # quoted
    assert json.loads(row["keep_list"]) == [bad, "x" + bad] and json.loads(row["versions"]) == {"tool": bad}
    for cells in (line, *csv.reader(text.splitlines(), delimiter=";"), *csv.reader(text.splitlines(), delimiter="\t")):
        assert not any(runs(cell) for cell in cells if not cell.startswith("-0")), cells


@pytest.mark.parametrize("text", ["", "B1", "K→Q", "a - b", "1 = 1", "a;b", "x\ty", "n/a", "'=1", "openvino/nncf", "–"])
def test_other_text_stays_as_it_is(text):
    assert safe_text(text) == text


def with_intervals(make_record, drop=0.77, ends=(0.29, 1.25), speed=(2.44, 2.5), **more):
    """The rows of a run as schema 1.1 has them."""
    rows = bench(make_record)[:3]
    rows[0] |= {"quality_drop_pct": drop, "speedup_vs_own_f32": 2.47, "speedup_vs_teacher_f32": 2.47}
    found = {"quality_drop_pct": list(ends), "speedup_vs_own_f32": list(speed)}
    rows[0] |= {"intervals": found | {"speedup_vs_teacher_f32": [2.44, 2.52]}, "exp_id": "B1"} | more
    return rows


def test_drops_and_speeds_have_their_interval(make_record):
    wide = "\n".join(lines_of(with_intervals(make_record), 160))
    assert "+0.77 ±0.48" in wide and "2.47 ±0.03" in wide and "2.47 [2.44, 2.52]" in wide
    assert "±" not in "\n".join(lines_of(bench(make_record), 160))
    skew = "\n".join(lines_of(with_intervals(make_record, ends=(-0.1, 1.25)), 160))
    assert "+0.77 [-0.10, +1.25]" in skew


@pytest.mark.parametrize("width", [120, 80])
@pytest.mark.parametrize("ends", [(0.29, 1.25), (-10.5, 11.25)])
def test_a_table_with_intervals_fits(make_record, width, ends):
    known = {"verdict": "undecided", "rmse": 0.5, "delta1": 0.9, "quality_reference": "ground_truth"}
    rows = with_intervals(make_record, ends=ends, **known)
    lines = lines_of(rows, width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width and "…" not in text and "undecided" in text
    assert ("±0.48" if ends[0] > 0 else "[-10.50, +11.25]") in text
    if width == 120:
        assert "[2.44, 2.52]" in text and "±0.03" in text


def test_ends_of_intervals_are_columns(tmp_path, make_record):
    """Of every column that any record has an interval of, right after it; a name that is no column is left alone."""
    rows = ordered(with_intervals(make_record))
    rows[0]["intervals"] = {"absrel": [0.05, 0.07], "no such": [1.0, 2.0], "verdict": [1.0, 2.0]}
    write_csv(tmp_path / "t.csv", rows)
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    names = list(lines[0])
    for name in ("quality_drop_pct", "speedup_vs_own_f32", "absrel"):
        place = names.index(name)
        assert names[place + 1 : place + 3] == [f"{name}_low", f"{name}_high"]
    assert [name for name in names if name.endswith("_low")] == [
        "absrel_low",
        "quality_drop_pct_low",
        "speedup_vs_teacher_f32_low",
        "speedup_vs_own_f32_low",
    ]
    assert (float(lines[-1]["quality_drop_pct_low"]), float(lines[-1]["quality_drop_pct_high"])) == (0.29, 1.25)
    assert lines[0]["quality_drop_pct_low"] == "" and lines[0]["absrel_high"] == "0.07"
    assert json.loads(lines[-1]["intervals"]) == rows[-1]["intervals"]
    write_record(tmp_path / "logs", rows[-1])
    write_reports(all_records(tmp_path / "logs"), tmp_path / "reports")
    (kept,) = json.loads((tmp_path / "reports" / "summary.json").read_text())
    assert kept["intervals"] == rows[-1]["intervals"] and "quality_drop_pct_low" not in kept


def test_reports_of_two_experiments_merge_and_repeat(tmp_path, make_record):
    logs, reports = tmp_path / "logs", tmp_path / "reports"
    for record in bench(make_record):
        write_record(logs, record)
    write_records(logs / "D1.json", [make_record(exp_id="D1", absrel=0.05), make_record(exp_id="D1", role="teacher")])
    told: list[str] = []
    paths = write_reports(all_records(logs), reports, say=told.append)
    names = [path.relative_to(reports).as_posix() for path in paths]
    plots = ["plots/tradeoff.png", "plots/latency.png", "plots/precision.png"]
    assert names == ["summary.csv", "summary.json", "result_table.xlsx", *plots]
    assert all(path.is_file() for path in paths)
    assert told == ["ablation.png is left out: no record of an ablation (combo H or Ablation)"]
    merged = [item.record for item in read_records(reports / "summary.json")]
    assert [r["exp_id"] for r in merged] == ["A2", "A10", "B1", "B1", "B1", "D1", "D1"]
    with (reports / "summary.csv").open(encoding="utf-8", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 7

    first = {name: (reports / name).read_bytes() for name in names if not name.endswith("xlsx")}
    for path in list(logs.iterdir()):  # other file names and another order of files: the same report
        path.rename(logs / f"{99 - len(path.name)}{path.name}")
    write_reports(all_records(logs), reports)
    assert first == {name: (reports / name).read_bytes() for name in first}


def test_reports_go_where_the_project_says(tmp_path, make_record, capsys):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    text = (tmp_path / "configs" / "eval.yaml").read_text()
    places = {"reports/result_table.xlsx": "out/all.xlsx", "reports/summary.csv": "out/s.csv"}
    places |= {"reports/summary.json": "json/s.json", "reports/plots": "figures"}
    for old, new in places.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "configs" / "eval.yaml").write_text(text)
    for record in bench(make_record):
        write_record(tmp_path / "logs", record)
    assert main([], tmp_path) == 0
    assert not (tmp_path / "reports").exists()
    for place in ("out/all.xlsx", "out/s.csv", "json/s.json", "figures/latency.png"):
        assert (tmp_path / place).is_file(), place
    assert main(["--reports", str(tmp_path / "mine")], tmp_path) == 0
    assert (tmp_path / "mine" / "summary.csv").read_bytes() == (tmp_path / "out" / "s.csv").read_bytes()
    (tmp_path / "configs" / "eval.yaml").write_text("report: {}")
    assert main([], tmp_path) == 2
    assert "eval.yaml" in capsys.readouterr().err


def test_bad_log_leaves_reports_alone(tmp_path, make_record):
    write_record(tmp_path / "logs", make_record())
    (tmp_path / "logs" / "bad.json").write_text(json.dumps({**make_record(), "absrell": 1}))
    with pytest.raises(PqkError, match=r"bad\.json: unknown field \"absrell\" \(did you mean 'absrel'\?\)"):
        write_reports(all_records(tmp_path / "logs"), tmp_path / "reports")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PqkError, match=r"no records in .*empty: run an experiment first"):
        all_records(tmp_path / "empty")
    assert not (tmp_path / "reports").exists()


def test_command(tmp_path, make_record, capsys):
    assert main(["--logs", str(tmp_path / "none"), "--reports", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"pqk: no log file or folder at {tmp_path / 'none'}\n"
    write_record(tmp_path / "logs", make_record(absrel=0.25))
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "aggregate.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "0.2500" in done.stdout and "latency.png is left out: no record has t_pair_p50_ms" in done.stdout
    assert (tmp_path / "reports" / "summary.csv").is_file()


def test_import_is_light():
    code = "import sys, pqk.report.table, pqk.report.plots, pqk.report.workbook, pqk.record.log\n"
    code += "print({'pandas', 'matplotlib', 'rich', 'openpyxl', 'jsonschema', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"


def test_empty_record_needs_its_identity():
    with pytest.raises(PqkError, match=r"^record: datetime must be"):
        validate(empty_record())


def test_ablation_tables_have_intervals(tmp_path, make_record):
    """As text beside the drop in the markdown, as numbers in the CSV; a point that failed has none."""
    from pqk.recipe.ablation import write_matrix
    from pqk.recipe.matrix import MatrixResult
    from pqk.settings.card import load_card

    known = {"quality_drop_pct": 0.5, "intervals": {"quality_drop_pct": [0.25, 0.75]}}
    points = {"8 images": make_record(**known), "=2;=3": make_record(quality_drop_pct=1.0), "none": None}
    files = write_matrix(MatrixResult(load_card("H1", ROOT), {"size": points}, {}), tmp_path)
    assert [path.name for path in files] == ["size.csv", "size.md", "size.png"]
    rows = list(csv.DictReader((tmp_path / "size.csv").open(newline="")))
    assert [(row["quality_drop_pct"], row["quality_drop_pct_low"], row["quality_drop_pct_high"]) for row in rows] == [
        ("0.5", "0.25", "0.75"),
        ("1.0", "", ""),
        ("", "", ""),
    ]
    assert rows[1]["point"] == "'=2;'=3" and "| +0.50 ±0.25 |" in (tmp_path / "size.md").read_text()


def test_ablations_can_be_read_in_a_terminal_of_80_columns(make_record):
    from io import StringIO

    from rich.console import Console

    from pqk.recipe.ablation import print_matrix
    from pqk.recipe.matrix import MatrixResult
    from pqk.settings.card import load_card

    points = {
        "without AttentionScales": make_record(quality_drop_pct=-0.5, intervals={"quality_drop_pct": [-1.75, 0.75]}),
        "[b]": None,
    }
    said = StringIO()
    failed = {("size", "[b]"): "too large"}
    print_matrix(MatrixResult(load_card("H1", ROOT), {"size": points}, failed), Console(file=said, width=80))
    lines = said.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in said.getvalue()
    assert sum(" without AttentionScales " in line for line in lines) == 2  # quality, and speed and size
    assert any("-0.50 ±1.25" in line for line in lines) and any("verdict" in line for line in lines)
    assert any(line.startswith(" [b]") and line.rstrip().endswith("failed") for line in lines)
    assert "size: [b] failed: too large" in said.getvalue()
