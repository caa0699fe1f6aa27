"""Runs the training loop, `Trainer`: autocast, cosine schedule, EMA, checkpoint and resume, early stop, DDP."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk.errors import PqkError
from pqk.files import atomic_path


@dataclass
class Progress:
    """State of a training after a step: counters, the rates of the last step, and the validations so far."""

    step: int = 0
    seconds: float = 0.0
    share: float = 0.0
    loss: float = math.nan
    learning_rate: float = 0.0
    samples_per_second: float = 0.0
    best: float = math.inf
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None  # why the run was stopped, in one sentence


@dataclass(frozen=True)
class Schedule:
    """End of the run and course of the learning rate, measured in time where `minutes` is given, else in steps."""

    steps: int
    learning_rate: float
    final_rate: float
    warmup: float
    minutes: float | None = None

    def share(self, step: int, seconds: float) -> float:
        """Returns the share of the run that is done, in [0, 1]."""
        done = seconds / (60 * self.minutes) if self.minutes else step / self.steps
        return min(1.0, done)

    def rate(self, share: float) -> float:
        """Returns the learning rate: linear warm-up, then half a cosine down to the final rate."""
        if share < self.warmup:
            return self.learning_rate * share / self.warmup
        fall = (share - self.warmup) / (1 - self.warmup)
        return self.final_rate + (self.learning_rate - self.final_rate) * 0.5 * (1 + math.cos(math.pi * fall))


def world() -> tuple[int, int]:
    """Returns rank and number of processes as torchrun sets them; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def parameter_groups(
    model: nn.Module, weight_decay: float, factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Returns groups of parameters: matrices and filters, with weight decay; biases and norms, without.

    factors: of the learning rate, by a regular expression that is searched in names; the first that is found counts.
    Parameters with factor 0 are not trained.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        factor = next((factor for part, factor in (factors or {}).items() if re.search(part, name)), 1.0)
        if factor == 0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            groups.setdefault((factor, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": found, "weight_decay": weight_decay if decays else 0.0, "factor": factor}
        for (factor, decays), found in groups.items()
    ]


class Trainer:
    """A model in training on `loss_of(model, step, share)`, and the exponential moving average (EMA) of its weights.

    `loss_of` draws its own batch from the step number, so that a resumed run sees the same batches as an undisturbed
    one. `validate(weights)` returns a dict whose 'score' is better when lower; the averaged weights with the best score
    are kept. Only rank 0 validates and writes.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        device: torch.device,
        weight_decay: float,
        clip_norm: float,
        ema: float,
        autocast: bool,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        """factors: of the learning rate; see `parameter_groups`."""
        self.rank, self.world = world()
        self.device, self.schedule, self.autocast = device, schedule, autocast
        self.clip_norm, self.decay = clip_norm, ema
        self.model = model.to(device)
        self.ema = {k: v.detach().clone().float() for k, v in self.model.state_dict().items()}
        self.best: dict[str, torch.Tensor] | None = None  # the average of the best validation, on the CPU
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, weight_decay, factors),
            lr=schedule.learning_rate,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )
        self.progress = Progress()

    def state(self) -> dict[str, Any]:
        """Returns everything that a resumed run needs: tensors, numbers and lists, which torch's safe load can read."""
        kept = {k: getattr(self.progress, k) for k in ("step", "seconds", "best", "stale", "history", "reason")}
        return {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "progress": kept,
        }

    def save(self, path: Path) -> None:
        """Writes the checkpoint atomically (rank 0 only)."""
        if self.rank == 0:
            with atomic_path(path) as temporary:
                torch.save(self.state(), temporary)

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint. Raises PqkError when it is damaged or belongs to another model."""
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.ema = {k: v.to(self.device) for k, v in saved["ema"].items()}
            self.optimizer.load_state_dict(saved["optimizer"])
            for key, value in saved["progress"].items():
                setattr(self.progress, key, value)
            if "best" in saved:
                kept = saved["best"]
            else:  # an old checkpoint without the best average: take the current one, with the last score
                kept, history = saved["ema"], self.progress.history
                self.progress.best = history[-1]["score"] if history else math.inf
            self.best = None if kept is None else {k: v.to("cpu") for k, v in kept.items()}
        except Exception as error:
            raise PqkError(
                f"{path}: not a checkpoint of this model ({type(error).__name__}); start over with --fresh"
            ) from error

    def averaged(self) -> dict[str, torch.Tensor]:
        """Returns the averaged weights, float32."""
        return {k: v.clone() for k, v in self.ema.items()}

    def best_averaged(self) -> dict[str, torch.Tensor]:
        """Returns the averaged weights of the best validation, float32; the current ones before any validation."""
        return self.averaged() if self.best is None else {k: v.clone() for k, v in self.best.items()}

    def judge(self, validate: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> None:
        """Validates the averaged weights, and keeps them when they are the best so far."""
        p = self.progress
        scores = validate(self.averaged())
        p.history.append({"step": p.step, "seconds": p.seconds, **scores})
        if scores["score"] < p.best:
            p.best, p.stale = scores["score"], 0
            self.best = {k: v.detach().to("cpu", copy=True) for k, v in self.ema.items()}
        else:
            p.stale += 1

    def _average(self) -> None:
        # A small decay at first, or the random initial weights would stay in the average for long. (torch's
        # AveragedModel takes the weights of the first step instead, which would change every run.)
        decay = min(self.decay, (1 + self.progress.step) / (10 + self.progress.step))
        with torch.no_grad():
            mine = self.model.state_dict()
            averaged = [v for k, v in self.ema.items() if mine[k].is_floating_point()]
            current = [mine[k].float() for k in self.ema if mine[k].is_floating_point()]
            torch._foreach_lerp_(averaged, current, 1 - decay)

    def _shared(self, value: float) -> float:
        """Returns rank 0's value on every rank: processes must agree on when to stop and which stage they are in."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(box, 0)
        return float(box.item())

    def run(
        self,
        loss_of: Callable[[nn.Module, int, float], torch.Tensor],
        *,
        wrapped: nn.Module | None = None,
        validate: Callable[[dict[str, torch.Tensor]], dict[str, Any]] | None = None,
        every: int = 1000,
        patience: int = 8,
        checkpoint: Path | None = None,
        save_every_s: float = 120.0,
        pause_after_s: float | None = None,
        report: Callable[[Progress], None] | None = None,
        batch_of: Callable[[float], int] | None = None,
        stop: Callable[[Progress], str | None] | None = None,
        exchange: Callable[[], None] | None = None,
    ) -> str:
        """Trains until the schedule ends, the score stops improving, `stop` gives a reason, or `pause_after_s` is over.

        `exchange` is called after each backward pass to bring the gradients of all processes together; without it that
        is left to DDP.
        `stop` is called after every step; it returns the reason, which `progress.reason` keeps, or None to continue.
        Returns 'done', 'early', 'stopped' or 'paused'. The checkpoint is written during the run and at the end. When
        the schedule has ended, the last weights are validated too.
        """
        p = self.progress
        if p.reason is not None:  # a resumed run that had been stopped
            return "stopped"
        module: nn.Module = self.model if wrapped is None else wrapped
        if self.world > 1 and exchange is None:
            # a model may have weights that no output depends on, as official files do
            module = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        module.train()
        began, before, saved = time.monotonic(), p.seconds, time.monotonic()
        # a resumed run may have stopped early already
        outcome, last, seen = "early" if validate and p.stale >= patience else "done", time.monotonic(), 0
        skipped = 0
        while outcome == "done":
            p.share = self._shared(self.schedule.share(p.step, p.seconds))
            if p.share >= 1.0:
                break
            p.learning_rate = self.schedule.rate(p.share)
            for group in self.optimizer.param_groups:
                group["lr"] = p.learning_rate * group.get("factor", 1.0)  # an old checkpoint has no factors
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                loss = loss_of(module, p.step, p.share)
            loss.backward()
            if exchange:
                exchange()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            if bool(torch.isfinite(norm)):
                self.optimizer.step()
                skipped = 0
            else:  # skip a batch without a finite gradient; many in a row mean that the run is lost
                skipped += 1
                if skipped >= 20:
                    raise PqkError(f"no finite gradient in 20 steps in a row, up to step {p.step}; lower learning_rate")
            self.optimizer.zero_grad(set_to_none=True)
            p.step += 1
            self._average()
            p.seconds = before + time.monotonic() - began
            seen += batch_of(p.share) if batch_of else 1
            if p.step % 20 == 0 or self.device.type == "cpu":
                p.loss = float(loss.detach())  # reading it waits for the device, so not at every step
                now = time.monotonic()
                p.samples_per_second, last, seen = seen / max(now - last, 1e-9), now, 0
                if report and self.rank == 0:
                    report(p)
            if validate and p.step % every == 0:
                if self.rank == 0:
                    self.judge(validate)
                    if report:
                        report(p)
                if self._shared(float(p.stale)) >= patience:
                    outcome = "early"
            if stop and outcome == "done":
                p.reason = stop(p) if self.rank == 0 else None
                if self._shared(float(p.reason is not None)):
                    outcome = "stopped"
            validated = validate is not None and p.step % every == 0
            if checkpoint and (validated or time.monotonic() - saved > save_every_s):
                self.save(checkpoint)
                saved = time.monotonic()
            if outcome == "done" and pause_after_s and self._shared(time.monotonic() - began) > pause_after_s:
                outcome = "paused"
        if checkpoint:
            self.save(checkpoint)
        if outcome == "done" and validate and self.rank == 0 and (not p.history or p.history[-1]["step"] != p.step):
            self.judge(validate)
            if checkpoint:
                self.save(checkpoint)
        return outcome
