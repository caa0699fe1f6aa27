"""Puts gates on attention heads and groups of hidden units, `Gated`; knows their FLOPs, and the price that shuts them.

A gate multiplies the outputs of its units before the layer that reads them. A quantizer may have prepared the network
already; then the gates add no rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pqk.compress.cut.cost import Costs
from pqk.compress.cut.units import Slot
from pqk.errors import PqkError
from pqk.families.cutting import CuttingPart


@dataclass(frozen=True)
class Layout:
    """The gates of one slot: for each of its groups the units of every gate, the most important ones first.

    units: group name -> tensors of indices: of the units that always stay, then of each gate. A gate holds `slot.step`
    units of every group, so all attentions of a slot lose the same number of heads. flops: FLOPs of each gate's units
    for one sample. worth: their importance per FLOP, summed over the groups. shared: FLOPs of each pair of units, where
    a layer has them on both sides; in `flops` those of a pair count for either unit.
    """

    slot: Slot
    units: Mapping[str, tuple[Tensor, ...]]
    flops: Tensor
    worth: Tensor
    shared: float = 0.0

    def saved(self, shut: Tensor) -> Tensor:
        """Returns the FLOPs that are saved when the gates (gates,) are shut by these shares in [0, 1]: a scalar.

        What a pair of units shares is saved once.
        """
        saved = (shut * self.flops.to(shut)).sum()
        if not self.shared:
            return saved
        sizes = shut.new_tensor([len(chosen) for chosen in next(iter(self.units.values()))[1:]])
        return saved - self.shared * (shut * sizes).sum().square()


def layouts_of(
    model: nn.Module, slots: Sequence[Slot], importance: Mapping[str, Tensor], cutting: CuttingPart
) -> list[Layout]:
    """Returns the gates of every slot. FLOPs of different slots add up exactly: each has layers of its own."""
    costs = Costs(model, slots, cutting)
    full, found = costs({}).flops, []
    for slot in slots:
        if slot.units <= slot.step:  # all of them must stay
            continue
        units = {
            group.name: torch.sort(importance[group.name], descending=True, stable=True).indices.split(slot.step)
            for group in slot.groups
        }
        # n units save each * n - shared * n^2
        some, every = (full - costs({slot.name: left}).flops for left in (slot.units - slot.step, 0))
        bent = slot.units * some - slot.step * every
        shared = bent / (slot.units * slot.step * (slot.units - slot.step))
        each = some / slot.step + shared * slot.step
        sizes = [len(chosen) for chosen in next(iter(units.values()))[1:]]
        cost = each * torch.tensor(sizes, dtype=torch.float64)
        worth = [
            sum(float(importance[name][chosen[gate]].sum()) for name, chosen in units.items())
            for gate in range(1, len(sizes) + 1)
        ]
        found.append(Layout(slot, units, cost, torch.tensor(worth, dtype=torch.float64) / cost, shared))
    return found


class Gate(nn.Module):
    """The factors of a slot's units: 1 for those that always stay, then z = sigmoid(slope * logit) for every gate.

    Raising the slope drives them to 0 and 1 (continuous sparsification: Savarese, Silva and Maire, NeurIPS 2020). The
    logits are `start + pace * moved`; the gradient of `moved` is that of the logits, so that one learning rate and
    one limit on the norm of gradients serve gates and weights; a step of the optimizer moves a logit pace times as far.
    """

    start: Tensor
    slope: Tensor

    def __init__(self, start: Tensor, pace: float) -> None:
        super().__init__()
        self.register_buffer("start", start.float())
        self.register_buffer("slope", torch.ones(()))
        self.moved = nn.Parameter(torch.zeros(len(start)))
        self.pace = pace

    def logits(self) -> Tensor:
        """Returns the logits (gates,)."""
        return self.start + self.pace * self.moved.detach() + (self.moved - self.moved.detach())

    def forward(self) -> Tensor:
        """Returns the factors (1 + gates,) in [0, 1]."""
        return torch.cat([torch.ones_like(self.start[:1]), torch.sigmoid(self.slope * self.logits())])


class _Before(nn.Module):
    """Product of a layer's input and its gates; a forward pre-hook and a submodule of that layer.

    As a module it is copied with the layer, and the hook of the copied layer is the copied module.
    """

    owner: Tensor

    def __init__(self, gate: Gate, owner: Tensor) -> None:
        super().__init__()
        self.gate = gate
        self.register_buffer("owner", owner)

    def forward(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        factors = self.gate()[self.owner].to(args[0].dtype)
        if isinstance(layer, nn.Conv2d):
            factors = factors[:, None, None]
        return (args[0] * factors, *args[1:])


class Gated:
    """Gates in the layers of one or more modules that hold the network's layers.

    The modules own the gates, so gates are trained, averaged, saved and copied with them; `Gated` only refers to them.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        layer_of: Callable[[str], nn.Module],
        total_flops: int,
        starts: Sequence[Tensor],
        pace: float,
    ) -> None:
        """Puts the gates into the modules. layer_of: returns the layer of a weight by the weight's name in the network.

        starts: logits (gates,) of each layout.
        """
        self.layouts, self.total = list(layouts), total_flops
        self.gates = [Gate(start, pace) for start in starts]
        for layout, gate in zip(self.layouts, self.gates, strict=True):
            for key, owner in owners(layout).items():
                layer = layer_of(key)
                before = _Before(gate, owner)
                layer.add_module("gates", before)
                layer.register_forward_pre_hook(before)

    def cut(self) -> Tensor:
        """Returns the cut share of the network's FLOPs, differentiable; each gate counts by how far it is shut."""
        gone = [layout.saved(1 - gate()[1:]) for layout, gate in self._both()]
        return torch.stack(gone).sum() / self.total

    def steepen(self, slope: float) -> None:
        for gate in self.gates:
            gate.slope.fill_(slope)

    def logits(self) -> list[Tensor]:
        """Returns the logits (gates,) of every layout, detached, on the CPU."""
        return [gate.logits().detach().cpu() for gate in self.gates]

    def factors(self) -> list[Tensor]:
        """Returns the factors (1 + gates,) of every layout, detached, on the CPU."""
        return [gate().detach().cpu() for gate in self.gates]

    def _both(self) -> Any:
        return zip(self.layouts, self.gates, strict=True)


