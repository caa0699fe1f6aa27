"""Predicts and scores in one go, for an evaluation whose predictions are too large to be kept."""

from __future__ import annotations

from typing import Any

from pqk.measure.predict import run_samples
from pqk.measure.scoring import Scorer


def evaluate(request: dict[str, Any]) -> dict[str, Any]:
    """Scores every sample beside the engines, against the ground truth or a reference that runs beside them.

    Request and result: those of `pqk.measure.predict.run_samples` and `pqk.measure.scoring.Scorer` together.
    """
    with Scorer(request, threads=1) as scorer:
        about = run_samples(request, scorer.add)
        return {**scorer.result(), **about}
