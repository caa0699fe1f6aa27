"""The golden cases (small random networks with the official network's answers), and a small configuration."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pqk.families.vectors import Case

sys.path.insert(0, str(Path(__file__).parent))  # for `diffusiondet_toys` under --import-mode=importlib


@pytest.fixture
def golden():
    return lambda name: Case(Path(__file__).parents[1] / "golden" / name)


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
