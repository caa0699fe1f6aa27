"""Golden cases of the DUSt3R network: small random networks with the official network's answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


class Case:
    """One folder of tests/golden: its description, and its arrays as tensors."""

    def __init__(self, name: str) -> None:
        self.folder = GOLDEN / name
        description = self.folder / "case.json"
        self.info: dict[str, Any] = json.loads(description.read_text()) if description.exists() else {}
        with np.load(self.folder / "case.npz") as arrays:
            self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.arrays[key]

    def weights(self, prefix: str = "") -> dict[str, torch.Tensor]:
        start = f"weights/{prefix}"
        return {key[len(start) :]: value for key, value in self.arrays.items() if key.startswith(start)}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def golden():
    return Case


@pytest.fixture
def difference():
    return relative


@pytest.fixture(scope="session")
def small_config() -> dict[str, Any]:
    """A DPT network small enough to export in a second."""
    return {
        "head_type": "dpt",
        "enc_embed_dim": 32,
        "enc_depth": 2,
        "enc_num_heads": 2,
        "dec_embed_dim": 16,
        "dec_depth": 3,
        "dec_num_heads": 2,
        "dpt": {"feature_dim": 16, "last_dim": 8, "layer_dims": [8, 12, 16, 24]},
    }
