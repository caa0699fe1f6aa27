"""Reviews what ran of a plan in a week, as the lab's workflow asks: passed, failed, stopped, hours, dollars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from pqk.record.tsv import markdown_cell
from pqk.settings.plan import Plan

if TYPE_CHECKING:
    from rich.console import Console

    from pqk.study.execute_plan import Past

OUTCOMES = {
    "passed": ("done",),
    "failed": ("failed",),
    "undecided": ("undecided",),
    "stopped": ("stopped",),
    "other": ("error", "unavailable", "running"),
}
"""What a review counts, and the statuses of `pqk.study.execute_plan` that belong to it."""
_CHINESE = {"passed": "通过", "failed": "失败", "undecided": "未定", "stopped": "止损/中断", "other": "其他"}


def review_data(plan: Plan, past: Sequence[Past], until: datetime, days: int, rate: float | None) -> dict[str, Any]:
    """Returns the attempts that began in the `days` before `until` as plain data, with counts, hours and dollars.

    Hours and dollars are null where nothing ran. rate: dollars per hour; default: the plan's.
    """
    since = until - timedelta(days=days)
    price = plan.rate if rate is None else rate
    own = [one for one in past if since.timestamp() < one.began <= until.timestamp()]
    hours = sum(one.hours for one in own) if own else None
    rows = [
        {
            "id": one.step.id,
            "combo": one.step.combo or None,
            "began": datetime.fromtimestamp(one.began, UTC).strftime("%Y-%m-%d %H:%M"),
            "outcome": next(name for name, statuses in OUTCOMES.items() if one.status in statuses),
            "status": one.status,
            "why": one.detail or None,
            "hours": one.hours,
            "cost": one.hours * price,
        }
        for one in own
    ]
    return {
        "plan": plan.name,
        "since": since.strftime("%Y-%m-%d"),
        "until": until.strftime("%Y-%m-%d"),
        "counts": {name: sum(row["outcome"] == name for row in rows) for name in OUTCOMES},
        "hours": hours,
        "cost": None if hours is None else hours * price,
        "rate": price,
        "attempts": rows,
    }


def review_text(data: Mapping[str, Any]) -> str:
    """Returns a review as a section of the plan's schedule, in Markdown and in the words of the lab."""
    counts = "，".join(f"{_CHINESE[name]} {count}" for name, count in data["counts"].items() if count)
    lines = [f"### {data['since']} – {data['until']}", ""]
    if not data["attempts"]:
        return "\n".join([*lines, "本周没有运行。", ""])
    lines += [f"{counts}；用时 {data['hours']:.3f} h，花费 {data['cost']:.2f} $。", ""]
    lines += ["| 实验 | 开始 (UTC) | 结果 | 用时 h | 花费 $ | 原因 |", "| --- | --- | --- | --- | --- | --- |"]
    for row in data["attempts"]:
        cells = [markdown_cell(row["id"]), row["began"], f"{_CHINESE[row['outcome']]} ({row['status']})"]
        cells += [f"{row['hours']:.3f}", f"{row['cost']:.2f}", markdown_cell(row["why"] or "–")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def print_review(data: Mapping[str, Any], console: Console) -> None:
    """Prints a review: a row per attempt, then the counts, hours and dollars."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for heading, side in (("exp", "left"), ("began (UTC)", "left"), ("outcome", "left"), ("hours", "right")):
        table.add_column(heading, justify=side, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("why", overflow="fold")
    for row in data["attempts"]:
        why = escape(row["why"] or "")
        table.add_row(escape(row["id"]), row["began"], row["outcome"], f"{row['hours']:.3f}", why)
    console.print(f"[bold]plan {escape(data['plan'])}[/], {data['since']} to {data['until']}", highlight=False)
    if not data["attempts"]:
        console.print("nothing ran")
        return
    console.print(table)
    counts = ", ".join(f"{count} {name}" for name, count in data["counts"].items() if count)
    text = f"{counts}; {data['hours']:.3f} h, {data['cost']:.2f} $ at {data['rate']:g} $ per hour"
    console.print(text, highlight=False)
