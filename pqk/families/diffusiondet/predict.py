"""Runs an image through the graphs: the backbone once, the head in every step of the sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pqk.families.contract import Call, Sample
from pqk.families.detection.inputs import Fed
from pqk.families.diffusiondet.network.head import MAPS
from pqk.families.diffusiondet.sampling import sampler
from pqk.families.diffusiondet.sampling.noise import DrawnNoise, Noise
from pqk.families.diffusiondet.sampling.selection import Detections, rescale

if TYPE_CHECKING:
    from pqk.families.diffusiondet.settings import Network, Workload

MOST = 100
"""Detections of an image, as many as COCO counts."""


def predict(call: Call, sample: Sample, workload: Workload, seed: int) -> dict[str, np.ndarray]:
    """Returns what the head says of the last noisy boxes, and the detections of all steps.

    logits (N, K) and refined (N, 4), corners in pixels of the input: outputs of the head's last call. boxes (D, 4),
    corners in pixels of the original image, scores (D,), labels (D,) int64: the best D <= 100 detections, best first.
    seed: of the noise, with the image's number.
    """
    fed: Fed = sample.inputs
    return predict_with(call, fed, workload, DrawnNoise(workload.sampler.boxes, seed, fed.number))


def predict_with(call: Call, fed: Fed, workload: Workload, noise: Noise) -> dict[str, np.ndarray]:
    """Returns what `predict` does, of one image and given noise."""
    how = sampler.Sampling.asked(workload)
    steps = list(sampler.sample(head_call(call, fed, workload), fed.whwh, noise, how))

    def shown(found: Detections) -> Detections:
        return rescale(found, fed.size, fed.original).of(slice(MOST))

    found = shown(sampler.detect(steps, how, lambda best: len(shown(best).scores) == MOST))
    return {
        "logits": steps[-1].logits,
        "refined": steps[-1].boxes,
        **found._asdict(),
    }


def head_call(call: Call, fed: Fed, workload: Workload) -> sampler.HeadCall:
    """Runs the backbone, and returns the graph of the head over its maps as the sampler calls it."""
    network = workload.network
    maps = call("backbone", {"image": fed.image}, stay=True)
    fixed = {name: maps[name] for name in MAPS}
    if network.geo_feat:
        fixed["whwh"] = fed.whwh[None]
    outputs = ("logits", "refined", "quality") if network.quality_head else ("logits", "refined")

    def run(boxes: np.ndarray, t: int, labels: Tensor | None) -> tuple[np.ndarray, ...]:
        feeds = {**fixed, "boxes": boxes[None], "t": np.array([t], dtype=np.float32)}
        if network.label_state is not None:
            given = masked(network, len(boxes)) if labels is None else labels
            feeds["labels"] = given.float().numpy()[None]
        found = call("head", feeds)
        return tuple(found[name][0] for name in outputs)

    return run


def masked(network: Network, many: int) -> Tensor:
    """Returns the class states of boxes of which nothing is known: the mask K (N,), or all on it (N, K + 1)."""
    assert network.classes is not None  # the settings ask for it
    if network.label_state == "sample":
        return torch.full((many,), network.classes)
    states = torch.zeros(many, network.classes + 1)
    states[:, -1] = 1
    return states
