"""Writes a plan as the lab's schedule: days with boxes, hours and dollars so far, weekly reviews, a change log.

The sections are those of the lab's experiment table (实验任务表) of October 2025: 1 what holds for all, 3 the
experiments, 6 the days, 7 the outputs, 9 the changes; the weekly review that its workflow asks for stands before the
last. What a reader adds below 周复盘 and 变更记录 is kept. The days: preparation in the first four and writing in the
last four, as in the lab's table; the experiments in between, in the order in which they run, each with days in
proportion to its hours.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pqk import paths
from pqk.errors import PqkError
from pqk.files import check_readable, matching, write_text
from pqk.recipe.experiment import Experiment
from pqk.record.tsv import markdown_cell
from pqk.settings.plan import Plan, Step, hours_on, total
from pqk.study.execute_plan import Progressed
from pqk.study.plan_table import range_text

DAYS, PREPARATION, WRITING = 30, 4, 4
LEAST = PREPARATION + WRITING + 1
_MARK = re.compile(r"<!-- pqk plan schedule: (\{.*\}) -->")
_REVIEWS, _CHANGES = "## 周复盘", "## 9. 变更记录"
_STATUS = {
    "done": "完成",
    "failed": "未达标",
    "undecided": "未定",
    "stopped": "止损/中断",
    "error": "出错",
    "unavailable": "不可用",
    "running": "进行中",
    "waiting": "待做",
}
_OUTPUTS = {
    "reports/result_table.xlsx": "四象限（质量/效率/资源/端测）主表",
    "reports/plots/*.png": "Trade-off 曲线",
    "reports/baseline_report.md": "Teacher 基线",
    "logs/*.json": "统一字段的原始日志",
}


@dataclass(frozen=True)
class Days:
    """Days from `first` to `last`, counted from 1, for something to do."""

    first: int
    last: int

    @property
    def text(self) -> str:
        """Returns D5–D9, or D5 for one day."""
        return f"D{self.first}" if self.first == self.last else f"D{self.first}–D{self.last}"


def document_of(plan: Plan, root: Path) -> Path:
    """Returns where the plan's schedule stands."""
    return root / "schedule" / f"{plan.document or f'{plan.name}_实验任务表'}.md"


def share_days(hours: Sequence[float], first: int, last: int) -> list[Days]:
    """Returns the days of experiments one after another, in proportion to their hours, from day `first` to `last`.

    Several short ones may share a day. Empty for no experiments.
    """
    found, before, count = [], 0.0, last - first + 1
    for own in hours:
        begin, end = (math.ceil(count * done / sum(hours) - 0.5) for done in (before, before + own))
        begin = min(begin, count - 1)
        found.append(Days(first + begin, first + max(begin, end - 1)))
        before += own
    return found


def write_schedule(
    plan: Plan, found: Sequence[Progressed], standard: Experiment, days: int, root: Path, now: datetime
) -> tuple[Path, str]:
    """Writes the schedule anew, and returns its path and what changed since the last one ('' for nothing).

    found: progress of the steps, in order. standard: an experiment with the standard configs. Raises PqkError for too
    few days, and for a file of that name that this command did not write, or wrote for another plan.
    """
    if days < LEAST:
        raise PqkError(
            f"--days {days}: {PREPARATION} to prepare, {WRITING} to write and one to run are {LEAST}, at least"
        )
    path = document_of(plan, root)
    before = _read(path, plan)
    rows = {item.step.id: {"status": item.status, "hours": item.hours} for item in found}
    state = {"plan": plan.name, "days": days, "hours": sum(step.hours for step in _steps(found)), "steps": rows}
    version, changed = 1, "首版建立"
    changes, reviews = "", ""
    if before is not None:
        old, reviews, changes = before
        changed = _difference(old, state)
        version = old["version"] + bool(changed)
    if changed:
        changes = f"{changes.rstrip()}\n- v{version} ({now:%Y-%m-%d}): {changed}\n".lstrip("\n")
    text = _page(plan, found, standard, days, root, f"v{version}")
    mark = json.dumps({"version": version, **state}, ensure_ascii=False).replace("--", r"-\u002d")
    tail = [_REVIEWS, "", reviews.strip() or "还没有。", "", _CHANGES, "", changes.strip(), ""]
    write_text(path, "\n".join([text, *tail, f"<!-- pqk plan schedule: {mark} -->", ""]))
    return path, changed


