"""Builds the network of a configuration, reads official checkpoints, and splits the network into its graphs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pqk.families import layers
from pqk.families.contract import GraphSpec
from pqk.families.diffusiondet.checkpoint import official as official
from pqk.families.diffusiondet.model import DiffusionDet
from pqk.families.diffusiondet.network import attention
from pqk.families.diffusiondet.network.backbone import Norm
from pqk.families.diffusiondet.network.head import Head, Stage
from pqk.families.diffusiondet.sampling import schedule
from pqk.families.diffusiondet.settings import SIGN

if TYPE_CHECKING:
    from pqk.families.diffusiondet.settings import Workload

UNDONE: Mapping[str, Any] = {"norm": "frozen"}
LAYOUT = f"'model' with {SIGN}"
"""What an official checkpoint holds."""

FIRST_CHANCE = 0.01
"""Of every class, before anything was learned (Lin et al. 2017, section 4.1)."""


def build(config: Mapping[str, Any]) -> nn.Module:
    """Returns the network of a configuration (see `network.configs`). Raises PqkError that names the key."""
    return DiffusionDet(config)


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fills every parameter and buffer with fresh values.

    Linear layers: Xavier uniform. The bias of the classes makes each of them a chance of 0.01. Extensions begin so that
    they change no output: a class table, last layers of geometry and the quality head with 0.
    """
    layers.initialize(model, generator)
    cast(DiffusionDet, model).fill_schedule()
    for part in model.modules():
        if isinstance(part, Norm):
            for buffer, fill in ((part.weight, 1), (part.bias, 0), (part.running_mean, 0), (part.running_var, 1)):
                buffer.fill_(fill)
        elif isinstance(part, attention.Attention):
            nn.init.xavier_uniform_(part.in_proj_weight, generator=generator)
            nn.init.zeros_(part.in_proj_bias)
        elif isinstance(part, Stage):
            nn.init.constant_(part.class_logits.bias, -math.log((1 - FIRST_CHANCE) / FIRST_CHANCE))
            if part.size.geometry:
                attention.start_geometry(part.geo_feat, generator)
            if part.size.bias is not None:
                attention.start_geometry(part.geo_bias, generator)
            if part.size.quality:
                nn.init.zeros_(part.quality_logit.weight)
                nn.init.zeros_(part.quality_logit.bias)
        elif isinstance(part, Head) and part.label_state is not None:
            nn.init.zeros_(part.label_embed.weight)


def adapt(weights: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Returns the weights as they are: their names are the official ones."""
    return dict(weights)


def may_lack(key: str) -> bool:
    """Whether a checkpoint may lack this weight: the tables of the schedule, which are computed anew."""
    return key in schedule.NAMES


def graphs(model: nn.Module, workload: Workload) -> dict[str, GraphSpec]:
    """Returns backbone and head for the input and the boxes of the workload. Raises PqkError where these differ."""
    from pqk.families.diffusiondet.graphs import graphs_of

    return graphs_of(cast(DiffusionDet, model), workload)
