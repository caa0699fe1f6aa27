"""Names the parts of the network by the names of weights and nodes, for profiles and for the rollback table."""

from __future__ import annotations

import re

KINDS = (
    "backbone",
    "pyramid",
    "pooling",
    "attention among boxes",
    "dynamic convolutions",
    "MLPs of boxes",
    "towers",
)
"""Kinds of parts, in the order of a table."""

ATTENTION = ("head:/self_attn/MatMul_[12]$",)
"""Keep-list entries of Q K^T and its product with V, of every attention; /MatMul is the projection before them."""

LAST_LAYERS = ("head:/head_series.[0-9]+/(class_logits|bboxes_delta)/",)
"""Keep-list entries of the layers right before classes and boxes."""

POOLING = ("head:/pooler/MatMul$", "head:/pyramid/Concat(_[0-9]+)?$")
"""Keep-list entries of the bilinear sums over the maps: products of activations, whose weights say where a box is; and
of the table of maps that they read, which OpenVINO cannot compile in int8 before such a product.
"""

DYNAMIC = ("head:/inst_interact/MatMul",)
"""Keep-list entries of the products with matrices that are made of what is known of a box."""

_BACKBONE = re.compile(r"\b(stem|res[2-5])\b")
_PYRAMID = re.compile(r"\bfpn_(?:lateral|output)[2-5]\b")
_STAGE = re.compile(r"\bhead_series\.(\d+)[./](\w+)")
_OF = {
    ("pooling", "pooling"): ("pooler",),
    ("attention", "attention among boxes"): ("self_attn", "geo_feat", "geo_bias", "norm1"),
    ("dynamic", "dynamic convolutions"): ("inst_interact", "norm2"),
    ("mlp", "MLPs of boxes"): ("linear1", "linear2", "norm3"),
    ("towers", "towers"): (
        "block_time_mlp",
        "cls_module",
        "reg_module",
        "class_logits",
        "bboxes_delta",
        "quality_logit",
        "refine",
    ),
}
_PARTS = {name: part for part, names in _OF.items() for name in names}


def part_of(name: str) -> tuple[str, str] | None:
    """Returns part and kind of a weight ('head.head_series.1.linear1.weight') or of a node.

    The groups of the ResNet, the pyramid, and of each stage of the head its pooling, attention, dynamic convolution,
    MLP and towers, each with the norm after it. None for what joins them, and for what all stages share.
    """
    if found := _STAGE.search(name):
        part = _PARTS.get(found[2])
        return None if part is None else (f"head.{found[1]}.{part[0]}", part[1])
    if _PYRAMID.search(name):
        return "backbone.pyramid", "pyramid"
    if found := _BACKBONE.search(name):
        return f"backbone.{found[1]}", "backbone"
    return None
