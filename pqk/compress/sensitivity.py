"""How many units each group gives: AbsRel when a group is silenced, and a budget spent where it hurts least."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pqk.compress.importance import most_important
from pqk.compress.pairs import depth_scores, scenery
from pqk.compress.refit import Moments, refit
from pqk.compress.units import Plan, Slot, may_drop, silenced
from pqk.data.seeds import split_seed
from pqk.data.stream import training_pairs
from pqk.data.synthetic import texture_bank
from pqk.errors import PqkError
from pqk.models.dust3r import Dust3r
from pqk.spec.prune import Prune

Rises = dict[str, dict[int, float]]
"""Name of a slot -> units that stay -> rise of AbsRel, absolute."""
BATCH = 4


@dataclass(frozen=True)
class Step:
    """Cut a slot down to `units`, so that `share` of it is gone. The cheapest go first, of equal ones the mildest."""

    price: float
    share: float
    slot: str
    units: int


class Probe:
    """Held-out pairs, rendered once, on which a network is scored many times."""

    def __init__(self, spec: Prune, device: torch.device, seed: int) -> None:
        bank, wanted = texture_bank().to(device), spec.sensitivity.pairs
        self.batches = [
            training_pairs(
                min(BATCH, wanted - first),
                spec.sensitivity.size,
                split_seed("validation", seed, first),
                bank,
                **scenery(spec.train),
            )
            for first in range(0, wanted, BATCH)
        ]
        self.batches = [batch for batch in self.batches if bool(batch.valid[:, 0].any())]
        if not self.batches:
            raise PqkError("no pair of the sensitivity scan has a valid pixel; lower min_covisible")

    @torch.no_grad()
    def encode(self, model: Dust3r) -> list[Tensor]:
        """The tokens of every batch, (B, 2, N, dim) each."""
        return [model.encode(b.images.flatten(0, 1)).unflatten(0, b.images.shape[:2]) for b in self.batches]

    @torch.no_grad()
    def score(self, model: Dust3r, tokens: Sequence[Tensor] | None = None) -> float:
        """AbsRel of view 1 over all pairs in both orders; `tokens` spares the encoder where it has not changed.

        Raises PqkError when it is not finite.
        """
        total, count = 0.0, 0
        for batch, encoded in zip(self.batches, tokens or self.encode(model), strict=True):
            size = (batch.images.shape[-2], batch.images.shape[-1])
            a, b = encoded[:, 0], encoded[:, 1]
            out = model.decode(torch.cat([a, b]), torch.cat([b, a]), size, size)
            truth, _, valid, _ = batch.ordered()
            usable = int(valid.flatten(1).any(1).sum())
            total += usable * depth_scores(out["pts3d_1"][..., 2], truth[..., 2], valid)["absrel"]
            count += usable
        if not torch.isfinite(torch.tensor(total)):
            raise PqkError("AbsRel of the network to be pruned is not finite on the pairs of the sensitivity scan")
        return total / count


def scan(
    model: Dust3r,
    slots: Sequence[Slot],
    importance: Mapping[str, Tensor],
    spec: Prune,
    probe: Probe,
    known: Moments | None = None,
    report: Callable[[str], None] | None = None,
) -> tuple[float, Rises]:
    """AbsRel of the network, and how much it rises when each slot alone loses each level of its units.

    The least important units of every group of the slot are silenced, and with `known` the others refitted, as they
    will be in the cut network; the weights come back as they were.
    """
    tokens = probe.encode(model)
    base = probe.score(model, tokens)
    rises: Rises = {}
    for index, slot in enumerate(slots):
        for units in slot.sizes(spec.sensitivity.levels):
            with taken_over(model, slot, kept(slot, importance, units), known):
                unchanged = None if slot.name.startswith("enc_") else tokens
                rises.setdefault(slot.name, {})[units] = probe.score(model, unchanged) - base
        if report:
            report(f"sensitivity scan: {index + 1} of {len(slots)} groups")
    return base, rises


@contextlib.contextmanager
def taken_over(model: Dust3r, slot: Slot, keep: Mapping[str, Tensor], known: Moments | None) -> Iterator[None]:
    """`silenced`, with the layers behind refitted where there are moments."""
    whole = {group.name: torch.arange(group.units) for group in slot.groups}
    with silenced(model, slot, whole):  # remembers the weights
        if known is not None:
            refit(model, slot, keep, known)
        with silenced(model, slot, keep):
            yield


def kept(slot: Slot, importance: Mapping[str, Tensor], units: int) -> dict[str, Tensor]:
    """For each group of the slot the indices of the units that stay when the slot keeps `units`."""
    if slot.kind == "block":
        return {group.name: torch.arange(units) for group in slot.groups}
    return {group.name: most_important(importance[group.name], slot.keeps(group, units)) for group in slot.groups}


def steps_by_scan(slots: Sequence[Slot], rises: Rises, cost: Callable[[Plan], int]) -> list[Step]:
    """Single steps of all slots, ordered by the rise of AbsRel that each costs per parameter (or FLOP) it saves.

    Between the levels of the scan the rise is a line; of a slot's points only the lower convex hull counts, so that its
    steps become dearer and dearer and the order never takes a later one first (the linear relaxation of the
    multiple-choice knapsack, Sinha and Zoltners 1979). A measured rise below 0 counts as 0, and none is lower than at
    a milder level. Slots are taken to act independently. `cost` of a plan that cuts one slot alone.
    """
    full = cost({})
    steps = []
    for slot in slots:
        points, highest = [(0.0, 0.0, slot.units)], 0.0
        for units, rise in sorted(rises.get(slot.name, {}).items(), reverse=True):
            highest = max(highest, rise)
            points.append((float(full - cost({slot.name: units})), highest, units))
        hull = _lower_hull(points)
        for (saved, rise, units), (saved_next, rise_next, units_next) in itertools.pairwise(hull):
            price = (rise_next - rise) / (saved_next - saved)
            sizes = range(units // slot.step * slot.step, units_next, -slot.step)
            cuts = [*(n for n in sizes if n < units), units_next]
            steps += [Step(price, 1 - n / slot.units, slot.name, n) for n in cuts]
    return sorted(steps, key=lambda step: (step.price, step.share))


def _lower_hull(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The lower convex hull of points (x, y, ...) with rising x, from the first to the last (Andrew 1979)."""
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
    """Single steps ordered by the share of the slot's units that is gone after each: all slots give alike."""
    steps = []
    for slot in slots:
        sizes = range((slot.units - 1) // slot.step * slot.step, 0, -slot.step)
        shares = [(1 - units / slot.units, units) for units in sizes if units < slot.units]
        steps += [Step(share, share, slot.name, units) for share, units in shares]
    return sorted(steps, key=lambda step: (step.price, step.share))


def spend(
    config: Mapping[str, object], slots: Sequence[Slot], steps: Sequence[Step], cost: Callable[[Plan], int], rho: float
) -> dict[str, int]:
    """The plan of the fewest steps that cuts at least the share `rho` of the cost.

    A block that may not go (`may_drop`) is passed over; once a block goes, its own heads and MLP no longer matter.
    Raises PqkError when all steps together do not reach rho.
    """
    blocks = {slot.name for slot in slots if slot.kind == "block"}
    plans: list[dict[str, int]] = [{}]
    for step in steps:
        last = plans[-1]
        dropped = [name for name in last if name in blocks]
        if _block_of(step.slot) in dropped or (step.slot in blocks and not may_drop(config, [*dropped, step.slot])):
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
    return {name: units for name, units in plans[low].items() if name in gone or _block_of(name) not in gone}


def _block_of(slot: str) -> str:
    """The block slot that a slot lies in: 'dec_blocks.1' for 'dec_blocks2.1.ffn'."""
    return ".".join(slot.replace("dec_blocks2.", "dec_blocks.").split(".")[:2])
