"""One pair through the graphs of a model: tokens stay on the device, host and device are both timed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_toys import TINY, small_experiment

from backends import exchange, registry
from backends.base import Graph, Precision
from pqk.engines.calls import Engines, Stopwatch, compiled
from pqk.engines.variant import Variant
from pqk.families.contract import Sample
from pqk.families.dust3r.data import example
from pqk.families.dust3r.predict import predict
from pqk.models import build_model

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from cuda_doubles import RUN_MS, FakeCuda, install

FOUND = registry.get("trt").availability()


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graph]:
    folder = tmp_path_factory.mktemp("graphs")
    model = build_model("dust3r", TINY, generator=torch.Generator().manual_seed(1)).eval()
    return {
        name: exchange.export(spec.module, spec.inputs, spec.output_names, folder / f"{name}.onnx")
        for name, spec in model.graphs(64, 64).items()
    }


def opened(backend: str, graphs: dict[str, Graph]) -> Engines:
    return compiled(Variant("fp32", backend, Precision.F32, graphs))


@pytest.fixture(scope="module")
def workload() -> Any:
    return small_experiment().workload


@pytest.fixture(scope="module")
def pair(workload: Any) -> Sample:
    return example(workload)


@pytest.mark.skipif(not FOUND.available, reason=FOUND.reason)
def test_tokens_stay_on_the_device_and_both_times_are_taken(
    graphs: dict[str, Graph], workload: Any, pair: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened("reference", graphs) as engines:
        want, watch = predict(engines, pair, workload, 0), Stopwatch(engines)
        predict(watch, pair, workload, 0)
        assert watch.device_ms is None
    providers: list[FakeCuda] = []
    install(monkeypatch, providers)
    with opened("trt", graphs) as engines:
        assert engines.measured == "engine"
        got, watch = predict(engines, pair, workload, 0), Stopwatch(engines)
        begin = time.perf_counter()
        predict(watch, pair, workload, 0)
        pair_ms = 1e3 * (time.perf_counter() - begin)
        encoder, decoder = (provider.moved for provider in providers)
    assert set(got) == set(want) == {"pts3d_1", "conf_1", "pts3d_2", "conf_2"}
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6)
    assert watch.device_ms == 3 * RUN_MS
    assert {name: len(times) for name, times in watch.graphs.items()} == {"encoder": 2, "decoder": 1}
    assert pair_ms >= sum(sum(times) for times in watch.graphs.values()) > 0
    assert encoder["down"] == decoder["up"] == 0
    assert encoder["up"] == 4 * pair.inputs[0].image.nbytes


def test_one_engine_without_a_device_time_leaves_the_pair_without(
    graphs: dict[str, Graph], workload: Any, pair: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened("reference", graphs) as engines:
        watch = Stopwatch(engines)
        monkeypatch.setattr(engines.engines["encoder"], "last_device_ms", 1.0)
        predict(watch, pair, workload, 0)
        assert watch.device_ms is None
        monkeypatch.setattr(engines.engines["decoder"], "last_device_ms", 0.5)
        watch.reset()
        predict(watch, pair, workload, 0)
        assert watch.device_ms == 2.5
