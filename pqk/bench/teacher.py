"""How good a Teacher is on the held-out test scenes, in float32 torch, beside a constant depth."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pqk import paths
from pqk.errors import PqkError
from pqk.files import write_json
from pqk.measure.quality import constant_depth_scores, pair_truth, score_pair, summarise
from pqk.models.checkpoint import load_model
from pqk.run.inputs import load_frames, scene_pairs
from pqk.run.stages import Context, listed_scenes
from pqk.run.store import Store
from pqk.spec.evaluation import load_evaluation
from pqk.spec.workload import load_workload


def bench_teacher(model: str, write: bool, command: str) -> dict[str, Any]:
    """Score `model` on the workload's test scenes; prints and returns the figures.

    Pairs whose first view has fewer than quality.min_valid_pixels of ground truth are not scored. `write` puts the
    figures under 'test' into the model_card.json beside the weights. Raises PqkError when the scenes have no ground
    truth, no pair is left, or there is no card to write to.
    """
    from pqk.data.scene import open_scene

    root = paths.project_root()
    workload, evaluation = load_workload(), load_evaluation()
    card_path = Path(model) / "model_card.json"
    if write and not card_path.is_file():
        raise PqkError(f"{card_path} is missing; only a folder written by `pqk train teacher` has a card")
    network = load_model(model)
    ctx = Context(Store(paths.store(root)), lambda *_: None, {})
    scenes = listed_scenes(ctx, "test", workload.scenes.test, workload, root)
    options: dict[str, Any] = {
        "align": evaluation.quality.scale_alignment,
        "chamfer_points": evaluation.quality.chamfer_points,
        "seed": workload.seeds.eval,
    }
    rows, flat = [], []
    height, width = workload.input.height, workload.input.width
    for folder in scenes.folders:
        scene = open_scene(folder)
        if not scene.has_ground_truth:
            raise PqkError(f"{folder}: the scene has no ground truth")
        frames = load_frames(scene, height, width, workload.scenes.test.views)
        with torch.inference_mode():
            tokens = [network.encode(torch.from_numpy(f.image[None])) for f in frames]
            for i, j in scene_pairs(frames, workload.pair_graph, workload.min_covisibility, True):
                out = network.decode(tokens[i], tokens[j], (height, width), (height, width))
                truth = pair_truth(frames[i], frames[j])
                if int(truth.valid1.sum()) < evaluation.quality.min_valid_pixels:
                    continue  # as `pqk run` does
                rows.append(score_pair({k: v[0].numpy() for k, v in out.items()}, truth, **options))
                flat.append(constant_depth_scores(truth, options["align"]))
    if not rows:
        wanted = evaluation.quality.min_valid_pixels
        raise PqkError(f"no pair's first view has {wanted} valid depth pixels (quality.min_valid_pixels)")
    shown = ("absrel", "delta1", "rmse", "chamfer", "reproj_px")
    scores, constant = summarise(rows), summarise(flat)
    result = {
        "split": "test",
        "scenes": len(scenes.folders),
        "pairs": len(rows),
        "size": [height, width],
        "scale_alignment": options["align"],
        **{name: scores[name] for name in shown},
        "constant_depth": {name: constant[name] for name in ("absrel", "delta1", "rmse")},
        "workload_sha256": workload.sha256,
        "measured": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
    }
    if write:
        card = json.loads(card_path.read_text())
        card["test"] = result
        write_json(card_path, card)
    print(json.dumps(result))
    return result
