"""What can be cut from a network: its units, the weights that belong to each, and the cut itself.

A unit is an attention head, a hidden unit of an MLP, a channel of a DPT head, or a whole block. The weights that make
a unit and those that read it go together; which these are is found by tracing the network with torch-pruning's
dependency graph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023).
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pqk.errors import PqkError
from pqk.families.dust3r.configs import dpt_hooks, read_config
from pqk.families.dust3r.layers import CrossAttention, DecoderBlock, Rope, SelfAttention
from pqk.families.dust3r.model import Dust3r
from pqk.models import build_model
from pqk.settings.prune import Units

FEEDS_NOTHING = ".refinenet4.resConfUnit1."
"""Weights of official DPT heads that no output depends on."""

Plan = Mapping[str, int]
"""Name of a slot -> units that stay; slots that are not named keep all."""


@dataclass(frozen=True)
class Part:
    """One parameter's share in a group: `rows` (units, k) are the indices along `axis` that belong to each unit.

    reads: whether these weights read the unit's output; otherwise they compute it.
    """

    key: str
    axis: int
    rows: Tensor
    reads: bool


@dataclass(frozen=True)
class Group:
    """Units that can go one by one, with all weights that each takes along."""

    name: str
    parts: tuple[Part, ...]

    @property
    def units(self) -> int:
        return len(self.parts[0].rows)


@dataclass(frozen=True)
class Slot:
    """One size of the configuration and all groups that have to follow it.

    name: 'enc_blocks.0.ffn', 'dec_blocks2.1.heads', 'dpt.feature_dim', or 'dec_blocks.1' of a block that goes whole,
    with its twin in the other decoder. units: the size now. step: what is cut at a time. Both attentions of a decoder
    block follow one number of heads, both DPT heads one set of widths; which units stay is up to each group.
    """

    name: str
    kind: str  # heads, ffn, dpt or block
    units: int
    step: int
    groups: tuple[Group, ...]

    def keeps(self, group: Group, units: int) -> int:
        """How many of a group's units stay when the slot keeps `units`; one layer of a DPT head has half the width."""
        return group.units * units // self.units

    def sizes(self, levels: Sequence[float]) -> list[int]:
        """Units that stay when these shares go, from many to few, in whole steps and never below one step."""
        if self.kind == "block":
            return [0]
        first = max(self.step, (self.units - 1) // self.step * self.step)
        kept = {min(first, max(self.step, round(self.units * (1 - level) / self.step) * self.step)) for level in levels}
        return sorted((n for n in kept if n < self.units), reverse=True)


def slots_of(model: Dust3r, units: Units, round_to: int) -> list[Slot]:
    """Everything that may be cut from the model. Sizes stay multiples of `round_to`, DPT's feature_dim of an even one.

    Raises PqkError when torch-pruning is not installed.
    """
    trace = _Tracer(model)
    slots = []
    stacks = ("enc_blocks", "dec_blocks", "dec_blocks2")
    for stack in stacks:
        for index, block in enumerate(getattr(model, stack)):
            name = f"{stack}.{index}"
            if units.heads:
                parts = [trace.heads(f"{name}.attn", "qkv")]
                if isinstance(block, DecoderBlock):
                    parts.append(trace.heads(f"{name}.cross_attn", "projq"))
                slots.append(Slot(f"{name}.heads", "heads", block.attn.heads, 1, tuple(parts)))
            if units.ffn:
                group = trace.group(f"{name}.mlp.fc1")
                slots.append(Slot(f"{name}.ffn", "ffn", group.units, round_to, (group,)))
            if units.blocks and stack != "dec_blocks2" and may_drop(model.config, [name]):
                twins = [name, f"dec_blocks2.{index}"] if stack == "dec_blocks" else [name]
                slots.append(Slot(name, "block", 1, 1, tuple(_whole(model, twin) for twin in twins)))
    if units.dpt and model.sizes.dpt is not None:
        slots += _dpt_slots(trace, model.sizes.dpt.layer_dims, model.sizes.dpt, round_to)
    return slots


def _dpt_slots(trace: _Tracer, layer_dims: Sequence[int], size: Any, round_to: int) -> list[Slot]:
    heads = [f"downstream_head{view}.dpt" for view in (1, 2)]
    slots = []
    for level, width in enumerate(layer_dims):
        # the convolution that follows the projection on all levels but the third keeps the width
        roots = [f"act_postprocess.{level}.{i}" for i in ((0,) if level == 2 else (0, 1))]
        groups = tuple(trace.group(f"{head}.{root}") for head in heads for root in roots)
        slots.append(Slot(f"dpt.layer_dims.{level}", "dpt", width, round_to, groups))
    roots = [f"scratch.layer{level}_rn" for level in range(1, 5)]
    roots += [f"scratch.refinenet{level}.resConfUnit{unit}.conv1" for level in range(1, 5) for unit in (1, 2)]
    roots = [root for root in roots if FEEDS_NOTHING not in f".{root}."]
    roots += ["scratch.refinenet1.out_conv", "head.0"]  # head.0 has half the channels
    features = tuple(trace.group(f"{head}.{root}") for head in heads for root in roots)
    even = round_to if round_to % 2 == 0 else 2 * round_to
    slots.append(Slot("dpt.feature_dim", "dpt", size.feature_dim, even, features))
    last = tuple(trace.group(f"{head}.head.2") for head in heads)
    slots.append(Slot("dpt.last_dim", "dpt", size.last_dim, round_to, last))
    return slots


def _whole(model: Dust3r, name: str) -> Group:
    """A block as one unit that owns all its weights: without them only the residual path is left."""
    parts = [
        Part(f"{name}.{key}", 0, torch.arange(len(weight))[None], False)
        for key, weight in model.get_submodule(name).named_parameters()
    ]
    return Group(name, tuple(parts))


def _coupled(q: Tensor, k: Tensor, v: Tensor, q_rope: Rope, k_rope: Rope) -> Tensor:
    return q + k + v


class _Tracer:
    """The dependency graph of a network of the same configuration, traced with tensors that have shapes but no data.

    Attention is replaced by the sum of queries, keys and values while tracing. That couples what is cut together,
    channel i of each, and spares the tracer the rotation, which mixes the channels inside a head but none of two heads.
    """

    def __init__(self, model: Dust3r) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import torch_pruning
        except ImportError:
            raise PqkError("pruning needs torch-pruning: pip install torch-pruning") from None
        side = 4 * model.sizes.patch_size
        with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = Dust3r(model.config)
            for module in self.model.modules():
                if isinstance(module, SelfAttention | CrossAttention):
                    module.attend = _coupled  # type: ignore[method-assign]

            def forward(net: Dust3r, image: Tensor) -> list[Tensor]:
                tokens = net.encode(image)
                return list(net.decode(tokens, tokens, (side, side), (side, side)).values())

            self.graph = torch_pruning.DependencyGraph().build_dependency(
                self.model, example_inputs=torch.zeros(1, 3, side, side), forward_fn=forward, verbose=False
            )
        self.names: dict[int, str] = {}  # of tied modules the first
        for name, module in self.model.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), name)

    def group(self, root: str, channels: int | None = None) -> Group:
        """The group of the output channels of a layer (the first `channels` of them)."""
        layer = self.model.get_submodule(root)
        pruner = self.graph.get_pruner_of_module(layer)
        count = channels or pruner.get_out_channels(layer)
        found = self.graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(count)))
        parts = []
        for item in found:
            module = item.dep.target.module
            if not isinstance(module, nn.Module) or not list(module.parameters(recurse=False)):
                continue  # an operation without weights
            if not isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                raise PqkError(f"the channels of {root} reach {self.names[id(module)]}, which cannot be cut")
            owned: list[list[int]] = [[] for _ in range(count)]
            for index, unit in zip(item.idxs, item.root_idxs, strict=True):
                owned[unit].append(index)
            rows = torch.tensor([sorted(indices) for indices in owned])
            name = self.names[id(module)]
            reads = not self.graph.is_out_channel_pruning_fn(item.dep.handler)
            transposed = isinstance(module, nn.ConvTranspose2d)  # its weight is (in, out, h, w)
            parts.append(Part(f"{name}.weight", int(reads != transposed), rows, reads))
            if not reads and module.bias is not None:
                parts.append(Part(f"{name}.bias", 0, rows, False))
        return Group(root, tuple(parts))

    def heads(self, name: str, root: str) -> Group:
        """The heads of an attention: its channels, head by head."""
        attention = self.model.get_submodule(name)
        assert isinstance(attention.heads, int) and isinstance(attention.inner, int)
        channels = self.group(f"{name}.{root}", attention.inner)
        parts = [
            Part(part.key, part.axis, part.rows.reshape(attention.heads, -1).sort(dim=1).values, part.reads)
            for part in channels.parts
        ]
        return Group(name, tuple(parts))


