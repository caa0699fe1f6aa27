"""Assigns proposals to truths: as many to each as its best overlaps add up to, the cheapest ones.

Ge et al. 2021 (OTA; the dynamic k of YOLOX), with the costs of Chen et al. 2023, section 3.3. N proposals, G truths, K
classes; boxes are corners in pixels. Nothing here has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pqk.families.diffusiondet.network.boxes import giou, iou_and_union, to_centres

ALPHA, GAMMA = 0.25, 2.0
CLASS_COST, BOX_COST, GIOU_COST = 2.0, 5.0, 2.0
OUTSIDE, FAR, TAKEN = 100.0, 10_000.0, 100_000.0
"""Added to the cost of a pair that is not central, of a proposal near no truth, and of one that has a truth."""
RADIUS = 2.5
"""A centre is near a truth within so many times its width and height."""
LOG_EPS = 1e-8


class Match(NamedTuple):
    """truth: of each proposal (N,) int64, -1 for none. best: the cheapest own proposal of each truth (G,) int64.

    cost, iou: (N, G), before anything was assigned.
    """

    truth: Tensor
    best: Tensor
    cost: Tensor
    iou: Tensor


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, labels: Tensor, truths: Tensor, whwh: Tensor, candidates: int = 5) -> Match:
    """Returns which proposal serves which truth.

    logits: (N, K). boxes: (N, 4). labels: of the truths (G,) int64, and truths: their boxes (G, 4). whwh: w, h, w, h of
    the image (4,). candidates: IoUs that are added up to the number of proposals of a truth.
    """
    if not len(truths):
        nothing = torch.full((len(boxes),), -1, device=boxes.device)
        return Match(nothing, nothing[:0], *([boxes.new_zeros(len(boxes), 0)] * 2))
    logits, boxes, truths = logits.float(), boxes.float(), truths.float()
    iou, _ = iou_and_union(boxes[:, None], truths[None])
    cost = costs(logits, boxes, labels, truths, whwh)
    taken, final = _assigned(cost.clone(), iou, candidates)
    truth = torch.where(taken.any(dim=1), taken.byte().argmax(dim=1), -1)
    best = final.masked_fill(~taken, torch.inf).argmin(dim=0)
    return Match(truth, best, cost, iou)


def costs(logits: Tensor, boxes: Tensor, labels: Tensor, truths: Tensor, whwh: Tensor) -> Tensor:
    """Returns the cost (N, G) of every pair: 5 L1 + 2 focal - 2 GIoU, and what is added to pairs far apart."""
    p = logits.sigmoid()
    hit = ALPHA * (1 - p) ** GAMMA * -(p + LOG_EPS).log()
    miss = (1 - ALPHA) * p**GAMMA * -(1 - p + LOG_EPS).log()
    of_class = (hit - miss)[:, labels]
    of_box = ((boxes / whwh)[:, None] - (truths / whwh)[None]).abs().sum(dim=-1)
    inside, near = _central(boxes, truths)
    cost = BOX_COST * of_box + CLASS_COST * of_class - GIOU_COST * giou(boxes[:, None], truths[None])
    cost = cost + OUTSIDE * ~(inside & near)
    return cost + FAR * ~(inside | near).any(dim=1, keepdim=True)


def _central(boxes: Tensor, truths: Tensor) -> tuple[Tensor, Tensor]:
    """Returns whether the centre of each proposal is inside of each truth, and whether it is near it: (N, G) each."""
    middle = to_centres(boxes)[:, None, :2]
    inside = (middle > truths[None, :, :2]) & (middle < truths[None, :, 2:])
    centre, size = to_centres(truths)[None].split(2, dim=-1)
    near = (middle > centre - RADIUS * size) & (middle < centre + RADIUS * size)
    return inside.all(dim=-1), near.all(dim=-1)


def _assigned(cost: Tensor, iou: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Returns what is assigned (N, G) bool, and the costs in the end. cost: is changed.

    A truth that is left without a proposal takes the cheapest free one. Where two take the same one, both keep it
    unless it was contested before: the published matcher looks again only at those, and the lower truth wins in the
    end.
    """
    many = iou.topk(min(candidates, len(iou)), dim=0).values.sum(dim=0).int().clamp(min=1)
    taken = cost.argsort(dim=0, stable=True).argsort(dim=0) < many
    contested = taken.sum(dim=1) > 1
    taken = _cheapest_only(taken, cost, contested)
    for _ in range(len(cost)):  # each round serves a truth more, while there are free proposals
        without = ~taken.any(dim=0)
        if not without.any():
            break
        cost[taken.any(dim=1)] += TAKEN
        taken[cost[:, without].argmin(dim=0), without.nonzero()[:, 0]] = True
        if (taken.sum(dim=1) > 1).any():
            taken = _cheapest_only(taken, cost, contested)
    return taken, cost


def _cheapest_only(taken: Tensor, cost: Tensor, rows: Tensor) -> Tensor:
    """Returns the assignment in which proposals of `rows` serve their cheapest truth alone."""
    alone = torch.zeros_like(taken).scatter_(1, cost.argmin(dim=1, keepdim=True), True)
    return torch.where(rows[:, None], alone, taken)
