"""Shows predictions of pairs: every picture is paired with the first one, so that all points lie in its camera."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pqk.data.scenes.preprocess import Frame
from pqk.data.scenes.scene import Scene
from pqk.errors import PqkError
from pqk.families.contract import Sample
from pqk.families.dust3r.settings import Workload
from pqk.families.metrics.resection import focal_length, resect
from pqk.families.scenes.frames import load_frames
from pqk.families.viewing import Geometry


def samples(scene: Scene, workload: Workload, most: int) -> tuple[Workload, list[Sample]]:
    """Returns the pairs of the first picture with each other one, and the workload unchanged.

    Raises PqkError as `load_frames` does.
    """
    frames = load_frames(scene, workload.input.height, workload.input.width, most)
    first = frames[0]
    rest = (frames[place] for place in range(1, len(frames)))
    return workload, [Sample(0, f"{first.name}, {frame.name}", (first, frame)) for frame in rest]


def view(samples: Sequence[Sample], predictions: Sequence[Mapping[str, np.ndarray]]) -> Geometry:
    """Returns the geometry of the pictures of `samples`, in the unit of the first pair.

    A pair is right up to a scale of its own: the median depth of the first picture, which all pairs have, brings them
    to one. The camera of each other picture is found from its points, with the focal length that those of the first
    picture tell (`resect`), and its depth is that of its points in this camera. Raises PqkError where a scale, the
    focal length or a camera cannot be found.
    """
    first = predictions[0]
    focal = focal_length(first["pts3d_1"], first["conf_1"])
    points, confidence = [first["pts3d_1"]], [first["conf_1"]]
    for prediction in predictions:
        scale = _median_depth(first["pts3d_1"]) / _median_depth(prediction["pts3d_1"])
        points.append(np.float32(scale) * prediction["pts3d_2"])
        confidence.append(prediction["conf_2"])
    frames: list[Frame] = [samples[0].inputs[0], *(sample.inputs[1] for sample in samples)]
    cameras = [np.eye(3, 4), *(resect(p, focal, c) for p, c in zip(points[1:], confidence[1:], strict=True))]
    depth = [p @ camera[2, :3] + camera[2, 3] for p, camera in zip(points, cameras, strict=True)]
    return Geometry(
        tuple(frame.name for frame in frames),
        np.stack([np.round((frame.image.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8) for frame in frames]),
        np.stack(depth).astype(np.float32),
        np.stack(points).astype(np.float32),
        np.stack(confidence).astype(np.float32),
        np.stack(cameras),
    )


def _median_depth(points: np.ndarray) -> float:
    depth = points[..., 2][np.isfinite(points[..., 2])]
    median = float(np.median(depth)) if depth.size else 0.0
    if median <= 0:
        raise PqkError("most points of the first picture lie behind its camera: there is nothing to see")
    return median
