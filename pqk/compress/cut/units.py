"""Finds the units that can be cut from a network and the weights of each, and cuts them: `slots_of`, `cut`.

A unit is an attention head, a hidden unit of an MLP, a channel of a convolution, or a whole block. The family names the
sizes that may shrink (`pqk.families.cutting`). The weights that compute a unit and those that read it are cut together.
They are found by tracing the network with torch-pruning's dependency graph (Fang et al., "DepGraph: Towards Any
Structural Pruning", CVPR 2023).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pqk.errors import PqkError
from pqk.families.cutting import Channels, CuttingPart, Plan, Size
from pqk.models import build_model


@dataclass(frozen=True)
class Part:
    """One weight's share in a group: `rows` (units, k) are the indices along `axis` that belong to each unit.

    A weight is a parameter, or a buffer of a norm (`weights_of`). reads: whether these weights read the unit's output;
    otherwise they compute it.
    """

    key: str
    axis: int
    rows: Tensor
    reads: bool

    @property
    def layer(self) -> str:
        return self.key.rpartition(".")[0]


@dataclass(frozen=True)
class Group:
    """Units that can be cut one by one, with all weights that belong to each."""

    name: str
    parts: tuple[Part, ...]

    @property
    def units(self) -> int:
        return len(self.parts[0].rows)


@dataclass(frozen=True)
class Slot:
    """One size of the configuration (`pqk.families.cutting.Size`) and the groups of units whose number it sets.

    name: such as 'blocks.0.ffn', or that of a block that is cut as a whole, which has a group for each of its modules.
    units: the size now. step: number of units cut at a time. follows: layers of this size that no output depends on.
    """

    name: str
    kind: str  # heads, ffn, block, or one of the family's own
    units: int
    step: int
    groups: tuple[Group, ...]
    follows: tuple[str, ...] = ()

    def keeps(self, group: Group, units: int) -> int:
        """Returns how many of a group's units stay when the slot keeps `units`.

        The number of units of a group may be a fixed fraction of the size.
        """
        return group.units * units // self.units

    def sizes(self, levels: Sequence[float]) -> list[int]:
        """Returns the numbers of units that stay when these shares are cut, from many to few, in whole steps and at
        least one step.
        """
        if self.kind == "block":
            return [0]
        first = max(self.step, (self.units - 1) // self.step * self.step)
        kept = {min(first, max(self.step, round(self.units * (1 - level) / self.step) * self.step)) for level in levels}
        return sorted((n for n in kept if n < self.units), reverse=True)

    def inside(self, block: Slot) -> bool:
        """Returns whether this slot lies in a block, and so is cut with it."""
        modules = tuple(f"{group.name}." for group in block.groups)
        return any(group.name.startswith(modules) for group in self.groups)


def slots_of(model: Any, kinds: Collection[str], round_to: int, cutting: CuttingPart) -> list[Slot]:
    """Returns everything of these kinds that may be cut from the model; see `CuttingPart.sizes`.

    Raises PqkError when torch-pruning is not installed.
    """
    trace = _Tracer(model, cutting)

    def group(channels: Channels) -> Group:
        found = trace.group(channels)
        return found if channels.norm is None else _with_norm(model, found, channels.norm)

    def slot(size: Size) -> Slot:
        groups = [_whole(model, name) for name in size.modules] or [group(channels) for channels in size.groups]
        return Slot(size.name, size.kind, size.units, size.step, tuple(groups), size.follows)

    return [slot(size) for size in cutting.sizes(model.config, round_to) if size.kind in kinds]


def groups_of(slots: Sequence[Slot]) -> list[Group]:
    """Returns the groups of all slots except whole blocks."""
    return [group for slot in slots if slot.kind != "block" for group in slot.groups]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns what files hold of a network, by name: parameters, and buffers that are not computed anew."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def _with_norm(model: nn.Module, group: Group, norm: str) -> Group:
    """Returns the group with the numbers that a norm has for each of its units."""
    rows = torch.arange(group.units)[:, None]
    keys = [f"{norm}.{name}" for name in weights_of(model.get_submodule(norm))]
    return Group(group.name, (*group.parts, *(Part(key, 0, rows, False) for key in keys)))


def _whole(model: nn.Module, name: str) -> Group:
    """Returns a block as one unit that owns all its weights."""
    parts = [
        Part(f"{name}.{key}", 0, torch.arange(len(weight))[None], False)
        for key, weight in model.get_submodule(name).named_parameters()
    ]
    return Group(name, tuple(parts))


class _Tracer:
    """The dependency graph of a network of the same configuration, traced with tensors that have shapes but no data."""

    def __init__(self, model: Any, cutting: CuttingPart) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import torch_pruning
        except ImportError:
            raise PqkError("pruning needs torch-pruning: pip install torch-pruning") from None
        with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = type(model)(model.config)
            forward, example = cutting.tracing(self.model)
            self.graph = torch_pruning.DependencyGraph().build_dependency(
                self.model, example_inputs=example, forward_fn=forward, verbose=False
            )
        self.names: dict[int, str] = {}  # of tied modules the first
        for name, module in self.model.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), name)

    def group(self, channels: Channels) -> Group:
        """Returns channels or heads with all weights that depend on them."""
        layer = self.model.get_submodule(channels.root)
        pruner = self.graph.get_pruner_of_module(layer)
        count = channels.inner or pruner.get_out_channels(layer)
        found = self.graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(count)))
        parts = []
        for item in found:
            module = item.dep.target.module
            if not isinstance(module, nn.Module) or not list(module.parameters(recurse=False)):
                continue  # an operation without weights
            if not isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                raise PqkError(f"the channels of {channels.root} reach {self.names[id(module)]}, which cannot be cut")
            owned: list[list[int]] = [[] for _ in range(count)]
            for index, unit in zip(item.idxs, item.root_idxs, strict=True):
                owned[unit].append(index)
            rows = torch.tensor(owned).reshape(channels.heads or count, -1).sort(dim=1).values
            name = self.names[id(module)]
            reads = not self.graph.is_out_channel_pruning_fn(item.dep.handler)
            if name == channels.root and not reads:
                rows = torch.cat([rows + k * count for k in range(channels.fused)], dim=1)
            transposed = isinstance(module, nn.ConvTranspose2d)  # its weight is (in, out, h, w)
            parts.append(Part(f"{name}.weight", int(reads != transposed), rows, reads))
            if not reads and module.bias is not None:
                parts.append(Part(f"{name}.bias", 0, rows, False))
        return Group(channels.name, tuple(parts))


@torch.no_grad()
def silence(weights: Mapping[str, Tensor], group: Group, keep: Tensor) -> None:
    """Sets the weights of all units of a group to zero, in place, except those of the kept units (indices)."""
    gone = torch.ones(group.units, dtype=torch.bool)
    gone[keep.cpu()] = False
    for part in group.parts:
        weight = weights[part.key]
        weight.index_fill_(part.axis, part.rows[gone].flatten().to(weight.device), 0.0)


@contextlib.contextmanager
def silenced(model: nn.Module, slot: Slot, keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Sets the weights of all units of a slot to zero except the kept ones (group name -> indices); restores them
    afterwards. A block that can be skipped is skipped (`Size.modules`).

    Inside the context the network computes the same as without these units. Other changes to the weights and biases of
    these layers inside the context are undone as well.
    """
    gone = [model.get_submodule(g.name) for g in slot.groups if slot.kind == "block" and not len(keep[g.name])]
    skipped: list[Any] = [block for block in gone if hasattr(block, "skipped")]
    weights = weights_of(model)
    keys = {part.key for group in slot.groups for part in group.parts}
    keys |= {key.removesuffix("weight") + "bias" for key in keys} & weights.keys()
    before = {key: weights[key].detach().clone() for key in keys}
    try:
        for block in skipped:
            block.skipped = True
        for group in slot.groups:
            silence(weights, group, keep[group.name])
        yield
    finally:
        for block in skipped:
            block.skipped = False
        with torch.no_grad():
            for key, value in before.items():
                weights[key].copy_(value)


