"""The parity table in the terminal: two short tables that fit into 80 columns, and what is emulated says so."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from pqk.parity.parity import Result, Row, Verdict
from pqk.parity.report import as_data, print_parity
from pqk.record.schema import empty_record


def heads(error: float) -> dict[str, dict[str, float | None]]:
    return {
        name: {"relative": error * (2 if name.endswith("2") else 1), "moved": error if "pts" in name else None}
        for name in ("pts3d_1", "pts3d_2", "conf_1", "conf_2")
    }


def record(**values: Any) -> dict[str, Any]:
    return empty_record() | {"status": "ok", "measured": "engine", "size_MB": 49.71} | values


def result() -> Result:
    timed = {"t_pair_p50_ms": 1234.56, "speedup_vs_own_f32": 12.47, "speedup_vs_best_float": 1.413}
    shares = {"executed_precision": {"bf16": 0.166, "int8": 0.834}}
    metrics = {name: {"value": 0.5, "unit": "", "better": "lower"} for name in ("rmse", "iou")}
    own = record(**timed, **shares, rmse=0.5, metrics=metrics)
    rows = [
        Row("float", "torch f32", note="the model itself: base of this level"),
        Row("float", "reference fp32", "torch f32", None, heads(1.13e-6)),
        Row("float", "trt fp16", "torch f32", record(measured="emulated"), heads(1.3e-3), 0.11492, -12.345),
        Row("recipe", "trt/modelopt-fp8 int8", None, record(measured="emulated"), None, 0.11568, 0.7),
        Row(
            "recipe",
            "openvino/nncf int8",
            "trt/modelopt-fp8 int8",
            own,
            heads(0.02),
            0.1158,
        ),
        Row("recipe", "openvino/inc", note="failed: [no] such package"),
    ]
    verdicts = [Verdict("float"), Verdict("recipe")]
    verdicts[0].judge(True, "a sentence that is much longer than the terminal is wide, and so has to go on below, " * 2)
    return Result("B1", rows, verdicts, "absrel")


def shown(width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_parity(result(), console)
    return console.export_text().splitlines()


def test_no_row_is_wrapped_at_80_columns() -> None:
    lines = [line.split() for line in shown(80)]
    assert all(len(line.rstrip()) <= 80 for line in shown(80))
    assert ["trt", "fp16", "emulated", "0.1149", "-12.35", "2.6e-03", "2.6e-03", "0.13"] in lines
    assert ["trt/modelopt-fp8", "int8", "emulated", "0.1157", "+0.70", "–", "–", "–"] in lines
    assert ["openvino/nncf", "int8", "engine", "49.7", "1234.6", "12.47", "1.41", "bf16", "16.6", "%"] in lines
    assert ["int8", "83.4", "%"] in lines  # each share on a line of its own
    assert ["side", "run", "as", "MB", "p50", "ms", "x", "own", "f32", "x", "float", "executed"] in lines
    assert [line for line in lines if line[:2] == ["reference", "fp32"]] == [
        ["reference", "fp32", "engine", "–", "–", "2.3e-06", "2.3e-06", "0.00"]
    ]
    text = "\n".join(shown(80))
    assert "float, errors against torch f32" in text
    assert "openvino/inc: failed: [no] such package" in text


def test_a_long_sentence_goes_on_below_its_beginning() -> None:
    lines = shown(80)
    first = next(index for index, line in enumerate(lines) if "ok: a sentence" in line)
    assert lines[first].startswith("  ok") and lines[first + 1].startswith("  ") and lines[first + 1].strip()


def test_a_wider_terminal_shows_the_same_tables() -> None:
    def tables(width: int) -> list[list[str]]:
        return [line.split() for line in shown(width) if "  " in line.strip()]

    assert tables(80) == tables(120) and len(tables(80)) > 8


def test_the_files_keep_every_column() -> None:
    rows = as_data(result())["rows"]
    assert {"t_pair_p95_ms", "against", "pts3d_2.relative", "conf_1.moved", "note"} <= set(rows[4])
    assert [(row["rmse"], row["iou"]) for row in rows[2:]] == [(None, None), (None, None), (0.5, 0.5), (None, None)]
