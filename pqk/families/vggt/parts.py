"""Names the parts of the network by the names of weights and nodes, for profiles and for the rollback table."""

from __future__ import annotations

import re

KINDS = (
    "encoder attention",
    "encoder MLPs",
    "frame attention",
    "frame MLPs",
    "global attention",
    "global MLPs",
    "camera head",
    "dense heads",
)
"""Kinds of parts, in the order of a table."""

ATTENTION = tuple(f"{graph}:attn/MatMul(_1)?$" for graph in ("encoder", "aggregator", "camera"))
"""Keep-list entries of Q K^T and its product with V, of every attention."""

LAST_LAYERS = (
    "camera:/camera_head/pose_branch/",
    "depth:/depth_head/scratch/output_conv2/",
    "points:/point_head/scratch/output_conv2/",
)
"""Keep-list entries of the layers right before poses, depths and points."""

POSE_LAYERS = "camera:/camera_head/(embed_pose|poseLN_modulation|pose_branch)"
"""The keep-list entry of the layers of the camera head that take a pose in and give one out, round by round."""

_BLOCK = re.compile(r"\b(?:(frame|global)_)?blocks\.(\d+)[./](attn|mlp)\b")
_CAMERA = re.compile(r"\b(camera_head|trunk\.\d+|pose_branch|embed_pose|poseLN_modulation)\b")
_DENSE = re.compile(r"\b(?:(depth_head|point_head)|scratch|projects|resize_layers)\b")


def part_of(name: str) -> tuple[str, str] | None:
    """Returns part and kind of a weight ('aggregator.frame_blocks.1.mlp.fc1.bias') or of a node.

    Attentions and MLPs of encoder, frame and global blocks; the camera head; the dense heads. None for anything else.
    """
    if found := _BLOCK.search(name):
        stack, number, what = found.groups()
        kind = f"{stack or 'encoder'} {'MLPs' if what == 'mlp' else 'attention'}"
        return f"{stack + '_blocks' if stack else 'encoder'}.{number}.{what}", kind
    if _CAMERA.search(name):
        return "camera_head", "camera head"
    if found := _DENSE.search(name):
        return found[1] or "dense heads", "dense heads"
    return None
