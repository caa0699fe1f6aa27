import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from pqk.errors import PqkError
from pqk.record.schema import GROUPS, columns, empty_record, load_schema, schema_path, schema_version, validate

# The fields of the lab's task table, section 4, in its words.
TASK_TABLE = """
exp_id, combo, rho, T, beta, gamma, bits_w, bits_a, keep_list, params_M, flops_G, size_MB, vram_GB,
chamfer, absrel, rmse, delta1, reproj_px, t_pair_p50_ms, t_pair_p95_ms, t_scene_s, pairs_per_sec,
notes, gpu_hours, seed, commit, datetime
""".replace("\n", " ").strip()


def test_schema_is_strict_and_complete():
    schema = load_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert schema["required"] == list(schema["properties"])
    assert {name.strip() for name in TASK_TABLE.split(",")} <= set(schema["properties"])


def test_every_column_is_described():
    for column in columns():
        assert column.group in GROUPS and column.description.endswith(".")
        assert column.better in ("", "lower", "higher")
        assert re.fullmatch(r"(\+?\.[0-9]f|d)", column.format) or column.kind not in ("number", "integer"), column.name
        assert column.format != "d" or column.kind == "integer"


def test_emulated_rule_covers_exactly_the_timing_columns():
    timing = {column.name for column in columns() if column.timing}
    assert timing == set(load_schema()["then"]["properties"])
    named = {
        c.name
        for c in columns()
        if c.name.startswith(("t_", "speedup", "pairs_per_sec", "samples", "timing", "disturbed"))
    }
    assert named == timing


def test_empty_record_has_every_field():
    record = empty_record()
    assert list(record) == [column.name for column in columns()]
    assert record.pop("schema_version") == schema_version()
    assert set(record.values()) == {None}


def test_least_record_is_valid(make_record):
    validate(make_record())
    validate(make_record(measured="emulated", absrel=0.1))
    validate(make_record(measured="engine", t_pair_p50_ms=3, executed_precision={"int8": 0.91, "bf16": 0.09}))


