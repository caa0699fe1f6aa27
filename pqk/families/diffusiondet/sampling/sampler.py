"""Runs the sampler: noisy boxes go through the head, and what it finds becomes the start of the next step.

Song et al. 2021 (DDIM); Chen et al. 2023, section 3.4 (box renewal, ensemble of steps). One image at a time; float64
between calls of the head. Nothing here knows what the head runs on: it is called as a function. Everything is tensors,
or arrays of numpy, as the image's size is: over engines a step in torch would take a tenth of the head's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pqk.families.diffusiondet.network.boxes import A, as_signal, from_signal, joined, library_of
from pqk.families.diffusiondet.network.configs import DiffusionDetConfig
from pqk.families.diffusiondet.sampling import labels as states
from pqk.families.diffusiondet.sampling import schedule
from pqk.families.diffusiondet.sampling.noise import Noise
from pqk.families.diffusiondet.sampling.selection import LARGEST_IOU, Detections, pooled, select, suppress

if TYPE_CHECKING:
    from pqk.families.diffusiondet.settings import Workload

RENEWAL = 0.5
"""Score that a box must exceed to be carried to the next step."""

HeadCall = Callable[[Any, int, Tensor | None], tuple[Any, ...]]
"""Boxes (N, 4) float32, a time and class states or None -> the last stage's logits (N, K) and boxes (N, 4), and the
quality logits (N,) of a network that has them."""


@dataclass(frozen=True)
class Sampling:
    """How a sampler runs.

    eta: share of fresh noise in a step, 0 for a deterministic one. renewal: score below which a box is replaced by a
    fresh one; None: none is, and every box keeps its place. ensemble: detections of several steps are pooled. The
    others are options of the configuration of that name.
    """

    steps: int
    proposals: int
    scale: float
    eta: float = 1.0
    renewal: float | None = RENEWAL
    ensemble: bool = True
    largest_iou: float = LARGEST_IOU
    noise_std: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    label_state: str | None = None
    label_diffusion: bool = False
    label_schedule: str = "linear"
    quality_scores: bool = False
    quality_guidance: float = 0.0

    @staticmethod
    def of(sizes: DiffusionDetConfig, steps: int | None = None, proposals: int | None = None) -> Sampling:
        """Returns what a configuration says, with other numbers of steps and proposals where they are given."""
        return Sampling(
            steps=sizes.steps if steps is None else steps,
            proposals=sizes.proposals if proposals is None else proposals,
            scale=sizes.scale,
            noise_std=sizes.noise_std,
            label_state=sizes.label_state,
            label_diffusion=sizes.label_diffusion,
            label_schedule=sizes.label_schedule,
            quality_scores=sizes.quality_scores,
            quality_guidance=sizes.quality_guidance,
        )

    @staticmethod
    def asked(workload: Workload) -> Sampling:
        """Returns what the sections `sampler` and `network` of a workload say."""
        sampler, network = workload.sampler, workload.network
        return Sampling(
            steps=sampler.steps,
            proposals=sampler.boxes,
            scale=network.signal_scale,
            eta=sampler.eta,
            renewal=sampler.renewal,
            ensemble=sampler.ensemble,
            largest_iou=sampler.largest_iou,
            noise_std=network.noise_std,
            label_state=network.label_state,
            label_diffusion=network.label_state is not None,
            label_schedule=network.label_schedule,
            quality_scores=sampler.scores == "quality",
            quality_guidance=sampler.quality_guidance,
        )


@dataclass
class Step:
    """What one pair of times did: tensors or arrays, (N, 4) where no other shape is named.

    x: the noisy boxes as signals. logits (N, K), boxes, quality (N,): of the head's last stage. x_next: the next noisy
    boxes; None at the end. The others are computed where they are asked for: at the end nobody needs them.
    """

    t: int
    after: int
    x: Any
    logits: Any
    boxes: Any
    quality: Any
    whwh: Any
    how: Sampling
    x_next: Any = None

    @cached_property
    def x0(self) -> Any:
        """The boxes of the head's last stage as limited signals."""
        of, scale = library_of(self.whwh), self.how.scale
        return as_signal(of.asarray(_alone(self.boxes), dtype=of.float64), self.whwh, scale).clip(-scale, scale)

    @cached_property
    def noise(self) -> Any:
        """The noise that x0 leaves in x."""
        return schedule.noise_in(self.x, self.x0, self.t)

    @cached_property
    def keep(self) -> Any:
        """Which boxes (N,) are carried to the next step: those whose best class has more than the score asked."""
        logits, how = _alone(self.logits), self.how
        of = library_of(logits)
        if how.renewal is None:
            return of.ones(len(logits), dtype=of.bool, device=logits.device)
        p = _sigmoid(of.amax(logits, 1))
        if how.quality_guidance and self.quality is not None:
            p = p * _sigmoid(self.quality) ** how.quality_guidance
        return p > how.renewal


