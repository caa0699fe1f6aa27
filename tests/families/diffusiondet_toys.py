"""Small detectors, and what tests of them share."""

import pytest
import torch

from pqk.errors import PqkError
from pqk.families.build import build_model

TINY = {
    "hidden_dim": 16,
    "nheads": 4,
    "dim_feedforward": 24,
    "dim_dynamic": 4,
    "num_heads": 2,
    "num_classes": 3,
    "num_proposals": 12,
    "blocks": [1, 2, 1, 1],
    "stem_out": 4,
    "res2_out": 8,
    "width_per_group": 2,
}
WHOLE = {**TINY, "quality_head": True, "geo_feat": True, "geo_bias": True, "label_state": "dist"}
"""With all extensions of the network."""


def made(config=None, seed=0):
    return build_model("diffusiondet", config or TINY, generator=torch.Generator().manual_seed(seed)).eval()


def sentence_of(call, *arguments):
    with pytest.raises(PqkError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)
