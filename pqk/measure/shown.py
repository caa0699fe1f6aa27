"""Predicts the pictures of a scene for `pqk show`, in float with torch, or in the engines of a variant: `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pqk.data.scenes.open import open_scene
from pqk.engines.calls import Remembering, compiled, in_torch
from pqk.engines.variant import Variant
from pqk.families.checkpoint import load_model
from pqk.measure.predict import opened_workload
from pqk.measure.predictions import Writer


def predict(request: dict[str, Any]) -> dict[str, Any]:
    """Writes the predictions of a model into the folder request['out'], as `pqk.measure.predictions` keeps them.

    Request: family, workload, scene (its folder), most (pictures), out, and model (argument of `load_model`) or variant
    (plain data). Which samples are predicted says the family's view part. Returns nothing. Raises PqkError as loading
    model and pictures does, and where a variant has not the shapes that so many pictures need.
    """
    of, workload = opened_workload(request)
    fed, samples = of.view_part().samples(open_scene(request["scene"]), workload, request["most"])
    run = of.predict_part().predict
    if "variant" in request:
        made = compiled(Variant.from_json(request["variant"]))
    else:
        made = in_torch(of.model_part().graphs(load_model(request["model"]), fed))
    with made as engines, Writer(Path(request["out"])) as writer:
        call = Remembering(engines)
        for sample in samples:
            writer.add(sample.group, sample.name, run(call, sample, fed, 0))
    return {}
