"""Runs a card with a matrix: one experiment for each point of each axis; the points share stages where possible.

They run here in this process, or each as `pqk run CARD --axis AXIS --point POINT` on a cluster (`pqk.launch`).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backends.base import BackendError
from pqk.errors import PqkError
from pqk.files import check_writable
from pqk.launch.cell import Cell, placed, pqk_command, why_not
from pqk.launch.launch import launcher
from pqk.launch.launch import run as run_cells
from pqk.launch.machine import KIND_FILE
from pqk.launch.needs import Needs
from pqk.recipe.experiment import experiment_family
from pqk.recipe.request import Request, asked_experiment
from pqk.recipe.runner import run
from pqk.record.log import read_records
from pqk.settings.card import Card
from pqk.store import worker
from pqk.store.store import OnEvent


@dataclass(frozen=True)
class MatrixResult:
    """The records of a matrix by axis and point, None where the point failed, and the reasons of the failures."""

    card: Card
    records: dict[str, dict[str, dict[str, Any] | None]]
    failures: dict[tuple[str, str], str] = field(default_factory=dict)


def run_matrix(
    card: Card,
    request: Request,
    axes: list[str],
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
) -> MatrixResult:
    """Runs every point of the named axes, or of all axes where none is named.

    Axes for models of another family than the request's are left out, and a message says so. Finished artifacts are
    reused, so an interrupted matrix continues where it was. A failed point is reported, and the others still run.

    Raises PqkError, before anything runs, for an unknown axis, for one of another family that is named, and for a point
    whose settings are wrong.
    """
    points = _checked(card, request, axes, root, say)
    result = MatrixResult(card, {})
    for number, (axis, point) in enumerate(points, 1):
        say(f"{card.id} {axis}: {point} ({number} of {len(points)})")
        found = result.records.setdefault(axis, {})
        try:
            found[point] = run(replace(request, point=(axis, point)), root, on_event, say).records[-1]
        except (PqkError, BackendError, worker.WorkerCrashed) as error:
            found[point] = None
            result.failures[axis, point] = str(error).strip().splitlines()[-1]
            say(f"{axis}: {point} failed: {result.failures[axis, point]}")
    return result


def run_matrix_on(
    card: Card, request: Request, axes: list[str], root: Path, on: str, needs: Needs, say: Callable[[str], None]
) -> MatrixResult:
    """Runs the points as cells of a launcher, see `pqk.launch.launch.launcher`; else as `run_matrix` does."""
    points = _checked(card, request, axes, root, say)
    folder = root / "outputs" / "matrices" / card.id
    check_writable(folder)
    names = {f"{axis}: {point}": (axis, point) for axis, point in points}
    cells = deque(
        Cell(
            name, (pqk_command(*_words(request, *names[name])),), root, folder / _log(number, axis), folder / KIND_FILE
        )
        for number, (name, (axis, _)) in enumerate(names.items(), 1)
    )
    ended: dict[tuple[str, str], dict[str, Any] | None] = {}
    failures: dict[tuple[str, str], str] = {}

    def more(places: int) -> list[Cell]:
        return [cells.popleft() for _ in range(min(places, len(cells)))]

    with launcher(on, needs, folder, say, say) as launched:
        for done in run_cells(more, launched):
            file = done.outcome.get("record")
            record = read_records(file)[-1].record if done.outcome["measured"] and file else None
            ended[names[done.name]] = record
            how = "done"
            if record is None:
                failures[names[done.name]] = why_not(done)
                how = f"failed: {why_not(done)}"
            say(f"{card.id} {done.name}: {how}, {done.seconds:.0f} s")
    records: dict[str, dict[str, dict[str, Any] | None]] = {}
    for axis, point in points:  # in the order of the card
        records.setdefault(axis, {})[point] = ended[axis, point]
    return MatrixResult(card, records, {which: failures[which] for which in points if which in failures})


def _checked(
    card: Card, request: Request, axes: list[str], root: Path, say: Callable[[str], None]
) -> list[tuple[str, str]]:
    """Returns the points to run. Raises PqkError as `run_matrix` does."""
    of = experiment_family(request.model, root).name
    for axis in axes:
        card.at(axis, next(iter(card.matrix[axis].points), "") if axis in card.matrix else "", of)
    points = [found for found in card.points() if found[0] in axes] if axes else card.points(of)
    others = [] if axes else [axis for axis, found in card.matrix.items() if found.family not in (None, of)]
    if others:
        say(f"left out, as {of} is another family: {', '.join(others)}")
    for which in points:
        asked_experiment(replace(request, point=which), root)
    return points


def _log(number: int, axis: str) -> str:
    return f"{axis}-{number}.log"


def _words(request: Request, axis: str, point: str) -> list[str]:
    """Returns the words of `pqk` that run one point of a request."""
    words = ["run", request.card, "--backend", request.backend, "--axis", axis, "--point", point]
    given = {
        "--quantizer": request.quantizer,
        "--model": placed(request.model),
        "--scenes": placed(request.scenes),
        "--images": placed(request.images),
        "--train-scenes": placed(request.train_scenes),
        "--train-images": placed(request.train_images),
        "--seed": request.seed,
        "--processes": request.processes if request.processes > 1 else None,
    }
    words += [word for name, value in given.items() if value is not None for word in (name, str(value))]
    words += [word for name, value in request.settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    flags = {"--fresh": request.fresh, "--retime": request.retime, "--no-qat": request.qat is False}
    return [*words, *(flag for flag, given in flags.items() if given)]
