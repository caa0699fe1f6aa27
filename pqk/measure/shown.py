"""Predicts the pictures of a scene in float with torch, for `pqk show`: `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pqk.data.scenes.open import open_scene
from pqk.engines.calls import Remembering, in_torch
from pqk.families.checkpoint import load_model
from pqk.measure.predict import opened_workload
from pqk.measure.predictions import Writer


def predict(request: dict[str, Any]) -> dict[str, Any]:
    """Writes the predictions of a model into the folder request['out'], as `pqk.measure.predictions` keeps them.

    Request: family, workload, scene (its folder), most (pictures), model (argument of `load_model`), out. Which samples
    are predicted says the family's view part. Returns nothing. Raises PqkError as loading model and pictures does.
    """
    of, workload = opened_workload(request)
    fed, samples = of.view_part().samples(open_scene(request["scene"]), workload, request["most"])
    run = of.predict_part().predict
    graphs = of.model_part().graphs(load_model(request["model"]), fed)
    with in_torch(graphs) as engines, Writer(Path(request["out"])) as writer:
        call = Remembering(engines)
        for sample in samples:
            writer.add(sample.group, sample.name, run(call, sample, fed, 0))
    return {}
