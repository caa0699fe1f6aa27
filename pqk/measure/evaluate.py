"""Predicts and scores in one step, for an evaluation whose predictions are too large to keep: `evaluate`."""

from __future__ import annotations

from typing import Any

from pqk.measure.predict import run_samples
from pqk.measure.scoring import Scorer


def evaluate(request: dict[str, Any]) -> dict[str, Any]:
    """Scores every sample while the engines run, against the ground truth or a reference that runs along with them.

    Request and result: those of `pqk.measure.predict.run_samples` and `pqk.measure.scoring.Scorer` together.
    """
    with Scorer(request, threads=1) as scorer:
        about = run_samples(request, scorer.add)
        return {**scorer.result(), **about}
