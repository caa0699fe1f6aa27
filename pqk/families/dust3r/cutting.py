"""What may be cut from a DUSt3R: heads, MLP widths, widths of the DPT heads, and blocks (a `CuttingPart`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pqk.families.cutting import Channels, Plan, Size
from pqk.families.dust3r.batches import Pairs
from pqk.families.dust3r.configs import DptSize, dpt_hooks, read_config
from pqk.families.dust3r.layers import CrossAttention, SelfAttention
from pqk.families.dust3r.model import Dust3r
from pqk.families.layers import Rope
from pqk.families.sizes import BlockSize

ENCODER, DECODERS = "enc_blocks", ("dec_blocks", "dec_blocks2")
DPT_HEADS = ("downstream_head1.dpt", "downstream_head2.dpt")
UNUSED = "scratch.refinenet4.resConfUnit1"
"""Of a DPT head: its coarsest level has nothing to add, but official files carry the weights."""


def sizes(config: Mapping[str, Any], round_to: int) -> list[Size]:
    """See `CuttingPart`. Both attentions of a decoder block follow one number of heads, both DPT heads one set of
    widths; blocks of the two decoders go together. DPT's feature_dim stays even, as one of its layers has half of it.
    """
    found = []
    for stack, blocks in _stacks(config).items():
        for index, block in enumerate(blocks):
            name = f"{stack}.{index}"
            heads = [_heads(f"{name}.attn", "qkv", block, fused=3)]
            if stack != ENCODER:
                heads.append(_heads(f"{name}.cross_attn", "projq", block))
            found.append(Size(f"{name}.heads", "heads", block.heads, groups=tuple(heads)))
            found.append(Size(f"{name}.ffn", "ffn", block.ffn, round_to, _channels(f"{name}.mlp.fc1")))
            if stack != DECODERS[1]:
                modules = [f"{twin}.{index}" for twin in (DECODERS if stack == DECODERS[0] else (stack,))]
                found.append(Size(name, "block", 1, modules=tuple(modules)))
    dpt = read_config(config).dpt
    return found if dpt is None else [*found, *_dpt_sizes(dpt, round_to)]


def _dpt_sizes(dpt: DptSize, round_to: int) -> list[Size]:
    found = []
    for level, width in enumerate(dpt.layer_dims):
        # the layer that follows the projection, on all levels but the third, keeps the width
        layers = [f"act_postprocess.{level}.{i}" for i in ((0,) if level == 2 else (0, 1))]
        found.append(Size(f"dpt.layer_dims.{level}", "dpt", width, round_to, _in_both_heads(layers)))
    layers = [f"scratch.layer{level}_rn" for level in range(1, 5)]
    layers += [f"scratch.refinenet{level}.resConfUnit{unit}.conv1" for level in range(1, 5) for unit in (1, 2)]
    layers.remove(f"{UNUSED}.conv1")
    layers += ["scratch.refinenet1.out_conv", "head.0"]  # head.0 has half the channels
    even = round_to if round_to % 2 == 0 else 2 * round_to
    idle = tuple(f"{head}.{UNUSED}.{conv}" for head in DPT_HEADS for conv in ("conv1", "conv2"))
    found.append(Size("dpt.feature_dim", "dpt", dpt.feature_dim, even, _in_both_heads(layers), follows=idle))
    return [*found, Size("dpt.last_dim", "dpt", dpt.last_dim, round_to, _in_both_heads(["head.2"]))]


def _stacks(config: Mapping[str, Any]) -> dict[str, tuple[BlockSize, ...]]:
    read = read_config(config)
    return {ENCODER: read.enc_blocks, DECODERS[0]: read.dec_blocks, DECODERS[1]: read.dec_blocks2}


def _heads(attention: str, projection: str, block: BlockSize, fused: int = 1) -> Channels:
    return Channels(attention, f"{attention}.{projection}", block.heads, block.heads * block.head_dim, fused)


def _channels(*layers: str) -> tuple[Channels, ...]:
    return tuple(Channels(layer, layer) for layer in layers)


def _in_both_heads(layers: Sequence[str]) -> tuple[Channels, ...]:
    return _channels(*(f"{head}.{layer}" for head in DPT_HEADS for layer in layers))


def smaller(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """See `CuttingPart`."""
    read, stacks = read_config(config), _stacks(config)
    new = {**config, "enc_head_dim": read.enc_blocks[0].head_dim, "dec_head_dim": read.dec_blocks[0].head_dim}
    for stack, blocks in stacks.items():
        twin = DECODERS[0] if stack in DECODERS else stack  # whose name a block of both decoders has
        new[stack] = [
            {"heads": plan.get(f"{stack}.{i}.heads", block.heads), "ffn": plan.get(f"{stack}.{i}.ffn", block.ffn)}
            for i, block in enumerate(blocks)
            if plan.get(f"{twin}.{i}", 1)
        ]
    new["enc_depth"], new["dec_depth"] = len(new[ENCODER]), len(new[DECODERS[0]])
    if read.dpt is not None:
        new["dpt"] = {
            "feature_dim": plan.get("dpt.feature_dim", read.dpt.feature_dim),
            "last_dim": plan.get("dpt.last_dim", read.dpt.last_dim),
            "layer_dims": [plan.get(f"dpt.layer_dims.{i}", width) for i, width in enumerate(read.dpt.layer_dims)],
        }
    return new


def may_drop(config: Mapping[str, Any], blocks: Sequence[str], *, retrained: bool = False) -> bool:
    """See `CuttingPart`. At least one block of each stack stays, and three of a decoder under a DPT head.

    Unless retrained, a DPT head still reads the outputs of the layers that it was trained on.
    """
    stacks = _stacks(config)
    left = {stack: [i for i in range(len(stacks[stack])) if f"{stack}.{i}" not in blocks] for stack in stacks}
    if not all(left.values()):
        return False
    depth, rest = len(stacks[DECODERS[0]]), left[DECODERS[0]]
    if read_config(config).dpt is None or len(rest) == depth:
        return True
    if len(rest) < 3:
        return False
    # entry 0 of the token list is the encoder's output, entry j the output of decoder layer j - 1
    return retrained or [0, *(rest[hook - 1] + 1 for hook in dpt_hooks(len(rest))[1:])] == list(dpt_hooks(depth))


def tracing(net: Dust3r) -> tuple[Callable[[Dust3r, Tensor], list[Tensor]], Tensor]:
    """See `CuttingPart`. Cross-attention becomes the sum of queries, keys and values, self-attention its queries.

    The sum couples what is cut together, channel i of each; of a fused projection `Channels` says it. Both spare the
    tracer the rotation, which mixes the channels inside a head but none of two heads.
    """
    side = 4 * net.sizes.patch_size
    for module in net.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.attend = _sum if isinstance(module, CrossAttention) else _queries  # type: ignore[method-assign]

    def forward(net: Dust3r, image: Tensor) -> list[Tensor]:
        tokens = net.encode(image)
        return list(net.decode(tokens, tokens, (side, side), (side, side)).values())

    return forward, torch.zeros(1, 3, side, side)


def _sum(q: Tensor, k: Tensor, v: Tensor, q_rope: Rope, k_rope: Rope) -> Tensor:
    return q + k + v


def _queries(q: Tensor, k: Tensor, v: Tensor, q_rope: Rope, k_rope: Rope) -> Tensor:
    return q


def run_sample(net: Dust3r, side: int) -> int:
    """See `CuttingPart`: a pair."""
    side -= side % net.sizes.patch_size
    image = torch.zeros(1, 3, side, side)
    net(image, image)
    return side


def begin(net: Dust3r, batch: Pairs) -> Tensor:
    """See `CuttingPart`: the tokens (B, 2, N, width) of both images."""
    return net.encode(batch.images.flatten(0, 1)).unflatten(0, batch.images.shape[:2])


def begins(size: str) -> bool:
    """See `CuttingPart`: whether the encoder has this size."""
    return size.startswith(f"{ENCODER}.")


def finish(net: Dust3r, begun: Tensor, batch: Pairs) -> dict[str, Tensor]:
    """See `CuttingPart`."""
    hw = (batch.images.shape[-2], batch.images.shape[-1])
    a, b = begun[:, 0], begun[:, 1]
    return net.decode(torch.cat([a, b]), torch.cat([b, a]), hw, hw)
