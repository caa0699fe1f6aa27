"""Trains a model of any family with any method: `fit`.

Distillation, fine-tuning after pruning, quantization-aware training and the joint recipe differ in their loss and in
their initial model. Training loop, schedule, resuming and validation are the same for all, and are here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqk.compress.train.ahead import Ahead
from pqk.compress.train.data import TrainingData
from pqk.compress.train.device import pick_device
from pqk.compress.train.judge import Forward, Judge, parts_of
from pqk.compress.train.loop import Progress, Schedule, Trainer, world
from pqk.compress.train.shared import Shared, average_gradients, check_processes, connect, equalize
from pqk.settings.training import Fit

Outputs = Mapping[str, Any]
LossOf = Callable[[nn.Module, Any, Outputs | None, float], Tensor]
"""(module that returns outputs for a batch, batch, the Teacher's outputs for it where they were requested, share of the
run in [0, 1]) -> loss."""
Stop = Callable[[Progress], str | None]


@dataclass(frozen=True)
class Fitted:
    """Result of a training.

    model: network with the best averaged weights, in eval mode on the CPU; the initial weights count too. last: the
    averaged weights at the end. outcome: 'done' or 'stopped', with its reason. history: one entry per validation, the
    first at step 0, with step, seconds and the result of `Judge`. seconds: training time over all resumed parts.
    """

    model: nn.Module
    last: dict[str, Tensor]
    outcome: str
    reason: str | None
    steps: int
    seconds: float
    history: list[dict[str, Any]]


class _Together(nn.Module):
    """The model, and an extra module that is trained with it and discarded afterwards."""

    def __init__(self, model: nn.Module, extra: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.extra = extra if extra is not None else nn.Module()


def fit(
    model: nn.Module,
    spec: Fit,
    loss_of: LossOf,
    data: TrainingData,
    *,
    seed: int,
    scratch: Path,
    device: str = "auto",
    teacher: nn.Module | None = None,
    guided: bool = False,
    watched: tuple[Any, Any] = (None, None),
    extra: nn.Module | None = None,
    nearest: bool = False,
    stop: Stop | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Trains `model` in place; returns the best averaged weights, scored on held-out samples at the start and after
    every epoch.

    model: a whole model, or an nn.ModuleDict of the modules of its graphs. seed: of the training batches; the held-out
    ones are the same for every seed. scratch: a folder for the checkpoint; a run that was killed continues from there,
    and on one CPU its final weights equal those of an undisturbed run bit for bit. The caller makes sure that it
    belongs to one model, spec and seed. teacher: each validation then has the drop against it; it moves to the training
    device and is not changed. guided: the loss needs the Teacher's outputs. watched: the layers of Teacher and model
    whose outputs are kept as features, see `LearningPart.features`. extra: a module whose parameters are trained too,
    such as projections of features. nearest: the best weights are those nearest to the Teacher (`Judge`). stop: see
    `Trainer.run`; called after every step. Several processes, as torchrun starts them, share every batch (`Shared`);
    only the first one has the best weights and the history.
    Raises PqkError for a batch that they cannot share, a device that is not available, a damaged checkpoint, a training
    that diverges to NaN, and errors of the data.
    """
    where = pick_device(device)
    autocast, learning = where.type == "cuda", data.learning
    processes = world()[1]
    check_processes(data.family, spec, processes, "train")
    connect()
    together = _Together(model, extra).to(where)
    equalize(together)
    trainer = Trainer(
        together,
        Schedule(spec.steps, spec.learning_rate, spec.final_rate, spec.warmup),
        device=where,
        weight_decay=spec.weight_decay,
        clip_norm=spec.clip_norm,
        ema=spec.ema,
        autocast=autocast,
    )
    frozen = copy.deepcopy(together).requires_grad_(False)
    checkpoint = scratch / "checkpoint.pt"
    if checkpoint.exists():
        trainer.resume(checkpoint)
    batches = data.batches(spec, where, seed)
    if where.type == "cpu":
        batches = Ahead(batches)
    if teacher is not None:
        teacher = teacher.to(where)
    judge: Judge | None = None
    if trainer.rank == 0:
        judge = Judge(
            data.family,
            batches,
            lambda: torch.autocast(where.type, dtype=torch.bfloat16, enabled=autocast),
            teacher,
            {"alpha": spec.alpha} if nearest else None,
        )
    guide: nn.Module | None = None
    if guided:
        assert teacher is not None
        guide = Forward(learning, learning.parts(teacher), watched[0]).eval()
    wrapped: nn.Module = Forward(learning, parts_of(learning, together.model), watched[1])
    if processes > 1:
        wrapped, guide = Shared(wrapped, learning), None if guide is None else Shared(guide, learning).eval()

    def loss(module: nn.Module, step: int, share: float) -> Tensor:
        stage = spec.stage_at(share)
        with torch.autocast(where.type, enabled=False):
            batch = batches.train(step, stage.batch, stage.size)
        aim = None
        if guide is not None:
            with torch.no_grad():
                aim = guide(batch)
        return loss_of(module, batch, aim, share)

    def validate(weights: dict[str, Tensor]) -> dict[str, Any]:
        assert judge is not None
        frozen.load_state_dict(weights)
        return judge(frozen.model)

    if trainer.rank == 0 and trainer.progress.step == 0 and not trainer.progress.history:
        trainer.judge(validate)  # a model that starts close to its Teacher must not get worse
    outcome = trainer.run(
        loss,
        wrapped=wrapped,
        validate=validate,
        every=spec.steps_per_epoch,
        patience=spec.epochs + 1,  # `stop` decides when to give up
        checkpoint=checkpoint,
        report=report,
        batch_of=lambda share: spec.stage_at(share).batch,
        stop=stop,
        exchange=lambda: average_gradients(together.parameters()),
    )
    frozen.load_state_dict(trainer.best_averaged())
    last = {k.removeprefix("model."): v.cpu() for k, v in trainer.averaged().items() if k.startswith("model.")}
    p = trainer.progress
    return Fitted(frozen.model.cpu().eval(), last, outcome, p.reason, p.step, p.seconds, list(p.history))
