"""Reads plans, several experiments with their order, hours and price, from `schedule/plans/NAME.yaml`: `load_plan`."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pqk import paths
from pqk.errors import PqkError, nearest
from pqk.files import matching
from pqk.settings.card import ABLATION, ID_PATTERN, Card, CardId, list_cards, load_card
from pqk.settings.recipe import JOINT
from pqk.settings.seeds import parse_seeds, seeds_text
from pqk.settings.yamlfile import Section, Spec, load_spec

DEVICES = ("H100", "A100")
A100_FACTOR = (1.7, 2.2)
"""Training speed of an H100 divided by that of an A100, from the lab's schedule: a range, not a measurement."""
STATUS, SCHEDULE, REVIEW = "status", "schedule", "review"
RESERVED = (STATUS, SCHEDULE, REVIEW)  # `pqk plan status` is no plan
BASELINE = "Baseline"
TRAIN_SEED = "workload.seeds.train"
TEACHER_CARD = "B1"  # whose workload the Teacher is evaluated on

Range = tuple[float, float]


class PlannedExperiment(Section):
    """One experiment. id: the task card; with `door` only a name, as that script is run instead of a card.

    hours: of one train seed. train_seeds: the card is run once for each; without them, with that of workload.yaml.
    eval_seeds: the result is then evaluated under these, such as "0..4", and the rows are kept in the ledger.
    """

    id: CardId
    hours: Annotated[float, Field(gt=0, le=10_000)]
    what: Annotated[str, Field(min_length=1, max_length=200)]
    door: Literal["baseline_eval"] | None = None
    train_seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=1024)], ...] | None, Field(strict=False)] = None
    eval_seeds: str | None = None

    @field_validator("eval_seeds")
    @classmethod
    def _seeds(cls, text: str | None) -> str | None:
        try:
            return None if text is None else seeds_text(parse_seeds(text))
        except PqkError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _seeds_of_what(self) -> Self:
        if self.train_seeds is not None and (
            not self.train_seeds or len(set(self.train_seeds)) < len(self.train_seeds)
        ):
            raise ValueError(f"train_seeds of {self.id!r} must be one or more different numbers")
        if self.door is not None and self.train_seeds is not None:
            raise ValueError(f"{self.id!r} is a script and trains nothing: leave out train_seeds")
        return self


class Target(Section):
    """The target of a card, for the page of the plan's results: one of `least` and `most`.

    measure: drop_pct is the mean over all evaluations; params_cut_pct, flops_cut_pct and file_cut_pct are against the
    Teacher; x_own_f32 and x_own_best_float are speeds against the same model in float; flops_G is of a pair, hours are
    device hours that made the model. against: another card; then the drop is the difference of both in points, and
    every other measure is the quotient. if_missed: note for readers when the target is missed.
    """

    card: CardId
    measure: Literal[
        "drop_pct",
        "params_cut_pct",
        "flops_cut_pct",
        "file_cut_pct",
        "x_own_f32",
        "x_own_best_float",
        "flops_G",
        "hours",
    ]
    least: float | None = None
    most: float | None = None
    against: CardId | None = None
    if_missed: Annotated[str, Field(min_length=1, max_length=300)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.least is None) == (self.most is None):
            raise ValueError(f"the target {self.measure} of {self.card!r} needs one of least and most")
        return self


