"""Pairs the boxes of two models: `paired_overlaps`."""

from __future__ import annotations

import numpy as np

from pqk.families.metrics.detection_ap import overlaps


def paired_overlaps(
    boxes: np.ndarray, labels: np.ndarray, others: np.ndarray, other_labels: np.ndarray, least: float
) -> tuple[float, ...]:
    """Returns the intersection over union of each pair of boxes of two sets, the largest first.

    boxes (D,4), others (E,4): x1 y1 x2 y2; labels (D,), other_labels (E,): their classes. Boxes of one class that
    overlap by `least` or more become a pair, those that overlap most first; a box is in one pair at most. So the two
    sets may change places.
    """
    overlap = overlaps(boxes.astype(np.float64), others.astype(np.float64), np.zeros(len(others), bool))
    overlap[labels[:, None] != other_labels] = 0
    found = []
    while overlap.size and overlap.max() >= least:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        found.append(float(overlap[row, column]))
        overlap[row], overlap[:, column] = 0, 0
    return tuple(found)
