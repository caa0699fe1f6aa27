"""Runs a set of frames through the graphs: each is encoded, the aggregator takes all tokens, each head its part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pqk.families.contract import Call, Sample

if TYPE_CHECKING:
    from pqk.families.vggt.settings import Workload

LEVELS = ("level_0", "level_1", "level_2", "level_3")


def predict(call: Call, sample: Sample, workload: Workload, seed: int) -> dict[str, np.ndarray]:
    """Returns what the network says of S frames, up to one scale and in the frame of the first camera.

    pose_enc (S, 9), depth (S, H, W), depth_conf (S, H, W), world_points (S, H, W, 3), world_points_conf (S, H, W).
    """
    tokens = {
        f"tokens_{index}": call("encoder", {"image": frame.image[None]}, reuse=frame.name, stay=True)["tokens"]
        for index, frame in enumerate(sample.inputs)
    }
    seen = call("aggregator", tokens, stay=True)
    levels = {name: seen[name] for name in LEVELS}
    pose = call("camera", {"camera_tokens": seen["camera_tokens"]})["pose_enc"]
    depth, points = call("depth", levels), call("points", levels)
    return {
        "pose_enc": pose[0],
        "depth": depth["depth"][..., 0],
        "depth_conf": depth["depth_conf"],
        "world_points": points["world_points"],
        "world_points_conf": points["world_points_conf"],
    }
