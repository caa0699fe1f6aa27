"""Measures what torch itself computes, for a study: PyTorch's dynamic quantization, and torchao's packed weights."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pqk.engines.calls import in_torch
from pqk.families.contract import Family, Sample
from pqk.settings.workload import Workload
from pqk.stats.latency import speedup
from pqk.study.weights.engines import EngineResult

NAME = "PyTorch_Dynamic"
WHAT = "torch eager with dynamic int8 linear layers"
SCHEME = {
    "quant_type": "pytorch_dynamic",
    "bits": 8,
    "symmetric": True,
    "per_channel": False,
    "group_size": None,
}
Arrays = Mapping[str, np.ndarray]


def file_bytes(model: nn.Module) -> int:
    """Returns the bytes of the model's state as torch saves it; safetensors has no quantized tensors."""
    with tempfile.TemporaryDirectory(prefix="pqk-dynamic-") as folder:
        path = Path(folder) / "state.pt"
        torch.save(model.state_dict(), path)
        return path.stat().st_size


def timed_in_torch(
    models: Mapping[str, nn.Module], of: Family, workload: Workload, sample: Sample, rounds: int
) -> dict[str, list[float]]:
    """Returns the milliseconds of a sample with each model, run in turns, in an order drawn anew in every round."""
    graphs = {name: of.model_part().graphs(model, workload) for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    random, names = np.random.default_rng(0), list(models)
    for number in range(-1, rounds):
        for place in random.permutation(len(names)):
            with in_torch(graphs[names[place]]) as call:
                start = time.perf_counter_ns()
                of.predict_part().predict(call, sample, workload, 0)
                if number >= 0:
                    taken[names[place]].append((time.perf_counter_ns() - start) / 1e6)
    return taken


def torch_result(what: str, base_ms: list[float], own_ms: list[float], size: int, error: float | None) -> EngineResult:
    """Returns the result of a model in torch; the speed-up is against torch in f32, not against a compiled engine."""
    return EngineResult("torch", what, "engine", size, tuple(own_ms), speedup(base_ms, own_ms), error)
