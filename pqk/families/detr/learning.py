"""Teaches DETR (a `LearningPart`): the library's own losses against the truth, and distances from a Teacher."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.families.contract import Batches, SampleSet
from pqk.families.detection.batches import Images, batches_of
from pqk.families.detection.inputs import padded
from pqk.families.detection.learning import REMEDY as REMEDY
from pqk.families.detection.learning import SOURCE as SOURCE
from pqk.families.detection.learning import UNIT as UNIT
from pqk.families.detection.learning import Scored, evidence, taught
from pqk.families.detection.learning import complete as complete
from pqk.families.detection.learning import floor as floor
from pqk.families.detr.predict import boxes_of
from pqk.families.detr.settings import Workload
from pqk.settings.training import Training

TERMS = ("task", "kl", "imitation", "probe")


class Part(nn.Module):
    """The network as a training runs it: with the truth it gives its loss too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, labels: Any = None) -> Any:
        return self.model(image, labels)


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the one part."""
    return {"detector": Part(model)}


def as_exported(parts: Mapping[str, nn.Module], workload: Workload) -> None:
    """Does nothing: no module holds a size."""


def batches(
    asked: Training,
    device: torch.device,
    *,
    seed: int,
    held_seed: int,
    found: SampleSet | None = None,
    workload: Workload | None = None,
) -> Batches:
    """Returns batches of generated images, or of the user's own set or photographs; see `LearningPart`."""
    return batches_of(asked, device, seed, held_seed, found)


def forward(parts: Mapping[str, nn.Module], batch: Images, watched: Any = None) -> dict[str, Any]:
    """Returns logits (B, N, K + 1), boxes (B, N, 4) relative to the padded input, its shape, and the loss where the
    truth is known. Raises PqkError for `watched`: no feature of this family is compared.
    """
    if watched is not None:
        raise PqkError("DETR compares no features; set distill.loss.gamma to 0")
    images, _ = padded(batch.images())
    height, width = images.shape[2:]
    labels = None
    if batch.truthful and not batch.held:
        size = images.new_tensor([width, height, width, height])
        labels = [{"class_labels": one["labels"], "boxes": _centres(one["boxes"] / size)} for one in batch.targets()]
    found = parts["detector"](images, labels)
    return {"logits": found.logits, "boxes": found.pred_boxes, "loss": found.loss, "shape": (height, width)}


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
        found["task"] = out["loss"]
    if "kl" in terms:
        assert teacher is not None
        warm = options["temperature"]
        mine, theirs = ((each["logits"].float() / warm).log_softmax(-1) for each in (out, teacher))
        found["kl"] = F.kl_div(mine, theirs, log_target=True, reduction="none").sum(-1).mean() * warm**2
    if "imitation" in terms:
        assert teacher is not None
        found["imitation"] = _apart(out, teacher).mean()
    if "probe" in terms:
        signs = torch.Generator().manual_seed(0)
        values = torch.cat((out["logits"].float().softmax(-1), out["boxes"].float()), dim=-1)
        drawn = torch.randint(2, values.shape, generator=signs).to(values) * 2 - 1
        found["probe"] = (drawn * values).sum() / values.numel() ** 0.5
    return found


def _apart(out: Mapping[str, Any], teacher: Mapping[str, Any]) -> Tensor:
    """Returns how far the outputs of each image (B,) are from the Teacher's: classes, and boxes it is sure of."""
    chances = [each["logits"].float().softmax(-1) for each in (out, teacher)]
    classes = (chances[0] - chances[1]).abs().sum(-1)
    boxes = (out["boxes"].float() - teacher["boxes"].float()).abs().sum(-1) * (1 - chances[1][..., -1])
    return (classes + 5 * boxes).mean(-1)


def features(teacher: nn.Module, student: nn.Module, seed: int) -> tuple[Any, Any, nn.ModuleDict]:
    """Raises PqkError: no feature is compared."""
    raise PqkError("DETR compares no features; set distill.loss.gamma to 0")


def _found(out: Mapping[str, Any], batch: Images) -> list[dict[str, np.ndarray]]:
    """Returns the detections of each image, in pixels of it."""
    sizes = [(one.image.shape[0], one.image.shape[1]) for one in batch.pictures]
    ends = zip(out["logits"].detach().float().cpu().numpy(), out["boxes"].detach().float().cpu().numpy(), strict=True)
    return [boxes_of(*end, out["shape"], size, size) for end, size in zip(ends, sizes, strict=True)]


def as_truth(batch: Images, out: Mapping[str, Any], config: Mapping[str, Any]) -> Images:
    """Returns the images with the Teacher's sure detections as their truth."""
    return taught(batch, _found(out, batch))


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
