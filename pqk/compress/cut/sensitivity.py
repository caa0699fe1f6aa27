"""Decides how many units are cut from each group: `scan` measures the effect on the outputs, `spend` makes the plan."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pqk.compress.cut.importance import most_important
from pqk.compress.cut.refit import Moments, refit
from pqk.compress.cut.units import Slot, silenced
from pqk.compress.train.data import TrainingData
from pqk.errors import PqkError
from pqk.families.contract import completed
from pqk.families.cutting import Plan
from pqk.settings.prune import Prune


class Score(NamedTuple):
    """Score of a cut network before any training: the distance of the family's first metric from its best value, and
    the relative distance of the outputs to those of the uncut network.
    """

    error: float
    shift: float


Scores = dict[str, dict[int, Score]]
"""Name of a slot -> units that stay -> the score when this slot alone is cut to them."""
BATCH = 4


@dataclass(frozen=True)
class Step:
    """A cut of a slot to `units`, which cuts `share` of it. Steps are ordered by price, then by share, both rising."""

    price: float
    share: float
    slot: str
    units: int


class Probe:
    """Held-out samples, made once, on which many cut networks are compared with the uncut one."""

    def __init__(self, model: nn.Module, spec: Prune, data: TrainingData) -> None:
        self.cutting, self._learning, self._metric = data.cutting, data.learning, data.family.settings_part().METRICS[0]
        made = data.batches(spec.train, next(model.parameters()).device, 0)
        asked = spec.sensitivity
        self.batches = list(made.held_out(asked.pairs, asked.size, BATCH))
        self.begun = self._begin(model)
        self.uncut = list(self._outputs(model, self.begun))
        if not made.truthful:
            config: Any = model.config
            both = zip(self.batches, self.uncut, strict=True)
            self.batches = [self._learning.as_truth(batch, out, config) for batch, out in both]
        usable = [any(self._learning.score(out, b)) for out, b in zip(self.uncut, self.batches, strict=True)]
        if not any(usable):
            raise self._nothing_to_score()
        self.batches, self.begun, self.uncut = (
            [item for item, fits in zip(items, usable, strict=True) if fits]
            for items in (self.batches, self.begun, self.uncut)
        )
        self.error = self.score(model, same_beginning=True).error
        if not math.isfinite(self.error):
            raise PqkError(
                f"{self._metric.name} of the network to be pruned is not finite on the samples of the sensitivity scan"
            )

    @torch.no_grad()
    def score(self, model: nn.Module, same_beginning: bool = False) -> Score:
        """Scores a network on all samples; not finite when its outputs are not.

        On few samples the error falls for about half of all small cuts, so the shift compares the outputs with the
        uncut network's (`LearningPart.shift`). same_beginning: the network differs from the uncut one only after its
        first part, whose outputs are reused. Raises PqkError where no sample has the metric.
        """
        begun = self.begun if same_beginning else self._begin(model)
        found: list[dict[str, Any]] = []
        shift = 0.0
        for batch, uncut, cut in zip(self.batches, self.uncut, self._outputs(model, begun), strict=True):
            rows = [row for of_sample in self._learning.score(cut, batch) for row in of_sample]
            found += rows
            shift += len(rows) * self._learning.shift(cut, uncut, batch)
        values = [row[self._metric.name] for row in completed(self._learning, found)]
        if None in values:
            raise self._nothing_to_score()
        return Score(math.fsum(map(self._metric.loss, values)) / len(values), shift / len(values))

    def _nothing_to_score(self) -> PqkError:
        unit, remedy = self._learning.UNIT, self._learning.REMEDY
        return PqkError(f"none of the {unit} of the sensitivity scan has anything to score; {remedy}")

    @torch.no_grad()
    def _begin(self, model: nn.Module) -> list[Any]:
        return [self.cutting.begin(model, batch) for batch in self.batches]

    @torch.no_grad()
    def _outputs(self, model: nn.Module, begun: Sequence[Any]) -> Iterator[Mapping[str, Tensor]]:
        for batch, first in zip(self.batches, begun, strict=True):
            yield self.cutting.finish(model, first, batch)


def scan(
    model: nn.Module,
    slots: Sequence[Slot],
    importance: Mapping[str, Tensor],
    levels: Sequence[float],
    probe: Probe,
    known: Moments,
    report: Callable[[str], None] | None = None,
) -> Scores:
    """Returns the scores of the network when one slot at a time loses each level of its units; restores the weights.

    The weights of the least important units of every group of the slot are set to zero, and the layers in `known` are
    refitted, as in the cut network. A level with outputs that are not finite is left out, with all higher levels of
    this slot.
    """
    found: Scores = {}
    for index, slot in enumerate(slots):
        for units in slot.sizes(levels):
            with taken_over(model, slot, kept(slot, importance, units), known):
                score = probe.score(model, same_beginning=not probe.cutting.begins(slot.name))
            if not math.isfinite(score.shift):
                break
            found.setdefault(slot.name, {})[units] = score
        if report:
            report(f"sensitivity scan: {index + 1} of {len(slots)} groups")
    return found


@contextlib.contextmanager
def taken_over(model: nn.Module, slot: Slot, keep: Mapping[str, Tensor], known: Moments) -> Iterator[None]:
    """Does the same as `silenced`, and refits the layers that read the slot where their moments are known."""
    whole = {group.name: torch.arange(group.units) for group in slot.groups}
    with silenced(model, slot, whole):  # remembers the weights
        for group in slot.groups:
            refit(model, group, keep[group.name], known)
        with silenced(model, slot, keep):
            yield


def kept(slot: Slot, importance: Mapping[str, Tensor], units: int) -> dict[str, Tensor]:
    """Returns, for each group of the slot, the indices of the units that stay when the slot keeps `units`."""
    if slot.kind == "block":
        return {group.name: torch.arange(units) for group in slot.groups}
    return {group.name: most_important(importance[group.name], slot.keeps(group, units)) for group in slot.groups}


def steps_by_scan(slots: Sequence[Slot], scores: Scores, cost: Callable[[Plan], int]) -> list[Step]:
    """Returns single steps of all slots, ordered by the shift per parameter (or FLOP) that each step saves.

    Between the levels of the scan the shift is interpolated linearly, and is never lower than at a smaller cut. Only
    the lower convex hull of a slot's points counts, so that the price of its steps rises and they are taken in order
    (the linear relaxation of the multiple-choice knapsack, Sinha and Zoltners 1979). Slots are assumed to act
    independently. cost: called with plans that cut one slot alone.
    """
    full = cost({})
    steps = []
    for slot in slots:
        points, highest = [(0.0, 0.0, slot.units)], 0.0
        for units, score in sorted(scores.get(slot.name, {}).items(), reverse=True):
            highest = max(highest, score.shift)
            points.append((float(full - cost({slot.name: units})), highest, units))
        hull = _lower_hull(points)
        for (saved, shift, units), (saved_next, shift_next, units_next) in itertools.pairwise(hull):
            price = (shift_next - shift) / (saved_next - saved)
            sizes = range(units // slot.step * slot.step, units_next, -slot.step)
            cuts = [*(n for n in sizes if n < units), units_next]
            steps += [Step(price, 1 - n / slot.units, slot.name, n) for n in cuts]
    return sorted(steps, key=lambda step: (step.price, step.share))


def _lower_hull(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Returns the lower convex hull of points (x, y, ...) with rising x, from the first to the last (Andrew 1979)."""
    hull: list[tuple[float, float, int]] = []
    for point in points:
        if hull and point[0] <= hull[-1][0]:
            continue  # saves nothing more
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-1][0]) >= (point[1] - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append(point)
    return hull


def even_steps(slots: Sequence[Slot]) -> list[Step]:
    """Returns single steps ordered by the share of the slot's units that is cut after each: all slots lose alike."""
    steps = []
    for slot in slots:
        sizes = range((slot.units - 1) // slot.step * slot.step, 0, -slot.step)
        shares = [(1 - units / slot.units, units) for units in sizes if units < slot.units]
        steps += [Step(share, share, slot.name, units) for share, units in shares]
    return sorted(steps, key=lambda step: (step.price, step.share))


def spend(
    slots: Sequence[Slot],
    steps: Sequence[Step],
    cost: Callable[[Plan], int],
    rho: float,
    may_drop: Callable[[Sequence[str]], bool],
) -> dict[str, int]:
    """Returns the plan with the fewest steps that cuts at least the share `rho` of the cost.

    may_drop: whether these blocks may all be cut. A block that may not is skipped. Once a block is cut, its own heads
    and MLP no longer matter.
    Raises PqkError when all steps together do not reach rho.
    """
    blocks = {slot.name: slot for slot in slots if slot.kind == "block"}
    around = {slot.name: {name for name, block in blocks.items() if slot.inside(block)} for slot in slots}
    plans: list[dict[str, int]] = [{}]
    for step in steps:
        last = plans[-1]
        dropped = [name for name in last if name in blocks]
        if around[step.slot] & {*dropped} or (step.slot in blocks and not may_drop([*dropped, step.slot])):
            continue
        plans.append({**last, step.slot: step.units})
    aim = (1 - rho) * cost({})
    if cost(plans[-1]) > aim:
        most = 100 * (1 - cost(plans[-1]) / cost({}))
        raise PqkError(
            f"rho {rho:g} cannot be reached: everything that may be cut is {most:.1f} % of the network; "
            "allow more units or higher sensitivity.levels"
        )
    low, high = 0, len(plans) - 1  # the network shrinks with every plan
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(plans[middle]) <= aim else (middle + 1, high)
    gone = {name for name in plans[low] if name in blocks}
    return {name: units for name, units in plans[low].items() if name in gone or not around[name] & gone}
