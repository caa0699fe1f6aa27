"""Trains weights that are rounded in every step, `fine_tuned`: quantization-aware training of any torch model.

The loss sees rounded weights, and its gradient reaches the float ones as if nothing had been rounded (the
straight-through estimator: Bengio, Leonard and Courville, arXiv 1308.3432; Jacob et al., CVPR 2018, section 3). Inputs
of layers are not rounded. Trained graphs of a toolchain, with rounded inputs, are `pqk.compress.qat`'s.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pqk.compress.weights.methods.method import pack_weight
from pqk.compress.weights.model import LEAST, Overrides, plan
from pqk.compress.weights.schemes import Scheme
from pqk.errors import PqkError

Loss = Callable[[nn.Module, Any], Tensor]
"""Takes the model and a batch; returns what is to become small."""


@dataclass(frozen=True)
class Training:
    """What the training needs: batches (used again from the first when they run out), the loss and the steps.

    learning_rate: AdamW's in the first step; it falls to 0 in a straight line.

    Raises PqkError for values that are not above 0.
    """

    batches: Iterable[Any]
    loss: Loss
    steps: int = 200
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.learning_rate < math.inf:
            raise PqkError(
                f"training needs steps and a learning rate above 0, not {self.steps} and {self.learning_rate}"
            )


class StraightThrough(nn.Module):
    """Rounds a weight in the forward pass; backward it is the identity."""

    def __init__(self, scheme: Scheme, axis: int) -> None:
        super().__init__()
        self.scheme, self.axis = scheme, axis

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            difference = pack_weight(weight, self.scheme, self.axis).dequantized(weight.dtype) - weight
        return weight + difference


def fine_tuned(
    model: nn.Module, scheme: Scheme, training: Training, overrides: Overrides = (), least: int = LEAST
) -> nn.Module:
    """Returns a copy of the model, trained; its weights are float, and lose less when `scheme` rounds them.

    overrides, least: as of `quantize_weights`. Layers that stay in float learn too; so does everything that asks for
    gradients. Whether dropout is on is the model's mode, which stays as it is.
    Raises PqkError when there is no batch or the loss is not finite.
    """
    found = copy.deepcopy(model)
    rounded = plan(found, scheme, overrides, least)
    for target, chosen in rounded:
        hook = StraightThrough(chosen, target.axis)
        parametrize.register_parametrization(target.module, target.key, hook, unsafe=True)
    optimizer = torch.optim.AdamW(
        [p for p in found.parameters() if p.requires_grad], lr=training.learning_rate, weight_decay=0.0
    )
    steps = 0
    for batch in islice(cycle(training.batches), training.steps):
        loss = training.loss(found, batch)
        if not bool(torch.isfinite(loss)):
            raise PqkError(f"the loss of step {steps + 1} is not finite; take a smaller learning_rate")
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * (1 - steps / training.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        steps += 1
    if not steps:
        raise PqkError("quantization-aware training needs batches, and there is none")
    for target, _ in rounded:
        parametrize.remove_parametrizations(target.module, target.key, leave_parametrized=False)
    return found
