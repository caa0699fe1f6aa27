"""The properties of pair graphs (the official lists: tests/families/test_vectors.py)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from pqk.data.scenes.pairs import image_similarity, pair_graph
from pqk.errors import PqkError


def test_neighbor_is_exact():
    assert pair_graph(5, "neighbor", k=4, symmetrize=False) == [
        (0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4),
    ]  # fmt: skip
    assert pair_graph(4, "neighbor", k=1, symmetrize=False) == [(0, 1), (1, 2), (2, 3)]
    assert pair_graph(3, "neighbor", k=2) == [(0, 1), (1, 2), (1, 0), (2, 1)]


def test_topk_is_exact_and_breaks_ties_by_index():
    similarity = np.array([[1, 0.5, 0.5, 0.1], [0.5, 1, 0.2, 0.2], [0.5, 0.2, 1, 0.9], [0.1, 0.2, 0.9, 1]])
    assert pair_graph(4, "topk", k=1, symmetrize=False, similarity=similarity) == [(0, 1), (2, 3)]
    assert pair_graph(4, "topk", k=2, symmetrize=False, similarity=similarity) == [
        (0, 1), (0, 2), (1, 2), (1, 3), (2, 3),
    ]  # fmt: skip
    n = 100
    tied = np.random.default_rng(0).integers(0, 3, (n, n)).astype(float)  # many equal values in each row
    expected = set()
    for i in range(n):
        for j in sorted((j for j in range(n) if j != i), key=lambda j, i=i: (-tied[i, j], j))[:2]:
            expected.add((min(i, j), max(i, j)))
    assert pair_graph(n, "topk", k=2, symmetrize=False, similarity=tied) == sorted(expected)


KINDS = ["neighbor", "complete", "topk", "swin", "swin-2-noncyclic", "logwin-9", "logwin-2-noncyclic", "oneref-1"]


@given(st.integers(2, 24), st.sampled_from(KINDS), st.integers(1, 30), st.booleans(), st.integers(0, 2**31))
def test_properties(n, kind, k, symmetrize, seed):
    similarity = np.random.default_rng(seed).random((n, n))
    pairs = pair_graph(n, kind, k, symmetrize, similarity)
    assert len(set(pairs)) == len(pairs)
    assert all(0 <= i < n and 0 <= j < n and i != j for i, j in pairs)
    assert {index for pair in pairs for index in pair} == set(range(n))  # no image is left out
    if symmetrize:
        half = len(pairs) // 2
        assert pairs[half:] == [(j, i) for i, j in pairs[:half]]
    else:
        assert not any((j, i) in pairs for i, j in pairs)
    if kind == "neighbor":
        assert all(abs(i - j) <= math.ceil(k / 2) for i, j in pairs)
    if kind == "topk":
        degree = np.bincount(np.array(pairs).ravel(), minlength=n) / (2 if symmetrize else 1)
        assert (degree >= min(k, n - 1)).all()


@given(st.integers(2, 15), st.integers(1, 20))
def test_filters_keep_what_they_say(n, limit):
    everything = pair_graph(n, "complete")
    assert pair_graph(n, "complete", prefilter=f"seq{limit}") == [(i, j) for i, j in everything if abs(i - j) <= limit]
    cyclic = [(i, j) for i, j in everything if min(abs(i - j), n - abs(i - j)) <= limit]
    assert pair_graph(n, "complete", prefilter=f"cyc{limit}") == cyclic


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": 1, "kind": "complete"}, "at least 2 images, found 1"),
        ({"n": 4, "kind": "neighbor", "k": 0}, "k must be at least 1, found 0"),
        ({"n": 4, "kind": "neighbour"}, "did you mean 'neighbor'"),
        ({"n": 4, "kind": "complete-3"}, "'complete-3' is unknown; allowed are"),
        ({"n": 4, "kind": "swin-x"}, "'x' must be a whole number"),
        ({"n": 4, "kind": "swin-0"}, "window must be at least 1"),
        ({"n": 4, "kind": "swin-2-3"}, "too many parts"),
        ({"n": 4, "kind": "oneref-4"}, "reference image 4 must be below"),
        ({"n": 4, "kind": "topk"}, "needs the similarity"),
        ({"n": 4, "kind": "topk", "similarity": np.ones((3, 3))}, r"4x4, found shape \(3, 3\)"),
        ({"n": 2, "kind": "topk", "similarity": np.full((2, 2), np.nan)}, "must be finite"),
        ({"n": 4, "kind": "complete", "prefilter": "near2"}, "allowed are seqK and cycK"),
        ({"n": 4, "kind": "complete", "prefilter": "seq0"}, "leaves no pair"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(PqkError, match=message):
        pair_graph(**arguments)


def test_similarity_of_sliding_views():
    """Overlapping windows of one long picture with structures some 50 pixels wide: nearer windows are more alike."""
    wide = gaussian_filter(np.random.default_rng(0).standard_normal((3, 96, 480)), (0, 24, 24)) * 20
    images = [wide[:, :, 16 * i : 16 * i + 128] for i in range(8)]
    similarity = image_similarity(images)
    np.testing.assert_allclose(np.diag(similarity), 1.0)
    np.testing.assert_allclose(similarity, similarity.T)
    assert np.abs(similarity).max() <= 1.0
    assert np.diag(similarity, 1).min() > 0.5 > np.abs(np.diag(similarity, 5)).mean()
    brighter = image_similarity([images[0], images[0] * 0.5 + 0.3])
    assert brighter[0, 1] == pytest.approx(1.0, abs=1e-6)  # exposure does not matter


def test_similarity_of_flat_and_small_pictures():
    flat = image_similarity([np.full((3, 20, 30), 0.3, np.float32), np.full((3, 20, 30), -0.7, np.float32)])
    np.testing.assert_array_equal(flat, np.eye(2))
    assert image_similarity([np.random.default_rng(0).random((3, 4, 5))] * 2)[0, 1] == pytest.approx(1.0)
    with pytest.raises(PqkError, match=r"image 0 has shape \(4, 5, 3\)"):
        image_similarity([np.zeros((4, 5, 3))])
