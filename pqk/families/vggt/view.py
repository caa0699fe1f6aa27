"""Shows a prediction of frames that are fed together: it holds depth, points and cameras of each as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pqk.data.scenes.scene import Scene
from pqk.errors import PqkError
from pqk.families.contract import Sample
from pqk.families.vggt.inputs import for_network, load
from pqk.families.vggt.scoring import cameras_of
from pqk.families.vggt.settings import MOST_FRAMES, Workload
from pqk.families.viewing import Geometry


def samples(scene: Scene, workload: Workload, most: int) -> tuple[Workload, list[Sample]]:
    """Returns one sample of the first `most` pictures, at most 64, and a workload that feeds so many at once.

    Raises PqkError for fewer than two pictures, and for what their files raise.
    """
    frames = load(scene, workload, min(most, MOST_FRAMES), least=2)
    chosen = tuple(for_network(frames[place]) for place in range(len(frames)))
    fed = workload.input.model_copy(update={"frames": len(chosen)})
    name = ", ".join(frame.name for frame in chosen)
    return workload.model_copy(update={"input": fed}), [Sample(0, name, chosen)]


def view(samples: Sequence[Sample], predictions: Sequence[Mapping[str, np.ndarray]]) -> Geometry:
    """Returns the geometry of the frames of the one sample, moved into the frame of the first predicted camera.

    Raises PqkError for a camera that is not finite.
    """
    if len(samples) != 1 or len(predictions) != 1:
        raise PqkError(f"frames are shown from one sample, not from {len(samples)}")
    prediction, frames = predictions[0], samples[0].inputs
    cameras = cameras_of(prediction, prediction["depth"].shape)
    rotation, shift = cameras[0, :, :3], cameras[0, :, 3]
    points = prediction["world_points"] @ rotation.T.astype(np.float32) + shift.astype(np.float32)
    turned = cameras[:, :, :3] @ rotation.T
    return Geometry(
        tuple(frame.name for frame in frames),
        np.stack([np.round(frame.image.transpose(1, 2, 0) * 255).astype(np.uint8) for frame in frames]),
        prediction["depth"].astype(np.float32),
        points.astype(np.float32),
        prediction["world_points_conf"].astype(np.float32),
        np.concatenate([turned, (cameras[:, :, 3] - turned @ shift)[..., None]], axis=2),
    )
