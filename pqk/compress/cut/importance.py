"""Computes the importance of the units of a group: norms of their weights (`norms`), first-order Taylor (`taylor`).

Both return the importance (units,) of all units, on the CPU, by name of their group. It is only comparable inside a
group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pqk.compress.cut.units import Group, Part
from pqk.compress.train.data import TrainingData
from pqk.compress.train.judge import Forward
from pqk.errors import PqkError

LossOf = Callable[[Any], Tensor]
"""A batch -> the loss of a network, a scalar."""


@torch.no_grad()
def norms(model: nn.Module, groups: Sequence[Group], kind: str) -> dict[str, Tensor]:
    """Returns norms of the weights of each unit.

    kind: l1 or l2: that norm of all weights of the unit, both those that compute it and those that read it (Li et al.,
    ICLR 2017, for filters; Fang et al., CVPR 2023, for the group). l2_product: L2 norm of the weights that compute the
    unit times L2 norm of those that read it. Buffers do not count: they are statistics, or norms that are not trained.
    """
    weights = dict(model.named_parameters())
    power = 1 if kind == "l1" else 2

    def summed(group: Group, *reads: bool) -> Tensor:
        parts = [part for part in group.parts if part.reads in reads and part.key in weights]
        return torch.stack([_per_unit(weights[part.key].abs() ** power, part) for part in parts]).sum(0)

    if kind == "l2_product":
        return {group.name: (summed(group, False) * summed(group, True)).sqrt() for group in groups}
    return {group.name: summed(group, False, True) ** (1 / power) for group in groups}


def loss_of(model: nn.Module, data: TrainingData, alpha: float) -> LossOf:
    """Returns the loss for the Taylor importance: that of the task; without ground truth the family's probe."""
    forward, term = Forward(data.learning, data.learning.parts(model)), "task" if data.truthful else "probe"
    return lambda batch: data.learning.losses(forward(batch), batch, None, (term,), {"alpha": alpha})[term]


def taylor(model: nn.Module, groups: Sequence[Group], batches: Iterable[Any], loss: LossOf) -> dict[str, Tensor]:
    """Returns the mean over the batches of (sum of g w)^2, over the weights w that read the unit, g their gradient.

    The parameters of `model` must require gradients. The sum is the derivative of the loss by a factor on the unit's
    output, so this is the squared first-order change of the loss when the unit is cut (Molchanov et al., "Importance
    Estimation for Neural Network Pruning", CVPR 2019, section 3; Michel et al., NeurIPS 2019, use its absolute value
    for heads). Raises PqkError when the gradients are not finite.
    """
    if not groups:  # only whole blocks may be cut
        return {}
    weights = dict(model.named_parameters())
    keys = sorted({part.key for group in groups for part in group.parts if part.reads})
    sums = {group.name: torch.zeros(group.units) for group in groups}
    count = 0
    for batch in batches:
        gradients = torch.autograd.grad(loss(batch), [weights[key] for key in keys])
        slopes = dict(zip(keys, gradients, strict=True))
        with torch.no_grad():
            for group in groups:
                reading = [part for part in group.parts if part.reads]
                change = torch.stack([_per_unit(slopes[p.key] * weights[p.key], p) for p in reading]).sum(0)
                sums[group.name] += change.square()
        count += 1
    if not all(bool(torch.isfinite(total).all()) for total in sums.values()):
        raise PqkError("the gradients of the Taylor importance are not finite")
    return {name: total / count for name, total in sums.items()}


def _per_unit(values: Tensor, part: Part) -> Tensor:
    """Returns the sum of a parameter-shaped tensor over the entries of each unit: (units,) on the CPU."""
    rows = values.transpose(0, part.axis).flatten(1).sum(1) if values.ndim > 1 else values
    return rows.double().cpu()[part.rows].sum(1)


def most_important(importance: Tensor, count: int) -> Tensor:
    """Returns the indices of the `count` most important units, ascending; of equal ones the first stay."""
    order = torch.sort(importance, descending=True, stable=True).indices
    return order[:count].sort().values
