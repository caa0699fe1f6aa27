"""Computes the losses of a set of boxes: classes, corners and overlap, for every stage by itself.

Lin et al. 2017 (focal loss); Rezatofighi et al. 2019 (GIoU); Li et al. 2020, equation 2 (quality focal loss). S stages,
B images, N proposals, K classes; boxes are corners in pixels of the network's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk.families.diffusiondet.network.boxes import giou, iou_and_union
from pqk.families.diffusiondet.network.configs import DiffusionDetConfig
from pqk.families.diffusiondet.sampling.labels import variational_loss
from pqk.families.diffusiondet.training.matcher import ALPHA, GAMMA, match

CE_WEIGHT, BOX_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0
TERMS = ("loss_ce", "loss_bbox", "loss_giou")
QUALITY_TERM, LABEL_TERM = "loss_quality", "loss_label"
IOU_EPS = 1e-6


@dataclass(frozen=True)
class LossOptions:
    """Which losses: the configuration's options of these names. candidates: of the matcher."""

    candidates: int = 5
    class_loss: str = "focal"
    qfl_beta: float = 2.0
    iou_power: float = 0.0
    quality_weight: float = 1.0
    label_weight: float = 0.0
    label_schedule: str = "linear"

    @staticmethod
    def of(sizes: DiffusionDetConfig) -> LossOptions:
        """Returns what a configuration says."""
        return LossOptions(
            sizes.candidates,
            sizes.class_loss,
            sizes.qfl_beta,
            sizes.iou_power,
            sizes.quality_weight,
            sizes.label_weight,
            sizes.label_schedule,
        )


class LabelStates(NamedTuple):
    """Noisy class states (B, N) int64 of the head's input, the mask being K, and the times (B,) of the images."""

    states: Tensor
    times: Tensor


def set_losses(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Mapping[str, Tensor]],
    options: LossOptions | None = None,
    quality: Tensor | None = None,
    labels: LabelStates | None = None,
) -> dict[str, Tensor]:
    """Returns the weighted losses by name, each a scalar; their sum is the loss.

    `loss_ce`, `loss_bbox`, `loss_giou` (and `loss_quality`) of the last stage, with `_0`, `_1` ... those of the stages
    before it. Each is divided by the number of matched proposals of its stage in the whole batch.
    logits: (S, B, N, K). boxes: (S, B, N, 4). quality: logits (S, B, N) of a network with a quality head. targets: for
    each image `labels` (G,) int64, `boxes` (G, 4) and `whwh`, its w, h, w, h (4,) without padding. labels: of a network
    with class states, whose variational loss has a weight.
    """
    options = options or LossOptions()
    logits, boxes = logits.float(), boxes.float()
    found: dict[str, Tensor] = {}
    for stage in range(len(logits)):
        last = stage == len(logits) - 1
        pairs = _matched(logits[stage], boxes[stage], targets, options.candidates)
        of_stage = stage_losses(
            logits[stage],
            boxes[stage],
            pairs,
            options,
            None if quality is None else quality[stage],
            labels if last and options.label_weight else None,
        )
        found |= {name if last else f"{name}_{stage}": value for name, value in of_stage.items()}
    return found


class Matched(NamedTuple):
    """Proposals that have a truth, M in all: image and row (M,), class (M,), box of the truth (M, 4), whwh (M, 4)."""

    image: Tensor
    row: Tensor
    classes: Tensor
    wanted: Tensor
    whwh: Tensor


def _matched(logits: Tensor, boxes: Tensor, targets: Sequence[Mapping[str, Tensor]], candidates: int) -> Matched:
    truth = torch.stack(
        [
            match(logits[image], boxes[image], one["labels"], one["boxes"], one["whwh"], candidates).truth
            for image, one in enumerate(targets)
        ]
    )
    image, row = torch.nonzero(truth >= 0, as_tuple=True)
    before = torch.tensor([0, *(len(one["labels"]) for one in targets)], device=truth.device).cumsum(0)
    place = before[image] + truth[image, row]
    classes, wanted = (torch.cat([one[name] for one in targets])[place] for name in ("labels", "boxes"))
    return Matched(image, row, classes, wanted, torch.stack([one["whwh"] for one in targets])[image])


def stage_losses(
    logits: Tensor,
    boxes: Tensor,
    found: Matched,
    options: LossOptions,
    quality: Tensor | None = None,
    labels: LabelStates | None = None,
) -> dict[str, Tensor]:
    """Returns the losses of one stage, whose proposals have been matched, as `set_losses` calls them.

    logits: (B, N, K). boxes: (B, N, 4). quality: (B, N).
    """
    at, n = (found.image, found.row), max(1, len(found.row))
    chosen = boxes[at]
    iou = iou_and_union(chosen.detach(), found.wanted)[0]
    share = (iou if options.class_loss == "qfl" else torch.ones_like(iou)).to(logits.dtype)
    target = torch.zeros_like(logits).index_put((*at, found.classes), share)
    of_class = quality_focal(logits, target, options.qfl_beta) if options.class_loss == "qfl" else focal(logits, target)
    weight = iou_weights(iou, options.iou_power)
    values = {
        "loss_ce": CE_WEIGHT * of_class.sum() / n,
        "loss_bbox": BOX_WEIGHT * (corner_distance(chosen, found.wanted, found.whwh) * weight).sum() / n,
        "loss_giou": GIOU_WEIGHT * ((1 - giou(chosen, found.wanted)) * weight).sum() / n,
    }
    if quality is not None:
        of_quality = F.binary_cross_entropy_with_logits(quality[at], iou, reduction="sum")
        values[QUALITY_TERM] = options.quality_weight * of_quality / n
    if labels is not None:
        states, times = labels.states[at], labels.times[found.image]
        of_state = variational_loss(logits[at], found.classes, states, times, options.label_schedule)
        values[LABEL_TERM] = options.label_weight * of_state
    return values


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the focal loss of each entry: alpha_t (1 - p_t)^gamma BCE with alpha 0.25 and gamma 2. target: 0 or 1."""
    p = logits.sigmoid()
    error = p + target - 2 * p * target  # 1 - p_t
    balance = ALPHA * target + (1 - ALPHA) * (1 - target)
    return balance * error**GAMMA * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def quality_focal(logits: Tensor, target: Tensor, beta: float) -> Tensor:
    """Returns the quality focal loss of each entry: |y - sigmoid|^beta BCE(logit, y). target: y in [0, 1]."""
    apart = (target - logits.sigmoid()).abs() ** beta
    return apart * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def corner_distance(boxes: Tensor, wanted: Tensor, whwh: Tensor) -> Tensor:
    """Returns the sum (...) of the absolute differences of the corners (..., 4), relative to the image."""
    return (boxes / whwh - wanted / whwh).abs().sum(dim=-1)


def iou_weights(iou: Tensor, power: float) -> Tensor:
    """Returns weights of matched pairs (M,) of mean 1, proportional to (IoU + 1e-6)^power; all 1 with a power of 0."""
    grown = (iou + IOU_EPS) ** power
    return grown * (len(grown) / grown.sum()) if len(grown) else grown
