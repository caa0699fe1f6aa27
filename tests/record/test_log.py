import json

import pytest

from pqk.errors import PqkError
from pqk.record.log import read_records, record_filename, write_record, write_records
from pqk.record.schema import schema_path


def test_round_trip_of_files_and_folder(tmp_path, make_record):
    first, second, third = make_record(), make_record(exp_id="A1", seed=3), make_record(exp_id="实验")
    write_record(tmp_path / "b.json", first)
    write_records(tmp_path / "a.json", [second, third])
    (tmp_path / "notes.txt").write_text("no log")
    (tmp_path / ".hidden.json").write_text("{")
    (tmp_path / "unified_log_schema.json").write_text(schema_path().read_text())
    logged = read_records(tmp_path)
    assert [(item.source.name, item.record) for item in logged] == [
        ("a.json", second),
        ("a.json", third),
        ("b.json", first),
    ]
    assert [item.record for item in read_records([tmp_path / "b.json", tmp_path / "a.json", tmp_path])] == [
        first,
        second,
        third,
    ]
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == first


def test_folder_names_files_by_identity(tmp_path, make_record):
    records = [
        make_record(precision=p, backend=b, device=d)
        for p in ("f32", "int8")
        for b in ("trt", "openvino")
        for d in ("a", "b")
    ]
    paths = {write_record(tmp_path, record) for record in records}
    assert len(paths) == len(records) == len(read_records(tmp_path))
    assert write_record(tmp_path / "new", records[0]).parent == tmp_path / "new"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..", ".", "/absolute", "a\\b", "a\x00b", "x" * 500, "实验", "-rf", ".hidden"]
)
def test_names_never_leave_the_folder(tmp_path, make_record, name):
    folder = tmp_path / "logs"
    path = write_record(folder, make_record(exp_id=name))
    assert path.parent == folder and path.is_file()
    assert all(char.isascii() and (char.isalnum() or char in "._-") for char in path.name)
    assert not path.name.startswith((".", "-")) and len(path.name) < 200
    assert read_records(folder)[0].record["exp_id"] == name
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_names_that_look_equal_once_cleaned_stay_apart(make_record):
    assert record_filename(make_record(exp_id="a/b")) != record_filename(make_record(exp_id="a_b"))


def test_never_overwrites_another_record(tmp_path, make_record):
    path = write_record(tmp_path / "log.json", make_record(absrel=0.5))
    write_record(path, make_record(absrel=0.4))
    assert read_records(path)[0].record["absrel"] == 0.4
    before = path.read_bytes()
    for other in (
        make_record(exp_id="B2"),
        make_record(role="teacher"),
        make_record(backend="trt"),
        make_record(seed=1),
    ):
        with pytest.raises(PqkError, match=r"log\.json already holds another record \(exp_id B1, role candidate\)"):
            write_record(path, other)
    write_records(path, [make_record(), make_record(exp_id="B2")])
    with pytest.raises(PqkError, match="already holds another record"):
        write_record(path, make_record())
    assert before != path.read_bytes() and len(read_records(path)) == 2


def test_never_overwrites_what_is_no_log(tmp_path, make_record):
    schema = tmp_path / "unified_log_schema.json"
    schema.write_text(schema_path().read_text())
    with pytest.raises(PqkError, match="exists and is not a log"):
        write_record(schema, make_record())
    (tmp_path / "half.json").write_text('{"exp_id":')
    with pytest.raises(PqkError, match=r"half\.json: bad JSON"):
        write_record(tmp_path / "half.json", make_record())
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(PqkError, match="exists and is not a log"):
        write_records(tmp_path / "list.json", [make_record()])