def add_review(plan: Plan, text: str, root: Path) -> Path:
    """Puts a review under 周复盘 of the plan's schedule, in place of one of the same days; returns its path.

    text: of `review_text`. Raises PqkError when there is no schedule of the plan yet.
    """
    path = document_of(plan, root)
    before = _read(path, plan)
    if before is None:
        raise PqkError(f"{paths.shown(path)} is not there yet: write it with pqk plan schedule {plan.name}")
    page = path.read_text(encoding="utf-8")
    _, reviews, _ = before
    head = text.splitlines()[0]
    own = [part for part in re.split(r"(?m)^(?=### )", reviews) if part.strip() and not part.startswith(f"{head}\n")]
    kept = "\n".join(part.strip() + "\n" for part in own if part.strip() != "还没有。")
    start, end = page.index(_REVIEWS) + len(_REVIEWS), page.index(_CHANGES)
    write_text(path, f"{page[:start]}\n\n{text.strip()}\n\n{kept}{chr(10) if kept else ''}{page[end:]}")
    return path


def _read(path: Path, plan: Plan) -> tuple[dict[str, Any], str, str] | None:
    """Returns the state in an older schedule, its reviews and its changes; None where there is none."""
    if not path.exists():
        return None
    check_readable(path)
    page = path.read_text(encoding="utf-8", errors="replace")
    mark = _MARK.search(page)
    try:
        old = json.loads(mark[1]) if mark else {}
        reviews = page[page.index(_REVIEWS) + len(_REVIEWS) : page.index(_CHANGES)]
        changes = page[page.index(_CHANGES) + len(_CHANGES) : mark.start()] if mark else ""
        old["version"], old["plan"], old["days"], old["hours"], old["steps"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PqkError(f"{paths.shown(path)} was not written by pqk plan schedule; move it away first") from error
    if old["plan"] != plan.name:
        raise PqkError(
            f"{paths.shown(path)} is the schedule of plan {old['plan']}, not of {plan.name}; move it away first"
        )
    return old, reviews, changes


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns what changed between two states, in a line; '' for nothing."""
    said = []
    for name, row in new["steps"].items():
        was = old["steps"].get(name)
        if was is None:
            said.append(f"新增 {name}")
        elif was["status"] != row["status"]:
            said.append(f"{name} {_STATUS.get(was['status'], was['status'])} → {_STATUS[row['status']]}")
        elif _hours(was["hours"]) != _hours(row["hours"]):
            said.append(f"{name} 用时 {_hours(was['hours'])} → {_hours(row['hours'])} h")
    said += [f"删除 {name}" for name in old["steps"] if name not in new["steps"]]
    said += [f"计划 {old['hours']:g} → {new['hours']:g} h"] if old["hours"] != new["hours"] else []
    said += [f"周期 {old['days']} → {new['days']} 天"] if old["days"] != new["days"] else []
    return "；".join(said)


def _page(plan: Plan, found: Sequence[Progressed], standard: Experiment, days: int, root: Path, version: str) -> str:
    ran = [item.hours for item in found if item.hours is not None]
    ticked = sum(_is_done(item, plan) for item in found)
    planned = total([(step.hours, step.hours) for step in _steps(found)])
    spent = f"{sum(ran):.3f} h（本机实测），{sum(ran) * plan.rate:.2f} $" if ran else "–"
    lines = [
        f"# {document_of(plan, root).stem.replace('_', ' ')} ({version})",
        "",
        f"> 由 `pqk plan schedule {plan.name}` 写成，重新运行即更新；勾选、用时与花费来自 `outputs/plans/{plan.name}`。"
        "“周复盘”与“变更记录”可手写补充。章节编号沿用实验任务表，由人写的章节从略。",
        "",
        f"- **方案**：{plan.name}，{markdown_cell(plan.title)}",
        f"- **目标**：{markdown_cell(plan.goal)}",
        f"- **进度**：{ticked}/{len(found)} 完成；至今 {spent}；计划 {range_text(planned)} h，"
        f"{planned[0] * plan.rate:,.0f} $（{plan.rate:g} $/h）",
        f"- **用时来源**：{markdown_cell(plan.hours_from)}；计划按一块 {plan.device}",
        "",
        *_rules(plan, standard, days),
        *_experiments(plan, found),
        *_calendar(plan, found, days, root),
        "## 7. 输出物清单",
        "",
        *(f"- [{'x' if _there(pattern, root) else ' '}] `{pattern}`：{what}" for pattern, what in _OUTPUTS.items()),
        "",
    ]
    return "\n".join(lines)


def _rules(plan: Plan, standard: Experiment, days: int) -> list[str]:
    workload, evaluation = standard.workload, standard.evaluation
    lines, stop = evaluation.thresholds, evaluation.stop_loss
    feeding = "；".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in workload.feeding.items())
    hours = sum(step.hours for step in plan.experiments)
    return [
        "## 1. 全局口径与约束",
        "",
        f"- **输入与负载**：BS=1；{markdown_cell(feeding)}（workload v{workload.version}）",
        f"- **质量指标**：{markdown_cell(', '.join(evaluation.quality.metrics))}；主指标 "
        f"{markdown_cell(evaluation.quality.main_metric)}（eval v{evaluation.version}）",
        f"- **成功阈值**：主线精度跌幅 ≤ {lines.quality_drop_mainline_pct:g} %；t_pair p50 下降 ≥ "
        f"{lines.t_pair_p50_reduction_pct:g} %；P-only 体积降低 ≥ {lines.size_reduction_p_only_pct:g} %，跌幅 ≤ "
        f"{lines.quality_drop_p_only_pct:g} %",
        f"- **止损**：连续 {stop.no_improve_ckpt} 个 ckpt 未提升；跌幅 > {stop.drop_stop_k_pct:g} % (K)，"
        f"{stop.drop_stop_q_pct:g} % (Q)，{stop.drop_stop_p_pct:g} % (P)；GPU 小时 > {stop.gpu_hours_overrun_pct:g} %；"
        f"最多 {stop.max_epochs} epoch",
        f"- **预算/周期**：{hours * plan.rate:,.0f} $，{days} 天",
        "",
    ]


def _experiments(plan: Plan, found: Sequence[Progressed]) -> list[str]:
    a100 = plan.device == "H100"
    head = ["代号", "组合", "目的", "前置", f"预估 h ({plan.device})", *(["预估 h (A100)"] if a100 else [])]
    head += ["状态", "用时 h", "花费 $", "说明"]
    lines = ["## 3. 实验全集与进度", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for item in found:
        step = item.step
        cells = [step.id, step.combo or "–", markdown_cell(step.what), ", ".join(step.requires) or "–"]
        cells += [f"{step.hours:g}", *([range_text(hours_on("A100", step.hours))] if a100 else [])]
        spent = "–" if item.hours is None else f"{item.hours * plan.rate:.2f}"
        cells += [_STATUS[item.status], _hours(item.hours), spent, markdown_cell(item.detail or "–")]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _calendar(plan: Plan, found: Sequence[Progressed], days: int, root: Path) -> list[str]:
    """Returns the days by week, a box for each thing to do, ticked when it is done."""
    teacher = next((item for item in found if item.step.card is None), None)
    own = [item for item in found if item is not teacher]
    has_teacher = teacher is not None and _is_done(teacher, plan)
    report = _there("reports/baseline_report.md", root)
    calibrated = _there("outputs/store/calibration/*", root)
    todo: list[tuple[Days, bool, str]] = [
        (Days(1, 2), has_teacher, f"环境 + `baseline_eval.py` + `workload.yaml`；Teacher 日志{_told(teacher)}"),
        (Days(3, PREPARATION), calibrated and report, "校准集整理；Teacher 基线报告 `reports/baseline_report.md`"),
    ]
    shared = share_days([item.step.hours for item in own], PREPARATION + 1, days - WRITING)
    todo += [
        (when, _is_done(item, plan), f"**{item.step.id}** {markdown_cell(item.step.what)}{_told(item)}")
        for when, item in zip(shared, own, strict=True)
    ]
    written = _there("reports/result_table.xlsx", root) and _there("reports/plots/*.png", root)
    ended = written and all(done for _, done, _ in todo)
    todo.append((Days(days - WRITING + 1, days), ended, "结果总表、曲线与报告草稿"))
    lines = [f"## 6. {days} 天日程（可勾选）", ""]
    for week in range((days + 6) // 7):
        here = [one for one in todo if 7 * week < one[0].first <= 7 * week + 7]
        lines += [f"### 第 {week + 1} 周", ""] if here else []
        lines += [f"- [{'x' if done else ' '}] {when.text}：{text}" for when, done, text in here]
        lines += [""] if here else []
    return lines


def _told(item: Progressed | None) -> str:
    if item is None:
        return ""
    spent = "" if item.hours is None else f"，{_hours(item.hours)} h"
    return f"（{_STATUS[item.status]}{spent}）"


def _is_done(item: Progressed, plan: Plan) -> bool:
    """Returns whether an experiment has its result: in a plan without rollback a missed threshold is one too."""
    return item.status == "done" or (not plan.rollback and item.status in ("failed", "undecided"))


def _steps(found: Sequence[Progressed]) -> list[Step]:
    return [item.step for item in found]


def _there(pattern: str, root: Path) -> bool:
    folder, _, name = pattern.rpartition("/")
    return bool([path for path in matching(root / folder, name) if path.name != "unified_log_schema.json"])


def _hours(hours: float | None) -> str:
    return "–" if hours is None else f"{hours:.3f}" if hours < 1 else f"{hours:.1f}"
