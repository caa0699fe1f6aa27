"""Chooses the pairs of a scene that are fed."""

from __future__ import annotations

from collections.abc import Sequence

from pqk.data.scenes.pairs import image_similarity, pair_graph
from pqk.data.scenes.preprocess import Frame
from pqk.errors import PqkError
from pqk.families.dust3r.settings import PairGraph
from pqk.families.scenes.frames import looked_at, overlap


def scene_pairs(
    frames: Sequence[Frame], graph: PairGraph, min_covisibility: float, ground_truth: bool
) -> list[tuple[int, int]]:
    """Returns ordered pairs of the scene. With ground truth, those that share too little of their view are left out.

    Every frame is loaded once here, so that a picture that cannot be used is refused before anything is computed.
    Raises PqkError for such a picture, when no pair is left, and for a view with ground truth that has no valid depth
    pixel at all.
    """
    topk = graph.kind == "topk"
    seen = (looked_at(frame, ground_truth) for frame in frames)
    similarity = image_similarity(frame.image for frame in seen) if topk else None
    count = len(frames) if topk else sum(1 for _ in seen)
    pairs = pair_graph(count, graph.kind, graph.k, graph.symmetrize, similarity)
    if not ground_truth:
        return pairs
    overlapping = [(i, j) for i, j in pairs if overlap(frames[i], frames[j]) >= min_covisibility]
    if not overlapping:
        raise PqkError(f"scene {frames[0].scene}: no pair shares {min_covisibility:.0%} of its view (min_covisibility)")
    return overlapping
