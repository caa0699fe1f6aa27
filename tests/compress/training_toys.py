"""A tiny network and a short training of it, for the tests of trainings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pqk.families.dust3r.configs import NAMED
from pqk.settings.training import TrainSpec

TINY = {
    "head_type": "linear",
    "enc_embed_dim": 32,
    "enc_depth": 1,
    "enc_num_heads": 2,
    "dec_embed_dim": 32,
    "dec_depth": 1,
    "dec_num_heads": 2,
}


def spec_with(**changes: object) -> TrainSpec:
    values = {
        "model": "tiny-for-tests",
        "steps": 8,
        "stages": [{"size": 32, "batch": 4, "until": 1.0}],
        "learning_rate": 3e-3,
        "warmup": 0.1,
        "ema": 0.9,
        "min_covisible": 0.0,
        "validation": {"size": 32, "pairs": 3, "every": 4, "patience": 8},
    }
    return TrainSpec.model_validate({**values, **changes})


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(NAMED, "tiny-for-tests", TINY)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for operations this small, threads cost more than they do
    yield
    torch.set_num_threads(threads)
