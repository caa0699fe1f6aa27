"""Runners of the cases of training: noisy truths, the matcher, the losses, one whole training step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pqk.families.diffusiondet.network.boxes import from_signal
from pqk.families.diffusiondet.training.losses import LossOptions, set_losses
from pqk.families.diffusiondet.training.matcher import match
from pqk.families.diffusiondet.training.targets import Draws, noisy_boxes
from pqk.families.diffusiondet.vectors.common import GRADIENT_MARK, NETWORK_MARK, gradients, network_of, sizes, tensor
from pqk.families.vectors import Case, Compared, compare

SMALL_GRADIENT = 1e-6
"""Of the norm of all: a gradient below is rounding."""


def targets(case: Case) -> Iterator[Compared]:
    """Noisy boxes of more, as many, fewer and no truths."""
    scale, ones = float(case.need("snr_scale")), torch.ones(4)
    for index in range(len(case.need("cases"))):
        draws = _draws(case, str(index))._replace(chosen=tensor(case, f"in_select{index}").bool())
        found = noisy_boxes(tensor(case, f"in_gt{index}"), draws, scale)
        yield case.check(f"mid_x_start{index}", found.x0)
        yield case.check(f"mid_x_t{index}", found.x)
        yield case.check(f"out_boxes{index}", from_signal(found.x, ones, scale))


def matcher(case: Case) -> Iterator[Compared]:
    """Assignments, which must be equal, and the costs they come from."""
    width, height = case.need("image_wh")
    for index in range(len(case.need("cases"))):
        logits, boxes, labels, truths = (
            tensor(case, f"in_{name}{index}") for name in ("logits", "boxes", "gt_labels", "gt_boxes")
        )
        found = match(logits, boxes, labels, truths, sizes((height, width)), case.need("ota_k"))
        yield case.check(f"out_assign{index}", found.truth)
        for name, value in (
            (f"mid_cost{index}", found.cost),
            (f"mid_iou{index}", found.iou),
            (f"out_best_proposal{index}", found.best),
        ):
            if name in case:
                yield case.check(name, value)


def loss(case: Case) -> Iterator[Compared]:
    """All losses of every stage, their sum, and its gradients."""
    logits, boxes = (tensor(case, name).requires_grad_() for name in ("in_logits", "in_boxes"))
    wanted = [
        {name: tensor(case, f"in_{key}{index}") for name, key in (("labels", "gt_labels"), ("boxes", "gt_boxes"))}
        | {"whwh": tensor(case, f"in_whwh{index}")}
        for index in range(len(case.need("images")))
    ]
    for stage in range(len(logits)):
        truth = [
            match(logits[stage, image], boxes[stage, image], one["labels"], one["boxes"], one["whwh"]).truth
            for image, one in enumerate(wanted)
        ]
        yield case.check(f"mid_assign_stage{stage}", torch.stack(truth))
    found = set_losses(logits, boxes, wanted, LossOptions(candidates=case.need("config")["ota_k"]))
    weights = case.need("weights")
    for name, value in found.items():
        yield case.check(f"out_{name}", value)
        weight = weights[{"ce": "ce", "bbox": "l1", "giou": "giou"}[name.split("_")[1]]]
        yield case.check(f"mid_raw.{name}", value / weight)
    total = torch.stack(list(found.values())).sum()
    yield case.check("out_total", total)
    given = {"out_grad_logits": logits, "out_grad_boxes": boxes}
    for name, gradient in gradients(total, given).items():
        yield case.check(name, gradient, GRADIENT_MARK)


def train_step(case: Case) -> Iterator[Compared]:
    """The losses of one step through the whole network, and the gradients of its weights."""
    net = network_of(case)
    count = len(case.need("image_hw"))
    images = [tensor(case, f"in_image{index}") for index in range(count)]
    wanted = [
        {"labels": tensor(case, f"in_gt_labels{index}"), "boxes": tensor(case, f"in_gt_boxes{index}")}
        for index in range(count)
    ]
    found = net.training_losses(images, wanted, [_draws(case, str(index)) for index in range(count)])
    for name, value in found.items():
        yield case.check(f"out_{name}", value, NETWORK_MARK)
    total = torch.stack(list(found.values())).sum()
    yield case.check("out_total", total, NETWORK_MARK)
    total.backward()
    grown = {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}
    for name in case.names("out_grad."):
        yield case.check(name, grown[name.removeprefix("out_grad.")], GRADIENT_MARK)
    norm = float(torch.stack([gradient.norm() for gradient in grown.values()]).norm())
    yield compare("grad_norm_total", norm, case.need("grad_norm_total"), GRADIENT_MARK)
    for name, expected in case.need("grad_norms").items():
        yield compare(f"grad_norm.{name}", float(grown[name].norm()), expected, GRADIENT_MARK, _scale(expected, norm))
    without = [name for name in case.need("no_grad") if name in grown and float(grown[name].norm())]
    yield compare("weights without a gradient", len(without), 0)


def _scale(expected: float, norm: float) -> float:
    return max(abs(expected), SMALL_GRADIENT * norm)


def _draws(case: Case, index: str) -> Draws:
    t, noise, padding = (tensor(case, f"in_{name}{index}") for name in ("t", "noise", "placeholder"))
    return Draws(t.reshape(()), noise, padding)


KINDS = {
    "diffusiondet_targets": targets,
    "diffusiondet_matcher": matcher,
    "diffusiondet_loss": loss,
    "diffusiondet_train_step": train_step,
}
