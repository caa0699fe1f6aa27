"""Opens the samples of a run: validation, on which everything is decided, and test, which is scored once at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pqk.errors import PqkError
from pqk.families.contract import Given, SampleSet
from pqk.recipe.experiment import Experiment
from pqk.recipe.request import Request
from pqk.recipe.stages import Context, open_split

_LEARN = frozenset(("P", "K", "PQK", "Q"))
"""Stages that train, or may: Q where PTQ drops too much."""


def given_by(request: Request) -> Given:
    """Returns the data that the command line names in place of the workload's."""
    return Given(request.scenes, request.images, request.train_scenes, request.train_images)


def test_split(ctx: Context, request: Request, experiment: Experiment, root: Path) -> SampleSet:
    """Returns the test samples: those of the command line, else the workload's, as the eval seed draws them."""
    return open_split(ctx, experiment, "test", root, given_by(request))


def train_split(
    ctx: Context, request: Request, experiment: Experiment, root: Path, recipe: Sequence[str]
) -> SampleSet | None:
    """Returns what a recipe may learn from; None for a recipe or a family that learns nothing.

    Raises PqkError where the command line names data that nothing would learn from.
    """
    if experiment.family.learning is not None and not _LEARN.isdisjoint(recipe):
        return open_split(ctx, experiment, "train", root, given_by(request))
    if request.train_scenes or request.train_images:
        option = "--train-scenes" if request.train_scenes else "--train-images"
        raise PqkError(f"{option}: nothing is trained in the recipe of card {experiment.card.id}; leave it out")
    return None


def check_apart(experiment: Experiment, sets: dict[str, SampleSet | None]) -> None:
    """Raises PqkError when two splits share a sample of the user's; seeds keep generated ones apart."""
    own = {name: found for name, found in sets.items() if found is not None and found.own}
    experiment.family.data_part().refuse_overlap(own)


def can_grow(request: Request, experiment: Experiment) -> bool:
    """Whether more test groups can be made: generated ones can, those of a folder are all there are."""
    return experiment.family.data_part().can_grow(experiment.workload, given_by(request))
