"""Says what may be cut from a detector: widths of the MLPs, inner widths of bottlenecks, and stages (a `CuttingPart`).

What the residual paths and the pyramid carry keeps its width. So does the dynamic convolution: a norm runs over its
inner width, so that a unit of it cannot be silent for the others. So do heads of attention, which are in one fused
parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk.families.cutting import Channels, Plan, Size
from pqk.families.detection.inputs import padded
from pqk.families.detection.settings import PATCH
from pqk.families.diffusiondet.model import DiffusionDet
from pqk.families.diffusiondet.network.backbone import Norm
from pqk.families.diffusiondet.network.configs import DiffusionDetConfig, read_config
from pqk.families.diffusiondet.sampling import schedule

if TYPE_CHECKING:
    from pqk.families.detection.batches import Images

BACKBONE, STAGES = "backbone.bottom_up", "head.head_series"


def sizes(config: Mapping[str, Any], round_to: int) -> list[Size]:
    """See `CuttingPart`. Both inner convolutions of a bottleneck follow one size.

    kind inner: channels inside of bottlenecks.
    """
    read, found = read_config(config), []
    for name, width in _bottlenecks(read).items():
        convs = [f"{name}.conv{number}" for number in (1, 2)]
        groups = tuple(Channels(conv, conv, norm=f"{conv}.norm") for conv in convs)
        found.append(Size(f"{name}.inner", "inner", width, round_to, groups))
    for index, stage in enumerate(read.head):
        name = f"{STAGES}.{index}"
        found.append(Size(f"{name}.ffn", "ffn", stage.ffn, round_to, (Channels(f"{name}.linear1", f"{name}.linear1"),)))
        found.append(Size(name, "block", 1, modules=(name,)))
    return found


def _bottlenecks(read: DiffusionDetConfig) -> dict[str, int]:
    """Returns the inner width of each bottleneck by its name."""
    return {
        f"{BACKBONE}.res{level + 2}.{block}": width
        for level, group in enumerate(read.backbone.inner)
        for block, width in enumerate(group)
    }


def smaller(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """See `CuttingPart`."""
    read = read_config(config)
    left = [(index, stage) for index, stage in enumerate(read.head) if plan.get(f"{STAGES}.{index}", 1)]
    inner = [
        [plan.get(f"{BACKBONE}.res{level + 2}.{block}.inner", width) for block, width in enumerate(group)]
        for level, group in enumerate(read.backbone.inner)
    ]
    return {
        **config,
        "num_heads": len(left),
        "dim_feedforward": [plan.get(f"{STAGES}.{index}.ffn", stage.ffn) for index, stage in left],
        "dim_dynamic": [stage.dynamic for _, stage in left],
        "inner": inner,
    }


def may_drop(config: Mapping[str, Any], blocks: Sequence[str], *, retrained: bool = False) -> bool:
    """See `CuttingPart`. At least one stage stays; unless retrained also the last one, whose boxes are the result."""
    stages = [f"{STAGES}.{index}" for index in range(read_config(config).stages)]
    return any(stage not in blocks for stage in stages) and (retrained or stages[-1] not in blocks)


def tracing(net: DiffusionDet) -> tuple[Callable[[DiffusionDet, Tensor], list[Tensor]], Tensor]:
    """See `CuttingPart`. Norms of the backbone pass on what they get; `Channels.norm` says what is cut along.

    Of the head only the MLPs are traced, as nothing else of it is cut.
    """
    net.requires_grad_(True)  # the tracer follows gradients, and some weights are not trained
    for module in net.modules():
        if isinstance(module, Norm):
            module.forward = _unchanged  # type: ignore[method-assign]

    def forward(net: DiffusionDet, images: Tensor) -> list[Tensor]:
        known = images.new_zeros(1, 1, net.sizes.stage.dim)
        mlps: Any = net.head.head_series
        return [*net.backbone(images), *(mlp.linear2(F.relu(mlp.linear1(known))) for mlp in mlps)]

    return forward, torch.zeros(1, 3, 2 * PATCH, 2 * PATCH)


def _unchanged(x: Tensor) -> Tensor:
    return x


def run_sample(net: DiffusionDet, side: int) -> int:
    """See `CuttingPart`: an image, and the configured number of boxes once through the head."""
    side -= side % PATCH
    boxes = torch.zeros(1, net.sizes.proposals, 4)
    net(torch.zeros(1, 3, side, side), boxes, schedule.TIMES - 1, whwh=torch.full((1, 4), float(side)))
    return side


def begin(net: DiffusionDet, batch: Images) -> list[Tensor]:
    """See `CuttingPart`: the maps p2 ... p5, each (B, C, h, w)."""
    maps: list[Tensor] = net.backbone(padded(batch.images())[0])
    return maps


def begins(size: str) -> bool:
    """See `CuttingPart`: whether the backbone has this size."""
    return size.startswith(f"{BACKBONE}.")


def finish(net: DiffusionDet, begun: Sequence[Tensor], batch: Images) -> dict[str, Any]:
    """See `CuttingPart`."""
    from pqk.families.diffusiondet import learning  # which opens data: nothing else here needs any

    return learning.forward({**learning.parts(net), "backbone": lambda images: begun}, batch)