def owners(layout: Layout) -> dict[str, Tensor]:
    """Returns, for each weight that reads the slot's units, (channels,): the index of each channel's factor in `Gate`.

    A channel is an input channel of that weight.
    """
    found = {}
    for group in layout.slot.groups:
        for part in group.parts:
            if part.reads:
                owner = torch.empty(part.rows.numel(), dtype=torch.long)
                for number, units in enumerate(layout.units[group.name]):
                    owner[part.rows[units].flatten()] = number
                found[part.key] = owner
    return found


def starting_logits(layouts: Sequence[Layout], mean: float, spread: float) -> list[Tensor]:
    """Returns logits from `logit(mean) - spread / 2` to `logit(mean) + spread / 2`, by the rank of a gate's worth among
    all gates.
    """
    worth = torch.cat([layout.worth for layout in layouts])
    rank = torch.empty(len(worth), dtype=torch.float64)
    rank[torch.sort(worth, stable=True).indices] = torch.linspace(-0.5, 0.5, len(worth), dtype=torch.float64)
    logits = math.log(mean / (1 - mean)) + spread * rank
    return [part.float() for part in logits.split([len(layout.worth) for layout in layouts])]


class Price(nn.Module):
    """The augmented Lagrangian of the constraint "the cut share equals the target" (Hestenes, 1969; Wang et al., EMNLP
    2020, section 3.2, for sparsity): `price * miss + penalty / 2 * miss^2`, miss = target - cut.

    After each step the price rises by dual_rate * miss. The price is a buffer, so the checkpoint of the training has
    it.
    """

    price: Tensor

    def __init__(self, penalty: float, dual_rate: float) -> None:
        super().__init__()
        self.register_buffer("price", torch.zeros(()))
        self.penalty, self.dual_rate = penalty, dual_rate

    def forward(self, cut: Tensor, target: float) -> Tensor:
        miss = target - cut
        charged = self.price.clone() * miss + 0.5 * self.penalty * miss.square()
        self.price.add_(self.dual_rate * miss.detach())
        return charged


def shut(layouts: Sequence[Layout], logits: Sequence[Tensor], total_flops: int, share: float) -> dict[str, Tensor]:
    """Returns the units that stay, as a mask (1 + gates,) per slot name. Gates with the lowest logits are shut until
    `share` is cut.

    Then gates that are not needed for the share are opened again, the highest logits first: the gate that was shut last
    may have cut more than was missing. Raises PqkError when shutting all gates does not reach the share.
    """
    stays = {layout.slot.name: torch.ones(1 + len(layout.flops), dtype=torch.bool) for layout in layouts}

    def put(layout: Layout, index: int, stay: bool) -> float:
        """Opens or shuts a gate; returns the FLOPs that this saves."""
        gates = stays[layout.slot.name][1:]
        before = layout.saved((~gates).double())
        gates[index] = stay
        return float(layout.saved((~gates).double()) - before)

    ranked = sorted(
        (float(value), number, index) for number, found in enumerate(logits) for index, value in enumerate(found)
    )
    gone, aim = 0.0, share * total_flops
    out = []
    for _, number, index in ranked:
        if gone >= aim:
            break
        out.append((layouts[number], index))
        gone += put(layouts[number], index, False)
    if gone < aim:
        raise PqkError(
            f"joint.flops_cut {share:g} cannot be reached: all units with gates together are "
            f"{100 * gone / total_flops:.1f} % of the FLOPs; allow more units"
        )
    for layout, index in reversed(out):
        opened = put(layout, index, True)
        if gone + opened >= aim:
            gone += opened
        else:
            put(layout, index, False)
    return stays


def kept_units(layouts: Sequence[Layout], stays: Mapping[str, Tensor]) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Returns the plan and the units to keep for `pqk.compress.cut.units.cut`, without slots that lose nothing."""
    plan, keep = {}, {}
    for layout in layouts:
        mask = stays[layout.slot.name]
        if bool(mask.all()):
            continue
        for name, units in layout.units.items():
            keep[name] = (
                torch.cat([part for part, stay in zip(units, mask.tolist(), strict=True) if stay]).sort().values
            )
            plan[layout.slot.name] = len(keep[name])
    return plan, keep


@torch.no_grad()
def fold(model: nn.Module, layouts: Sequence[Layout], factors: Sequence[Tensor]) -> None:
    """Multiplies the weights that read gated units by their factors, in place: then the network needs no gates."""
    weights = dict(model.named_parameters())
    for layout, factor in zip(layouts, factors, strict=True):
        for key, owner in owners(layout).items():
            weight = weights[key]
            weight.mul_(factor[owner].to(weight).reshape(-1, *[1] * (weight.ndim - 2)))
