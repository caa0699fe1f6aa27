"""Runs `pqk plan`, and prints its results in the terminal."""

from __future__ import annotations

import json
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pqk import paths
from pqk.cli.spread import Spread
from pqk.errors import EXIT_OK, PqkError, nearest
from pqk.settings.plan import (
    DEVICES,
    RESERVED,
    REVIEW,
    SCHEDULE,
    STATUS,
    TEACHER_CARD,
    list_plans,
    load_plan,
    ordered,
)
from pqk.study.execute_plan import Asked, exit_code, folder_of, past_attempts, progress, run_plan
from pqk.study.plan_table import plan_data, print_plan, print_status, print_statuses, status_data


def plan(
    name: str,
    of: str | None,
    rate: float | None,
    device: str | None,
    execute: bool,
    backend: str | None,
    model: str | None,
    keep_going: bool,
    as_json: bool,
    days: int | None = None,
    write: bool = False,
    spread: Spread | None = None,
) -> int:
    """Runs `pqk plan`: shows a plan, runs it, prints its progress, writes its schedule or reviews a week.

    name: of a plan, or one of RESERVED. Returns the exit code.
    """
    root = paths.project_root()
    if execute and name in RESERVED:
        raise PqkError("run a plan by its name: `pqk plan NAME --run`")
    if (days is not None and name not in (SCHEDULE, REVIEW)) or (write and name != REVIEW):
        raise PqkError("--days goes with `pqk plan schedule` and `pqk plan review`, --write with `pqk plan review`")
    if device is not None and device not in DEVICES:
        raise PqkError(f"--device {device}: hours are known for {', '.join(DEVICES)}{nearest(device, DEVICES)}")
    if not execute and (backend or model or keep_going or spread):
        words = "--on" if spread else "--backend, --model and --keep-going"
        raise PqkError(f"{words} need{'s' * bool(spread)} --run")
    if name == STATUS:
        return _show_status(of, rate, as_json, root)
    if name == SCHEDULE:
        return _write_schedule(of, days, as_json, root)
    if name == REVIEW:
        return _review(of, rate, days, write, as_json, root)
    if of is not None:
        raise PqkError(f"{of!r} is one word too many: `pqk plan {name}`, or `pqk plan status {name}`")
    if execute:
        return _carry_out(name, rate, backend, model, keep_going, as_json, root, spread)
    found = load_plan(name, root)
    if device is not None and found.device == "CPU":
        raise PqkError(f"--device {device}: the hours of plan {name} are those of a CPU")
    data = plan_data(found, ordered(found, root), device or found.device, rate)
    _show(data, as_json, print_plan)
    return EXIT_OK


def _show_status(of: str | None, rate: float | None, as_json: bool, root: Path) -> int:
    every = []
    for name in list_plans(root) if of is None else [of]:
        found = load_plan(name, root)
        every.append(status_data(found, progress(found, ordered(found, root), root), rate))
    if of is not None:
        _show(every[0], as_json, print_status)
    elif as_json:
        print(json.dumps(every, ensure_ascii=False))
    else:
        print_statuses(every, Console())
    return EXIT_OK


def _write_schedule(of: str | None, days: int | None, as_json: bool, root: Path) -> int:
    """Writes the schedule of a plan; its path is the last line of stdout."""
    from pqk.recipe.experiment import resolve
    from pqk.settings.card import load_card
    from pqk.study.schedule import DAYS, write_schedule

    if of is None:
        raise PqkError(f"name the plan: `pqk plan schedule NAME`, one of {', '.join(list_plans(root))}")
    found = load_plan(of, root)
    standard = resolve(load_card(TEACHER_CARD, root), root)
    now, done = datetime.now(UTC), progress(found, ordered(found, root), root)
    path, changed = write_schedule(found, done, standard, days or DAYS, root, now)
    Console(stderr=True, highlight=False).print(escape(changed or "nothing changed since the last one"))
    print(json.dumps({"path": paths.shown(path), "changed": changed or None}) if as_json else paths.shown(path))
    return EXIT_OK


def _review(of: str | None, rate: float | None, days: int | None, write: bool, as_json: bool, root: Path) -> int:
    """Prints what ran in the last days; `write` puts it into the schedule of the named plan."""
    from pqk.study.review import print_review, review_data, review_text
    from pqk.study.schedule import add_review

    if write and of is None:
        raise PqkError("--write needs the plan: `pqk plan review NAME --write`")
    every, console = [], Console(stderr=as_json)
    for name in list_plans(root) if of is None else [of]:
        found = load_plan(name, root)
        past = past_attempts(found, ordered(found, root), root)
        data = review_data(found, past, datetime.now(UTC), days or 7, rate)
        if past or of is not None:
            every.append(data)
            print_review(data, console)
        if write:
            console.print(f"written to {escape(paths.shown(add_review(found, review_text(data), root)))}")
    if not every:
        console.print("no plan ran yet")
    if as_json:
        print(json.dumps(every if of is None else every[0], ensure_ascii=False))
    return EXIT_OK


def _carry_out(
    name: str,
    rate: float | None,
    backend: str | None,
    model: str | None,
    keep_going: bool,
    as_json: bool,
    root: Path,
    spread: Spread | None,
) -> int:
    found = load_plan(name, root)
    steps = ordered(found, root)
    chosen = _usable(backend)
    given = str(Path(model).resolve()) if model and Path(model).exists() else model  # experiments run in the root
    errors = Console(stderr=True, highlight=False)
    try:
        done = run_plan(
            found,
            steps,
            root,
            Asked(chosen, given),
            lambda text: errors.print(f"[bold]▸ {escape(text)}[/]", soft_wrap=True),
            lambda line: errors.print(f"  {escape(line)}", style="dim", soft_wrap=True),
            keep_going=keep_going,
            **(spread._asdict() if spread else {}),
        )
    except KeyboardInterrupt:
        errors.print(f"interrupted; `pqk plan {name} --run` continues from here")
        return 128 + signal.SIGINT
    _show(status_data(found, done, rate), as_json, print_status)
    errors.print(f"output of each experiment: {escape(paths.shown(folder_of(name, root)))}/*.log", style="dim")
    return exit_code(done)


def _usable(backend: str | None) -> str:
    """Returns the backend of all experiments. Raises BackendError, before the first of them, when it cannot run."""
    from backends import registry
    from backends.base import Unavailable

    if backend in (None, "auto"):
        from pqk.cli.run_output import choose_backend

        backend = choose_backend(backend)
    assert backend is not None
    found = registry.get(backend).availability()
    if not found.available:
        raise Unavailable(f"backend {backend!r} cannot run: {found.reason}; {found.remedy}")
    return backend


def _show(data: dict[str, Any], as_json: bool, show: Any) -> None:
    show(data, Console(stderr=as_json))
    if as_json:
        print(json.dumps(data, ensure_ascii=False))
