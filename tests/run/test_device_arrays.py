"""One pair through the graphs of a model: tokens stay on the device, host and device are both timed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_toys import TINY

from backends import exchange, registry
from backends.base import Graph, Precision
from pqk.engines.variant import Runner, Variant
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


def opened(backend: str, graphs: dict[str, Graph]) -> Runner:
    return Runner(Variant("fp32", backend, Precision.F32, graphs["encoder"], graphs["decoder"]))


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32) for _ in range(2)]


@pytest.mark.skipif(not FOUND.available, reason=FOUND.reason)
def test_tokens_stay_on_the_device_and_both_times_are_taken(
    graphs: dict[str, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = images()
    with opened("reference", graphs) as runner:
        want = runner.decode(runner.encode(a), runner.encode(b))
        assert runner.timed_pair(a, b).device_ms is None
    providers: list[FakeCuda] = []
    install(monkeypatch, providers)
    with opened("trt", graphs) as runner:
        assert runner.measured == "engine"
        got = runner.decode(runner.encode(a), runner.encode(b))
        times = runner.timed_pair(a, b)
        encoder, decoder = (provider.moved for provider in providers)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6)
    assert times.device_ms == 3 * RUN_MS
    assert times.pair_ms == sum(times.encoder_ms) + times.decoder_ms > 0
    assert encoder["down"] == decoder["up"] == 0
    assert encoder["up"] == 4 * a.nbytes


def test_one_engine_without_a_device_time_leaves_the_pair_without(
    graphs: dict[str, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened("reference", graphs) as runner:
        part: Any = runner.encoder
        monkeypatch.setattr(part, "last_device_ms", 1.0)
        assert runner.timed_pair(*images()).device_ms is None
        monkeypatch.setattr(runner.decoder, "last_device_ms", 0.5)
        assert runner.timed_pair(*images()).device_ms == 2.5
