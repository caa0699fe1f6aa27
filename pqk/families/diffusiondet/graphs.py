"""Splits the detector into two graphs of static shape: the backbone, and the head that refines noisy boxes.

| graph | inputs | outputs |
| --- | --- | --- |
| backbone | image (1, 3, H, W) | p2 (1, C, H / 4, W / 4), p3, p4, p5 (1, C, H / 32, W / 32) |
| head | p2 ... p5, boxes (1, N, 4), t (1,), labels, whwh | logits (1, N, K), refined (1, N, 4), quality (1, N) |

The image is normalised. N boxes are corners in pixels; `refined` are those of the last stage. t: a time 0 ... 999.
labels: class states, of a network that diffuses classes: (1, N) with K as the mask, or distributions (1, N, K + 1).
whwh: w, h, w, h of the picture in the input (1, 4), of a network with place features. quality: logits, of a network
with a quality head. Everything is float32. The modules share the network's weights and take batches of any size too.
"""

from __future__ import annotations

import copy
import json
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.families.contract import GraphSpec
from pqk.families.diffusiondet.model import DiffusionDet
from pqk.families.diffusiondet.network.configs import DiffusionDetConfig
from pqk.families.diffusiondet.network.head import MAPS, Head

if TYPE_CHECKING:
    from pqk.families.diffusiondet.settings import Network, Workload


class BackboneGraph(nn.Module):
    """Normalised images (B, 3, H, W) -> p2, p3, p4 and p5."""

    def __init__(self, model: DiffusionDet) -> None:
        super().__init__()
        self.backbone = model.backbone

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(image))


class HeadGraph(nn.Module):
    """Maps, noisy boxes and times -> logits, boxes and quality logits of the last stage.

    every: of every stage, with the stages as the first axis, as a training needs them. neighbours: see
    `settings.Network`.
    """

    def __init__(self, model: DiffusionDet, every: bool = False, neighbours: int | None = None) -> None:
        super().__init__()
        self.head = model.head if neighbours is None else rewired(model.head, neighbours)
        self.sizes, self.every = model.sizes, every
        self.labelled, self.placed = label_state(model.sizes) is not None, model.sizes.stage.geometry
        self.numbered = model.sizes.label_state == "sample"

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Takes the inputs in the order of `head_names`."""
        p2, p3, p4, p5, boxes, t, *more = given
        labels = more.pop(0) if self.labelled else None
        if labels is not None and self.numbered:
            labels = labels.long()
        whwh = more.pop(0) if self.placed else None
        maps = (p2, p3, p4, p5)
        if self.every:
            return self.head(maps, boxes, t, labels, whwh)
        return self.head.last(maps, boxes, t, labels, whwh)


def rewired(head: Head, neighbours: int) -> Head:
    """Returns a copy of the head with the same weights, whose boxes attend to so many others, the nearest ones."""
    other = copy.copy(head)
    other._modules = dict(head._modules)
    stages = []
    for stage in head.head_series:
        new: Any = copy.copy(stage)
        new.size = replace(new.size, nearest=neighbours, attends=neighbours > 0)
        stages.append(new)
    other.head_series = nn.ModuleList(stages)
    return other


def label_state(sizes: DiffusionDetConfig) -> str | None:
    """Returns how a network diffuses classes; None: it does not, and all classes are masked."""
    return sizes.label_state if sizes.label_diffusion else None


def head_names(sizes: DiffusionDetConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the inputs and of the outputs of the head's graph."""
    labels = () if label_state(sizes) is None else ("labels",)
    whwh = ("whwh",) if sizes.stage.geometry else ()
    quality = ("quality",) if sizes.stage.quality else ()
    return (*MAPS, "boxes", "t", *labels, *whwh), ("logits", "refined", *quality)


def parts_of(model: DiffusionDet, training: bool = False, neighbours: int | None = None) -> dict[str, nn.Module]:
    """Returns the modules of both graphs. training: the head gives the outputs of every stage."""
    return {"backbone": BackboneGraph(model), "head": HeadGraph(model, training, neighbours)}


def check_network(sizes: DiffusionDetConfig, network: Network) -> None:
    """Raises PqkError where the section `network` of a workload says something else than the model's configuration.

    It names all that is to be set, as arguments of a command.
    """
    state = label_state(sizes)
    known: dict[str, Any] = {"signal_scale": sizes.scale, "noise_std": list(sizes.noise_std), "label_state": state}
    known["classes"] = None if state is None else sizes.stage.classes
    if state is not None:
        known["label_schedule"] = sizes.label_schedule
    known |= {"quality_head": sizes.stage.quality, "geo_feat": sizes.stage.geometry}
    said = network.model_dump(mode="json")
    if wrong := [f"workload.network.{key}={_shown(own)}" for key, own in known.items() if said[key] != own]:
        asked = " ".join(f"--set {shlex.quote(setting)}" for setting in wrong)
        raise PqkError(f"the workload tells of another network than the model has; give {asked}")


def graphs_of(model: DiffusionDet, workload: Workload) -> dict[str, GraphSpec]:
    """Returns both graphs for the input and the number of boxes of a workload, with these weights.

    Example inputs are random, from a fixed seed: normal images, their maps, boxes of all sizes, also partly outside of
    the image, and one of size 0. Raises PqkError for a workload of another network (`check_network`).
    """
    sizes = model.sizes
    check_network(sizes, workload.network)
    height, width = workload.input.height, workload.input.width
    random = torch.Generator().manual_seed(0)
    images = [torch.randn((1, 3, height, width), generator=random) for _ in range(2)]
    parts = parts_of(model, neighbours=workload.network.neighbours)
    with torch.no_grad():
        first, second = (
            _fed(sizes, dict(zip(MAPS, parts["backbone"](each), strict=True)), workload, random) for each in images
        )
    inputs, outputs = head_names(sizes)
    return {
        "backbone": GraphSpec(parts["backbone"], {"image": images[0]}, ("image",), MAPS),
        "head": GraphSpec(parts["head"], first, inputs, outputs, (second,)),
    }


def _fed(
    sizes: DiffusionDetConfig, maps: dict[str, Tensor], workload: Workload, random: torch.Generator
) -> dict[str, Tensor]:
    """Returns inputs of the head for the maps of an image: on maps of noise it is badly conditioned."""
    height, width, many = workload.input.height, workload.input.width, workload.sampler.boxes
    feeds = {**maps, "boxes": example_boxes(many, height, width, random)[None]}
    feeds["t"] = torch.randint(0, 1000, (1,), generator=random).float()
    classes = sizes.stage.classes
    if label_state(sizes) == "sample":
        feeds["labels"] = torch.randint(0, classes + 1, (1, many), generator=random).float()
    elif label_state(sizes) == "dist":
        feeds["labels"] = torch.rand((1, many, classes + 1), generator=random).softmax(dim=-1)
    if sizes.stage.geometry:
        feeds["whwh"] = torch.tensor([[width, height] * 2], dtype=torch.float32)
    return feeds


def example_boxes(many: int, height: int, width: int, random: torch.Generator) -> Tensor:
    """Returns boxes (many, 4): sides from a hundredth of the image's on, centres in it, the first of size 0."""
    whole = torch.tensor([width, height])
    sides = 100.0 ** -torch.rand((many, 2), generator=random) * whole
    sides[0] = 0
    middle = torch.rand((many, 2), generator=random) * whole
    return torch.cat((middle - sides / 2, middle + sides / 2), dim=-1)


def _shown(value: object) -> str:
    """Returns a value as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value)
