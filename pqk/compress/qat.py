"""Trains graphs that round like their int8 engines, against the float model (quantization-aware training): `qat`.

The toolchain prepares the modules, and builds engines from them afterwards. All modules of a model are trained
together, so that each adapts to the rounded outputs of the modules before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pqk.compress.train.fit import Fitted, LossOf, Outputs, Stop, TrainingData, fit
from pqk.compress.train.loop import Progress
from pqk.settings.training import Rounded


def rounded_loss(spec: Rounded, data: TrainingData) -> LossOf:
    """Returns the loss: distance from the Teacher's outputs, plus task_weight times the family's own loss.

    Without ground truth the family's own loss is left out.
    """
    terms = ("imitation", "task") if spec.task_weight and data.truthful else ("imitation",)

    def loss_of(module: nn.Module, batch: Any, aim: Outputs | None, share: float) -> Tensor:
        found = data.learning.losses(module(batch), batch, aim, terms, {"alpha": spec.alpha})
        loss = found["imitation"]
        return loss + spec.task_weight * found["task"] if "task" in found else loss

    return loss_of


def qat(
    parts: Mapping[str, nn.Module],
    teacher: nn.Module,
    spec: Rounded,
    data: TrainingData,
    *,
    seed: int,
    scratch: Path,
    device: str = "cpu",
    stop: Stop | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Trains the prepared modules together; `Fitted.model` is an nn.ModuleDict of the trained ones, on the CPU.

    parts: the modules that a quantizer's `prepare` returned for the graphs; they are trained in place.
    teacher: the float model that they are compared with and learn from; its own weights do not change.
    seed, scratch, stop, report: see `fit`. After a kill, modules that are prepared again from the same model, spec and
    calibration continue from `scratch`.
    The best averaged weights are those nearest to the teacher on held-out samples.
    Raises PqkError as `fit` does.
    """
    return fit(
        nn.ModuleDict(parts),
        spec,
        rounded_loss(spec, data),
        data,
        seed=seed,
        scratch=scratch,
        device=device,
        teacher=teacher,
        guided=True,
        nearest=True,
        stop=stop,
        report=report,
    )
