"""Runs several runtimes on the same samples and compares the outputs of each with those of the first: `compare`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pqk.engines.calls import Engines, compiled, in_torch
from pqk.engines.variant import Variant
from pqk.errors import PqkError
from pqk.families.checkpoint import load_model
from pqk.families.contract import Family, Sample
from pqk.measure.predict import opened
from pqk.measure.similarity import Agreement
from pqk.settings.workload import Workload


def open_side(side: Mapping[str, Any], of: Family, workload: Workload) -> Engines:
    """Opens a side, given as {'variant': ...} or {'torch': path of the model}."""
    if "torch" in side:
        return in_torch(of.model_part().graphs(load_model(side["torch"]), workload))
    return compiled(Variant.from_json(side["variant"]))


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """Compares each of `others` with `base` over some samples, each side end to end.

    Request: family, workload, samples, base (see `open_side`), others (a list of such), count (samples, spread evenly
    over all). Returns heads (for each of `others` in turn: see `similarity.HeadAgreement`) and samples (group and name
    of each). Each side runs once, and one is open at a time; memory holds the outputs of `base`. Raises PqkError.
    """
    of, workload, found = opened(request)
    every = [(sample.group, sample.name) for sample in of.data_part().samples(found, workload, 0)]
    if not every:
        raise PqkError("there is no sample to compare")
    count = min(request["count"], len(every))
    taken = {every[k * len(every) // count] for k in range(count)}

    def chosen() -> Iterator[Sample]:
        return (s for s in of.data_part().samples(found, workload, 0) if (s.group, s.name) in taken)

    def outputs(side: Mapping[str, Any]) -> Iterator[Mapping[str, np.ndarray]]:
        with open_side(side, of, workload) as call:
            for sample in chosen():
                yield of.predict_part().predict(call, sample, workload, 0)

    expected: Sequence[Mapping[str, np.ndarray]] = list(outputs(request["base"]))
    heads = []
    for other in request["others"]:
        agreement = Agreement(of.scoring_part().OUTPUTS)
        for a, b in zip(expected, outputs(other), strict=True):
            agreement.add(a, b)
        heads.append({head: asdict(found) for head, found in agreement.result().items()})
    return {"heads": heads, "samples": [list(place) for place in every if place in taken]}