def cut(model: Any, slots: Sequence[Slot], plan: Plan, keep: Mapping[str, Tensor], cutting: CuttingPart) -> Any:
    """Returns a new, smaller float32 model on the CPU: each group keeps the units in `keep` (ascending indices).

    Only groups of slots in the plan are cut; blocks with 0 units in the plan are cut as a whole.
    """
    blocks = [g.name for slot in slots if slot.kind == "block" and not plan.get(slot.name, 1) for g in slot.groups]
    # build_model puts zeros where weights that no output depends on are missing
    unused = [layer for size in cutting.sizes(model.config, 1) for layer in size.follows]
    dropped = tuple(f"{name}." for name in (*blocks, *unused))
    chosen: dict[str, list[tuple[int, Tensor]]] = {}
    for slot in slots:
        if slot.name not in plan or slot.kind == "block":
            continue
        for group, part in ((g, p) for g in slot.groups for p in g.parts):
            rows = part.rows[keep[group.name].cpu()].flatten().sort().values
            chosen.setdefault(part.key, []).append((part.axis, rows))
    state: dict[str, Tensor] = {}
    for key, weight in weights_of(model).items():
        if key.startswith(dropped):
            continue
        value = weight.detach().cpu()
        for axis, rows in chosen.get(key, ()):
            value = value.index_select(axis, rows)
        state[_renumbered(key, blocks)] = value
    return build_model(model.family, cutting.smaller(model.config, plan), state)


def _renumbered(key: str, blocks: Sequence[str]) -> str:
    """Returns the name of a weight after these blocks ('stack.3') are cut: the blocks behind them are renumbered."""
    for stack in {block.rpartition(".")[0] for block in blocks}:
        if key.startswith(f"{stack}."):
            index, _, rest = key.removeprefix(f"{stack}.").partition(".")
            before = sum(f"{stack}.{i}" in blocks for i in range(int(index)))
            return f"{stack}.{int(index) - before}.{rest}"
    return key
