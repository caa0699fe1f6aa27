"""Says what may be cut from a VGGT: heads, MLP widths, widths of the DPT heads, and blocks (a `CuttingPart`).

Widths that the embedding of places is added to stay: its table depends on their number, so what is left of them would
get another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pqk.families.cutting import Channels, Plan, Size
from pqk.families.layers import Rope
from pqk.families.sizes import BlockSize
from pqk.families.vggt.batches import Sets
from pqk.families.vggt.graphs import parts_of
from pqk.families.vggt.learning import behind_encoder
from pqk.families.vggt.network.configs import VggtConfig, layers_of, read_config
from pqk.families.vggt.network.layers import Attention
from pqk.families.vggt.network.model import Vggt

ENCODER, FRAME, GLOBAL = "aggregator.patch_embed.blocks", "aggregator.frame_blocks", "aggregator.global_blocks"
TRUNK = "camera_head.trunk"
RESIZED = (0, 1, 3)
"""Levels of a DPT head that a layer resizes."""
TRACED_FRAMES = 2


def sizes(config: Mapping[str, Any], round_to: int) -> list[Size]:
    """See `CuttingPart`. A round's two blocks go together; both DPT heads follow one set of widths."""
    found = []
    for stack, blocks in _stacks(read_config(config)).items():
        for index, block in enumerate(blocks):
            name = f"{stack}.{index}"
            heads = Channels(f"{name}.attn", f"{name}.attn.qkv", block.heads, block.heads * block.head_dim, fused=3)
            found.append(Size(f"{name}.heads", "heads", block.heads, groups=(heads,)))
            found.append(Size(f"{name}.ffn", "ffn", block.ffn, round_to, _channels(f"{name}.mlp.fc1")))
            if stack != GLOBAL:
                twins = (FRAME, GLOBAL) if stack == FRAME else (stack,)
                found.append(Size(name, "block", 1, modules=tuple(f"{twin}.{index}" for twin in twins)))
    return [*found, *_dpt_sizes(read_config(config), round_to)]


def _dpt_sizes(read: VggtConfig, round_to: int) -> list[Size]:
    heads = _heads(read)
    if not heads:
        return []

    def everywhere(layers: Sequence[str]) -> tuple[Channels, ...]:
        return _channels(*(f"{head}.{layer}" for head in heads for layer in layers))

    found = [
        Size(f"dpt.resized.{level}", "dpt", read.dpt.resized[level], round_to, everywhere([f"resize_layers.{level}"]))
        for level in RESIZED
    ]
    layers = [f"scratch.layer{level}_rn" for level in range(1, 5)]
    layers += [f"scratch.refinenet{level}.resConfUnit{unit}.conv1" for level in range(1, 5) for unit in (1, 2)]
    layers.remove("scratch.refinenet4.resConfUnit1.conv1")  # the coarsest level has none
    layers.append("scratch.refinenet1.out_conv")
    return [*found, Size("dpt.features", "dpt", read.dpt.features, round_to, everywhere(layers))]


def _heads(read: VggtConfig) -> list[str]:
    return [name for name, has in (("depth_head", read.depth_head), ("point_head", read.point_head)) if has]


def _stacks(read: VggtConfig) -> dict[str, tuple[BlockSize, ...]]:
    return {ENCODER: read.dino or (), FRAME: read.frame_blocks, GLOBAL: read.global_blocks, TRUNK: read.camera or ()}


def _channels(*layers: str) -> tuple[Channels, ...]:
    return tuple(Channels(layer, layer) for layer in layers)


