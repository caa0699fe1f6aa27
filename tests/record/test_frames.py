"""Records as a DataFrame: a row each, typed columns, null where nothing was measured."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pqk.errors import NotBuilt, PqkError
from pqk.record import frame
from pqk.record.log import read_records
from pqk.record.schema import columns

RECORDS = Path(__file__).resolve().parents[2] / "deliverables" / "results-3" / "records"
Make = Callable[..., dict[str, Any]]


def test_a_frame_has_a_row_per_record_and_typed_columns(make_record: Make) -> None:
    pd = pytest.importorskip("pandas", reason="needs pandas (extra frame)")
    table = frame(RECORDS)
    records = [item.record for item in read_records(RECORDS)]
    assert len(table) == len(records) == 32
    assert list(table.columns)[: len(columns())] == [column.name for column in columns()]
    want = {"number": "Float64", "integer": "Int64", "string": "string", "boolean": "boolean"}
    for column in columns():
        found = str(table[column.name].dtype)
        if column.name in ("datetime", "measured_at"):
            assert found.startswith("datetime64[") and found.endswith(", UTC]")
        else:
            assert found == want.get(column.kind, "object"), column.name
    for name in ("absrel", "quality_drop_pct", "t_pair_p50_ms", "params", "gpu_hours", "verdict"):
        for value, record in zip(table[name], records, strict=True):
            assert pd.isna(value) if record[name] is None else value == record[name]
    assert table["power_avg_W"].isna().all()  # null where not measured, never 0
    assert table["samples"][0]["pair"] == records[0]["samples"]["pair"]
    means = table[table["role"] == "candidate"].groupby("exp_id")["absrel"].mean()
    assert means["A1"] == pytest.approx(0.1157, abs=1e-4)
    assert table.attrs["unit"]["t_pair_p50_ms"] == "ms" and table.attrs["better"]["absrel"] == "lower"
    assert set(table["executed_int8"].dropna()) >= {0.0}


def test_metrics_and_intervals_get_columns(make_record: Make) -> None:
    pd = pytest.importorskip("pandas", reason="needs pandas (extra frame)")
    iou = {"value": 0.5, "unit": "", "better": "higher", "interval": [0.4, 0.6]}
    ends = {"iou": [0.4, 0.6], "quality_drop_pct": [-1.0, 2.0]}
    one = make_record(metrics={"iou": iou}, main_metric="iou", intervals=ends, quality_drop_pct=0.5, measured="engine")
    two = make_record(executed_precision={"int8": 0.9, "f32": 0.1}, measured="engine")
    table = frame([one, two])
    assert table["iou"].tolist()[0] == 0.5 and pd.isna(table["iou"][1])
    assert (table["iou_low"][0], table["quality_drop_pct_high"][0]) == (0.4, 2.0)
    assert pd.isna(table["executed_int8"][0]) and table["executed_int8"][1] == 0.9
    assert table.attrs["better"]["iou"] == "higher"
    assert str(table["iou_low"].dtype) == str(table["executed_f32"].dtype) == "Float64"
    assert len(frame([])) == 0 and "absrel" in frame([])
    with pytest.raises(PqkError, match=r"record 2: unknown field \"absrell\""):
        frame([two, {**two, "absrell": 1}])
    with pytest.raises(PqkError, match="no log file or folder"):
        frame("nowhere")


def test_files_and_folders_and_the_project_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="needs pandas (extra frame)")
    files = sorted(RECORDS.glob("*.json"))[:2]
    assert len(frame(files)) == 2 and len(frame(str(files[0]))) == 1
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "workload.yaml").write_text("")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.json").write_bytes(files[0].read_bytes())
    monkeypatch.chdir(tmp_path)
    assert frame()["exp_id"].tolist() == ["A1"]


def test_without_pandas_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NotBuilt, match=r"needs pandas, which is not installed: pip install 'pqk\[frame\]'"):
        frame(RECORDS)
