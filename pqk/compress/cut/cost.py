"""Computes parameters and FLOPs of a network after a cut, without cutting it: `Costs`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pqk.compress.cut.units import Slot
from pqk.families.cutting import CuttingPart, Plan

FLOPS_SIDE = 512
"""FLOPs are those of one sample of square images of this side, or of the next smaller one that a network takes."""


class Cost(NamedTuple):
    """Parameters, and FLOPs of one sample: two per multiply-add of layers and attention."""

    params: int
    flops: int


class Costs:
    """The costs of a network after any plan: costs(plan). side: of the images of which FLOPs are counted."""

    def __init__(self, model: nn.Module, slots: Sequence[Slot], cutting: CuttingPart) -> None:
        self.slots = {slot.name: slot for slot in slots}
        self.shapes = {key: tuple(weight.shape) for key, weight in model.named_parameters()}
        self.side, self.flops = _flops_of_modules(model, cutting)

    def __call__(self, plan: Plan) -> Cost:
        lengths: dict[tuple[str, int], int] = {}  # new ones, of axes
        shares: dict[str, tuple[int, int]] = {}  # of attentions: heads that stay, and all
        dropped: tuple[str, ...] = ()
        for name, units in plan.items():
            slot = self.slots[name]
            if slot.kind == "block":
                dropped += tuple(f"{group.name}." for group in slot.groups)
                continue
            for group in slot.groups:
                shares[group.name] = (slot.keeps(group, units), group.units)
                for part in group.parts:
                    lengths[part.key, part.axis] = part.rows.shape[1] * slot.keeps(group, units)
            for layer in slot.follows:  # in no group, but stored
                lengths |= {(f"{layer}.weight", 0): units, (f"{layer}.weight", 1): units, (f"{layer}.bias", 0): units}
        params = flops = 0
        for key, shape in self.shapes.items():
            if not key.startswith(dropped):
                count = math.prod(lengths.get((key, axis), length) for axis, length in enumerate(shape))
                params += count
                if key.endswith(".weight"):
                    flops += self.flops.get(key.removesuffix(".weight"), 0) * count // math.prod(shape)
        for name, found in self.flops.items():
            if f"{name}.weight" not in self.shapes and not f"{name}.".startswith(dropped):
                kept, every = shares.get(name, (1, 1))
                flops += found * kept // every
        return Cost(params, flops)


def _flops_of_modules(model: Any, cutting: CuttingPart) -> tuple[int, dict[str, int]]:
    """Returns the side of the images, and the FLOPs of a sample in each module without those of the modules inside it.

    Modules without FLOPs are left out.

    The FLOPs of an attention itself (the module of a group of heads) are proportional to its number of heads: each
    token with each token that it attends to.
    """
    found: dict[str, int] = {}
    open_: list[list[int]] = []  # of the modules that are running: FLOPs at the start, and FLOPs of modules inside
    # shapes without data; attention as plain products, as its fused kernel on a CPU is not counted
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        net = type(model)(model.config)

        def enter(module: nn.Module, inputs: Any) -> None:
            open_.append([counter.get_total_flops(), 0])

        def leave(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            start, inner = open_.pop()
            total = counter.get_total_flops() - start
            if total > inner:
                found[name] = found.get(name, 0) + total - inner  # some run once per view
            if open_:
                open_[-1][1] += total

        for name, module in net.named_modules():
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(partial(leave, name))
        side = cutting.run_sample(net, FLOPS_SIDE)
    return side, found
