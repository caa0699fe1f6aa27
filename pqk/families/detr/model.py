"""Builds DETR with the `transformers` library; its own configuration and weights are read as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pqk.errors import NotBuilt, PqkError
from pqk.families.contract import GraphSpec
from pqk.families.defaults import LAYOUT as LAYOUT
from pqk.families.defaults import UNDONE as UNDONE
from pqk.families.defaults import may_lack as may_lack
from pqk.families.defaults import official as official
from pqk.families.detr.settings import Workload

_OWN = "net."
_FIXED = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "auxiliary_loss": True}


class Detr(nn.Module):
    """The library's network of one configuration: normalised images (B, 3, H, W) -> logits, boxes.

    Every pixel counts, those of the padding too. Raises NotBuilt without the library, and PqkError for a configuration
    that it refuses.
    """

    family = "detr"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        try:
            from transformers import DetrConfig, DetrForObjectDetection
        except ImportError as error:
            raise NotBuilt(f"DETR needs the library transformers, pip install 'pqk[detr]' ({error})") from error
        self.config = {key: value for key, value in config.items() if key != "family"}
        if "backbone_config" not in self.config or self.config.get("use_timm_backbone"):
            raise PqkError("detr configuration: needs a backbone_config of a ResNet of transformers; timm is not used")
        try:
            self.net = DetrForObjectDetection(DetrConfig.from_dict({**self.config, **_FIXED}))
        except Exception as error:  # whatever the library says of a value
            raise PqkError(f"detr configuration: {str(error).strip().splitlines()[0]}") from error

    def forward(self, image: Tensor, labels: list[dict[str, Tensor]] | None = None) -> Any:
        """Returns what the library's network does; labels: `class_labels` and relative `boxes` of each image."""
        return self.net(image, pixel_mask=torch.ones_like(image[:, 0], dtype=torch.int64), labels=labels)


class DetectorGraph(nn.Module):
    """Image (1, 3, H, W) -> logits (1, N, K + 1), the last class being none, and refined (1, N, 4): cx, cy, w, h in
    [0, 1] of the input.
    """

    def __init__(self, model: Detr) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(image)
        return found.logits, found.pred_boxes


def build(config: Mapping[str, Any]) -> nn.Module:
    """Returns the network of a configuration, with keys of the library's DetrConfig. Raises as `Detr` does."""
    return Detr(config)


def initialize(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fills every weight as the library does. generator: seeds it; None: torch's own random numbers."""
    with torch.random.fork_rng(enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model.net.apply(model.net._init_weights)  # type: ignore[operator, union-attr]


def adapt(weights: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Returns the library's weights under the names that they have here."""
    return {key if key.startswith(_OWN) else f"{_OWN}{key}": value for key, value in weights.items()}


def graphs(model: nn.Module, workload: Workload) -> dict[str, GraphSpec]:
    """Returns the one graph, with a random image as its example."""
    random = torch.Generator().manual_seed(0)
    image = torch.randn((1, 3, workload.input.height, workload.input.width), generator=random)
    assert isinstance(model, Detr)
    return {"detector": GraphSpec(DetectorGraph(model), {"image": image}, ("image",), ("logits", "refined"))}