def test_invalid_record_writes_nothing(tmp_path, make_record):
    with pytest.raises(PqkError, match=r"^record of B1: absrel must be a finite number or null, got NaN$"):
        write_record(tmp_path / "x.json", make_record(absrel=float("nan")))
    with pytest.raises(PqkError, match=r"^record of A1: unknown field \"chamfr\" \(did you mean 'chamfer'"):
        write_records(tmp_path / "x.json", [make_record(), make_record(exp_id="A1", chamfr=1.0)])
    with pytest.raises(PqkError, match=r"^record of B1: t_scene_s must be null in an emulated record"):
        write_record(tmp_path, make_record(measured="emulated", t_scene_s=1.0))
    with pytest.raises(PqkError, match="no record to write"):
        write_records(tmp_path / "x.json", [])
    with pytest.raises(PqkError, match=r"needs a file name that ends in \.json"):
        write_records(tmp_path, [make_record()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad JSON"),
        ('{"exp_id": "B1"', "bad JSON"),
        ('{"absrel": NaN}', "bad JSON: NaN is not JSON; use null for unknown values"),
        ('{"absrel": -Infinity}', "bad JSON: -Infinity is not JSON"),
        ('{"absrel": 1, "absrel": 2}', "bad JSON: the field 'absrel' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ("3", "a record must be a JSON object, got 3"),
        ("{}", "missing fields exp_id, combo"),
    ],
)
def test_bad_file_is_one_sentence_that_names_it(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(PqkError) as caught:
        read_records(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "bad.json"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_record_in_a_list_is_numbered(tmp_path, make_record):
    (tmp_path / "two.json").write_text(json.dumps([make_record(), make_record(delta1=2)]))
    with pytest.raises(PqkError, match=r"two\.json, record 2: delta1 must be a number between 0 and 1, or null, got 2"):
        read_records(tmp_path)
    (tmp_path / "two.json").write_text('{"absrel": 1e999}')
    with pytest.raises(PqkError, match=r"two\.json: absrel must be a finite number or null, got Infinity"):
        read_records(tmp_path)


def test_bytes_that_are_no_text_and_missing_files(tmp_path):
    (tmp_path / "bad.json").write_bytes(b'{"notes": "\xff"}')
    with pytest.raises(PqkError, match=r"bad\.json: bad JSON"):
        read_records(tmp_path / "bad.json")
    with pytest.raises(PqkError, match="no log file or folder at"):
        read_records(tmp_path / "none.json")


def test_versions(tmp_path, monkeypatch, make_record):
    """A project whose schema has grown to 2.2.0 reads a log of 2.1.0; one of 2.1.0 refuses a log of 2.2.0."""
    old = make_record(absrel=0.25)
    path = write_record(tmp_path / "old.json", old)
    path_new = tmp_path / "new.json"
    path_new.write_text(json.dumps({**old, "schema_version": "2.2.0", "cost_usd": 1.0}))
    with pytest.raises(PqkError, match=r"new\.json: schema_version 2\.2\.0 is newer than 2\.1\.0, .*; update pqk"):
        read_records(path_new)

    schema = json.loads(schema_path().read_text())
    schema["properties"]["schema_version"]["const"] = "2.2.0"
    schema["properties"]["cost_usd"] = {"type": ["number", "null"], "description": "Money.", "x-group": "resources"}
    schema["required"].append("cost_usd")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "unified_log_schema.json").write_text(json.dumps(schema))
    monkeypatch.chdir(tmp_path)
    assert read_records(path)[0].record == {**old, "schema_version": "2.2.0", "cost_usd": None}
    assert read_records(path_new)[0].record["cost_usd"] == 1.0
    with pytest.raises(PqkError, match=r"old\.json: unknown field \"colour\""):
        path.write_text(json.dumps({**old, "colour": 1}))
        read_records(path)
    path.write_text(json.dumps({**old, "schema_version": "0.9.0"}))
    with pytest.raises(PqkError, match=r"schema_version 0\.9\.0 is older than 1\.0\.0"):
        read_records(path)
    path.write_text(json.dumps({**old, "schema_version": "latest"}))
    with pytest.raises(PqkError, match=r'schema_version must be "2\.2\.0", got "latest"'):
        read_records(path)


def test_a_log_of_1_0_says_what_its_columns_were(tmp_path, make_record):
    """1.0 had one speedup with two denominators, a chamfer at equal pixels, and the memory of a compiling process."""
    new = {"speedup_vs_teacher_f32", "speedup_vs_own_f32", "chamfer_paired", "ram_compile_GB"}
    known = {"schema_version": "1.0.0", "speedup_vs_fp32": 1.25, "chamfer": 0.2, "chamfer_accuracy": 0.1, "ram_GB": 1.5}
    known["main_metric"] = "chamfer"
    hashes = {"model": "a" * 64}
    student = {**hashes, "teacher": "b" * 64}
    rows = [
        ({"precision": "f32", "hashes": hashes}, 1.25, 1.25),
        ({"precision": "f32", "hashes": student}, 1.25, None),
        ({"precision": "int8", "quantizer": "nncf", "hashes": hashes}, 1.25, 1.25),
        ({"precision": "int8", "quantizer": "nncf", "hashes": student}, None, 1.25),
    ]
    for row, teacher, own in rows:
        old = {name: value for name, value in make_record(**row).items() if name not in new} | known
        (tmp_path / "old.json").write_text(json.dumps(old))
        record = read_records(tmp_path / "old.json")[0].record
        assert (record["speedup_vs_teacher_f32"], record["speedup_vs_own_f32"]) == (teacher, own)
        assert (record["chamfer_paired"], record["chamfer"], record["chamfer_accuracy"]) == (0.2, None, None)
        assert (record["ram_compile_GB"], record["ram_GB"]) == (1.5, None)
        about = {"value": 0.2, "unit": "scene unit", "better": "lower"}
        assert (record["main_metric"], record["metrics"]) == ("chamfer_paired", {"chamfer_paired": about})


def test_a_log_of_1_1_gets_its_family_and_metrics(tmp_path, make_record):
    """Unit and direction are the schema's, the interval is the column's; a run that failed has none."""
    known = {"absrel": 0.1, "delta1": 0.9, "main_metric": "absrel", "intervals": {"absrel": [0.05, 0.15]}}
    for row, metrics in (
        (
            known,
            {
                "absrel": {"value": 0.1, "unit": "", "better": "lower", "interval": [0.05, 0.15]},
                "delta1": {"value": 0.9, "unit": "", "better": "higher"},
            },
        ),
        ({"main_metric": "absrel", "status": "failed"}, None),
    ):
        old = make_record(**row, schema_version="1.1.0")
        del old["family"], old["metrics"]
        (tmp_path / "old.json").write_text(json.dumps(old))
        record = read_records(tmp_path / "old.json")[0].record
        assert (record["schema_version"], record["family"], record["metrics"]) == ("2.1.0", "dust3r", metrics)
        assert {name: record[name] for name in row} == row


def test_how_to_quantize_is_no_part_of_a_float_row(make_record):
    """Another quant setting is another candidate, but the same Teacher."""
    sha = {"a": "a" * 64, "b": "b" * 64}
    teachers = [record_filename(make_record(role="teacher", hashes={"quant": sha[k]})) for k in "ab"]
    candidates = [record_filename(make_record(quantizer="nncf", hashes={"quant": sha[k]})) for k in "ab"]
    assert teachers[0] == teachers[1] and candidates[0] != candidates[1]
    evals = [record_filename(make_record(role="teacher", hashes={"eval": sha[k]})) for k in "ab"]
    assert evals[0] != evals[1]
