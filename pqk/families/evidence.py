"""Completes the evidence of a set of samples: `completed`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pqk.families.contract import LearningPart, ScoringPart


def completed(part: ScoringPart | LearningPart, evidence: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the evidence of all samples of a set with the metrics that only the set as a whole has.

    These are the columns of `complete`, where the part has that function (`pqk.families.contract`).
    """
    complete = getattr(part, "complete", None)
    return [dict(row) for row in evidence] if complete is None else complete(evidence)
