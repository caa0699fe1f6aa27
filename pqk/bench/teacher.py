"""Scores a Teacher on the held-out test scenes in float32, as `pqk run` does, beside a constant depth."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pqk import paths
from pqk.data.scenes.open import open_scene
from pqk.errors import PqkError
from pqk.families.dust3r.inputs import load_frames, scene_pairs
from pqk.families.dust3r.scoring import constant_depth_scores, pair_truth, summarise
from pqk.files import write_json
from pqk.measure.scores import metric_intervals
from pqk.recipe.candidate import Outcome, make
from pqk.recipe.request import Request

CARD = "B1"
"""Whose workload and evaluation count; it has no overrides."""


def bench_teacher(model: str, write: bool, command: str) -> dict[str, Any]:
    """Score `model` on the workload's test scenes; prints and returns the figures.

    Its float graphs run on ONNX Runtime. `write` puts the figures under 'test' into the model_card.json beside the
    weights. Raises PqkError when the scenes have no ground truth, no pair is left, or there is no card to write to.
    """
    root = paths.project_root()
    card_path = Path(model) / "model_card.json"
    if write and not card_path.is_file():
        raise PqkError(f"{card_path} is missing; only a folder written by `pqk train teacher` has a card")
    outcome = make(Request(CARD, "reference", model=model, recipe=False), root, lambda *_: None, lambda _: None).outcome
    if not outcome.test.truthful:
        raise PqkError(f"{outcome.test.scenes.root}: the scenes have no ground truth")
    scores, constant = outcome.score(outcome.variants[0], on=outcome.test), _constant(outcome)
    quality, summary = outcome.experiment.evaluation.quality, scores["summary"]
    result: dict[str, Any] = {
        "split": "test",
        "scenes": len(scores["scenes"]),
        "pairs": len(scores["pairs"]),
        "size": outcome.scoring["shape"],
        "scale_alignment": quality.scale_alignment,
        **{name: summary[name] for name in quality.metrics},
        "intervals": metric_intervals(scores, quality.metrics),
        "constant_depth": {name: constant[name] for name in ("absrel", "delta1", "rmse")},
        "workload_sha256": outcome.experiment.workload.sha256,
        "measured": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
    }
    if write:
        card = json.loads(card_path.read_text())
        card["test"] = result
        write_json(card_path, card)
    print(json.dumps(result))
    return result


def _constant(outcome: Outcome) -> dict[str, float | None]:
    """Scores of one depth everywhere on the same pairs: the floor that any model must beat."""
    workload, quality = outcome.experiment.workload, outcome.experiment.evaluation.quality
    flat = []
    for folder in outcome.test.scenes.folders:
        frames = load_frames(open_scene(folder), workload.input.height, workload.input.width, outcome.test.views)
        for i, j in scene_pairs(frames, workload.pair_graph, workload.min_covisibility, True):
            truth = pair_truth(frames[i], frames[j])
            if min(int(truth.valid1.sum()), int(truth.valid2.sum())) >= quality.min_valid_pixels:
                flat.append(constant_depth_scores(truth, quality.scale_alignment))
    return summarise(flat)
