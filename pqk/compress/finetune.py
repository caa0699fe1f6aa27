"""Trains a pruned network further, `finetune`: on the task loss, or on the Teacher's outputs without ground truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pqk.compress.train.fit import Fitted, Outputs, Stop, TrainingData, fit
from pqk.compress.train.loop import Progress
from pqk.settings.prune import Prune


def finetune(
    pruned: nn.Module,
    teacher: nn.Module,
    spec: Prune,
    data: TrainingData,
    *,
    seed: int,
    scratch: Path,
    device: str = "auto",
    stop: Stop | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Trains the pruned network. With ground truth, the Teacher is only used to compute the drop. See `fit` for
    arguments and errors.
    """
    term = "task" if data.truthful else "imitation"

    def loss_of(module: nn.Module, batch: Any, aim: Outputs | None, share: float) -> Tensor:
        return data.learning.losses(module(batch), batch, aim, (term,), {"alpha": spec.train.alpha})[term]

    return fit(
        pruned.requires_grad_(True),  # weights of an earlier training do not require gradients
        spec.train,
        loss_of,
        data,
        seed=seed,
        scratch=scratch,
        device=device,
        teacher=teacher,
        guided=not data.truthful,
        stop=stop,
        report=report,
    )
