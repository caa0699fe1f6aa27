"""Chooses the pairs of images that a network gets, `pair_graph`: pair graphs by name, and a cheap image similarity.

The similarity is for the top-k graph. The names complete, swin, logwin and oneref (and the filters seqK and cycK) are
those of other pairwise 3D models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from PIL import Image

from pqk.errors import PqkError, nearest

KINDS = ("neighbor", "complete", "topk", "swin", "logwin", "oneref")
Pairs = list[tuple[int, int]]


def pair_graph(
    n: int,
    kind: str,
    k: int = 4,
    symmetrize: bool = True,
    similarity: np.ndarray | None = None,
    prefilter: str | None = None,
) -> Pairs:
    """Returns ordered pairs (first, second) of n images; the first image of a pair is its reference frame.

    kind, pairs before symmetrizing:
    - neighbor: i < j <= i + ceil(k/2), ascending: k is the number of neighbours of an inner image
    - complete: all (i,j) with j < i, ascending
    - topk: each image with the k most similar others by `similarity` (n,n), ties to the smaller index, merged, i < j
    - swin[-w][-noncyclic]: i with i+1..i+w (w = 3 by default), wrapping around unless noncyclic, i < j
    - logwin[-w][-noncyclic]: i with i +- 2^0..2^(w-1), likewise
    - oneref[-r]: (r,j) for all j but r (r = 0 by default)

    symmetrize appends every pair swapped, in the same order. prefilter seqK then keeps |i-j| <= K, cycK the same
    around the circle. Raises PqkError for n < 2, k < 1, an unknown kind or filter, a similarity of the wrong shape or
    not finite, and when no pair is left.
    """
    if n < 2:
        raise PqkError(f"a pair graph needs at least 2 images, found {n}")
    if k < 1:
        raise PqkError(f"pair graph: k must be at least 1, found {k}")
    name, *options = kind.split("-")
    if name == "neighbor" and not options:
        reach = -(-k // 2)
        pairs = [(i, j) for i in range(n) for j in range(i + 1, min(i + reach, n - 1) + 1)]
    elif name == "complete" and not options:
        pairs = [(i, j) for i in range(n) for j in range(i)]
    elif name == "topk" and not options:
        pairs = _topk(n, k, similarity)
    elif name in ("swin", "logwin"):
        pairs = _window(n, kind, name, options)
    elif name == "oneref" and len(options) <= 1:
        reference = _number(kind, options[0]) if options else 0
        if reference >= n:
            raise PqkError(f"pair graph {kind!r}: reference image {reference} must be below the {n} images there are")
        pairs = [(reference, j) for j in range(n) if j != reference]
    else:
        allowed = "neighbor, complete, topk, swin[-w][-noncyclic], logwin[-w][-noncyclic], oneref[-r]"
        hint = "" if name in KINDS else nearest(name, KINDS)
        raise PqkError(f"pair graph {kind!r} is unknown{hint}; allowed are {allowed}")
    if symmetrize:
        pairs = pairs + [(j, i) for i, j in pairs]
    if prefilter is not None:
        pairs = _filter(pairs, prefilter)
    if not pairs:
        raise PqkError(f"pair graph {kind!r} with filter {prefilter!r} leaves no pair of {n} images")
    return pairs


def most_pairs(n: int, kind: str, k: int, symmetrize: bool) -> int:
    """Returns the number of pairs of `pair_graph` for neighbor and complete, and its upper limit for topk."""
    whole, reach = n * (n - 1) // 2, -(-k // 2)
    most = {"neighbor": reach * n - reach * (reach + 1) // 2 if reach < n else whole, "topk": min(n * k, whole)}
    return most.get(kind, whole) * (2 if symmetrize else 1)


def image_similarity(images: Iterable[np.ndarray], size: int = 16) -> np.ndarray:
    """Returns the cosine similarity (n,n) float64 in [-1,1] of images (3,H,W), of any float or integer range.

    Each image is read once and averaged down to size x size, its mean colour is subtracted, and the vectors are
    compared. A cheap substitute for retrieval features: it finds overlapping views of a slow camera, not the same place
    from another side. A picture of one colour is similar to itself only. Raises PqkError when an array is not (3,H,W).
    """
    rows = []
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3:
            raise PqkError(f"image similarity: image {index} has shape {image.shape}, expected (3,H,W)")
        small = [
            np.asarray(Image.fromarray(np.asarray(c, np.float32)).resize((size, size), Image.Resampling.BOX))
            for c in image
        ]
        vector = np.stack([channel - channel.mean(dtype=np.float64) for channel in small]).astype(np.float64).ravel()
        length = np.linalg.norm(vector)
        # Averaging one colour leaves rounding noise; without this limit it would be blown up to a full-length vector.
        rows.append(vector / length if length > 1e-5 * (1 + np.abs(image).max()) else np.zeros_like(vector))
    matrix = np.clip(np.stack(rows) @ np.stack(rows).T, -1.0, 1.0)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def _topk(n: int, k: int, similarity: np.ndarray | None) -> Pairs:
    if similarity is None:
        raise PqkError("pair graph 'topk' needs the similarity of the images")
    similarity = np.asarray(similarity, dtype=np.float64)
    if similarity.shape != (n, n) or not np.isfinite(similarity).all():
        raise PqkError(f"pair graph 'topk': similarity must be finite and {n}x{n}, found shape {similarity.shape}")
    ranked = np.argsort(-similarity, axis=1, kind="stable")
    best = {(i, int(j)) for i in range(n) for j in [j for j in ranked[i] if j != i][:k]}
    return sorted({(min(pair), max(pair)) for pair in best})


def _window(n: int, kind: str, name: str, options: list[str]) -> Pairs:
    cyclic = options[-1:] != ["noncyclic"]
    numbers = options if cyclic else options[:-1]
    if len(numbers) > 1:
        raise PqkError(f"pair graph {kind!r} has too many parts; allowed is {name}[-w][-noncyclic]")
    w = _number(kind, numbers[0]) if numbers else 3
    if w < 1:
        raise PqkError(f"pair graph {kind!r}: the window must be at least 1")
    if name == "swin":
        offsets = list(range(1, min(w, n - 1) + 1))  # a window beyond that adds nothing
    else:
        powers = [2**exponent for exponent in range(min(w, 2 * n))]  # beyond that, powers modulo n only repeat
        offsets = powers + [-power for power in powers]
    pairs = set()
    for i in range(n):
        for offset in offsets:
            j = (i + offset) % n if cyclic else i + offset
            if 0 <= j < n and j != i:
                pairs.add((min(i, j), max(i, j)))
    return sorted(pairs)


def _filter(pairs: Pairs, prefilter: str) -> Pairs:
    match = re.fullmatch(r"(seq|cyc)(\d+)", prefilter)
    if match is None:
        raise PqkError(f"pair filter {prefilter!r} is unknown; allowed are seqK and cycK with a number K, as in seq5")
    limit = int(match[2])
    count = max(max(pair) for pair in pairs) + 1

    def distance(i: int, j: int) -> int:
        apart = abs(i - j)
        return apart if match[1] == "seq" else min(apart, abs(i + count - j), abs(i - count - j))

    return [(i, j) for i, j in pairs if distance(i, j) <= limit]


def _number(kind: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise PqkError(f"pair graph {kind!r}: {text!r} must be a whole number")
    return int(text)