IOU = {"value": 0.5, "unit": "", "better": "higher"}


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"absrell": 0.1}, "run.json: unknown field \"absrell\" (did you mean 'absrel'?)"),
        ({"exp_id": None}, "run.json: exp_id must be a text of 1 to 500 characters, got null"),
        ({"commit": ""}, 'run.json: commit must be a text that is not empty, or null, got ""'),
        ({"absrel": "0.1"}, 'run.json: absrel must be a number of at least 0, or null, got "0.1"'),
        ({"delta1": 1.5}, "run.json: delta1 must be a number between 0 and 1, or null, got 1.5"),
        ({"T": 0}, "run.json: T must be a number above 0, or null, got 0"),
        ({"bits_w": 7.5}, "run.json: bits_w must be a whole number between 1 and 64, or null, got 7.5"),
        ({"throttle": 1}, "run.json: throttle must be true or false, or null, got 1"),
        ({"seed": True}, "run.json: seed must be a whole number between 0 and 9223372036854775807, or null, got true"),
        ({"seed": 10**30}, "run.json: seed must fit in 64 bits, got a number of 100 bits"),
        ({"keep_list": ["LayerNorm", 3]}, "run.json: keep_list[1] must be a text, got 3"),
        (
            {"role": "candidat"},
            "run.json: role must be one of teacher, baseline, candidate, got \"candidat\" (did you mean 'candidate'?)",
        ),
        ({"measured": "x"}, 'run.json: measured must be one of engine, emulated or null, got "x"'),
        (
            {"executed_precision": {"int8": 91}},
            "run.json: executed_precision.int8 must be a number between 0 and 1, got 91",
        ),
        (
            {"executed_precision": {"int8": 0.9, "f32": 0.2}},
            "run.json: executed_precision: the shares must add up to at most 1, got 1.1",
        ),
        (
            {"hashes": {"model": "abc"}},
            'run.json: hashes.model must be a sha256 of 64 lower-case hexadecimal digits, got "abc"',
        ),
        ({"hashes": {"the model": "0" * 64}}, 'run.json: hashes has the key "the model", which is not a name'),
        ({"samples": {"pair": [1.0, -2.0]}}, "run.json: samples.pair[1] must be a number of at least 0, got -2.0"),
        (
            {"datetime": "2025-02-30T12:00:00Z"},
            'run.json: datetime must be a day that exists, got "2025-02-30T12:00:00Z"',
        ),
        ({"schema_version": "2.0"}, 'run.json: schema_version must be "2.1.0", got "2.0"'),
        ({"metrics": {"iou": {"value": 1, "unit": ""}}}, "run.json: metrics.iou: 'better' is a required property"),
        (
            {"metrics": {"iou": {"value": 1, "unit": "", "better": "more"}}},
            'run.json: metrics.iou.better must be one of lower, higher, got "more"',
        ),
        ({"metrics": {"IoU": IOU}}, 'run.json: metrics has the key "IoU", which is not a name'),
        ({"metrics": {"seed": IOU}}, "run.json: metrics.seed has the name of another field"),
        ({"metrics": {"absrel": IOU}}, "run.json: absrel is null and must be as in metrics, 0.5"),
        (
            {"metrics": {"iou": IOU}, "main_metric": "iuo"},
            "run.json: main_metric must be one of iou, got \"iuo\" (did you mean 'iou'?)",
        ),
        ({"notes": "\ud800"}, 'run.json: notes must be Unicode text, got "\\ud800"'),
    ],
)
def test_message_names_field_value_and_what_is_allowed(make_record, known, message):
    with pytest.raises(PqkError) as caught:
        validate(make_record(**known), "run.json")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "moment", ["2025-10-08 12:00:00Z", "2025-10-08T12:00:00", "2025-10-08T12:00:00+08:00", "2025-10-08T12:00:00Z\n"]
)
def test_time_must_be_utc(make_record, moment):
    with pytest.raises(PqkError, match="datetime must be an ISO 8601 time in UTC such as 2025-10-08T12:00:00Z, got"):
        validate(make_record(datetime=moment))
    validate(make_record(datetime="2025-10-08T12:00:00.123456+00:00"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_are_finite(make_record, value):
    with pytest.raises(PqkError, match=r"^record: absrel must be a finite number or null, got -?(NaN|Infinity)$"):
        validate(make_record(absrel=value))
    with pytest.raises(PqkError, match=r"^record: samples\.pair\[1\] must be a finite number"):
        validate(make_record(samples={"pair": [1.0, value]}))


def test_emulated_record_carries_no_timing(make_record):
    values = {"samples": {"pair": [1.0]}, "timing": {"rounds": 30}, "disturbed": True}
    for column in (column for column in columns() if column.timing):
        value = values.get(column.name, 12.5)
        validate(make_record(measured="engine", **{column.name: value}))
        with pytest.raises(
            PqkError, match=f"^record: {column.name} must be null in an emulated record, which carries no"
        ):
            validate(make_record(measured="emulated", **{column.name: value}))


def test_missing_and_several_problems(make_record):
    record = make_record()
    del record["notes"], record["seed"]
    with pytest.raises(PqkError, match=r"^record: missing fields seed, notes; use null for unknown values$"):
        validate(record)
    with pytest.raises(PqkError, match=r"^record: absrel must be .*, got -1 \(and 1 more\)$"):
        validate(make_record(rho=2, absrel=-1))
    with pytest.raises(PqkError, match=r"^record: a record must be a JSON object, got 3$"):
        validate(3)


def test_schema_of_the_project_comes_first(tmp_path, monkeypatch, make_record):
    schema = json.loads(schema_path().read_text())
    schema["properties"]["cost_usd"] = {"type": ["number", "null"], "description": "Money.", "x-group": "resources"}
    schema["required"].append("cost_usd")
    own = tmp_path / "logs" / "unified_log_schema.json"
    own.parent.mkdir()
    own.write_text(json.dumps(schema))
    monkeypatch.chdir(tmp_path)
    assert schema_path() == own
    assert columns()[-1].name == "cost_usd"
    (tmp_path / "below" / "it").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "below" / "it")
    assert schema_path() == own
    validate(make_record(cost_usd=3.0))
    monkeypatch.chdir("/")
    assert schema_path() == Path(__file__).parents[2] / "logs" / "unified_log_schema.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a valid JSON Schema"),
        ('{"type": 3}', "not a valid JSON Schema"),
        ("{}", "must name the version as a const"),
        ('{"properties": {"schema_version": {"const": "1.0.0"}}}', "field 'schema_version' must have a description"),
    ],
)
def test_damaged_schema_is_one_sentence(tmp_path, monkeypatch, text, message):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "unified_log_schema.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PqkError, match=message) as caught:
        load_schema()
    assert "\n" not in str(caught.value)
