"""Makes the batches that VGGT learns from: sets of frames of rendered rooms, or of the user's scenes or photographs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pqk.data.render.stream import SetBatch, training_sets
from pqk.data.render.synthetic import texture_bank
from pqk.data.scenes.preprocess import Frame
from pqk.data.scenes.scene import Scene
from pqk.errors import PqkError
from pqk.families.contract import SampleSet
from pqk.families.metrics.truth import points_in_camera
from pqk.families.scenes.frames import load_frames
from pqk.families.scenes.own import HELD_BATCH, Own, pose_of
from pqk.families.vggt.geometry import extri_intri_to_pose_encoding
from pqk.families.vggt.inputs import for_network, windows
from pqk.families.vggt.losses import Truth
from pqk.families.vggt.settings import PATCH, Workload
from pqk.settings.seeds import INDICES, split_seed
from pqk.settings.training import Training


@dataclass
class Sets:
    """B sets of S frames: images (B, S, 3, H, W) in [0, 1], and their truth where it is known.

    mapped: of so many sets, the first ones, a training computes the maps; of all where it is None. gain: factor of the
    gradient from the cameras into the aggregator.
    """

    images: Tensor
    truth: Truth | None = None
    mapped: int | None = None
    gain: float = 1.0

    def known(self) -> Truth:
        """Returns the truth. Raises PqkError where there is none."""
        if self.truth is None:
            raise PqkError("plain photographs have no ground truth to learn from")
        return self.truth


def scenery(asked: Any) -> dict[str, Any]:
    """The options of `training_sets` that the settings of a training hold."""
    return {"spread": asked.spread_deg, "fov": asked.fov_deg, "min_covisible": asked.min_covisible}


class Rendered:
    """Sets rendered on the device: no two are alike, and seeds keep the held-out ones apart.

    Every batch has one number of frames, out of the range that the settings give; the more frames, the fewer sets, so
    that batches hold about equally many images.
    """

    truthful = True

    def __init__(self, asked: Any, device: torch.device, seed: int, held_seed: int) -> None:
        self._asked, self._seed, self._held_seed = asked, seed, held_seed
        self._bank = texture_bank().to(device)

    def train(self, index: int, count: int, size: int) -> Sets:
        fewest, most = self._asked.frames
        seed = split_seed("train", self._seed, index % INDICES)
        frames = fewest + index % (most - fewest + 1)
        sets = max(1, count * fewest // frames)
        found = _known(training_sets(sets, frames, size, seed, self._bank, **scenery(self._asked)))
        match = getattr(self._asked, "match", None)
        return found if match is None else replace(found, mapped=max(1, round(match.maps * sets)), gain=match.cameras)

    def held_out(self, pairs: int | None = None, size: int | None = None, batch: int | None = None) -> Iterator[Sets]:
        wanted, step = self._asked.validation, batch or HELD_BATCH
        count = pairs or wanted.pairs
        for first in range(0, count, step):
            seed = split_seed("validation", self._held_seed, first)
            sets = min(step, count - first)
            frames, side = self._asked.frames[0], size or wanted.size
            yield _known(training_sets(sets, frames, side, seed, self._bank, **scenery(self._asked)))


def own(asked: Training, device: torch.device, seed: int, found: SampleSet, workload: Workload) -> Own:
    """Returns batches of sets of the user's scenes, or of photographs without depth.

    Sets are windows of the workload's number of frames; with depth, those in which each frame shares at least
    `min_covisible` of its view with the one before.
    """
    side = asked.validation.size  # type: ignore[attr-defined]

    def choose(scene: Scene) -> list[tuple[int, ...]]:
        frames = load_frames(scene, side, side, patch=PATCH, least=workload.together)
        return windows(frames, workload.together, workload.frame_sets, asked.min_covisible, found.truthful)

    def stacked(arrays: Any) -> Tensor:
        return torch.from_numpy(np.array(arrays, dtype=np.float32)).to(device)

    def batch(sets: Sequence[Sequence[Frame]]) -> Sets:
        images = stacked([[for_network(frame).image for frame in together] for together in sets])
        if not found.truthful:
            return Sets(images)
        valid = np.array([[points_in_camera(frame)[1] for frame in together] for together in sets])
        return Sets(
            images,
            Truth(
                stacked([[frame.depth for frame in together] for together in sets]),
                stacked([_in_first_camera(together) for together in sets]),
                torch.from_numpy(valid).to(device),
                torch.stack([_encoded(together) for together in sets]).to(device),
            ),
        )

    return Own(asked, seed, found, PATCH, choose, batch)


def _in_first_camera(together: Sequence[Frame]) -> list[np.ndarray]:
    """Returns the points (H, W, 3) of every frame in the first one's camera, 0 where there is no depth."""
    found = []
    for frame in together:
        points, valid = points_in_camera(frame)
        motion = pose_of(together[0]) @ np.linalg.inv(pose_of(frame))
        moved = points @ motion[:3, :3].T + motion[:3, 3]
        found.append(np.where(valid[..., None], moved, 0.0))
    return found


def _encoded(together: Sequence[Frame]) -> Tensor:
    """Returns the pose encodings (S, 9) of frames with cameras; the first one's is the world."""
    first = np.linalg.inv(pose_of(together[0]))
    extrinsics = torch.from_numpy(np.stack([(pose_of(frame) @ first)[:3] for frame in together]))
    intrinsics = torch.from_numpy(np.stack([np.asarray(frame.K, dtype=np.float64) for frame in together]))
    height, width = together[0].image.shape[1:]
    return extri_intri_to_pose_encoding(extrinsics, intrinsics, (height, width)).float()


def _known(batch: SetBatch) -> Sets:
    """Returns rendered sets with their truth; the principal point is the centre."""
    height, width = batch.images.shape[-2:]
    intrinsics = torch.zeros(*batch.focal.shape, 3, 3, device=batch.focal.device)
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = batch.focal
    pose = extri_intri_to_pose_encoding(batch.from_first[..., :3, :], intrinsics, (height, width))
    return Sets(batch.images, Truth(batch.depth, batch.points, batch.valid, pose))
