"""Refits the layers that read a group by least squares, so that kept units replace the cut ones: `refit`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pqk.compress.cut.units import Group
from pqk.compress.train.judge import Forward
from pqk.families.contract import LearningPart

RIDGE = 1e-3
"""Share of the mean variance of the units' outputs; limits the correction where the samples carry little information.
"""
PLACES = 2048
"""Number of places of a feature map that are used of one input of a convolution."""

Moments = Mapping[str, Tensor]
"""Name of a layer -> (n + 1, n + 1): mean of x x^T over all tokens or places, x the layer's n inputs and a 1."""


@torch.no_grad()
def moments(
    model: nn.Module, groups: Sequence[Group], batches: Iterable[Any], count: int, learning: LearningPart
) -> dict[str, Tensor]:
    """Returns the second moments of the inputs of all layers that read these groups, float32 on the CPU.

    batches: `count` batches; the family's forward runs them through the model.
    """
    found: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        x = inputs[0]
        if not isinstance(layer, nn.Linear):
            x = x.flatten(2).mT
            # an odd step: one that divides the width of a map would use the same few columns of every row
            x = x[:, :: -(-x.shape[1] // PLACES) | 1]
        x = x.flatten(0, -2).double()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        total = (x.T @ x / (len(x) * count)).float().cpu()
        found[name] = found[name] + total if name in found else total

    readers = {part.layer: None for group in groups for part in group.parts if part.reads}
    hooks = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in readers]
    try:
        forward = Forward(learning, learning.parts(model))
        for batch in batches:
            forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def refit(model: nn.Module, group: Group, keep: Tensor, known: Moments) -> None:
    """Corrects, in place, the layers in `known` that read the units that stay (indices), before the others are cut.

    The correction is the least-squares one (He, Zhang and Sun, ICCV 2017): with k the outputs that stay, g those that
    are cut and W_g the weights that read g, D = W_g cov(g, k) (cov(k, k) + ridge)^-1 is added to W_k and
    W_g mean(g) - D mean(k) to the bias. In a convolution every tap gets the same share of k. A layer that cannot add a
    constant everywhere is fitted without one, by the uncentred moments.
    """
    weights = dict(model.named_parameters())
    gone = torch.ones(group.units, dtype=torch.bool)
    gone[keep.cpu()] = False
    for part in group.parts:
        if not part.reads or part.layer not in known or not bool(gone.any()):
            continue
        leaving = part.rows[gone].flatten().sort().values
        staying = part.rows[~gone].flatten().sort().values
        total = known[part.layer].double()
        mean, bias = total[:-1, -1], weights.get(f"{part.layer}.bias")
        covariance = total[:-1, :-1] - mean[:, None] * mean
        ridge = RIDGE * float(covariance.diagonal().mean()) + 1e-12
        # a transposed convolution (inputs at axis 0) adds the constant only at some places when its stride leaves gaps
        if part.axis == 0:
            bias = None
        products = total[:-1, :-1] if bias is None else covariance
        square = products[staying][:, staying]
        square.diagonal().add_(ridge)
        share = torch.linalg.solve(square, products[staying][:, leaving]).T  # g is about share @ k and a constant
        weight = weights[part.key].movedim(part.axis, -1)
        lost = weight[..., leaving.to(weight.device)].double().cpu()
        weight[..., staying.to(weight.device)] += (lost @ share).to(weight)
        if bias is not None:
            added = lost @ (mean[leaving] - share @ mean[staying])  # for each tap
            bias.add_(added.reshape(len(bias), -1).sum(1).to(bias))
