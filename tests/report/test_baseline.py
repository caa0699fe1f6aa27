"""The Teacher's baseline report, from records."""

from __future__ import annotations

import re
from pathlib import Path

from pqk.record.log import read_records
from pqk.report.baseline import baseline_text, write_baseline

RECORDS = Path(__file__).resolve().parents[2] / "deliverables" / "results-3" / "records"


def test_the_report_has_the_fields_of_the_lab(tmp_path: Path) -> None:
    (record,) = [item.record for item in read_records(RECORDS / "B1-teacher-openvino-f32-04da690c.json")]
    twin = {**record, "precision": "bf16", "t_pair_p50_ms": None, "intervals": {"absrel": [0.1, 0.2]}}
    path = write_baseline([twin, record], tmp_path / "baseline_report.md")
    text = path.read_text("utf-8")
    rows = {line.split("|")[1].strip(" `"): line for line in text.splitlines() if line.startswith("| `")}
    for name in ("absrel", "rmse", "delta1", "reproj_px", "t_pair_p95_ms", "t_scene_s", "pairs_per_sec", "vram_GB"):
        assert name in rows
    for name in ("params_M", "size_MB", "flops_G"):
        assert rows[name].count("–") == 0
    assert "| field | unit | f32 | bf16 |" in text
    assert rows["vram_GB"].endswith("| – | – |")  # not measured is a dash, never 0
    assert rows["t_pair_p50_ms"] == f"| `t_pair_p50_ms` | ms | {record['t_pair_p50_ms']:.2f} | – |"
    assert rows["absrel"].endswith(f"| {record['absrel']:.4f} | {record['absrel']:.4f} [0.1000, 0.2000] |")
    assert re.search(r"\| `logs/B1-teacher-openvino-f32-\w{8}\.json` \| \w{64} \|", text)
    assert "AMD EPYC" in text and record["commit"] in text and "quality against | ground\\_truth" in text


def test_texts_of_records_are_no_markup() -> None:
    record = read_records(RECORDS / "B1-teacher-openvino-f32-04da690c.json")[0].record
    text = baseline_text([{**record, "device": "<b>|x", "disturbed": True}])
    assert "| device | \\<b\\>\\|x |" in text and "timing was disturbed" in text
