"""Metrics of a record: those that the family names, in `metrics` and in the columns that the schema has for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.base import Graph, Precision
from pqk.engines.variant import Variant
from pqk.errors import PqkError
from pqk.families.contract import Metric
from pqk.recipe.columns import Measurements, measured_record
from pqk.record.schema import columns, validate

KNOWN = (
    Metric("absrel", "", "lower", 0.0),
    Metric("iou", "px", "higher", 1.0, parts=("iou_small",)),
    Metric("seed", "", "lower", 0.0),
)


def record_of(main: str, *asked: str) -> dict[str, Any]:
    """The record of a model of two groups that was scored with these metrics, and timed graph by graph."""
    graph = Graph(Path("net.onnx"), (), (), "0" * 64)
    mine = Variant("fp32", "openvino", Precision.F32, {"net": graph}, {})
    samples = [{"group": group, "sample": "0", "absrel": 0.1, "iou": 0.5 + group, "seed": 1.0} for group in range(2)]
    summary = {"absrel": 0.1, "iou": 1.0, "iou_small": 0.25, "seed": 1.0, "absrel_p95": 0.2}
    scored = {
        "summary": summary,
        "samples": samples,
        "groups": ["a", "b"],
        "measured": "engine",
        "executed": {},
        "matched_by_size": None,
        "flops": 1e9,
        "size_bytes": 1000,
    }
    times = [1.0 + k / 100 for k in range(30)]
    timed = {"sample": times, "graphs": {"net": times, "encoder": times}, "group_s": [1.0], "group_samples": 1}
    known = {metric.name: metric for metric in KNOWN}
    asks = SimpleNamespace(quality=SimpleNamespace(metrics=asked, main_metric=main))
    experiment: Any = SimpleNamespace(evaluation=asks, metrics=known, metric=known[main])
    about = {"variants": {"fp32": timed}, "timing": {"rounds": 30}, "disturbed": []}
    measured = Measurements(mine, {"fp32": scored}, about, {"fp32": {"compile": None, "steady": None}})
    common = {"exp_id": "X", "role": "teacher", "status": "ok", "main_metric": main, "hashes": {}, "family": "toy"}
    return measured_record(common, measured, mine, [mine], True, experiment)


def test_a_metric_without_a_column_is_in_metrics_alone() -> None:
    record = record_of("iou", "absrel", "iou")
    validate(record)
    assert record["absrel"] == 0.1 and not {"iou", "iou_small"} & set(record)
    assert {name: about["value"] for name, about in record["metrics"].items()} == {
        "absrel": 0.1,
        "iou": 1.0,
        "iou_small": 0.25,
    }
    assert record["metrics"]["iou_small"] == {"value": 0.25, "unit": "px", "better": "higher"}
    iou = record["metrics"]["iou"]
    assert (iou["unit"], iou["better"], iou["interval"]) == ("px", "higher", record["intervals"]["iou"])
    assert iou["interval"][0] < 1.0 < iou["interval"][1]


def test_a_graph_without_a_column_has_its_times_in_samples_alone() -> None:
    record = record_of("iou", "iou")
    assert set(record) == {column.name for column in columns()}
    assert record["t_encoder_p50_ms"] == pytest.approx(1.145) and record["t_decoder_p50_ms"] is None
    assert set(record["samples"]) == {"pair", "net", "encoder"}


def test_a_metric_must_not_have_the_name_of_another_field() -> None:
    with pytest.raises(PqkError, match=r"metrics\.seed has the name of another field"):
        validate(record_of("iou", "iou", "seed"))