@contextlib.contextmanager
def silenced(model: nn.Module, slot: Slot, keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Zero the weights of all units of a slot but those kept (group name -> indices), and put them back afterwards.

    The network then computes what it computes without these units. What else happens inside to the weights and biases
    of the layers concerned is undone as well.
    """
    weights = dict(model.named_parameters())
    keys = {part.key for group in slot.groups for part in group.parts}
    keys |= {key.removesuffix("weight") + "bias" for key in keys} & weights.keys()
    before = {key: weights[key].detach().clone() for key in keys}
    try:
        with torch.no_grad():
            for group in slot.groups:
                gone = torch.ones(group.units, dtype=torch.bool)
                gone[keep[group.name].cpu()] = False
                for part in group.parts:
                    weight = weights[part.key]
                    weight.index_fill_(part.axis, part.rows[gone].flatten().to(weight.device), 0.0)
        yield
    finally:
        with torch.no_grad():
            for key, value in before.items():
                weights[key].copy_(value)


def smaller_config(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The configuration that is left when each slot of the plan keeps the units it says."""
    sizes = read_config(config)
    new = {**config, "enc_head_dim": sizes.enc_blocks[0].head_dim, "dec_head_dim": sizes.dec_blocks[0].head_dim}
    for stack, blocks in (
        ("enc_blocks", sizes.enc_blocks),
        ("dec_blocks", sizes.dec_blocks),
        ("dec_blocks2", sizes.dec_blocks2),
    ):
        new[stack] = [
            {
                "heads": plan.get(f"{stack}.{i}.heads", block.heads),
                "ffn": plan.get(f"{stack}.{i}.ffn", block.ffn),
            }
            for i, block in enumerate(blocks)
            if plan.get(f"{stack.rstrip('2')}.{i}", 1)
        ]
    new["enc_depth"], new["dec_depth"] = len(new["enc_blocks"]), len(new["dec_blocks"])
    if sizes.dpt is not None:
        new["dpt"] = {
            "feature_dim": plan.get("dpt.feature_dim", sizes.dpt.feature_dim),
            "last_dim": plan.get("dpt.last_dim", sizes.dpt.last_dim),
            "layer_dims": [plan.get(f"dpt.layer_dims.{i}", width) for i, width in enumerate(sizes.dpt.layer_dims)],
        }
    return new


def may_drop(config: Mapping[str, Any], dropped: Sequence[str]) -> bool:
    """Whether these blocks ('enc_blocks.1', 'dec_blocks.4') may all go.

    At least one block of each stack stays, and a DPT head still reads the outputs of the layers that it was trained on.
    """
    sizes = read_config(config)
    left = {
        stack: [i for i in range(len(blocks)) if f"{stack}.{i}" not in dropped]
        for stack, blocks in (("enc_blocks", sizes.enc_blocks), ("dec_blocks", sizes.dec_blocks))
    }
    if not all(left.values()):
        return False
    depth, rest = len(sizes.dec_blocks), left["dec_blocks"]
    if sizes.dpt is None or len(rest) == depth:
        return True
    if len(rest) < 3:
        return False
    # entry 0 of the token list is the encoder's output, entry j the output of decoder layer j - 1
    return [0, *(rest[hook - 1] + 1 for hook in dpt_hooks(len(rest))[1:])] == list(dpt_hooks(depth))


def cut(model: Dust3r, slots: Sequence[Slot], plan: Plan, keep: Mapping[str, Tensor]) -> Dust3r:
    """A new float32 CPU model with small weights: each group keeps the units `keep` names (ascending indices).

    Only groups of slots in the plan are cut; blocks with 0 units in the plan go as a whole.
    """
    dropped = tuple(f"{s.name}." for s in slots if s.kind == "block" and plan.get(s.name, 1) == 0)
    dropped += tuple(name.replace("dec_blocks.", "dec_blocks2.") for name in dropped if name.startswith("dec_blocks."))
    chosen: dict[str, list[tuple[int, Tensor]]] = {}
    for slot in slots:
        if slot.name not in plan or slot.kind == "block":
            continue
        for group, part in ((g, p) for g in slot.groups for p in g.parts):
            rows = part.rows[keep[group.name].cpu()].flatten().sort().values
            chosen.setdefault(part.key, []).append((part.axis, rows))
    numbers = {
        stack: itertools.count() for stack in ("enc_blocks", "dec_blocks", "dec_blocks2")
    }  # of the blocks that stay
    renamed: dict[str, str] = {}
    state: dict[str, Tensor] = {}
    for key, weight in model.named_parameters():
        if key.startswith(dropped) or FEEDS_NOTHING in key:
            continue  # build_model puts zeros where weights that feed nothing are missing
        value = weight.detach().cpu()
        for axis, rows in chosen.get(key, ()):
            value = value.index_select(axis, rows)
        stack, _, rest = key.partition(".")
        if stack in numbers:
            block = f"{stack}.{rest.partition('.')[0]}"
            if block not in renamed:
                renamed[block] = f"{stack}.{next(numbers[stack])}"
            key = renamed[block] + key[len(block) :]
        state[key] = value
    return build_model(model.family, smaller_config(model.config, plan), state)