def smaller(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """See `CuttingPart`."""
    read = read_config(config)
    left: dict[str, list[dict[str, int]]] = {}
    for stack, blocks in _stacks(read).items():
        twin = FRAME if stack == GLOBAL else stack  # whose name the blocks of a round have
        left[stack] = [
            {"heads": plan.get(f"{stack}.{i}.heads", block.heads), "ffn": plan.get(f"{stack}.{i}.ffn", block.ffn)}
            for i, block in enumerate(blocks)
            if plan.get(f"{twin}.{i}", 1)
        ]
    new = {**config, "head_dim": read.frame_blocks[0].head_dim}
    new |= {"frame_blocks": left[FRAME], "global_blocks": left[GLOBAL], "depth": len(left[FRAME])}
    if read.dino is not None:
        new["dino"] = {"depth": len(left[ENCODER]), "head_dim": read.dino[0].head_dim, "blocks": left[ENCODER]}
    if read.camera is not None:
        new["camera"] = {"trunk_depth": len(left[TRUNK]), "head_dim": read.camera[0].head_dim, "blocks": left[TRUNK]}
    rounds = [i for i in range(len(read.frame_blocks)) if plan.get(f"{FRAME}.{i}", 1)]
    kept = all(layer in rounds for layer in read.dpt.layers)
    new["dpt"] = {
        "features": plan.get("dpt.features", read.dpt.features),
        "out_channels": list(read.dpt.out_channels),
        "layers": [rounds.index(layer) for layer in read.dpt.layers] if kept else list(layers_of(len(rounds))),
        "resized": [plan.get(f"dpt.resized.{level}", width) for level, width in enumerate(read.dpt.resized)],
        "last": read.dpt.last,
    }
    return new


def may_drop(config: Mapping[str, Any], blocks: Sequence[str], *, retrained: bool = False) -> bool:
    """See `CuttingPart`. At least one block of each stack stays.

    Unless retrained, the heads still read the rounds that they were trained on, and those stay.
    """
    read = read_config(config)
    left = {stack: [i for i in range(len(of)) if f"{stack}.{i}" not in blocks] for stack, of in _stacks(read).items()}
    if not all(left[stack] for stack, of in _stacks(read).items() if of):
        return False
    last = len(read.frame_blocks) - 1  # the camera head reads it
    return retrained or all(layer in left[FRAME] for layer in (*read.dpt.layers, last))


def tracing(net: Vggt) -> tuple[Callable[[Vggt, Tensor], list[Tensor]], Tensor]:
    """See `CuttingPart`. Attention becomes its queries: keys and values are cut as they are (`Channels.fused`).

    That spares the tracer the norms and the rotation, which mix the channels inside a head but none of two heads.
    """
    for module in net.modules():
        if isinstance(module, Attention):
            module.attend = _queries  # type: ignore[method-assign]
    side = 4 * net.sizes.patch_size
    return lambda net, images: list(net(images).values()), torch.zeros(1, TRACED_FRAMES, 3, side, side)


def _queries(q: Tensor, k: Tensor, v: Tensor, tokens: int, rope: Rope | None, bias: Tensor | None = None) -> Tensor:
    return q


def run_sample(net: Vggt, side: int) -> int:
    """See `CuttingPart`: two frames."""
    side -= side % net.sizes.patch_size
    net(torch.zeros(1, TRACED_FRAMES, 3, side, side))
    return side


def begin(net: Vggt, batch: Sets) -> Tensor:
    """See `CuttingPart`: the patch tokens (B, S, N, C) of all frames."""
    rows, cols = (side // net.sizes.patch_size for side in batch.images.shape[-2:])
    return net.aggregator.encode(batch.images.flatten(0, 1), (rows, cols)).unflatten(0, batch.images.shape[:2])


def begins(size: str) -> bool:
    """See `CuttingPart`: whether the image encoder has this size."""
    return size.startswith(f"{ENCODER}.")


def finish(net: Vggt, begun: Tensor, batch: Sets) -> dict[str, Any]:
    """See `CuttingPart`."""
    rows, cols = (side // net.sizes.patch_size for side in batch.images.shape[-2:])
    return behind_encoder(parts_of(net, (rows, cols), begun.shape[1], training=True), begun, net.aggregator.special())
