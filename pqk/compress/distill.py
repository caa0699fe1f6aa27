"""Trains a student network on the ground truth and on a Teacher (method K): `distill`.

Loss: `alpha L_task + beta KL(p_T || p_S) + gamma |F_T - F_S|^2`. The family defines each term (`LearningPart`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pqk.compress.train.fit import Fitted, Outputs, Stop, TrainingData, fit
from pqk.compress.train.loop import Progress
from pqk.errors import PqkError
from pqk.settings.distill import Distill

SAMPLER = "sampler"
"""The loss of families that have a sampler; their `forward` watches `SamplerLoss.watched` for it."""


def distill(
    teacher: nn.Module,
    student: nn.Module,
    spec: Distill,
    data: TrainingData,
    *,
    seed: int,
    scratch: Path,
    device: str = "auto",
    stop: Stop | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Trains `student`, a model of the Teacher's family of any size, in place; returns its best averaged weights.

    The Teacher sees the same batches. beta is beta_start up to loss.task_share of the run, then rises linearly to
    beta_end. Features are compared only when gamma is above 0. Without ground truth the task loss is left out. seed,
    scratch, device, stop and report: as in `fit`. history has the drop against the Teacher.
    Raises PqkError as `fit` does, and when no loss term is left.
    """
    loss = spec.loss
    terms = ["task"] if data.truthful else []
    terms += ["kl"] if max(loss.beta_start, loss.beta_end) > 0 else []
    terms += ["features"] if loss.gamma > 0 else []
    terms += [SAMPLER] if spec.sampler is not None and spec.sampler.guided else []
    if not terms:
        raise PqkError("without ground truth K learns from the Teacher alone: set distill.loss.beta_start or gamma")
    options: dict[str, Any] = {"alpha": spec.train.alpha, "temperature": loss.temperature}
    watched: tuple[Any, Any] = (None, None)
    if spec.sampler is not None:
        if SAMPLER not in data.learning.TERMS:
            raise PqkError(f"models of the family {data.family.name} have no sampler; leave distill.sampler out")
        watched = spec.sampler.watched
        options[SAMPLER] = spec.sampler.model_dump()
    if loss.gamma > 0:
        *watched, options["bridges"] = data.learning.features(teacher, student, seed)  # type: ignore[assignment]

    def loss_of(module: nn.Module, batch: Any, aim: Outputs | None, share: float) -> Tensor:
        found = data.learning.losses(module(batch), batch, aim, terms, options)
        weights = {"task": loss.alpha, "kl": loss.beta_at(share), "features": loss.gamma, SAMPLER: 1.0}
        return weighed(found, weights)

    return fit(
        student,
        spec.train,
        loss_of,
        data,
        seed=seed,
        scratch=scratch,
        device=device,
        teacher=teacher.eval(),
        guided=terms != ["task"],
        watched=(watched[0], watched[1]),
        extra=options.get("bridges"),
        stop=stop,
        report=report,
    )


def weighed(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Returns the weighted sum of the losses."""
    first, *others = (weights[name] * loss for name, loss in losses.items())
    for other in others:
        first = first + other
    return first
