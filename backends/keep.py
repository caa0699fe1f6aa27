"""Finds the nodes of a graph that a keep-list protects from quantization, for every graph format.

An entry of a keep-list is the name of a group or a regular expression that is searched in node names. A toolchain
describes its graph as a list of `Node`s; which kinds of nodes belong to a group is defined here alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backends.base import BackendError, nearest

GROUPS = ("LayerNorm", "Softmax", "AttentionScales")
"""LayerNorm: normalisations with their scale and shift. Softmax: also inside fused attention. AttentionScales: the
score matmul QK^T and the multiplications by one number around it."""

# The same operation has other names in ONNX and in OpenVINO; the sets below hold both.
_NORMS = {"LayerNormalization", "InstanceNormalization", "GroupNormalization", "SimplifiedLayerNormalization", "MVN"}
_NORMS |= {"ReduceMean", "SquaredDifference", "Power", "Sqrt"}  # parts of a normalisation that is spelled out
_ATTENTION = "ScaledDotProductAttention"
_SOFTMAX = {"Softmax", "LogSoftmax"}
_SCALES = {"Mul", "Div", "Multiply", "Divide"}
_ROUNDING = {"QuantizeLinear", "DequantizeLinear", "FakeQuantize"}
# All that may lie between queries or keys and their scores, and between scores and Softmax.
_BETWEEN = _SCALES | _ROUNDING | {"Add", "Sub", "Subtract", "Where", "Select", "Cast"}
_BETWEEN |= {"Transpose", "Reshape", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class Node:
    """A node that computes with the values of the graph's inputs.

    live: for each of its operands that depends on those values, in order, the name of the node that makes it; '' for an
    input of the graph. fixed: numbers of elements of its other operands, 1 where a shape is unknown.
    """

    name: str
    kind: str
    live: tuple[str, ...]
    fixed: tuple[int, ...]


def kept(nodes: Sequence[Node], keep: Iterable[str]) -> dict[str, str]:
    """Returns names and kinds of the nodes that the entries `keep` protect. `nodes` are in topological order.

    A group may be absent from a graph. Nodes that only round cannot be protected.
    Raises BackendError for a regular expression that is invalid or matches no node.
    """
    able = {node.name: node.kind for node in nodes if node.kind not in _ROUNDING}
    found: dict[str, str] = {}
    for entry in keep:
        names = _group(entry, nodes) if entry in GROUPS else matching(entry, able)
        found.update((name, able[name]) for name in names if name in able)
    return found


def matching(entry: str, names: Iterable[str]) -> list[str]:
    """Returns the names in which the regular expression `entry` is found. Raises BackendError when there is none."""
    try:
        pattern = re.compile(entry)
    except re.error as error:
        raise BackendError(f"keep entry {entry!r} is not a valid regular expression: {error}") from error
    known = list(names)
    chosen = [name for name in known if pattern.search(name)]
    if not chosen:
        hint = nearest(entry, [*GROUPS, *known])
        raise BackendError(f"keep entry {entry!r} matches no node{hint}; groups are {list(GROUPS)}")
    return chosen


def _group(group: str, nodes: Sequence[Node]) -> list[str]:
    if group == "Softmax":
        return [node.name for node in nodes if node.kind in _SOFTMAX or node.kind == _ATTENTION]
    by_name = {node.name: node for node in nodes}
    if group == "AttentionScales":
        return _scores(nodes, by_name)
    norms = [node.name for node in nodes if node.kind in _NORMS]
    return norms + _affine([node.name for node in nodes if node.kind == "MVN"], nodes)


def _affine(norms: Iterable[str], nodes: Sequence[Node]) -> list[str]:
    """Returns the Multiply and Add that directly follow the nodes `norms`: OpenVINO's MVN has no scale and shift."""
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.live:
            readers.setdefault(name, []).append(node)
    found = []
    for last in norms:
        for kind in ("Multiply", "Add"):
            following = readers.get(last, [])
            if len(following) != 1 or following[0].kind != kind:
                break
            last = following[0].name
            found.append(last)
    return found


def _scores(nodes: Sequence[Node], by_name: dict[str, Node]) -> list[str]:
    found = [node.name for node in nodes if node.kind == _ATTENTION]
    for softmax in [node for node in nodes if node.kind in _SOFTMAX]:
        above = _walk_up(softmax.live[0], by_name)
        for score in [node for node in above if node.kind == "MatMul" and not node.fixed]:
            found.append(score.name)
            for operand in score.live:
                above += _walk_up(operand, by_name)
        found += [node.name for node in above if node.kind in _SCALES]
    return found


def _walk_up(name: str, by_name: dict[str, Node]) -> list[Node]:
    """Returns the node `name` and those that feed it, through scales, masks and moves, up to the first other node.

    A multiplication counts only as a scale, by one number: rotary embeddings multiply by tables.
    """
    found = []
    while name in by_name:
        node = by_name[name]
        if node.kind in _SCALES and (len(node.live) != 1 or any(size != 1 for size in node.fixed)):
            break
        found.append(node)
        if node.kind not in _BETWEEN:
            break
        name = node.live[0]
    return found
