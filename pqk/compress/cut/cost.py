"""Parameters and FLOPs of a network after a cut, without cutting it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pqk.compress.cut.units import FEEDS_NOTHING, Plan, Slot
from pqk.families.dust3r.layers import CrossAttention, SelfAttention
from pqk.families.dust3r.model import Dust3r

FLOPS_SIDE = 512
"""FLOPs are those of one pair of square images of this side."""


class Cost(NamedTuple):
    """Parameters, and FLOPs of one pair of images: two per multiply-add of layers and attention."""

    params: int
    flops: int


class Costs:
    """What a network costs after any plan: costs(plan)."""

    def __init__(self, model: Dust3r, slots: Sequence[Slot]) -> None:
        self.slots = {slot.name: slot for slot in slots}
        self.shapes = {key: tuple(weight.shape) for key, weight in model.named_parameters()}
        self.positions = _positions(model.config)
        self.tokens = (FLOPS_SIDE // model.sizes.patch_size) ** 2
        self.attentions = [n for n, m in model.named_modules() if isinstance(m, SelfAttention | CrossAttention)]

    def __call__(self, plan: Plan) -> Cost:
        sizes: dict[tuple[str, int], int] = {}  # new lengths of axes
        dropped: tuple[str, ...] = ()
        for name, units in plan.items():
            slot = self.slots[name]
            if slot.kind == "block":
                dropped += tuple(f"{group.name}." for group in slot.groups)
                continue
            for group in slot.groups:
                for part in group.parts:
                    sizes[part.key, part.axis] = part.rows.shape[1] * slot.keeps(group, units)
            if name == "dpt.feature_dim":  # no group has these, but they are stored
                unused = [key for key in self.shapes if FEEDS_NOTHING in key]
                sizes |= {(key, axis): units for key in unused for axis in (0, 1)}
        params, products = 0, 0.0
        for key, shape in self.shapes.items():
            if not key.startswith(dropped):
                count = math.prod(sizes.get((key, axis), length) for axis, length in enumerate(shape))
                params += count
                products += count * self.positions.get(key, 0.0)
        for name in self.attentions:
            key = f"{name}.proj.weight"
            if not key.startswith(dropped):
                inner = sizes.get((key, 1), self.shapes[key][1])
                # every token with every token of the view it looks at: q k^T, and the weighted sum of v
                products += 2 * inner * self.tokens * self.positions[key]
        return Cost(params, round(2 * products))


def _positions(config: Mapping[str, Any]) -> dict[str, float]:
    """How many tokens or pixels each layer's weight is applied to for one pair; unused layers are left out."""
    found: dict[str, float] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # shapes without data
        model = Dust3r(config)
        for key, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):

                def note(layer: Any, inputs: tuple[Tensor, ...], output: Tensor, key: str = f"{key}.weight") -> None:
                    # a transposed convolution spreads each pixel that comes in
                    ends = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
                    found[key] = found.get(key, 0.0) + ends.numel() / len(layer.weight)  # some run once per view

                module.register_forward_hook(note)
        image = torch.zeros(1, 3, FLOPS_SIDE, FLOPS_SIDE)
        model(image, image)
    return found
