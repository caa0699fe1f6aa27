"""Scores a run on its test samples, once, after all choices; with `--decide` on as many scenes as a verdict needs."""

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
from pqk.recipe.candidate import Candidate
from pqk.recipe.experiment import Experiment
from pqk.recipe.request import Request
from pqk.recipe.splits import can_grow
from pqk.recipe.stages import open_split
from pqk.recipe.verdict import drop_limit
from pqk.stats.intervals import LEVEL, Interval, groups_to_decide


@dataclass(frozen=True)
class Final:
    """Scores of every variant on the test samples, by its name, as `stages.quality` returns them.

    sha256: of all scenes that were scored. level: of the intervals, so that all looks together err in at most 5 %.
    note: on the looks, for the record; None without `decide`.
    """

    scored: Mapping[str, Mapping[str, Any]]
    sha256: str
    level: float
    note: str | None = None


def score_final(
    candidate: Candidate,
    request: Request,
    root: Path,
    recipe: Sequence[str],
    decide: int | None,
    say: Callable[[str], None],
) -> Final:
    """Scores all variants on the test samples.

    decide: the most scenes. The function looks at the candidate's drop, and doubles the scenes until the interval of
    the drop lies on one side of the limit or there are `decide` scenes. The looks are planned beforehand, and each is
    judged at 1 - 0.05 / looks (Bonferroni; Wald 1947 explains why a fixed level is not enough). Raises PqkError for
    `decide` where no scenes can be added or the main metric gives no drop.
    """
    splits, level, note = [candidate.test], LEVEL, None
    if decide is not None:
        splits, level, note = _looks(candidate, request, root, drop_limit(recipe, _thresholds(candidate)), decide, say)
    scored = {variant.name: _on(candidate, variant, splits) for variant in candidate.variants}
    shas = [split.sha256 for split in splits]
    return Final(scored, shas[0] if len(shas) == 1 else sha256_json(shas), level, note)


def planned_looks(first: int, most: int) -> list[int]:
    """Returns the numbers of scenes for the looks at a drop: doubled from `first`, and `most` as the last one."""
    looks = [first]
    while looks[-1] < most:
        looks.append(min(2 * looks[-1], most))
    return looks


def check_decide(request: Request, experiment: Experiment) -> None:
    """Raises PqkError where `--decide` cannot add scenes: the scenes of a folder are fixed."""
    if not can_grow(request, experiment):
        raise PqkError(
            "--decide adds generated test scenes, but the scenes of a folder are fixed; add scenes to the folder"
        )


def _looks(
    candidate: Candidate, request: Request, root: Path, limit: float, most: int, say: Callable[[str], None]
) -> tuple[list[SampleSet], float, str]:
    """Returns the splits that a decision needed, the level of the intervals, and the record's note on the looks."""
    check_decide(request, candidate.experiment)
    have = len(candidate.test.groups)
    if most < have:
        raise PqkError(f"--max-scenes {most} is less than the {have} test scenes of the workload")
    looks = planned_looks(have, most)
    level = 1 - (1 - LEVEL) / len(looks)
    splits = [candidate.test]
    for number, count in enumerate(looks, 1):
        have = sum(len(split.groups) for split in splits)
        if count > have:
            splits.append(open_split(candidate.ctx, candidate.experiment, "test", root, first=have, count=count - have))
        drop = _drop(candidate, splits, level)
        if drop is None or drop.low is None or drop.high is None:
            raise PqkError(f"--decide needs a drop with an interval, but {candidate.metric} gives none here")
        say(f"{count} test scenes: drop {drop.value:.2f} %, {drop.low:.2f} to {drop.high:.2f} % (limit {limit:g} %)")
        if drop.high <= limit or drop.low > limit:
            break
        needed = groups_to_decide(drop, limit)
        if number < len(looks) and needed is not None:
            say(f"undecided: about {needed} scenes would decide")
    share = 100 * level
    return splits, level, f"look {number} of at most {len(looks)} at the test scenes, each judged at {share:.4g} %"


def _thresholds(candidate: Candidate) -> Any:
    return candidate.experiment.evaluation.thresholds


def _drop(candidate: Candidate, splits: Sequence[SampleSet], level: float) -> Interval | None:
    mine, teacher = (_on(candidate, candidate.variants[n], splits) for n in (-1, 0))
    return drop_of(candidate.experiment.metric, mine, teacher, candidate.truthful, level)


def _on(candidate: Candidate, variant: Variant, splits: Sequence[SampleSet]) -> dict[str, Any]:
    scoring = candidate.experiment.family.scoring_part()
    return together([candidate.score(variant, on=split) for split in splits], scoring)
