"""Names the parts of the network by the names of weights and nodes, for profiles and for the rollback table."""

from __future__ import annotations

import re

KINDS = ("encoder attention", "encoder MLPs", "decoder attention", "decoder MLPs", "heads")
"""Kinds of parts, in the order of a table."""

ATTENTION = (r"attn/MatMul(_1)?$",)
"""Keep-list entries of Q K^T and its product with V, of every attention of both graphs."""

LAST_LAYERS = (r"decoder:/downstream_head\d/(dpt/head\.|proj/)",)
"""Keep-list entries of the layers right before points and confidence."""

_BLOCK = re.compile(r"\b(enc|dec)_blocks(2?)\.(\d+)[./](attn|cross_attn|mlp)\b")
_HEAD = re.compile(r"\bdownstream_head[12]\b")
_STACKS = {"enc": "encoder", "dec": "decoder"}


def part_of(name: str) -> tuple[str, str] | None:
    """Returns part and kind of a weight ('dec_blocks.1.mlp.fc1.bias') or of a node ('/dec_blocks.1/mlp/fc1/Add').

    Blocks' attentions and MLPs, and heads; None for anything else.
    """
    if found := _BLOCK.search(name):
        stack, twin, number, what = found.groups()
        kind = f"{_STACKS[stack]} {'MLPs' if what == 'mlp' else 'attention'}"
        return f"{stack}_blocks{twin}.{number}.{what}", kind
    if found := _HEAD.search(name):
        return found.group(), "heads"
    return None
