"""Names the parts of the network by the names of weights and nodes, for profiles and for the rollback table."""

from __future__ import annotations

import re

KINDS = ("backbone", "pyramid", "attention among boxes", "dynamic convolutions", "MLPs of boxes", "towers")
"""Kinds of parts, in the order of a table."""

ATTENTION = ("head:self_attn/MatMul(_1)?$",)
"""Keep-list entries of Q K^T and its product with V, of every attention."""

LAST_LAYERS = ("head:/head_series.[0-9]+/(class_logits|bboxes_delta)/",)
"""Keep-list entries of the layers right before classes and boxes."""

_BACKBONE = re.compile(r"\b(stem|res[2-5])\b")
_PYRAMID = re.compile(r"\bfpn_(?:lateral|output)[2-5]\b")
_STAGE = re.compile(r"\bhead_series\.(\d+)[./](\w+)")
_OF = {
    "self_attn": ("attention", "attention among boxes"),
    "inst_interact": ("dynamic", "dynamic convolutions"),
    "linear1": ("mlp", "MLPs of boxes"),
    "linear2": ("mlp", "MLPs of boxes"),
}


def part_of(name: str) -> tuple[str, str] | None:
    """Returns part and kind of a weight ('head.head_series.1.linear1.weight') or of a node.

    The groups of the ResNet, the pyramid, and of each stage of the head its attention, dynamic convolution, MLP and
    towers. None for anything else.
    """
    if found := _STAGE.search(name):
        part, kind = _OF.get(found[2], ("towers", "towers"))
        return f"head.{found[1]}.{part}", kind
    if _PYRAMID.search(name):
        return "pyramid", "pyramid"
    if found := _BACKBONE.search(name):
        return f"backbone.{found[1]}", "backbone"
    return None
