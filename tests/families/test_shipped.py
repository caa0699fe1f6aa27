"""Tests the shipped models: small, as their cards say, better than the floor; exported, the same in every runtime."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import registry
from backends.base import Precision
from backends.exchange import export
from pqk.engines.calls import Engines, compiled, in_torch
from pqk.engines.variant import Variant
from pqk.families.registry import family
from pqk.files import sha256_file
from pqk.models import load_model

MODELS = Path(__file__).parents[2] / "models"
SHIPPED = sorted(path.parent.name for path in MODELS.glob("*/model_card.json"))
LIMIT = 1e-4  # parity.float_relative of eval.yaml


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_is_of_these_weights_and_above_the_floor(name: str) -> None:
    folder = MODELS / name
    weights, card = folder / "model.safetensors", json.loads((folder / "model_card.json").read_text())
    assert weights.stat().st_size <= 25 * 2**20
    assert sha256_file(weights) == card["sha256"]
    of = family(json.loads((folder / "config.json").read_text()).get("family", "dust3r"))
    metric, test = of.settings_part().METRICS[0], card["test"]
    floor = (test.get("floor") or test["constant_depth"])[metric.name]
    assert metric.loss(test[metric.name]) < (0.5 if metric.perfect == 0 else 0.8) * metric.loss(floor)


def outputs(engines: Engines, of: Any, workload: Any) -> dict[str, np.ndarray]:
    with engines:
        return dict(of.predict_part().predict(engines, of.data_part().example(workload), workload, 0))


@pytest.mark.slow
@pytest.mark.skipif("vggt-tiny" not in SHIPPED, reason="it is not trained yet")
@pytest.mark.parametrize("frames", [1, 2, 4, 8])
def test_every_runtime_agrees_for_any_number_of_frames(frames: int, tmp_path: Path) -> None:
    """The largest difference of each output to torch, relative to the largest value."""
    of = family("vggt")
    file = Path(__file__).parents[2] / "configs" / "vggt" / "workload.yaml"
    asked = of.settings_part().load_workload(file, {"input.frames": frames, "input.shape": [1, 3, 112, 112]})
    specs = of.model_part().graphs(load_model(MODELS / "vggt-tiny"), asked)
    graphs = {n: export(s.module, s.inputs, s.output_names, tmp_path / f"{n}.onnx") for n, s in specs.items()}
    true = outputs(in_torch(specs), of, asked)
    plain = Variant("fp32", "reference", Precision.F32, graphs)
    for backend in ("reference", "openvino"):
        if not registry.get(backend).availability().available:
            continue
        for output, found in outputs(compiled(replace(plain, backend=backend)), of, asked).items():
            apart = np.abs(found - true[output]).max() / np.abs(true[output]).max()
            assert apart < LIMIT, (backend, output, apart)
