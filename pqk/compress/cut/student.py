"""Builds a smaller network from a Teacher's own layers, `make_student`: fewer blocks, heads, MLP channels, channels of
its dense heads and inner channels of convolutional blocks.

Of each width the units with the largest weights stay: L2 norm of the weights that compute them times L2 norm of the
weights that read them. Every layer that read a cut unit is refitted on a few samples to predict its values from the
kept ones. The widths of the token streams are never cut, so blocks can be left out and all shapes still match.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pqk.compress.cut.importance import most_important, norms
from pqk.compress.cut.refit import Moments, moments, refit
from pqk.compress.cut.units import Slot, cut, groups_of, silence, slots_of, weights_of
from pqk.compress.train.data import TrainingData
from pqk.families.cutting import CuttingPart
from pqk.settings.distill import Distill, StudentCut
from pqk.settings.seeds import INDICES, LIMIT

STEPS = {"heads": 1, "ffn": 16, "dpt": 8, "inner": 8}
"""Kinds that may be cut; sizes are multiples of these numbers where the Teacher's are, as kernels waste the rest."""


def remaining(count: int, share: float, step: int = 1) -> int:
    """Returns how many of `count` units stay when `share` is cut: the nearest multiple of `step` where count is one."""
    if share == 0:
        return count
    step = step if count % step == 0 else 1
    return min(count, max(1, step, step * int((1 - share) * count / step + 0.5)))


def evenly(count: int, keep: int) -> list[int]:
    """Returns `keep` of `count` layers, evenly spaced, the first and the last among them (one alone: the last)."""
    if keep == 1:
        return [count - 1]
    return [(2 * i * (count - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]  # rounded to the nearest


def plan_of_shares(
    config: Mapping[str, Any], slots: Sequence[Slot], shares: StudentCut, cutting: CuttingPart
) -> dict[str, int]:
    """Returns the plan that cuts its share of every slot and of each stack of blocks; evenly spaced blocks stay."""
    plan: dict[str, int] = {}
    stacks: dict[str, list[str]] = {}
    for slot in slots:
        if slot.kind == "block":
            stacks.setdefault(slot.name.rpartition(".")[0], []).append(slot.name)
    for names in stacks.values():
        for count in range(remaining(len(names), shares.depth), len(names) + 1):
            stay = evenly(len(names), count)
            gone = [name for index, name in enumerate(names) if index not in stay]
            if cutting.may_drop(config, gone, retrained=True):
                break
        plan |= dict.fromkeys(gone, 0)
    blocks = [slot for slot in slots if plan.get(slot.name) == 0]
    for slot in slots:
        if slot.kind == "block" or any(slot.inside(block) for block in blocks):
            continue
        units = remaining(slot.units, getattr(shares, slot.kind), STEPS[slot.kind])
        units = max(slot.step, units // slot.step * slot.step)
        if units < slot.units:
            plan[slot.name] = units
    return plan


def make_student(teacher: Any, spec: Distill, data: TrainingData) -> nn.Module:
    """Returns a smaller model on the CPU, in eval mode, with the Teacher's kept layers; the Teacher is not changed.

    Depth: evenly spaced blocks stay, the first and last among them; blocks are cut as far as the family allows
    (`CuttingPart.may_drop`). Of heads and channels each group keeps the most important ones (see the module's
    docstring). Numbers are rounded to the nearest; at least one head and one block stay. A share of a kind that the
    network does not have does nothing.
    With student.fold_pairs, the layers that read cut units are refitted on as many samples of the train split; the
    result is the same at every call. Raises PqkError when torch-pruning is not installed.
    """
    shares, cutting = spec.student, data.cutting
    slots = slots_of(teacher, {*STEPS, "block"}, 1, cutting)
    plan = plan_of_shares(teacher.config, slots, shares, cutting)
    cut_slots = [slot for slot in slots if slot.name in plan and slot.kind != "block"]
    known = _moments(teacher, cut_slots, spec, data)
    working = copy.deepcopy(teacher).cpu()
    weights = weights_of(working)
    keep: dict[str, Tensor] = {}
    for slot in cut_slots:
        for group in slot.groups:  # by its importance after the cuts before it
            importance = norms(working, [group], "l2_product")[group.name]
            keep[group.name] = most_important(importance, slot.keeps(group, plan[slot.name]))
            refit(working, group, keep[group.name], known)
            silence(weights, group, keep[group.name])
    student: nn.Module = cut(working, slots, plan, keep, cutting).eval()
    return student


def _moments(teacher: nn.Module, slots: Sequence[Slot], spec: Distill, data: TrainingData) -> Moments:
    """Returns the moments of the inputs of the layers that read these slots.

    The samples are ones that no training draws before its millionth step.
    """
    shares = spec.student
    if not shares.fold_pairs or not slots:
        return {}
    drawn = data.batches(spec.train, next(teacher.parameters()).device, LIMIT - 1)
    first = INDICES - shares.fold_pairs
    batches = (drawn.train(first + k, 1, shares.fold_size) for k in range(shares.fold_pairs))
    return moments(teacher, groups_of(slots), batches, shares.fold_pairs, data.learning)
