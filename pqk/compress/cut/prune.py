"""Structured pruning: whole units are cut out of a network, which is then smaller for every runtime; and fine-tuning.

Which units can go and what goes with them: `pqk.compress.cut.units`. Which of a group go first:
`pqk.compress.cut.importance`. How many each group gives: `pqk.compress.cut.sensitivity`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pqk.compress.cut.cost import FLOPS_SIDE, Costs
from pqk.compress.cut.importance import importances
from pqk.compress.cut.refit import moments, refit
from pqk.compress.cut.sensitivity import Probe, Scores, even_steps, kept, scan, spend, steps_by_scan
from pqk.compress.cut.units import Plan, Slot, cut, slots_of
from pqk.compress.train.data import VALIDATION_SEED
from pqk.compress.train.device import pick_device
from pqk.errors import PqkError
from pqk.families.dust3r.model import Dust3r
from pqk.settings.prune import Prune


@dataclass(frozen=True)
class Removed:
    """What one size of the configuration gave.

    name: such as 'enc_blocks.0.ffn'. kind: heads, ffn, dpt or block. params, flops: what cutting this alone would save.
    importance_kept: share of the summed importance of its units that stays (None for a block). scan: for each number of
    units that stay, in this group alone and before any training, the rise of AbsRel against the truth (`rise_pct`) and
    the relative distance of the points of both views to those of the uncut network (`shift_pct`), which decides.
    """

    name: str
    kind: str
    units_before: int
    units_after: int
    params: int
    flops: int
    importance_kept: float | None
    scan: dict[str, dict[str, float]]


@dataclass(frozen=True)
class PruneReport:
    """What was cut. FLOPs are those of one pair of flops_side x flops_side images, two per multiply-add.

    share: of the measure (params or flops) that is gone. absrel_before, absrel_after, shift_pct: on the scan's
    pairs, without fine-tuning; None without a scan. scan: what the scan found for every size, cut or not.
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
    absrel_before: float | None
    absrel_after: float | None
    shift_pct: float | None
    removed: list[Removed]
    scan: dict[str, dict[str, dict[str, float]]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def prune(
    model: Dust3r,
    spec: Prune,
    *,
    seed: int,
    device: str = "auto",
    report: Callable[[str], None] | None = None,
) -> tuple[Dust3r, PruneReport]:
    """A smaller network, float32 in eval mode on the CPU, and what was cut; the given one stays as it is.

    At least the share spec.rho of the parameters (or FLOPs) of the whole network goes, and no more steps than that
    needs. seed: of the training pairs for Taylor gradients and the refit; those of the scan are held out and the same
    for every seed. report gets a line of text now and then. On one CPU the same arguments give the same network.
    Raises PqkError for a device that is not there, a rho that the allowed units do not reach, a network whose depth is
    not finite, and a missing torch-pruning.
    """
    say = report or (lambda line: None)
    where = pick_device(device)
    slots = slots_of(model, spec.units, spec.round_to)
    working = copy.deepcopy(model).requires_grad_(True).eval().to(where)
    say(f"importance {spec.importance} of {sum(len(slot.groups) for slot in slots)} groups")
    importance = importances(working, slots, spec, seed=seed)
    known = None
    if spec.refit:
        say("second moments for the refit")
        known = moments(working, slots, spec, seed=seed)
    costs = Costs(model, slots)

    def cost(plan: Plan) -> int:
        return costs(plan).params if spec.measure == "params" else costs(plan).flops

    scores, probe = Scores(), None
    if spec.sensitivity.enabled:
        probe = Probe(working, spec, VALIDATION_SEED)
        scores = scan(working, slots, importance, spec, probe, known, report)
        steps = steps_by_scan(slots, scores, cost)
    else:
        steps = even_steps(slots)
    plan = spend(model.config, slots, steps, cost, spec.rho)
    say(f"cutting {len(plan)} of {len(slots)} groups")
    keep: dict[str, torch.Tensor] = {}
    for slot in slots:
        if slot.name in plan:
            chosen = kept(slot, importance, plan[slot.name])
            keep |= chosen
            if known is not None:
                refit(working, slot, chosen, known)
    pruned = cut(working, slots, plan, keep).eval()
    after = probe.score(copy.deepcopy(pruned).to(where)) if probe else None
    if after and not math.isfinite(after.shift):
        raise PqkError(f"the points of the network are no longer finite at rho {spec.rho:g}; lower it")
    scanned: dict[str, dict[str, dict[str, float]]] = {}
    for name, levels in scores.items():
        assert probe is not None
        scanned[name] = {
            str(units): {"rise_pct": 100 * (score.absrel / probe.absrel - 1), "shift_pct": 100 * score.shift}
            for units, score in levels.items()
        }
    removed = []
    for slot in slots:
        if slot.name in plan:
            alone = costs({slot.name: plan[slot.name]})
            removed.append(
                Removed(
                    name=slot.name,
                    kind=slot.kind,
                    units_before=slot.units,
                    units_after=plan[slot.name],
                    params=costs({}).params - alone.params,
                    flops=costs({}).flops - alone.flops,
                    importance_kept=_share_kept(slot, importance, keep),
                    scan=scanned.get(slot.name, {}),
                )
            )
    return pruned, PruneReport(
        rho=spec.rho,
        measure=spec.measure,
        importance=spec.importance,
        share=1 - cost(plan) / cost({}),
        params_before=costs({}).params,
        params_after=costs(plan).params,
        flops_before=costs({}).flops,
        flops_after=costs(plan).flops,
        flops_side=FLOPS_SIDE,
        absrel_before=probe.absrel if probe else None,
        absrel_after=after.absrel if after else None,
        shift_pct=100 * after.shift if after else None,
        removed=removed,
        scan=scanned,
    )


def _share_kept(slot: Slot, importance: Mapping[str, torch.Tensor], keep: Mapping[str, torch.Tensor]) -> float | None:
    """Share of the summed importance of a slot's units that stays; None for a block, or where all are worth nothing."""
    values = [importance[group.name] for group in slot.groups if slot.kind != "block"]
    total = sum(float(value.sum()) for value in values)
    if not total:
        return None
    stays = (importance[group.name][keep[group.name]] for group in slot.groups)
    return sum(float(value.sum()) for value in stays) / total
