"""Scores a run on its test samples, once, when everything is chosen; with `--decide` on as many as a verdict needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqk.engines.variant import Variant
from pqk.errors import PqkError
from pqk.families.contract import SampleSet
from pqk.files import sha256_json
from pqk.measure.scores import drop_of, together
from pqk.recipe.candidate import Outcome
from pqk.recipe.experiment import Experiment
from pqk.recipe.request import Request
from pqk.recipe.splits import can_grow
from pqk.recipe.stages import open_split
from pqk.recipe.verdict import drop_limit
from pqk.stats.intervals import LEVEL, Interval, groups_to_decide


@dataclass(frozen=True)
class Final:
    """Scores of every variant on the test samples, by its name; what `stages.quality` returns.

    sha256: of all scenes that were scored. level: of the intervals, so that all looks together err in 5 % at most.
    note: what the record tells of the looks; None for a single one.
    """

    scored: Mapping[str, Mapping[str, Any]]
    sha256: str
    level: float
    note: str | None = None


def score_final(
    outcome: Outcome,
    request: Request,
    root: Path,
    recipe: Sequence[str],
    decide: int | None,
    say: Callable[[str], None],
) -> Final:
    """Scores all variants on the test samples.

    decide: look at the candidate's drop, and double the scenes until its interval lies on one side of the limit or
    there are so many. The looks are planned beforehand, and each is judged at 1 - 0.05 / looks (Bonferroni; Wald 1947
    on why a fixed level would not do). Raises PqkError for `decide` where no scenes can be added or no drop is told.
    """
    splits, level, note = [outcome.test], LEVEL, None
    if decide is not None:
        splits, level, note = _looks(outcome, request, root, drop_limit(recipe, _thresholds(outcome)), decide, say)
    scored = {variant.name: _on(outcome, variant, splits) for variant in outcome.variants}
    shas = [split.sha256 for split in splits]
    return Final(scored, shas[0] if len(shas) == 1 else sha256_json(shas), level, note)


def planned_looks(first: int, most: int) -> list[int]:
    """Numbers of scenes at which a drop is looked at: doubled from `first`, and `most` as the last one."""
    looks = [first]
    while looks[-1] < most:
        looks.append(min(2 * looks[-1], most))
    return looks


def check_decide(request: Request, experiment: Experiment) -> None:
    """Raise PqkError where `--decide` cannot add scenes: those of a folder are all there are."""
    if not can_grow(request, experiment):
        raise PqkError("--decide adds generated test scenes, and those of a folder are all there are; add some to it")


def _looks(
    outcome: Outcome, request: Request, root: Path, limit: float, most: int, say: Callable[[str], None]
) -> tuple[list[SampleSet], float, str]:
    check_decide(request, outcome.experiment)
    have = len(outcome.test.groups)
    if most < have:
        raise PqkError(f"--max-scenes {most} is less than the {have} test scenes of the workload")
    looks = planned_looks(have, most)
    level = 1 - (1 - LEVEL) / len(looks)
    splits = [outcome.test]
    for number, count in enumerate(looks, 1):
        have = sum(len(split.groups) for split in splits)
        if count > have:
            splits.append(open_split(outcome.ctx, outcome.experiment, "test", root, first=have, count=count - have))
        drop = _drop(outcome, splits, level)
        if drop is None or drop.low is None or drop.high is None:
            raise PqkError(f"--decide needs a drop with an interval, and {outcome.metric} gives none here")
        say(f"{count} test scenes: drop {drop.value:.2f} %, {drop.low:.2f} to {drop.high:.2f} % (limit {limit:g} %)")
        if drop.high <= limit or drop.low > limit:
            break
        needed = groups_to_decide(drop, limit)
        if number < len(looks) and needed is not None:
            say(f"undecided: about {needed} scenes would decide")
    share = 100 * level
    return splits, level, f"look {number} of at most {len(looks)} at the test scenes, each judged at {share:.4g} %"


def _thresholds(outcome: Outcome) -> Any:
    return outcome.experiment.evaluation.thresholds


def _drop(outcome: Outcome, splits: Sequence[SampleSet], level: float) -> Interval | None:
    mine, teacher = (_on(outcome, outcome.variants[n], splits) for n in (-1, 0))
    return drop_of(outcome.experiment.metric, mine, teacher, outcome.truthful, level)


def _on(outcome: Outcome, variant: Variant, splits: Sequence[SampleSet]) -> dict[str, Any]:
    summarise = outcome.experiment.family.scoring_part().summarise
    return together([outcome.score(variant, on=split) for split in splits], summarise)