class Plan(Spec):
    """Experiments, and the price of an hour. Hours are estimates for one `device`; rate: US dollars per hour on it.

    rollback: false for a campaign, which reports failures without repairing them: no recipe is run again by the
    rollback table, a recipe that missed its thresholds is a result like any other, and cards that require it run.
    document: name of the plan's schedule in schedule/, without .md.
    """

    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    title: Annotated[str, Field(min_length=1, max_length=200)]
    goal: Annotated[str, Field(min_length=1)]
    hours_from: Annotated[str, Field(min_length=1)]
    device: Literal["H100", "CPU"]
    rate: Annotated[float, Field(ge=0, le=10_000)]
    rollback: bool = True
    document: Annotated[str, Field(pattern=r"^\w[\w-]{0,79}$")] | None = None
    experiments: Annotated[tuple[PlannedExperiment, ...], Field(strict=False, min_length=1)]
    targets: Annotated[tuple[Target, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _targets_of_its_cards(self) -> Self:
        known = [experiment.id for experiment in self.experiments]
        for target in self.targets:
            for card in (target.card, target.against or target.card):
                if card not in known:
                    raise ValueError(f"has a target for {card!r}, which is not one of its experiments")
        return self

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        names = [experiment.id for experiment in self.experiments]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"lists the experiment {twice!r} twice")
        return self

    @property
    def name(self) -> str:
        """Returns the file's name without .yaml."""
        return self._source.stem


@dataclass(frozen=True)
class Step:
    """One experiment in the order of its plan: with its card (None: a script), and the ids that it waits for.

    id: the card's, followed by '-s1' if the plan has it with several train seeds. train_seed: None is that of
    workload.yaml. eval_seeds: see `PlannedExperiment`.
    """

    id: str
    combo: str
    what: str
    hours: float
    requires: tuple[str, ...]
    card: Card | None
    train_seed: int | None = None
    eval_seeds: str | None = None

    @property
    def settings(self) -> dict[str, int]:
        """Returns the settings that it lays over the card's configs."""
        return {} if self.train_seed is None else {TRAIN_SEED: self.train_seed}


def plans_folder(root: Path) -> Path:
    """Returns the folder of the plans."""
    return root / "schedule" / "plans"


def list_plans(root: Path | None = None) -> list[str]:
    """Returns the names of the plans in schedule/plans, sorted."""
    base = root or paths.project_root()
    stems = sorted(path.stem for path in matching(plans_folder(base), "*.yaml") if re.match(ID_PATTERN, path.stem))
    return [stem for stem in stems if stem not in RESERVED]


def load_plan(name: str, root: Path | None = None) -> Plan:
    """Reads a plan by its name. Raises PqkError when there is no such plan, or it is invalid."""
    base = root or paths.project_root()
    known = list_plans(base)
    if name not in known:
        where, near = paths.shown(plans_folder(base)), nearest(name, [*known, *RESERVED])
        raise PqkError(f"there is no plan {name!r} in {where}{near}; plans: {', '.join(known) or 'none'}")
    return load_spec(Plan, plans_folder(base) / f"{name}.yaml", None, "", "plan")


def ordered(plan: Plan, root: Path | None = None) -> list[Step]:
    """Returns the plan's experiments in the order in which they run.

    No experiment runs before those that its card requires. Among those that can run: scripts, K alone, P alone, T
    alone, Q alone, recipes of two stages, of three, of four, the joint PQK, ablations; then the order of the file.
    Raises PqkError when a card is missing or invalid, requires a card that the plan does not have, or when cards
    require each other in a circle.
    """
    base = root or paths.project_root()
    where = paths.shown(plan.source)
    seeds = {experiment.id: experiment.train_seeds for experiment in plan.experiments}
    steps = [step for experiment in plan.experiments for step in _steps(experiment, seeds, where, base)]
    twice = next((name for name, count in Counter(step.id for step in steps).items() if count > 1), None)
    if twice is not None:
        raise PqkError(f"{where}: {twice} is the name of two experiments")
    ranked = sorted(steps, key=_rank)
    missing = [len(set(step.requires)) for step in ranked]
    behind: dict[str, list[int]] = {step.id: [] for step in ranked}
    for place, step in enumerate(ranked):
        for other in set(step.requires):
            behind[other].append(place)
    free = [place for place, count in enumerate(missing) if not count]  # a heap, as it is sorted
    done: list[Step] = []
    while free:
        step = ranked[heapq.heappop(free)]
        done.append(step)
        for place in behind[step.id]:
            missing[place] -= 1
            if not missing[place]:
                heapq.heappush(free, place)
    if len(done) < len(ranked):
        left = [step.id for step, count in zip(ranked, missing, strict=True) if count]
        raise PqkError(f"{where}: these cards require each other: {', '.join(left)}")
    return done


def _steps(experiment: PlannedExperiment, seeds: Mapping[str, Any], where: str, root: Path) -> list[Step]:
    """Returns a step for each train seed. seeds: the train seeds of all experiments of the plan."""
    if experiment.door is not None:
        if experiment.id in list_cards(root):
            raise PqkError(f"{where}: {experiment.id} is a card, so it cannot name the script {experiment.door}")
        return [Step(experiment.id, "", experiment.what, experiment.hours, (), None, eval_seeds=experiment.eval_seeds)]
    try:
        card = load_card(experiment.id, root)
    except PqkError as error:
        raise PqkError(f"{where}: {error}") from None
    for other in card.requires:
        if other not in seeds:
            raise PqkError(
                f"{where}: {card.id} requires {other}, which the plan does not have; add it under experiments "
                "(a card that has run already is not run again)"
            )
    if card.matrix and experiment.eval_seeds is not None:
        raise PqkError(f"{where}: {card.id} is a matrix and has no result of its own: leave out eval_seeds")
    steps = []
    for seed in experiment.train_seeds or (None,):
        requires = tuple(_named(other, _same_or_first(seeds[other], seed), seeds[other]) for other in card.requires)
        name = _named(card.id, seed, experiment.train_seeds)
        hours, eval_seeds = experiment.hours, experiment.eval_seeds
        steps.append(Step(name, card.combo, experiment.what, hours, requires, card, seed, eval_seeds))
    return steps


def _named(card: str, seed: int | None, seeds: Sequence[int] | None) -> str:
    return card if seeds is None or len(seeds) == 1 else f"{card}-s{seed}"


def _same_or_first(seeds: Sequence[int] | None, wanted: int | None) -> int | None:
    """Returns the train seed of a required card that counts: the same seed, else its first one."""
    return None if seeds is None else wanted if wanted in seeds else seeds[0]


def _rank(step: Step) -> int:
    if step.card is None:
        return 0
    if step.combo == ABLATION:
        return 9
    recipe = step.card.recipe
    if recipe == JOINT:
        return 8
    return 1 + "KPTQ".index(recipe[0]) if len(recipe) == 1 else 3 + len(recipe)


def hours_on(device: str, hours: float) -> Range:
    """Returns estimated hours on a device, least and most, for work that takes `hours` on an H100.

    hours(A100) = hours(H100) * (1.7 ... 2.2). Raises PqkError for a device without a factor, such as a CPU.
    """
    if device not in DEVICES:
        raise PqkError(f"--device {device}: hours are known for {', '.join(DEVICES)}{nearest(device, DEVICES)}")
    return (hours, hours) if device == "H100" else (hours * A100_FACTOR[0], hours * A100_FACTOR[1])


def total(ranges: Sequence[Range]) -> Range:
    """Returns least and most hours of several experiments, one after another."""
    return sum(low for low, _ in ranges), sum(high for _, high in ranges)


def rate_on(plan: Plan, device: str, asked: float | None) -> float | None:
    """Returns dollars per hour: `asked`, else the plan's rate for the plan's device; None if neither is known."""
    return asked if asked is not None else plan.rate if device == plan.device else None


def cost(hours: Range, rate: float | None) -> Range | None:
    """Returns least and most dollars."""
    return None if rate is None else (hours[0] * rate, hours[1] * rate)


def waits_for(step: Step, steps: Mapping[str, Step]) -> set[str]:
    """Returns every experiment that must be done before `step`, directly or indirectly."""
    found: set[str] = set()
    open_ends = list(step.requires)
    while open_ends:
        name = open_ends.pop()
        if name not in found:
            found.add(name)
            open_ends += steps[name].requires
    return found
