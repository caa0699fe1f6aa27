"""The keep-list walk on graphs written by hand: groups, patterns, and where the way up from Softmax ends."""

from __future__ import annotations

import pytest

from backends.base import BackendError
from backends.keep import GROUPS, Node, kept
from pqk.settings.quant import KEEP_GROUPS


def attention(matmul: str, scale: str, rounding: str) -> list[Node]:
    """Queries and keys, both scaled by one number and rotated by a table, their scores, Softmax, the weighted sum."""
    return [
        Node("qkv", "MatMul", ("",), (4096,)),
        Node("rotate", scale, ("qkv",), (256,)),
        Node("scale_q", scale, ("rotate",), (1,)),
        Node("round_q", rounding, ("scale_q",), (1, 1)),
        Node("turn_k", "Transpose", ("qkv",), ()),
        Node("scale_k", scale, ("turn_k",), (1,)),
        Node("scores", matmul, ("round_q", "scale_k"), ()),
        Node("mask", "Add", ("scores",), (256,)),
        Node("softmax", "Softmax", ("mask",), ()),
        Node("sum", matmul, ("softmax", "qkv"), ()),
    ]


@pytest.mark.parametrize(("scale", "rounding"), [("Mul", "DequantizeLinear"), ("Multiply", "FakeQuantize")])
def test_the_scores_and_the_scales_by_one_number_are_kept(scale, rounding):
    """Tables of rotary embeddings and the weighted sum are not; in the words of ONNX and of OpenVINO alike."""
    nodes = attention("MatMul", scale, rounding)
    assert kept(nodes, ["AttentionScales"]) == {"scores": "MatMul", "scale_q": scale, "scale_k": scale}
    assert kept(nodes, ["Softmax"]) == {"softmax": "Softmax"}


def test_scores_of_graph_inputs_are_kept_and_products_with_weights_are_not():
    scores = Node("scores", "MatMul", ("", ""), ())
    assert kept([scores, Node("s", "Softmax", ("scores",), ())], ["AttentionScales"]) == {"scores": "MatMul"}
    classes = Node("classes", "MatMul", ("",), (4096,))
    assert kept([classes, Node("s", "Softmax", ("classes",), ())], ["AttentionScales"]) == {}


def test_scale_and_shift_belong_to_the_normalisation_they_follow_alone():
    norm = [Node("norm", "MVN", ("",), (1,)), Node("scale", "Multiply", ("norm",), (64,))]
    shift = Node("shift", "Add", ("scale",), (64,))
    assert list(kept([*norm, shift, Node("next", "Multiply", ("shift",), (1,))], ["LayerNorm"])) == [
        "norm",
        "scale",
        "shift",
    ]
    assert list(kept([*norm, shift, Node("other", "Relu", ("scale",), ())], ["LayerNorm"])) == ["norm", "scale"]


def test_patterns_find_nodes_but_none_that_only_round():
    nodes = attention("MatMul", "Mul", "QuantizeLinear")
    assert list(kept(nodes, ["_q$"])) == ["scale_q"]
    for entry, says in {"round_q": "matches no node", "softmx": "did you mean 'softmax'", "(": "not a valid"}.items():
        with pytest.raises(BackendError, match=says):
            kept(nodes, [entry])


def test_settings_know_the_same_groups():
    """They may not import backends, so they hold the names a second time."""
    assert KEEP_GROUPS == GROUPS
