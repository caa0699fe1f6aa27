"""The training of every method: a model, a loss on rendered pairs, and what came out of it.

Distillation, fine-tuning after pruning, quantization-aware training and the joint recipe differ in their loss and in
the model they start from; the loop, its schedule, its resuming and its validation are the same, and are here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk.compress.train.loop import Progress, Schedule, Trainer
from pqk.compress.train.pairs import ScoreOf, SymmetricPairs, pick_device, scenery, validation_scores
from pqk.data.render.stream import PairBatch, training_pairs
from pqk.data.render.synthetic import texture_bank
from pqk.errors import PqkError
from pqk.settings.seeds import INDICES, split_seed
from pqk.settings.training import Fit
from pqk.stats.intervals import drop_interval

VALIDATION_SEED = 1
"""Every method, whatever its training seed, is judged on the same held-out pairs. Those of seed 0 chose the Teacher,
and `scenes.validation`, which decides between models, has a seed of its own."""

LossOf = Callable[[nn.Module, PairBatch, float], torch.Tensor]
Stop = Callable[[Progress], str | None]


@dataclass(frozen=True)
class Fitted:
    """What a training left.

    model: the best averaged weights, in eval mode on the CPU; those of the start are among them. outcome: 'done' or
    'stopped', with its reason. history: one entry per validation, the first of step 0, with step, seconds, score,
    scores (of each held-out pair), absrel, delta1 and, when a Teacher was given, drop_pct and drop_low, the lower end
    of its 95 % interval over pairs. seconds: time spent training, over all its resumed parts.
    """

    model: nn.Module
    outcome: str
    reason: str | None
    steps: int
    seconds: float
    history: list[dict[str, Any]]


class _Together(nn.Module):
    """The model and what is trained beside it and thrown away afterwards."""

    def __init__(self, model: nn.Module, extra: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.extra = extra if extra is not None else nn.Module()


def fit(
    model: nn.Module,
    spec: Fit,
    loss_of: LossOf,
    *,
    seed: int,
    scratch: Path,
    device: str = "auto",
    teacher: nn.Module | None = None,
    extra: nn.Module | None = None,
    pairs_of: Callable[[nn.Module], nn.Module] = SymmetricPairs,
    score_of: ScoreOf | None = None,
    stop: Stop | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Train `model` in place and return the best averaged weights, judged on held-out pairs at the start and after
    every epoch.

    loss_of(module, pairs, share): the loss on one batch; `module` is pairs_of(model), which takes images (B,2,3,H,W)
    to outputs of 2B samples, first the orders (a, b), then (b, a); share in [0, 1] tells how much of the run is over.
    seed: of the rendered training pairs; validation pairs are the same for every seed.
    scratch: a folder for the checkpoint; a run that was killed continues from there, and on one CPU its final weights
    equal those of an undisturbed run bit for bit. It belongs to one model, spec and seed: the caller sees to that.
    teacher: each validation then tells the drop of AbsRel against it, in percent, on the same pairs.
    extra: a module whose parameters are trained too, such as projections of features.
    score_of: what the best weights are chosen by, of the averaged model's outputs for the validation pairs; without it,
    AbsRel.
    stop: see `Trainer.run`; called after every step.
    Raises PqkError for a device that is not there, a damaged checkpoint, and a training that diverges to NaN.
    """
    where = pick_device(device)
    autocast = where.type == "cuda"
    together = _Together(model, extra).to(where)
    schedule = Schedule(spec.steps, spec.learning_rate, spec.final_rate, spec.warmup)
    trainer = Trainer(
        together,
        schedule,
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
    bank = texture_bank().to(where)
    aim = _score(teacher.to(where), spec, where, autocast)["absrels"] if teacher is not None else None

    def loss(module: nn.Module, step: int, share: float) -> torch.Tensor:
        stage = spec.stage_at(share)
        with torch.autocast(where.type, enabled=False):
            pairs = training_pairs(
                stage.batch, stage.size, split_seed("train", seed, step % INDICES), bank, **scenery(spec)
            )
        return loss_of(module, pairs, share)

    def validate(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        frozen.load_state_dict(weights)
        scores = _score(frozen.model, spec, where, autocast, score_of)
        mine = scores.pop("absrels")
        if aim is not None:
            drop = drop_interval(mine, aim, range(len(aim)))
            scores |= {"drop_pct": drop.value, "drop_low": drop.low}
        return scores

    if trainer.progress.step == 0 and not trainer.progress.history:
        trainer.judge(validate)  # a model that begins close to its Teacher must not come out worse
    outcome = trainer.run(
        loss,
        wrapped=pairs_of(together.model),
        validate=validate,
        every=spec.steps_per_epoch,
        patience=spec.epochs + 1,  # when to give up is the business of `stop`
        checkpoint=checkpoint,
        report=report,
        batch_of=lambda share: spec.stage_at(share).batch,
        stop=stop,
    )
    frozen.load_state_dict(trainer.best_averaged())
    p = trainer.progress
    return Fitted(frozen.model.cpu().eval(), outcome, p.reason, p.step, p.seconds, list(p.history))


def _score(
    model: nn.Module, spec: Fit, device: torch.device, autocast: bool, score_of: ScoreOf | None = None
) -> dict[str, Any]:
    scores = validation_scores(model.eval(), spec, device, autocast, VALIDATION_SEED, score_of)
    if not math.isfinite(scores["score"]):
        raise PqkError("AbsRel on the validation pairs is not finite; lower learning_rate")
    return {name: scores[name] for name in ("score", "scores", "absrel", "absrels", "delta1")}
