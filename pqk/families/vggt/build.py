"""Builds the network of a configuration, reads official VGGT checkpoints, and splits the network into its graphs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.families import layers
from pqk.families.contract import GraphSpec
from pqk.families.vggt.network.camera import CameraHead
from pqk.families.vggt.network.configs import infer_config
from pqk.families.vggt.network.layers import Dino, LayerScale
from pqk.families.vggt.network.model import Vggt
from pqk.families.vggt.settings import SIGN

if TYPE_CHECKING:
    from pqk.families.vggt.settings import Workload

UNDONE: Mapping[str, Any] = {}
LAYOUT = f"the bare weights with {SIGN}"
"""What an official checkpoint holds."""

_FIRST_POSES = 0.02
"""Factor of the last layer of the camera head: its rounds add up, and random ones would begin far from any pose."""
_UNUSED = ("mask_token",)
_OPTIONAL = ("track_head.", "camera_head.", "depth_head.", "point_head.")
"""Heads that a network may be built without."""


def build(config: Mapping[str, Any]) -> nn.Module:
    """Returns the network of a configuration (see `network.configs`). Raises PqkError that names the key."""
    return Vggt(config)


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fills every parameter with fresh weights.

    LayerScale gets 1 in the image encoder and `init_values` elsewhere. The encoder's position table gets sines
    (`position_waves`): of random entries, a resized table is another one at every image size. First poses are near 0.
    """
    layers.initialize(model, generator)
    net = cast(Vggt, model)
    for name, part in net.named_modules():
        if isinstance(part, LayerScale):
            nn.init.constant_(part.gamma, 1.0 if ".patch_embed." in name else net.sizes.init_values)
        elif isinstance(part, Dino):
            part.pos_embed[0, 1:] = position_waves(part.side, part.pos_embed.shape[-1])
        elif isinstance(part, CameraHead):
            part.pose_branch.fc2.weight.mul_(_FIRST_POSES)


def position_waves(side: int, dim: int) -> Tensor:
    """Returns fixed 2-D positions (side * side, dim) for a table of patches (Vaswani et al. 2017; Chen et al. 2021).

    A quarter of the channels each are sines and cosines of the column, then of the row, from half a period over the
    image to 16 periods; scaled to a deviation of 1/2.
    """
    count = dim // 4
    rates = math.pi * 32 ** (torch.arange(count, dtype=torch.float64) / max(1, count - 1))
    place = torch.arange(side, dtype=torch.float64) / side
    across, down = torch.meshgrid(place, place, indexing="xy")
    waves = torch.zeros(side * side, dim)
    for number, (axis, wave) in enumerate(itertools.product((across, down), (torch.sin, torch.cos))):
        waves[:, number * count : (number + 1) * count] = wave(axis.reshape(-1, 1) * rates) / math.sqrt(2)
    return waves


def adapt(weights: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Returns the weights without heads that the network was built without."""
    absent = tuple(head for head in _OPTIONAL if not any(key.startswith(head) for key in expected))
    return {key: weight for key, weight in weights.items() if not (absent and key.startswith(absent))}


def may_lack(key: str) -> bool:
    """Whether a checkpoint may lack this weight, because no result depends on it."""
    return key.endswith(_UNUSED)


def official(content: Any) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Returns configuration and weights of an official checkpoint: a bare state dict, or one under `model`.

    The configuration is inferred from shapes (`infer_config`), without the track head. None when it is another
    family's. Raises PqkError for one that is damaged.
    """
    if not isinstance(content, Mapping):
        return None
    inner = content.get("model")
    weights = inner if isinstance(inner, Mapping) and SIGN in inner else content
    if SIGN not in weights:
        return None
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise PqkError(f"it is not an official VGGT checkpoint: {key!r} is no tensor")
    try:
        return infer_config(weights), dict(weights)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):  # of shapes that no network has
        raise PqkError("it is not an official VGGT checkpoint: its weights have impossible shapes") from None


def graphs(model: nn.Module, workload: Workload) -> dict[str, GraphSpec]:
    """Returns the encoder, the aggregator and a graph per head, for the frames and their size in the workload."""
    from pqk.families.vggt.graphs import graphs_of

    sizes, shape = cast(Vggt, model).sizes, workload.input
    heads = {"camera": sizes.camera is not None, "depth": sizes.depth_head, "points": sizes.point_head}
    lacking = [name for name, has in heads.items() if not has]
    if lacking:
        raise PqkError(f"a VGGT is run with all of its heads, and this one lacks {' and '.join(lacking)}")
    return graphs_of(cast(Vggt, model), shape.frames, shape.height, shape.width)
