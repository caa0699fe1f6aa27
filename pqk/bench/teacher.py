"""Scores a Teacher on the held-out test scenes in float32, as `pqk run` does, beside the floor of its family."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pqk import paths
from pqk.errors import PqkError
from pqk.families.contract import completed
from pqk.files import write_json
from pqk.measure.scores import metric_intervals
from pqk.recipe.candidate import Candidate, make
from pqk.recipe.experiment import teacher_path
from pqk.recipe.request import Request

CARD = "B1"
"""The card whose workload and evaluation are used; it has no overrides."""


def bench_teacher(model: str | None, write: bool, command: str) -> dict[str, Any]:
    """Scores `model` on the workload's test scenes; prints and returns the figures.

    Its float graphs run on ONNX Runtime. `write` puts the figures under 'test' into the model_card.json beside the
    weights. Raises PqkError when the scenes have no ground truth, no pair is left, or there is no card to write to.
    """
    root = paths.project_root()
    model = teacher_path(model, root)
    card_path = Path(model) / "model_card.json"
    if write and not card_path.is_file():
        raise PqkError(f"{card_path} is missing; only a folder written by `pqk train teacher` has a card")
    candidate = make(
        Request(CARD, "reference", model=model, recipe=False), root, lambda *_: None, lambda _: None
    ).candidate
    if not candidate.test.truthful:
        raise PqkError("the test samples have no ground truth")
    scores, floor = candidate.score(candidate.variants[0], on=candidate.test), _floor(candidate)
    quality, summary = candidate.experiment.evaluation.quality, scores["summary"]
    options = quality.model_dump(mode="json")
    result: dict[str, Any] = {
        "split": "test",
        "scenes": len(scores["groups"]),
        "pairs": len(scores["samples"]),
        **candidate.experiment.workload.static,
        **{name: value for name, value in options.items() if name not in ("main_metric", "metrics")},
        **{name: summary[name] for name in quality.metrics},
        "intervals": metric_intervals(scores, quality.metrics),
        "floor": floor,
        "workload_sha256": candidate.experiment.workload.sha256,
        "measured": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
    }
    if write:
        card = json.loads(card_path.read_text())
        card["test"] = result
        write_json(card_path, card)
    print(json.dumps(result))
    return result


def _floor(candidate: Candidate) -> dict[str, float | None]:
    """Returns the metrics of a predictor that ignores its input, on the same samples: the floor for any model."""
    of, workload = candidate.experiment.family, candidate.experiment.workload
    part, options = of.scoring_part(), candidate.experiment.evaluation.quality.model_dump(mode="json")
    samples = of.data_part().samples(candidate.test, workload, workload.seeds.eval)
    evidence = [found for sample in samples if (found := part.floor(sample, options)) is not None]
    return part.summarise(completed(part, evidence))
