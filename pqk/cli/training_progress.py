"""Shows the progress of a training in the terminal: `run_train_teacher`."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pqk.compress.train import loop as train
from pqk.paths import project_root
from pqk.recipe.experiment import default_teacher


def run_train_teacher(
    config: Path | None,
    out: Path,
    device: str,
    minutes: float | None,
    pause_after: float | None,
    steps: int | None,
    autocast: bool | None,
    compiled: bool,
    fresh: bool,
    init: str | None,
) -> None:
    """Runs `pqk train teacher`: reads the file, trains with a progress bar, prints the outcome."""
    from pqk.compress.train.teacher import family_of_named, train_teacher
    from pqk.settings.training import load_training

    root = project_root()
    spec = load_training(config or root / default_teacher(root).training, steps=steps)
    of = family_of_named(spec.model)
    metrics, unit = [metric.name for metric in of.settings_part().METRICS], of.learning_part().UNIT
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:5.1f} %  {task.fields[note]}"),
        TimeElapsedColumn(),
    )
    command = "pqk " + shlex.join(sys.argv[1:])
    with Progress(*columns, console=console, disable=train.world()[0] != 0) as bar:
        task = bar.add_task(spec.model, total=1.0, note="")
        spoken = [0.0]

        def report(p: train.Progress) -> None:
            eta = f"  ETA {p.seconds * (1 - p.share) / p.share / 60:.1f} min" if p.share else ""
            last = p.history[-1] if p.history else None
            score = "".join(f"  val {name} {last[name]:.4f}" for name in metrics if last and name in last)
            note = f"step {p.step}  loss {p.loss:.4f}  {p.samples_per_second:.1f} {unit}/s{eta}{score}"
            bar.update(task, completed=p.share, note=note)
            if not console.is_terminal and time.monotonic() - spoken[0] > 10:  # a log file gets a line now and then
                spoken[0] = time.monotonic()
                console.print(f"{100 * p.share:5.1f} %  {note}", highlight=False)

        outcome, progress = train_teacher(
            spec,
            out,
            device=device,
            minutes=minutes,
            pause_after_s=pause_after,
            autocast=autocast,
            compiled=compiled,
            fresh=fresh,
            init=init,
            report=report,
            command=command,
        )
    best = "no validation yet"
    if kept := min(progress.history, key=lambda entry: entry["score"], default=None):
        best = f"best validation {metrics[0]} {kept[metrics[0]]:.4f}"
    if train.world()[0] == 0:
        paused = "no weights written yet; the same command continues"
        left = paused if outcome == "paused" else f"weights and card in {out}"
        print(f"{outcome}: {progress.step} steps in {progress.seconds / 60:.1f} min, {best}; {left}")