def sample(call: HeadCall, whwh: A, noise: Noise, how: Sampling) -> Iterator[Step]:
    """Yields the steps of the sampler for one image. whwh: its w, h, w, h (4,), without padding.

    Kept boxes come first in the next step, in their order, fresh ones after them. No gradient goes from one step to the
    next.
    """
    of = library_of(whwh)
    single, double = of.float32, of.float64
    whwh = of.asarray(whwh, dtype=double)
    std = of.asarray(how.noise_std, dtype=double, device=whwh.device)

    def drawn(rows: Tensor) -> Any:
        """Returns rows of noise as boxes' signals begin with them."""
        return (rows.to(whwh) if isinstance(whwh, Tensor) else rows.numpy().astype(double)) * std

    x = drawn(noise.start())
    state = _StateOfLabels(how, torch.device(whwh.device))
    for pair, (t, after) in enumerate(schedule.time_pairs(how.steps)):
        logits, boxes, *rest = call(of.asarray(from_signal(x, whwh, how.scale), dtype=single), t, state.given)
        step = Step(t, after, x, logits, boxes, rest[0] if rest else None, whwh, how)
        if after >= 0:
            keep = step.keep
            many = int(keep.sum())
            clean, add, fresh = schedule.ddim_coefficients(t, after, how.eta)
            x = clean * step.x0[keep] + add * step.noise[keep]
            if how.eta:
                x = x + fresh * drawn(noise.step(pair, many))
            state.advance(_alone(logits), keep, t, after, partial(noise.uniform, pair))
            if many < len(keep):
                x = joined((x, drawn(noise.renew(pair, len(keep) - many))), 0)
            step.x_next = x
        yield step


def _alone(values: A) -> A:
    """Returns a tensor without its gradient."""
    return values.detach() if isinstance(values, Tensor) else values


def detect(steps: Iterable[Step], how: Sampling, enough: Callable[[Detections], bool] | None = None) -> Detections:
    """Returns the detections of a sampler's steps, sorted by score, in pixels of the network's input, not clipped.

    Of several steps all but the last one are pooled, without the last as in the published code; without the ensemble
    only the last one counts. enough: see `suppress`.
    """
    pool: list[Detections] = []
    for step in steps:
        if how.steps == 1 or (step.after >= 0 if how.ensemble else step.after < 0):
            pool.append(select(scores_of(step.logits, step.quality, how), step.boxes, how.proposals))
    return suppress(pooled(pool), how.largest_iou, enough)


def scores_of(logits: A, quality: A | None, how: Sampling) -> A:
    """Returns the scores (N, K) that detections are chosen by: of classes, or their geometric mean with the quality."""
    p = _sigmoid(logits)
    if not how.quality_scores or quality is None:
        return p
    return (p * _sigmoid(quality)[:, None]) ** 0.5


def _sigmoid(values: A) -> A:
    """Returns the sigmoid in float32, by torch, so that no score depends on the kind of the array."""
    if isinstance(values, Tensor):
        return values.float().sigmoid()
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).sigmoid().numpy()


class _StateOfLabels:
    """The class states of the boxes, where the network has them: all masked at first."""

    def __init__(self, how: Sampling, device: torch.device) -> None:
        self._how, self._device = how, device
        self.given: Tensor | None = None

    def advance(self, logits: Any, keep: Any, t: int, after: int, uniform: Callable[[int], Tensor]) -> None:
        """Moves the states of kept boxes to the next time; fresh ones are masked."""
        how, (many, classes) = self._how, logits.shape
        if how.label_state is None or not how.label_diffusion:
            return
        logits, keep = torch.as_tensor(logits), torch.as_tensor(keep)
        clean = states.clean_distribution(logits.float())
        if how.label_state == "dist":
            moved = states.mixed(clean, states.share_at(how.label_schedule, after).to(clean.device))
            masked = torch.zeros_like(moved[:1])
            masked[0, -1] = 1
        else:
            masked = torch.full((1,), classes, device=logits.device)
            now = masked.expand(many) if self.given is None else self.given
            moved = states.previous(now, clean, t, after, uniform(many).to(logits.device), how.label_schedule)
        fresh = masked.expand(many - int(keep.sum()), *masked.shape[1:])
        self.given = torch.cat((moved[keep], fresh))
