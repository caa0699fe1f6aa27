"""Which units of a group matter least: L1, L2 and first-order Taylor importance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pqk.compress.cut.units import Group, Part, Slot
from pqk.data.render.stream import training_pairs
from pqk.data.render.synthetic import texture_bank
from pqk.errors import PqkError
from pqk.families.dust3r.batches import scenery
from pqk.families.dust3r.learning import SymmetricPairs
from pqk.families.dust3r.losses import confidence_loss
from pqk.settings.prune import Prune
from pqk.settings.seeds import split_seed


def importances(model: nn.Module, slots: Sequence[Slot], spec: Prune, *, seed: int) -> dict[str, Tensor]:
    """Importance (units,) of every unit, on the CPU, by name of its group; only comparable inside a group.

    l1, l2: that norm of all weights that go with the unit, both those that make it and those that read it (Li et al.,
    ICLR 2017, for filters; Fang et al., CVPR 2023, for the group). taylor: see `_taylor`; it needs parameters that
    require gradients. Raises PqkError when the gradients are not finite.
    """
    groups = [group for slot in slots if slot.kind != "block" for group in slot.groups]
    if not groups:  # only whole blocks may go
        return {}
    if spec.importance == "taylor":
        return _taylor(model, groups, spec, seed)
    weights = dict(model.named_parameters())
    power = 1 if spec.importance == "l1" else 2
    found = {}
    with torch.no_grad():
        for group in groups:
            sums = [_per_unit(weights[part.key].abs() ** power, part) for part in group.parts]
            found[group.name] = torch.stack(sums).sum(0) ** (1 / power)
    return found


def _taylor(model: nn.Module, groups: Sequence[Group], spec: Prune, seed: int) -> dict[str, Tensor]:
    """Mean over rendered training pairs of (sum of g w)^2, over the weights w that read the unit.

    g is the gradient of the task loss. The sum is the derivative of the loss by a factor on the unit's output, so this
    is the squared first-order change of the loss when the unit goes (Molchanov et al., "Importance Estimation for
    Neural Network Pruning", CVPR 2019, section 3; Michel et al., NeurIPS 2019, use its absolute value for heads).
    """
    weights = dict(model.named_parameters())
    device = next(iter(weights.values())).device
    keys = sorted({part.key for group in groups for part in group.parts if part.reads})
    bank, symmetric = texture_bank().to(device), SymmetricPairs(model)
    sums = {group.name: torch.zeros(group.units) for group in groups}
    for index in range(spec.samples.pairs):
        pairs = training_pairs(1, spec.samples.size, split_seed("train", seed, index), bank, **scenery(spec.train))
        loss = confidence_loss(symmetric(pairs.images), *pairs.ordered(), spec.train.alpha)[0]
        gradients = dict(zip(keys, torch.autograd.grad(loss, [weights[key] for key in keys]), strict=True))
        with torch.no_grad():
            for group in groups:
                reading = [part for part in group.parts if part.reads]
                change = torch.stack([_per_unit(gradients[p.key] * weights[p.key], p) for p in reading]).sum(0)
                sums[group.name] += change.square()
    if not all(bool(torch.isfinite(total).all()) for total in sums.values()):
        raise PqkError("the gradients of the Taylor importance are not finite")
    return {name: total / spec.samples.pairs for name, total in sums.items()}


def _per_unit(values: Tensor, part: Part) -> Tensor:
    """Sum of a parameter-shaped tensor over everything that belongs to each unit: (units,) on the CPU."""
    rows = values.transpose(0, part.axis).flatten(1).sum(1) if values.ndim > 1 else values
    return rows.double().cpu()[part.rows].sum(1)


def most_important(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` most important units, ascending; of equal ones the first stay."""
    order = torch.sort(importance, descending=True, stable=True).indices
    return order[:count].sort().values
