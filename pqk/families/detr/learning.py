"""Teaches DETR (a `LearningPart`): the library's own losses against the truth, and distances from a Teacher."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.families.contract import Join
from pqk.families.detection.batches import Images
from pqk.families.detection.inputs import padded
from pqk.families.detection.learning import REMEDY as REMEDY
from pqk.families.detection.learning import SOURCE as SOURCE
from pqk.families.detection.learning import UNIT as UNIT
from pqk.families.detection.learning import Scored, check_classes, evidence, taught
from pqk.families.detection.learning import as_exported as as_exported
from pqk.families.detection.learning import batches as batches
from pqk.families.detection.learning import compiled as compiled
from pqk.families.detection.learning import complete as complete
from pqk.families.detection.learning import floor as floor
from pqk.families.detection.learning import samples as samples
from pqk.families.detection.learning import share as share
from pqk.families.detr.model import DetectorGraph, Detr, resnet_of
from pqk.families.detr.predict import boxes_of

TERMS = ("task", "kl", "imitation", "probe")
borrowed = {"diffusiondet": resnet_of}
NO_FEATURES = "DETR compares no features; set distill.loss.gamma to 0"


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the module of the one graph, which shares the model's weights and takes any size."""
    assert isinstance(model, Detr)
    return {"detector": DetectorGraph(model, every=True)}


def forward(parts: Mapping[str, nn.Module], batch: Images, watched: Any = None) -> dict[str, Any]:
    """Returns logits (L, B, N, K + 1) and boxes (L, B, N, 4) relative to the padded input, its shape, and the loss that
    belongs to them. The exported graph gives the last of L layers alone. Raises PqkError for `watched`: no feature of
    this family is compared.
    """
    if watched is not None:
        raise PqkError(NO_FEATURES)
    images, _ = padded(batch.images(), batch.least)
    part: Any = parts["detector"]
    logits, boxes = part(images)
    if logits.ndim == 3:
        logits, boxes = logits[None], boxes[None]
    check_classes(batch, logits.shape[-1] - 1)
    return {"logits": logits, "boxes": boxes, "loss": part.model.loss, "shape": tuple(images.shape[2:])}


def joined(out: Mapping[str, Any], join: Join) -> dict[str, Any]:
    """Returns the outputs for the whole batch; see `LearningPart`."""
    return {**out, "logits": join(out["logits"], 1), "boxes": join(out["boxes"], 1)}


def _task(out: Mapping[str, Any], batch: Images) -> Tensor:
    height, width = out["shape"]
    size = out["boxes"].new_tensor([width, height, width, height], dtype=torch.float32)
    labels = [{"class_labels": one["labels"], "boxes": _centres(one["boxes"] / size)} for one in batch.targets()]
    loss: Tensor = out["loss"](out["logits"].float(), out["boxes"].float(), labels)
    return loss


def _centres(corners: Tensor) -> Tensor:
    low, high = corners[:, :2], corners[:, 2:]
    return torch.cat(((low + high) / 2, high - low), dim=1)


def losses(
    out: Mapping[str, Any],
    batch: Images,
    teacher: Mapping[str, Any] | None,
    terms: Collection[str],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Returns the losses that are asked for; see `LearningPart`. kl: of the classes of each query, at a temperature,
    times its square (Hinton et al. 2015).
    """
    found: dict[str, Tensor] = {}
    if "task" in terms:
        with torch.autocast(out["logits"].device.type, enabled=False):
            found["task"] = _task(out, batch)
    if "kl" in terms:
        assert teacher is not None
        warm = options["temperature"]
        mine, theirs = ((each["logits"][-1].float() / warm).log_softmax(-1) for each in (out, teacher))
        found["kl"] = F.kl_div(mine, theirs, log_target=True, reduction="none").sum(-1).mean() * warm**2
    if "imitation" in terms:
        assert teacher is not None
        found["imitation"] = _apart(out, teacher).mean()
    if "probe" in terms:
        signs = torch.Generator().manual_seed(0)
        values = torch.cat((out["logits"][-1].float().softmax(-1), out["boxes"][-1].float()), dim=-1)
        drawn = torch.randint(2, values.shape, generator=signs).to(values) * 2 - 1
        found["probe"] = (drawn * values).sum() / values.numel() ** 0.5
    return found


def _apart(out: Mapping[str, Any], teacher: Mapping[str, Any]) -> Tensor:
    """Returns how far the outputs of each image (B,) are from the Teacher's: classes, and boxes it is sure of."""
    chances = [each["logits"][-1].float().softmax(-1) for each in (out, teacher)]
    classes = (chances[0] - chances[1]).abs().sum(-1)
    boxes = (out["boxes"][-1].float() - teacher["boxes"][-1].float()).abs().sum(-1) * (1 - chances[1][..., -1])
    return (classes + 5 * boxes).mean(-1)


def features(teacher: nn.Module, student: nn.Module, seed: int) -> tuple[Any, Any, nn.ModuleDict]:
    """Raises PqkError: no feature is compared."""
    raise PqkError(NO_FEATURES)


def _found(out: Mapping[str, Any], batch: Images) -> list[dict[str, np.ndarray]]:
    """Returns the detections of each image, in pixels of it."""
    sizes = [(one.image.shape[0], one.image.shape[1]) for one in batch.pictures]
    logits, boxes = (out[name][-1].detach().float().cpu().numpy() for name in ("logits", "boxes"))
    ends = zip(logits, boxes, strict=True)
    return [boxes_of(*end, out["shape"], size, size) for end, size in zip(ends, sizes, strict=True)]


def as_truth(batch: Images, out: Mapping[str, Any], config: Mapping[str, Any]) -> Images:
    """Returns the images with the Teacher's sure detections as their truth."""
    return taught(batch, _found(out, batch), out["logits"].shape[-1] - 1)


def score(out: Mapping[str, Any], batch: Images) -> Scored:
    """Returns the evidence of each image; see `complete`."""
    return evidence(_found(out, batch), batch)


def shift(out: Mapping[str, Any], uncut: Mapping[str, Any], batch: Images) -> float:
    """Returns the mean distance of the outputs of a cut network from those of the uncut one."""
    return float(_apart(out, uncut).mean())


def distance(out: Mapping[str, Any], teacher: Mapping[str, Any], options: Mapping[str, Any]) -> list[float]:
    """Returns the loss 'imitation' of each image by itself."""
    return [float(value) for value in _apart(out, teacher)]


def same_network(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configurations are the same but for the name of the family."""
    return {**one, "family": ""} == {**other, "family": ""}
