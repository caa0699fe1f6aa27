"""Prunes a network by cutting out whole units, which makes it smaller for every runtime: `prune`.

Units and their weights: `pqk.compress.cut.units`. Order of the units inside a group: `pqk.compress.cut.importance`.
Number of units cut from each group: `pqk.compress.cut.sensitivity`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pqk.compress.cut.cost import Costs
from pqk.compress.cut.importance import loss_of, norms, taylor
from pqk.compress.cut.refit import moments, refit
from pqk.compress.cut.sensitivity import Probe, Scores, even_steps, kept, scan, spend, steps_by_scan
from pqk.compress.cut.units import Slot, cut, groups_of, slots_of
from pqk.compress.train.data import TrainingData
from pqk.compress.train.device import pick_device
from pqk.errors import PqkError
from pqk.families.cutting import Plan
from pqk.settings.prune import Prune

REFITTED = ("heads", "ffn", "inner")
"""Kinds of units whose readers are refitted; see `pqk.settings.prune.Prune`."""


Levels = dict[str, dict[str, float | None]]
"""Number of units that stay -> results of the scan."""


@dataclass(frozen=True)
class Removed:
    """The cut of one size of the configuration.

    name: such as 'blocks.0.ffn'. kind: heads, ffn, block, or one of the family's own. params, flops: savings if only
    this size were cut. importance_kept: share of the summed importance of its units that stays (None for a block).
    scan: for each number of units that stay, with only this group cut and before any training, the rise of the error
    (`rise_pct`, None where the uncut network's own outputs are the ground truth) and the relative distance of the
    outputs to those of the uncut network (`shift_pct`), which decides.
    """

    name: str
    kind: str
    units_before: int
    units_after: int
    params: int
    flops: int
    importance_kept: float | None
    scan: Levels


@dataclass(frozen=True)
class PruneReport:
    """Report of a cut. FLOPs are those of one sample of flops_side x flops_side images, two per multiply-add.

    share: share of the measure (params or flops) that was cut. error_before, error_after (distance of the family's
    first metric from its best value), shift_pct: on the scan's samples, without fine-tuning; None without a scan.
    scan: its results for every size, cut or not.
    """

    rho: float
    measure: str
    importance: str
    share: float
    params_before: int
    params_after: int
    flops_before: int
    flops_after: int
    flops_side: int
    error_before: float | None
    error_after: float | None
    shift_pct: float | None
    removed: list[Removed]
    scan: dict[str, Levels]

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


def prune(
    model: Any,
    spec: Prune,
    data: TrainingData,
    *,
    seed: int,
    device: str = "auto",
    report: Callable[[str], None] | None = None,
) -> tuple[Any, PruneReport]:
    """Returns a smaller network, float32 in eval mode on the CPU, and a report of the cut; `model` is not changed.

    At least the share spec.rho of the parameters (or FLOPs) of the whole network is cut, in as few steps as possible.
    seed: of the training samples for Taylor gradients and the refit; those of the scan are held out and the same for
    every seed. report: gets lines of text about the progress. On one CPU the same arguments give the same network.
    Raises PqkError for a device that is not available, a rho that the allowed units do not reach, a network whose
    outputs are not finite, and a missing torch-pruning.
    """
    say = report or (lambda line: None)
    where = pick_device(device)
    cutting, drawn = data.cutting, data.batches(spec.train, where, seed)

    def samples() -> Iterator[Any]:
        return (drawn.train(index, 1, spec.samples.size) for index in range(spec.samples.pairs))

    def may_drop(blocks: Sequence[str]) -> bool:
        return cutting.may_drop(model.config, blocks)

    kinds = {"block" if name == "blocks" else name for name, allowed in spec.units if allowed}
    slots = slots_of(model, kinds, spec.round_to, cutting)
    slots = [slot for slot in slots if slot.kind != "block" or may_drop([slot.name])]
    groups = groups_of(slots)
    working = copy.deepcopy(model).requires_grad_(True).eval().to(where)
    say(f"importance {spec.importance} of {sum(len(slot.groups) for slot in slots)} groups")
    if spec.importance == "taylor":
        importance = taylor(working, groups, samples(), loss_of(working, data, spec.train.alpha))
    else:
        importance = norms(working, groups, spec.importance)
    known: dict[str, torch.Tensor] = {}
    if spec.refit:
        say("second moments for the refit")
        read = groups_of([slot for slot in slots if slot.kind in REFITTED])
        known = moments(working, read, samples(), spec.samples.pairs, data.learning)
    costs = Costs(model, slots, cutting)

    def cost(plan: Plan) -> int:
        return costs(plan).params if spec.measure == "params" else costs(plan).flops

    scores, probe = Scores(), None
    if spec.sensitivity.enabled:
        probe = Probe(working, spec, data)
        scores = scan(working, slots, importance, spec.sensitivity.levels, probe, known, report)
        steps = steps_by_scan(slots, scores, cost)
    else:
        steps = even_steps(slots)
    plan = spend(slots, steps, cost, spec.rho, may_drop)
    say(f"cutting {len(plan)} of {len(slots)} groups")
    keep: dict[str, torch.Tensor] = {}
    for slot in slots:
        if slot.name in plan:
            chosen = kept(slot, importance, plan[slot.name])
            keep |= chosen
            for group in slot.groups:
                refit(working, group, chosen[group.name], known)
    pruned = cut(working, slots, plan, keep, cutting).eval()
    after = probe.score(copy.deepcopy(pruned).to(where)) if probe else None
    if after and not math.isfinite(after.shift):
        raise PqkError(f"the outputs of the network are no longer finite at rho {spec.rho:g}; lower it")
    base = probe.error if probe else 0.0
    scanned: dict[str, Levels] = {
        name: {
            str(units): {
                "rise_pct": 100 * (score.error / base - 1) if base else None,
                "shift_pct": 100 * score.shift,
            }
            for units, score in levels.items()
        }
        for name, levels in scores.items()
    }
    return pruned, PruneReport(
        rho=spec.rho,
        measure=spec.measure,
        importance=spec.importance,
        share=1 - cost(plan) / cost({}),
        params_before=costs({}).params,
        params_after=costs(plan).params,
        flops_before=costs({}).flops,
        flops_after=costs(plan).flops,
        flops_side=costs.side,
        error_before=probe.error if probe else None,
        error_after=after.error if after else None,
        shift_pct=100 * after.shift if after else None,
        removed=removed_units(slots, plan, costs, importance, keep, scanned),
        scan=scanned,
    )


def removed_units(
    slots: Sequence[Slot],
    plan: Plan,
    costs: Costs,
    importance: Mapping[str, torch.Tensor],
    keep: Mapping[str, torch.Tensor],
    scanned: Mapping[str, Levels],
) -> list[Removed]:
    """Returns the cut of each slot of the plan."""
    found, whole = [], costs({})
    for slot in slots:
        if slot.name in plan:
            alone = costs({slot.name: plan[slot.name]})
            found.append(
                Removed(
                    name=slot.name,
                    kind=slot.kind,
                    units_before=slot.units,
                    units_after=plan[slot.name],
                    params=whole.params - alone.params,
                    flops=whole.flops - alone.flops,
                    importance_kept=_share_kept(slot, importance, keep),
                    scan=scanned.get(slot.name, {}),
                )
            )
    return found


def _share_kept(slot: Slot, importance: Mapping[str, torch.Tensor], keep: Mapping[str, torch.Tensor]) -> float | None:
    """Returns the share of the summed importance of a slot's units that stays; None for a block or a sum of 0."""
    values = [importance[group.name] for group in slot.groups if slot.kind != "block"]
    total = sum(float(value.sum()) for value in values)
    if not total:
        return None
    stays = (importance[group.name][keep[group.name]] for group in slot.groups)
    return sum(float(value.sum()) for value in stays) / total
