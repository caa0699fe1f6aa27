"""The schedule of a plan and the weekly review: what is ticked, what is counted, what is kept."""

from __future__ import annotations

import json
import shutil
import sys
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from pqk.cli.app import app
from pqk.errors import PqkError, told
from pqk.settings.plan import load_plan, ordered
from pqk.study.execute_plan import Asked, past_attempts, run_plan
from pqk.study.review import review_data, review_text
from pqk.study.schedule import Days, document_of, share_days

ROOT = Path(__file__).resolve().parents[2]
CODES = {"Baseline": 0, "A1": 0, "C1": 1, "B1": 4, "E1": 0, "D1": 0}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("configs", "schedule", "models"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors", "*实验任务表.md"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def go(root: Path, name: str = "medium", **codes: int) -> None:
    """Runs a plan whose experiments end at once, with the given exit codes."""
    plan = load_plan(name, root)
    ends = {**CODES, **codes}

    def commands(step: object) -> list[list[str]]:
        return [[sys.executable, "-c", f"import sys; sys.exit({ends.get(step.id, 0)})"]]  # type: ignore[attr-defined]

    run_plan(plan, ordered(plan, root), root, Asked("toy"), str, str, keep_going=True, commands_of=commands)


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = told(lambda: app(["plan", *words], standalone_mode=False) or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def boxes(text: str) -> dict[str, bool]:
    lines = [line for line in text.splitlines() if line.startswith("- [")]
    return {line[6:].partition("：")[0]: line[3] == "x" for line in lines}


def test_days_are_shared_by_hours() -> None:
    assert share_days([1, 1], 1, 4) == [Days(1, 2), Days(3, 4)]
    assert share_days([3, 1], 5, 8) == [Days(5, 7), Days(8, 8)]
    assert share_days([1, 1, 1, 1], 1, 2) == [Days(1, 1), Days(1, 1), Days(2, 2), Days(2, 2)]
    assert share_days([], 1, 4) == []
    for hours in ([24, 14, 10, 14, 10], [0.1, 50, 0.2], [7] * 40):
        found = share_days(hours, 5, 26)
        assert found[0].first == 5 and found[-1].last == 26
        assert all(one.first <= one.last and one.last <= two.last for one, two in pairwise(found))
    assert (Days(5, 9).text, Days(5, 5).text) == ("D5–D9", "D5")


def test_a_schedule_has_the_sections_of_the_lab_and_ticks_what_is_done(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "schedule", "medium")
    path = project / "schedule" / "DUSt3R-PQK_实验任务表.md"
    assert (code, out.strip()) == (0, "schedule/DUSt3R-PQK_实验任务表.md") and path.is_file()
    before = path.read_text("utf-8")
    for heading in ("1. 全局口径与约束", "3. 实验全集与进度", "6. 30 天日程（可勾选）", "7. 输出物清单", "9. 变更记录"):
        assert f"\n## {heading}\n" in before
    ticks = boxes(before)
    assert list(ticks)[:8] == ["D1–D2", "D3–D4", "D5–D11", "D12–D16", "D17–D19", "D20–D23", "D24–D26", "D27–D30"]
    assert not any(ticks.values())
    assert "0/6 完成；至今 –；计划 75 h，516 $" in before and "- v1 (" in before

    go(project)
    (project / "reports").mkdir()
    (project / "reports" / "baseline_report.md").write_text("x")
    assert call(capsys, "schedule", "medium")[0] == 0
    after = path.read_text("utf-8")
    ticks = boxes(after)
    assert (ticks["D1–D2"], ticks["D5–D11"], ticks["D12–D16"], ticks["D17–D19"]) == (True, True, False, False)
    assert ticks["`reports/baseline_report.md`"] and not ticks["`reports/result_table.xlsx`"]
    assert "4/6 完成" in after and "C1 待做 → 未达标" in after and "B1 待做 → 未定" in after
    assert "- v1 (" in after and "- v2 (" in after
    hours = [line.split("|")[8].strip() for line in after.splitlines() if line.startswith("| A1 ")]
    assert float(hours[0]) < 0.1

    same = path.read_text("utf-8")
    code, _, err = call(capsys, "schedule", "medium")
    assert (code, err) == (0, "nothing changed since the last one\n") and path.read_text("utf-8") == same


def test_what_was_written_by_hand_is_kept(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "schedule", "medium")
    path = document_of(load_plan("medium", project), project)
    text = path.read_text("utf-8").replace("\n<!-- pqk", "- by hand: A1 waits for a card\n\n<!-- pqk")
    path.write_text(text.replace("还没有。", "### 2026-01-01 – 2026-01-08\n\nby hand\n"), "utf-8")
    go(project)
    assert call(capsys, "review", "medium", "--write")[0] == 0
    assert call(capsys, "review", "medium", "--write")[0] == 0
    assert call(capsys, "schedule", "medium", "--days", "40")[0] == 0
    text = path.read_text("utf-8")
    assert text.count("- by hand: A1 waits for a card") == 1 and text.count("\nby hand\n") == 1
    assert text.count("通过 4，失败 1，未定 1；用时") == 1  # a review of the same days replaces the older one
    assert "周期 30 → 40 天" in text and "## 6. 40 天日程" in text
    assert text.index("## 周复盘") < text.index("通过 4") < text.index("## 9. 变更记录") < text.index("- v2 (")


def test_other_files_are_left_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = document_of(load_plan("medium", project), project)
    path.write_text("mine")
    assert call(capsys, "schedule", "medium")[::2] == (
        2,
        "pqk: schedule/DUSt3R-PQK_实验任务表.md was not written by pqk plan schedule; move it away first\n",
    )
    assert path.read_text() == "mine"
    path.unlink()
    assert call(capsys, "review", "medium", "--write")[0] == 2
    call(capsys, "schedule", "medium")
    assert "is the schedule of plan medium, not of best" in call(capsys, "schedule", "best")[2]
    assert document_of(load_plan("results", project), project).name == "results_实验任务表.md"
    for words in (
        ["schedule"],
        ["schedule", "medium", "--days", "8"],
        ["medium", "--days", "8"],
        ["medium", "--write"],
    ):
        code, _, err = call(capsys, *words)
        assert code == 2 and err.startswith("pqk: ") and err.count("\n") == 1
    assert call(capsys, "review", "--write")[0] == call(capsys, "review", "--run")[0] == 2


def test_a_review_counts_the_week(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "review")[1] == "no plan ran yet\n"
    go(project)
    go(project, C1=0)
    code, out, _ = call(capsys, "review", "medium", "--json")
    data = json.loads(out)
    assert code == 0 and data["counts"] == {"passed": 5, "failed": 1, "undecided": 2, "stopped": 0, "other": 0}
    assert data["hours"] == pytest.approx(sum(row["hours"] for row in data["attempts"]))
    assert data["cost"] == pytest.approx(data["hours"] * 6.88)
    assert [row["id"] for row in data["attempts"]] == ["Baseline", "A1", "C1", "B1", "E1", "D1", "C1", "B1"]
    plan = load_plan("medium", project)
    past = past_attempts(plan, ordered(plan, project), project)
    later = review_data(plan, past, datetime.now(UTC) + timedelta(days=30), 7, None)
    assert (later["hours"], later["cost"], later["attempts"]) == (None, None, [])
    assert "本周没有运行" in review_text(later)


def test_stops_of_earlier_attempts_are_told_apart(project: Path) -> None:
    """The run log of a card has the lines of all attempts."""
    plan = load_plan("medium", project)
    folder = project / "outputs" / "plans" / "medium"
    folder.mkdir(parents=True)
    attempts = [
        {"key": "a", "began": 1_700_000_000.0, "seconds": 3600.0, "exit_code": 1, "said": ""},
        {"key": "a", "began": 1_700_010_000.0, "seconds": 1800.0, "exit_code": 1, "said": "drop 2 %"},
        {"key": "a", "began": 1_700_020_000.0, "seconds": 900.0, "exit_code": None, "said": ""},
    ]
    state = {"version": 1, "asked": {"backend": "toy", "model": None}, "attempts": {"A1": attempts}}
    (folder / "state.json").write_text(json.dumps(state))
    log = project / "logs" / "runs" / "A1.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(
        '{"time": "2023-11-14T22:30:00Z", "event": "stop", "why": "hours are spent"}\n'
        '{"time": "2023-11-15T01:30:00Z", "event": "attempt"}\n'
    )
    found = past_attempts(plan, ordered(plan, project), project)
    assert [(one.status, one.detail, one.hours) for one in found] == [
        ("stopped", "hours are spent", 1.0),
        ("failed", "drop 2 %", 0.5),
        ("stopped", "interrupted", 0.25),
    ]
    text = review_text(review_data(plan, found, datetime(2023, 11, 16, tzinfo=UTC), 7, 10.0))
    assert "失败 1，止损/中断 2；用时 1.750 h，花费 17.50 $。" in text and "hours are spent" in text


def test_a_plan_may_not_have_a_reserved_name(project: Path) -> None:
    with pytest.raises(PqkError, match="there is no plan 'schedule'"):
        load_plan("schedule", project)
