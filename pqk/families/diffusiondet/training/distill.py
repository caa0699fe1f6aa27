"""Teaches a sampler of few steps what one of many steps finds, and other ways to need fewer steps.

Salimans and Ho 2022 (progressive distillation); Song et al. 2023 (consistency distillation). Teacher and student start
from the same noise and run without fresh noise, renewal and ensemble, so that a box of one is the same box of the
other. One image at a time: N boxes, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk.errors import PqkError
from pqk.families.diffusiondet.network.boxes import as_signal, from_signal, giou
from pqk.families.diffusiondet.sampling import schedule
from pqk.families.diffusiondet.sampling.noise import GivenNoise
from pqk.families.diffusiondet.sampling.sampler import HeadCall, Sampling, Step, sample
from pqk.families.diffusiondet.training.losses import BOX_WEIGHT, GIOU_WEIGHT, corner_distance


class End(NamedTuple):
    """What the last stage of the head found in one step: logits (N, K) and boxes (N, 4)."""

    logits: Tensor
    boxes: Tensor


class Terms(NamedTuple):
    """Losses of classes and of boxes, each a scalar, and which boxes they were taken over: an index for each pair."""

    classes: Tensor
    boxes: Tensor
    chosen: list[Tensor]


def trajectory(call: HeadCall, whwh: Tensor, start: Tensor, steps: int, scale: float) -> list[Step]:
    """Returns all steps of a deterministic sampler from the noise `start` (N, 4). whwh: of the image (4,)."""
    how = Sampling(steps, len(start), scale, eta=0.0, renewal=None, ensemble=False)
    return list(sample(call, whwh, GivenNoise(start), how))


def chosen_boxes(logits: Tensor, boxes: Tensor, most: int) -> Tensor:
    """Returns the index, in order, of the `most` boxes of the highest class score among those that have an area."""
    real = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero()[:, 0]
    best = logits[real].sigmoid().amax(dim=1).argsort(descending=True, stable=True)[:most]
    return real[best].sort().values


def distill_terms(student: Sequence[Step | End], teacher: Sequence[Step | End], whwh: Tensor, most: int) -> Terms:
    """Returns the mean over the student's steps of what sets it apart from the teacher at the end of the same interval.

    Step k of S is compared with the teacher's pair (k + 1) T / S - 1, of T. Classes: binary cross-entropy with the
    teacher's scores, summed over classes. Boxes: 5 L1 of relative corners + 2 (1 - GIoU). Both are means over the
    teacher's `most` best boxes. Raises PqkError where T is no multiple of S.
    """
    if len(teacher) % len(student):
        raise PqkError(f"a teacher of {len(teacher)} steps cannot teach a student of {len(student)}: no multiple")
    times = len(teacher) // len(student)
    pairs = [(step, teacher[(k + 1) * times - 1]) for k, step in enumerate(student)]
    chosen = [chosen_boxes(wanted.logits, wanted.boxes, most) for _, wanted in pairs]
    classes, boxes = [], []
    for (step, wanted), index in zip(pairs, chosen, strict=True):
        classes.append(class_distance(step.logits, wanted.logits, index))
        ours, theirs = step.boxes[index], wanted.boxes[index].detach()
        apart = BOX_WEIGHT * corner_distance(ours, theirs, whwh) + GIOU_WEIGHT * (1 - giou(ours, theirs))
        boxes.append(apart.mean())
    return Terms(torch.stack(classes).mean(), torch.stack(boxes).mean(), chosen)


def class_distance(logits: Tensor, wanted: Tensor, index: Tensor) -> Tensor:
    """Returns the mean over boxes at `index` of the summed cross-entropy with the sigmoid of wanted logits."""
    target = wanted[index].detach().sigmoid()
    return F.binary_cross_entropy_with_logits(logits[index], target, reduction="none").sum(dim=1).mean()


def progressive_target(x: Tensor, t: int, x_after: Tensor, after: int) -> Tensor:
    """Returns the x0 with which one deterministic step leads from x at time t to x_after at time `after` >= 0.

    (x'' - r x) / (alpha'' - r alpha) with r = sigma'' / sigma; alpha = sqrt(abar), sigma = sqrt(1 - abar) (Salimans and
    Ho 2022, appendix G).
    """
    (alpha, sigma), (alpha_after, sigma_after) = (
        (schedule.at("sqrt_alphas_cumprod", at), schedule.at("sqrt_one_minus_alphas_cumprod", at)) for at in (t, after)
    )
    ratio = sigma_after / sigma
    return (x_after - ratio * x) / (alpha_after - ratio * alpha)


def consistency_terms(
    student: HeadCall,
    target: HeadCall,
    teacher: HeadCall,
    x0: Tensor,
    noise: Tensor,
    times: tuple[int, int],
    whwh: Tensor,
    scale: float,
    most: int,
) -> tuple[Terms, Tensor]:
    """Returns how far the student at one time is from the target network at the next, and the state there.

    x0, noise: clean signals and standard-normal rows (N, 4). times: t and the next one, of a sampler's pairs. The
    teacher makes the step between them. Boxes: mean over boxes of the summed distance of limited signals.
    """
    t, after = times
    whwh = whwh.double()
    x = schedule.diffuse(x0, t, noise)

    def signals(call: HeadCall, state: Tensor, at: int) -> tuple[Tensor, Tensor, Tensor]:
        logits, boxes = call(from_signal(state, whwh, scale).float(), at, None)[:2]
        return logits, boxes, as_signal(boxes.double(), whwh, scale).clamp(-scale, scale)

    with torch.no_grad():
        found = signals(teacher, x, t)[2]
        clean, add, _ = schedule.ddim_coefficients(t, after, 0.0)
        x_after = clean * found + add * schedule.noise_in(x, found, t)
        wanted, wanted_boxes, wanted_signals = signals(target, x_after, after)
        index = chosen_boxes(wanted, wanted_boxes, most)
    logits, _, ours = signals(student, x, t)
    apart = (ours[index] - wanted_signals[index]).abs().sum(dim=1).mean()
    return Terms(class_distance(logits, wanted, index), apart.float(), [index]), x_after
