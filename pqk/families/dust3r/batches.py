"""Makes the batches that DUSt3R learns from: pairs of rendered rooms, or of the user's own scenes or photographs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pqk.data.render.stream import PairBatch, training_pairs
from pqk.data.render.synthetic import texture_bank
from pqk.data.scenes.preprocess import Frame
from pqk.data.scenes.scene import Scene
from pqk.errors import PqkError
from pqk.families.contract import SampleSet
from pqk.families.dust3r.inputs import scene_pairs
from pqk.families.dust3r.settings import PATCH, Workload
from pqk.families.metrics.truth import points_in_camera
from pqk.families.scenes.frames import load_frames
from pqk.families.scenes.own import HELD_BATCH, Own, pose_of
from pqk.settings.seeds import INDICES, split_seed
from pqk.settings.training import Training


@dataclass
class PicturePairs:
    """B pairs of pictures: images (B, 2, 3, H, W) in [-1, 1], and, where a Teacher gave it, what counts as their truth:
    see `PairBatch.ordered`. Nothing is known of their cameras.
    """

    images: Tensor
    truth: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def ordered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `PairBatch.ordered`. Raises PqkError where no Teacher gave a truth."""
        if self.truth is None:
            raise PqkError("plain photographs have no ground truth to learn from")
        return self.truth

    def first_to_second(self) -> None:
        """The pose, which is unknown."""


Pairs = PairBatch | PicturePairs


def scenery(asked: Training) -> dict[str, Any]:
    """The options of `training_pairs` that the settings of a training hold."""
    return {"spread": asked.spread_deg, "fov": asked.fov_deg, "min_covisible": asked.min_covisible}


class Rendered:
    """Pairs rendered on the device: no two are alike, and seeds keep the held-out ones apart."""

    truthful = True

    def __init__(self, asked: Any, device: torch.device, seed: int, held_seed: int) -> None:
        self._asked, self._seed, self._held_seed = asked, seed, held_seed
        self._bank = texture_bank().to(device)

    def train(self, index: int, count: int, size: int) -> PairBatch:
        seed = split_seed("train", self._seed, index % INDICES)
        return training_pairs(count, size, seed, self._bank, **scenery(self._asked))

    def held_out(
        self, pairs: int | None = None, size: int | None = None, batch: int | None = None
    ) -> Iterator[PairBatch]:
        wanted, step = self._asked.validation, batch or HELD_BATCH
        pairs = pairs or wanted.pairs
        for first in range(0, pairs, step):
            seed = split_seed("validation", self._held_seed, first)
            count = min(step, pairs - first)
            yield training_pairs(count, size or wanted.size, seed, self._bank, **scenery(self._asked))


def own(asked: Training, device: torch.device, seed: int, found: SampleSet, workload: Workload) -> Own:
    """Returns batches of pairs of the user's scenes, or of photographs without depth.

    Pairs are those of the workload's pair graph; with depth, those that share at least `min_covisible` of their view.
    """
    side = asked.validation.size  # type: ignore[attr-defined]

    def choose(scene: Scene) -> list[tuple[int, int]]:
        frames = load_frames(scene, side, side)
        return scene_pairs(frames, workload.pair_graph, asked.min_covisible, found.truthful)

    def stacked(arrays: Any) -> Tensor:
        return torch.from_numpy(np.array(arrays, dtype=np.float32)).to(device)

    def batch(both: Sequence[Sequence[Frame]]) -> Pairs:
        images = stacked([[frame.image for frame in pair] for pair in both])
        if not found.truthful:
            return PicturePairs(images)
        known = [[points_in_camera(frame) for frame in pair] for pair in both]
        return PairBatch(
            images,
            stacked([[points for points, _ in pair] for pair in known]),
            stacked([pose_of(second) @ np.linalg.inv(pose_of(first)) for first, second in both]),
            torch.from_numpy(np.array([[valid for _, valid in pair] for pair in known])).to(device),
            torch.ones(len(both), device=device),
        )

    return Own(asked, seed, found, PATCH, choose, batch)
