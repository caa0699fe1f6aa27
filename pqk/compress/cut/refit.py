"""What the units that stay can take over from those that go: the layer behind them, refitted by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pqk.compress.cut.units import Group, Part, Slot
from pqk.data.render.stream import training_pairs
from pqk.data.render.synthetic import texture_bank
from pqk.families.dust3r.batches import scenery
from pqk.families.dust3r.learning import SymmetricPairs
from pqk.settings.prune import Prune
from pqk.settings.seeds import split_seed

RIDGE = 1e-3
"""Of the mean variance of the units' outputs: holds the correction back where the samples say little."""

Moments = Mapping[str, Tensor]
"""Name of a group -> (n + 1, n + 1): mean of x x^T over all tokens, x the n outputs of its units and a 1."""


@torch.no_grad()
def moments(model: nn.Module, slots: Sequence[Slot], spec: Prune, *, seed: int) -> dict[str, Tensor]:
    """Second moments of the outputs of all heads and MLP units on rendered training pairs, float32 on the CPU."""
    found: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        x = inputs[0].flatten(0, -2).double()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        total = (x.T @ x / (len(x) * spec.samples.pairs)).float().cpu()
        found[name] = found[name] + total if name in found else total

    hooks = []
    for group, part in _read_by_one(slots):
        layer = model.get_submodule(part.key.removesuffix(".weight"))
        hooks.append(layer.register_forward_hook(partial(note, group.name)))
    try:
        bank, symmetric = texture_bank().to(next(model.parameters()).device), SymmetricPairs(model)
        for index in range(spec.samples.pairs):
            seeds = split_seed("train", seed, index)
            symmetric(training_pairs(1, spec.samples.size, seeds, bank, **scenery(spec.train)).images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def refit(model: nn.Module, slot: Slot, keep: Mapping[str, Tensor], known: Moments) -> None:
    """Correct, in place, the weights that read the units that stay (group name -> indices), before the others go.

    The correction is the least-squares one (He, Zhang and Sun, ICCV 2017): with k the outputs that stay, g those that
    go and W_g the weights that read those, D = W_g cov(g, k) (cov(k, k) + ridge)^-1 is added to W_k and
    W_g mean(g) - D mean(k) to the bias. Only linear layers are refitted: behind heads and MLP units, not behind a DPT
    head's channels.
    """
    weights = dict(model.named_parameters())
    for group, part in _read_by_one([slot]):
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[keep[group.name].cpu()] = False
        if not bool(gone.any()):
            continue
        leaving = part.rows[gone].flatten().sort().values
        staying = part.rows[~gone].flatten().sort().values
        total = known[group.name].double()
        mean = total[:-1, -1]
        covariance = total[:-1, :-1] - mean[:, None] * mean
        square = covariance[staying][:, staying]
        square.diagonal().add_(RIDGE * float(covariance.diagonal().mean()) + 1e-12)
        share = torch.linalg.solve(square, covariance[staying][:, leaving]).T  # g is about share @ k and a constant
        weight, bias = weights[part.key], weights[part.key.removesuffix("weight") + "bias"]
        lost = weight[:, leaving.to(weight.device)].double().cpu()
        weight[:, staying.to(weight.device)] += (lost @ share).to(weight)
        bias.add_((lost @ (mean[leaving] - share @ mean[staying])).to(bias))


def _read_by_one(slots: Sequence[Slot]) -> list[tuple[Group, Part]]:
    """The groups of heads and MLP units, with the weights of the one linear layer that reads each."""
    pairs = [(group, part) for s in slots if s.kind in ("heads", "ffn") for group in s.groups for part in group.parts]
    return [(group, part) for group, part in pairs if part.reads]
