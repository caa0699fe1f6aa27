"""Ranges of a preset: made from measured runs, kept as data, shown beside a new run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from pqk.cli import presets
from pqk.cli.app import app
from pqk.errors import PqkError, told
from pqk.recipe.experiment import resolve
from pqk.recipe.request import Request
from pqk.record.log import read_records
from pqk.report.expected import compare, expected_text, matching_entry, print_expected, ranges_of
from pqk.settings.card import load_card
from pqk.settings.preset import list_presets, load_expected, load_preset

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "deliverables" / "results-3" / "records"
Record = dict[str, Any]


def run(drop: float = 0.5, speed: float = 1.5, run_id: str = "r1", **more: Any) -> list[Record]:
    """The records of a run of B1: those of a deliverable, with what newer records have."""
    names = ("B1-teacher-openvino-f32-04da690c.json", "B1-candidate-openvino-nncf-int8-022b65c9.json")
    teacher, mine = (read_records(RECORDS / name)[0].record for name in names)
    both = {"run_id": run_id, "machine": {"isa": "avx2", "cores": 2}, **more}
    ends = {"quality_drop_pct": [drop - 3, drop + 3], "speedup_vs_own_f32": [speed - 0.1, speed + 0.1]}
    own = {"quality_drop_pct": drop, "speedup_vs_own_f32": speed, "intervals": ends}
    return [{**teacher, **both}, {**mine, **both, **own}]


def ends(entry: Any) -> dict[tuple[str, str], tuple[float, float]]:
    return {(one.precision, one.column): (one.low, one.high) for one in entry.ranges}


def test_a_range_spans_the_intervals_of_all_runs() -> None:
    entry = ranges_of([run(0.5, 1.5), run(0.75, 1.4, "r2")])
    found = ends(entry)
    assert found["int8", "quality_drop_pct"] == (-0.5, 1.75)  # its own interval is that of other samples
    assert found["int8", "speedup_vs_own_f32"] == pytest.approx((1.3, 1.6))
    ratio = run()[1]["size_ratio"]
    assert found["int8", "size_ratio"] == pytest.approx((0.99 * ratio, 1.01 * ratio))  # it has no interval
    assert ("f32", "quality_drop_pct") not in found and ("f32", "absrel") in found
    assert (entry.runs, entry.isa, entry.cores, entry.card, entry.measured) == (2, "avx2", 2, "B1", "2026-11-22")
    assert entry.teacher_sha256 == run()[0]["hashes"]["model"]
    with pytest.raises(PqkError, match="differ in isa"):
        ranges_of([run(), run(machine={"isa": "avx512"})])
    with pytest.raises(PqkError, match="says nothing of isa"):
        ranges_of([run(machine=None)])
    for none in ([], [[]]):
        with pytest.raises(PqkError, match="no run"):
            ranges_of(none)


def test_ranges_are_shown_beside_what_was_measured() -> None:
    entry = ranges_of([run(0.5, 1.5)])
    records = run(9.0, 1.5)
    inside = {(one.expected.precision, one.expected.column): one.inside for one in compare(records, entry)}
    assert inside["int8", "quality_drop_pct"] is False and inside["int8", "speedup_vs_own_f32"] is True
    records[1]["speedup_vs_own_f32"] = None
    assert {one.inside for one in compare(records, entry) if one.expected.column == "speedup_vs_own_f32"} == {None}
    console = Console(record=True, width=80)
    print_expected(records, entry, console)
    text = console.export_text()
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in text.splitlines() if ".." in line}
    assert rows["int8", "quality_drop_pct"] == ["-0.50", "..", "+1.50", "+9.00", "no"]
    assert rows["int8", "speedup_vs_own_f32"][-2:] == ["–", "–"]
    assert rows["int8", "size_ratio"][-1] == "yes" and "…" not in text and "speedup_vs_best_float " in text
    assert "ranges of 1 run, measured 2026-11-22 on AMD EPYC, avx2, 2 cores" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_range_is_for_its_machine_and_configs_alone() -> None:
    entry = ranges_of([run()])
    assert matching_entry(run(), [entry]) == (entry, "")
    found, why = matching_entry(run(machine={"isa": "avx512", "cores": 2}), [entry])
    assert found is None and why == "no range was measured for B1 with openvino on avx512"
    found, why = matching_entry(run(), [entry.model_copy(update={"eval_sha256": "0" * 64})])
    assert found is None and "other configs" in why


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("configs", "schedule", "models"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_writes_the_ranges_of_measured_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project / "configs" / "presets" / "quick.expected.yaml"
    path.unlink(missing_ok=True)
    asked = resolve(load_card("B1", project), project, settings=load_preset("quick", project).settings)
    own = {"workload": asked.workload.sha256, "eval": asked.evaluation.sha256, "quant": asked.quant.sha256}
    for number, drop in enumerate((0.5, 0.9)):
        folder = project / f"L{number}"
        folder.mkdir()
        for record in run(drop, run_id=f"r{number}"):
            record = {**record, "hashes": {**record["hashes"], **own}}
            (folder / f"{record['role']}.json").write_text(json.dumps(record))
    words = ["bench", "expect", "B1", "--preset", "quick"]
    code = told(lambda: app([*words, "--logs", "L0", "--logs", "L1"], standalone_mode=False) or 0)
    assert (code, capsys.readouterr().out) == (0, "configs/presets/quick.expected.yaml\n")
    (entry,) = load_expected("quick", project)
    assert ends(entry)["int8", "quality_drop_pct"] == pytest.approx((-0.5, 1.9)) and entry.runs == 2
    assert path.read_text("utf-8").startswith("# v1.0: ranges of the preset quick, written by `pqk bench expect`")
    other = entry.model_copy(update={"isa": "amx"})
    path.write_text(expected_text("quick", [other]), "utf-8")
    assert told(lambda: app([*words, "--logs", "L0"], standalone_mode=False) or 0) == 0
    assert [found.isa for found in load_expected("quick", project)] == ["amx", "avx2"]  # entries of others stay
    (project / "logs").mkdir()
    assert told(lambda: app(words, standalone_mode=False) or 0) == 2
    assert "measure one with pqk run B1 --preset quick" in capsys.readouterr().err


def test_a_preset_lies_under_the_settings_of_the_command_line(project: Path) -> None:
    request = Request("B1", "openvino", settings={"workload.scenes.test.count": 4})
    found = presets.laid_under(request, "quick", project)
    assert found.settings["workload.scenes.test.count"] == 4
    assert found.settings["quant.ptq.calibration_images"] == 32
    assert replace(found, settings=request.settings) == request
    with pytest.raises(PqkError, match=r"no preset 'quik' .*did you mean 'quick'.*; presets: quick"):
        presets.laid_under(request, "quik", project)
    detector = replace(request, model="random:diffusiondet-r50")
    with pytest.raises(PqkError, match="preset quick is for dust3r and vggt; the model is of the family diffusiondet"):
        presets.laid_under(detector, "quick", project)


def test_a_damaged_file_of_ranges_spoils_no_run(project: Path) -> None:
    path = project / "configs" / "presets" / "quick.expected.yaml"
    path.write_text("version: 1\nexpected: {}\n")
    console = Console(record=True, width=200)
    presets.show_expected("quick", run(), project, console)
    assert "preset quick: configs/presets/quick.expected.yaml" in console.export_text()
    assert told(lambda: app(["check"], standalone_mode=False) or 0) == 2


def test_the_shipped_presets_are_whole() -> None:
    assert list_presets(ROOT) == ["quick"]
    entries = load_expected("quick", ROOT)
    assert entries and all(entry.runs >= 3 for entry in entries)
    text = (ROOT / "configs" / "presets" / "quick.expected.yaml").read_text("utf-8")
    assert text == expected_text("quick", entries)  # as the command writes it
    assert yaml.safe_load(text)["expected"][0]["card"] == "B1"
