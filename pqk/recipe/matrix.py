"""Runs a card with a matrix: one experiment for each point of each axis; the points share stages where possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backends.base import BackendError
from pqk.errors import PqkError
from pqk.recipe.experiment import experiment_family
from pqk.recipe.request import Request, asked_experiment
from pqk.recipe.runner import run
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
    of = experiment_family(request.model, root).name
    for axis in axes:
        card.at(axis, next(iter(card.matrix[axis].points), "") if axis in card.matrix else "", of)
    points = [found for found in card.points() if found[0] in axes] if axes else card.points(of)
    others = [] if axes else [axis for axis, found in card.matrix.items() if found.family not in (None, of)]
    if others:
        say(f"left out, as {of} is another family: {', '.join(others)}")
    for which in points:
        asked_experiment(replace(request, point=which), root)
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
