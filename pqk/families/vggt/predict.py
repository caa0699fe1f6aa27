"""Runs a set of frames through the graphs: each is encoded, the aggregator takes all tokens, each head its part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pqk.families.contract import Call, Sample

if TYPE_CHECKING:
    from pqk.families.vggt.settings import Workload

LEVELS = ("level_0", "level_1", "level_2", "level_3")


def predict(call: Call, sample: Sample, workload: Workload, seed: int) -> dict[str, np.ndarray]:
    """Returns what the network says of S frames, up to one scale and in the frame of the first camera.

    pose_enc (S, 9), depth (S, H, W), depth_conf (S, H, W), world_points (S, H, W, 3), world_points_conf (S, H, W).
    """
    encoded = [call("encoder", {"image": frame.image[None]}, reuse=frame.name, stay=True) for frame in sample.inputs]
    tokens = {f"tokens_{index}": found["tokens"] for index, found in enumerate(encoded)}
    seen = call("aggregator", {"special": encoded[0]["special"], **tokens}, stay=True)
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


def calibrated(graph: str, feeds: Mapping[str, np.ndarray], ptq: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns what a graph is calibrated on: with `special_tokens: left_out` patch tokens in place of the special ones.

    The camera token and the registers have activations far outside those of the patches (QVGGT, arXiv 2605.31124), and
    would stretch the range of every activation that they share. Each is replaced by a patch token of the first frame,
    from places evenly spread over it, in calibration alone.
    """
    if graph != "aggregator" or ptq.get("special_tokens") != "left_out":
        return dict(feeds)
    special, patches = feeds["special"], feeds["tokens_0"][0]
    count = special.shape[0] * special.shape[1]
    places = np.arange(count) * len(patches) // count
    return {**feeds, "special": patches[places].reshape(special.shape)}
