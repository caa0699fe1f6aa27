"""Runs a pair through the graphs: each image is encoded, the decoder takes the tokens of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pqk.families.contract import Call, Sample

if TYPE_CHECKING:
    from pqk.families.dust3r.settings import Workload


def predict(call: Call, sample: Sample, workload: Workload, seed: int) -> dict[str, np.ndarray]:
    """Returns pts3d_1, pts3d_2 (H, W, 3) in camera 1 and conf_1, conf_2 (H, W) of a pair of frames."""
    tokens_1, tokens_2 = (
        call("encoder", {"image": frame.image[None]}, reuse=frame.name, stay=True)["tokens"] for frame in sample.inputs
    )
    return {name: array[0] for name, array in call("decoder", {"tokens_1": tokens_1, "tokens_2": tokens_2}).items()}
