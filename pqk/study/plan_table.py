"""Shows plans in the terminal, 80 columns wide, and as plain data: their experiments, costs and progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pqk.report.cells import DASH
from pqk.settings.plan import A100_FACTOR, Plan, Range, Step, cost, hours_on, rate_on, total

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pqk.study.execute_plan import Progressed


def plan_data(plan: Plan, steps: Sequence[Step], device: str, rate: float | None) -> dict[str, Any]:
    """Returns plain data: experiments in order with hours and dollars as [least, most], all estimates, and totals.

    Dollars are null where no rate is known; a plan holds the rate of its own device.
    """
    price = rate_on(plan, device, rate)
    all_hours = [(s.hours, s.hours) if device == plan.device else hours_on(device, s.hours) for s in steps]
    return {
        "plan": plan.name,
        "title": plan.title,
        "goal": plan.goal,
        "device": device,
        "rate": price,
        "estimate": True,
        "hours_from": plan.hours_from,
        "experiments": [
            {
                "id": step.id,
                "combo": step.combo or None,
                "what": step.what,
                "requires": list(step.requires),
                "train_seed": step.train_seed,
                "eval_seeds": step.eval_seeds,
                "hours": list(hours),
                "cost": _list(cost(hours, price)),
            }
            for step, hours in zip(steps, all_hours, strict=True)
        ],
        "hours": list(total(all_hours)),
        "cost": _list(cost(total(all_hours), price)),
    }


def print_plan(data: Mapping[str, Any], console: Console) -> None:
    """Prints the experiments in the order in which they run, with totals."""
    from rich.markup import escape

    table = _table(f"plan {data['plan']}: {data['title']}")
    table.add_column("exp", no_wrap=True)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("after", overflow="fold")
    table.add_column(f"{data['device']} h", justify="right", no_wrap=True)
    table.add_column("$", justify="right", no_wrap=True)
    for row in data["experiments"]:
        table.add_row(
            escape(row["id"]),
            escape(row["combo"] or DASH),
            escape(row["what"]),
            escape(", ".join(row["requires"]) or DASH),
            range_text(row["hours"]),
            range_text(row["cost"]),
        )
    table.add_section()
    table.add_row("total", "", "", "", range_text(data["hours"]), range_text(data["cost"]), style="bold")
    console.print(table)
    console.print(escape(data["goal"]))
    console.print(f"Hours: {escape(data['hours_from'])}.", highlight=False)
    if data["device"] == "A100":
        low, high = A100_FACTOR
        console.print(f"A100 hours = H100 hours x {low:g} to {high:g}.", highlight=False)
    if data["rate"] is None:
        console.print(f"No price of an {data['device']} hour is known; give it with --rate.", highlight=False)
    else:
        console.print(f"{data['rate']:g} $ per hour.", highlight=False)


def status_data(plan: Plan, found: Sequence[Progressed], rate: float | None) -> dict[str, Any]:
    """Returns plain data: status, wall hours and dollars so far of each experiment; null where nothing ran."""
    price = plan.rate if rate is None else rate
    ran = [item.hours for item in found if item.hours is not None]
    hours = sum(ran) if ran else None
    statuses = [item.status for item in found]
    return {
        "plan": plan.name,
        "rate": price,
        "counts": {status: statuses.count(status) for status in dict.fromkeys(statuses)},
        "hours": hours,
        "cost": _dollars(hours, price),
        "experiments": [
            {
                "id": item.step.id,
                "status": item.status,
                "detail": item.detail or None,
                "hours": item.hours,
                "cost": _dollars(item.hours, price),
                "planned_hours": item.step.hours,
            }
            for item in found
        ],
    }


_COLOURS = {
    "done": "green",
    "failed": "red",
    "undecided": "yellow",
    "error": "red",
    "stopped": "yellow",
    "running": "cyan",
}


def print_status(data: Mapping[str, Any], console: Console) -> None:
    """Prints one plan: a row per experiment, and the hours and dollars used so far."""
    from rich.markup import escape

    table = _table(f"plan {data['plan']}")
    table.add_column("exp", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("hours", justify="right", no_wrap=True)
    table.add_column("$", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in data["experiments"]:
        colour = _COLOURS.get(row["status"])
        status = f"[{colour}]{row['status']}[/]" if colour else row["status"]
        why = escape(row["detail"] or "")
        table.add_row(escape(row["id"]), status, _hours_text(row["hours"]), _dollar_text(row["cost"]), why)
    table.add_section()
    table.add_row("total", "", _hours_text(data["hours"]), _dollar_text(data["cost"]), style="bold")
    console.print(table)
    console.print(f"{_counts_text(data)}; wall hours measured here, at {data['rate']:g} $ per hour", highlight=False)


def print_statuses(plans: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints all plans, a row each."""
    from rich.markup import escape

    table = _table(None)
    table.add_column("plan", no_wrap=True)
    table.add_column("experiments", overflow="fold")
    table.add_column("hours", justify="right", no_wrap=True)
    table.add_column("$", justify="right", no_wrap=True)
    for data in plans:
        table.add_row(escape(data["plan"]), _counts_text(data), _hours_text(data["hours"]), _dollar_text(data["cost"]))
    console.print(table)


def range_text(ends: Sequence[float] | None) -> str:
    """Returns '20', '34–44' or a dash; from a thousand on with a comma."""
    if ends is None:
        return DASH
    low, high = (_number(end) for end in ends)
    return low if low == high else f"{low}–{high}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == round(value) else f"{value:.1f}"


def _table(title: str | None) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)


def _counts_text(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {status}" for status, count in data["counts"].items())


def _hours_text(hours: float | None) -> str:
    return DASH if hours is None else f"{hours:.3f}" if hours < 1 else f"{hours:.1f}"


def _dollar_text(dollars: float | None) -> str:
    return DASH if dollars is None else f"{dollars:,.2f}"


def _dollars(hours: float | None, rate: float) -> float | None:
    return None if hours is None else hours * rate


def _list(ends: Range | None) -> list[float] | None:
    return None if ends is None else list(ends)
