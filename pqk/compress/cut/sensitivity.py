"""How many units each group gives: what its cut does to the points, and a budget spent where it hurts least."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pqk.compress.cut.importance import most_important
from pqk.compress.cut.refit import Moments, refit
from pqk.compress.cut.units import Plan, Slot, may_drop, silenced
from pqk.data.render.stream import training_pairs
from pqk.data.render.synthetic import texture_bank
from pqk.errors import PqkError
from pqk.families.dust3r.batches import scenery
from pqk.families.dust3r.learning import depth_scores
from pqk.families.dust3r.model import Dust3r
from pqk.settings.prune import Prune
from pqk.settings.seeds import split_seed


class Score(NamedTuple):
    """Of a cut network before any training: AbsRel, and the relative distance of its points to the uncut ones."""

    absrel: float
    shift: float


Scores = dict[str, dict[int, Score]]
"""Name of a slot -> units that stay -> the score when this slot alone is cut to them."""
BATCH = 4


@dataclass(frozen=True)
class Step:
    """Cut a slot down to `units`, so that `share` of it is gone. The cheapest go first, of equal ones the mildest."""

    price: float
    share: float
    slot: str
    units: int


class Probe:
    """Held-out pairs, rendered once, on which networks are compared with an uncut one many times."""

    def __init__(self, model: Dust3r, spec: Prune, seed: int) -> None:
        self.device, wanted = model.mask_token.device, spec.sensitivity.pairs
        bank = texture_bank().to(self.device)
        drawn = [
            training_pairs(
                min(BATCH, wanted - first),
                spec.sensitivity.size,
                split_seed("validation", seed, first),
                bank,
                **scenery(spec.train),
            )
            for first in range(0, wanted, BATCH)
        ]
        self.batches = [batch for batch in drawn if bool(batch.valid.any())]
        if not self.batches:
            raise PqkError("no pair of the sensitivity scan has a valid pixel; lower min_covisible")
        self.tokens = self._encode(model)
        self.points = list(self._points(model, self.tokens))  # of the uncut network
        self.absrel = self.score(model, same_encoder=True).absrel
        if not math.isfinite(self.absrel):
            raise PqkError("AbsRel of the network to be pruned is not finite on the pairs of the sensitivity scan")

    @torch.no_grad()
    def score(self, model: Dust3r, same_encoder: bool = False) -> Score:
        """AbsRel and the shift over all pairs in both orders; not finite when the points are not.

        On few pairs AbsRel falls for every second small cut. So the shift compares the points of both views with the
        uncut network's, X' with X: the mean over valid pixels of |s X' - X| / |X|, with s = median |X| / median |X'|
        for each sample.
        same_encoder: spares the encoder of a network that only differs from the uncut one behind it.
        """
        tokens = self.tokens if same_encoder else self._encode(model)
        absrel: list[float] = []
        shift, count = 0.0, 0
        for batch, uncut, cut in zip(self.batches, self.points, self._points(model, tokens), strict=True):
            _, _, *valid = batch.ordered()
            usable = int(valid[0].flatten(1).any(1).sum())
            absrel += [row["absrel"] for row in depth_scores(*cut, batch)]
            both = torch.stack(valid, dim=1)
            shift += usable * _shift(torch.stack(cut, dim=1), torch.stack(uncut, dim=1), both)
            count += usable
        return Score(math.fsum(absrel) / len(absrel), shift / count)

    @torch.no_grad()
    def _encode(self, model: Dust3r) -> list[Tensor]:
        return [model.encode(b.images.flatten(0, 1)).unflatten(0, b.images.shape[:2]) for b in self.batches]

    @torch.no_grad()
    def _points(self, model: Dust3r, tokens: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Points (2B, H, W, 3) of view 1 and view 2 of every batch, both orders."""
        for batch, encoded in zip(self.batches, tokens, strict=True):
            size = (batch.images.shape[-2], batch.images.shape[-1])
            a, b = encoded[:, 0], encoded[:, 1]
            out = model.decode(torch.cat([a, b]), torch.cat([b, a]), size, size)
            yield out["pts3d_1"].float(), out["pts3d_2"].float()


def _shift(cut: Tensor, uncut: Tensor, valid: Tensor) -> float:
    """See `Probe.score`: points (B, 2, H, W, 3) and masks (B, 2, H, W), one scale for both views of a sample."""
    found = []
    for moved, true, mask in zip(cut, uncut, valid, strict=True):
        if bool(mask.any()):
            x, y = moved[mask], true[mask]
            far = y.norm(dim=-1).clamp(min=1e-6)
            scale = far.median() / x.norm(dim=-1).median().clamp(min=1e-6)
            found.append(((scale * x - y).norm(dim=-1) / far).mean())
    return float(torch.stack(found).mean())


def scan(
    model: Dust3r,
    slots: Sequence[Slot],
    importance: Mapping[str, Tensor],
    spec: Prune,
    probe: Probe,
    known: Moments | None = None,
    report: Callable[[str], None] | None = None,
) -> Scores:
    """The scores when each slot alone loses each level of its units. The weights come back as they were.

    The least important units of every group of the slot are silenced, and with `known` the others refitted, as they
    will be in the cut network. A level whose points are not finite is left out, and all that cut more of this slot.
    """
    found: Scores = {}
    for index, slot in enumerate(slots):
        for units in slot.sizes(spec.sensitivity.levels):
            with taken_over(model, slot, kept(slot, importance, units), known):
                score = probe.score(model, same_encoder=not slot.name.startswith("enc_"))
            if not math.isfinite(score.shift):
                break
            found.setdefault(slot.name, {})[units] = score
        if report:
            report(f"sensitivity scan: {index + 1} of {len(slots)} groups")
    return found


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


def steps_by_scan(slots: Sequence[Slot], scores: Scores, cost: Callable[[Plan], int]) -> list[Step]:
    """Single steps of all slots, ordered by the shift that each costs per parameter (or FLOP) it saves.

    Between the levels of the scan the shift is a line, and never lower than at a milder level; of a slot's points only
    the lower convex hull counts, so that its steps become dearer and dearer and the order never takes a later one first
    (the linear relaxation of the multiple-choice knapsack, Sinha and Zoltners 1979). Slots are taken to act
    independently. `cost` of a plan that cuts one slot alone.
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
