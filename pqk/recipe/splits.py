"""Opens the samples of a run: validation samples for all decisions, test samples for one scoring at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pqk.errors import PqkError
from pqk.families.contract import Given, SampleSet
from pqk.recipe.experiment import Experiment
from pqk.recipe.request import Request
from pqk.recipe.stages import Context, open_split

_LEARN = frozenset(("P", "K", "PQK", "Q"))
"""Stages that train, or may train: Q trains where PTQ drops too much."""


def given_by(request: Request) -> Given:
    """Returns the data that the command line names instead of the workload's."""
    return Given(request.scenes, request.images, request.train_scenes, request.train_images)


def test_split(ctx: Context, request: Request, experiment: Experiment, root: Path) -> SampleSet:
    """Returns the test samples: those of the command line, else the workload's, drawn with the eval seed."""
    return open_split(ctx, experiment, "test", root, given_by(request))


def train_split(
    ctx: Context, request: Request, experiment: Experiment, root: Path, recipe: Sequence[str]
) -> SampleSet | None:
    """Returns the training samples of a recipe; None for a recipe or a family without training.

    Raises PqkError where the command line names training data and nothing is trained.
    """
    if experiment.family.learning is not None and not _LEARN.isdisjoint(recipe):
        return open_split(ctx, experiment, "train", root, given_by(request))
    if request.train_scenes or request.train_images:
        option = "--train-scenes" if request.train_scenes else "--train-images"
        raise PqkError(f"{option}: the recipe of card {experiment.card.id} trains nothing; leave the option out")
    return None


def check_apart(experiment: Experiment, sets: dict[str, SampleSet | None]) -> None:
    """Raises PqkError when two splits share a sample of the user's; seeds keep generated ones apart."""
    own = {name: found for name, found in sets.items() if found is not None and found.own}
    experiment.family.data_part().refuse_overlap(own)


def can_grow(request: Request, experiment: Experiment) -> bool:
    """Returns whether more test groups can be made: generated groups can, the groups of a folder are fixed."""
    return experiment.family.data_part().can_grow(experiment.workload, given_by(request))
