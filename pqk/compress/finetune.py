"""Trains a pruned network on the task loss alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pqk.compress.train.fit import Fitted, Stop, fit
from pqk.compress.train.loop import Progress
from pqk.data.render.stream import PairBatch
from pqk.families.dust3r.losses import confidence_loss
from pqk.settings.prune import Prune


def task_loss(module: nn.Module, pairs: PairBatch, alpha: float) -> Tensor:
    """The confidence loss of `SymmetricPairs` of a network, in both orders of the pairs: a scalar."""
    prediction = module(pairs.images)
    with torch.autocast(pairs.images.device.type, enabled=False):
        return confidence_loss(prediction, *pairs.ordered(), alpha)[0]


def finetune(
    pruned: nn.Module,
    teacher: nn.Module,
    spec: Prune,
    *,
    seed: int,
    scratch: Path,
    device: str = "auto",
    stop: Stop | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Train the pruned network; the Teacher only gives the drop. Arguments and errors: as in `fit`."""
    return fit(
        pruned.requires_grad_(True),  # what an earlier training left has no gradients
        spec.train,
        lambda module, pairs, share: task_loss(module, pairs, spec.train.alpha),
        seed=seed,
        scratch=scratch,
        device=device,
        teacher=teacher,
        stop=stop,
        report=report,
    )
