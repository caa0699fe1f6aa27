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
from pqk.data.scenes.kept import Kept
from pqk.data.scenes.preprocess import Frame, fit_to_shape
from pqk.data.scenes.scene import Scene, View
from pqk.errors import PqkError
from pqk.families.contract import SampleSet
from pqk.families.dust3r.inputs import learning_split, load_frames, scene_pairs
from pqk.families.dust3r.scoring import points_in_camera
from pqk.families.dust3r.settings import Workload
from pqk.settings.seeds import INDICES, split_seed
from pqk.settings.training import Training

HELD_BATCH = 8
"""Pairs of a batch of held-out ones."""
_KEPT = 2**30
"""Bytes of pictures and depth of one size that stay in memory."""


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


class Own:
    """Pairs of the user's scenes, or of photographs without depth.

    Pairs are those of the workload's pair graph; with depth, those that share at least `min_covisible` of their view.
    A training batch is drawn from the pairs of the scenes that are not held out, seeded by its number, and held out are
    pairs evenly spread over those of the others. Pictures are cropped at their centre.
    """

    def __init__(self, asked: Any, device: torch.device, seed: int, found: SampleSet, workload: Workload) -> None:
        self.truthful = found.truthful
        self._asked, self._device, self._seed = asked, device, seed
        self._frames: dict[int, Kept[Frame]] = {}
        self._views: list[tuple[View, str]] = []
        learned, held = learning_split(found)
        self._learned = self._pairs(learned, workload)
        self._judged = self._pairs(held, workload)

    def _pairs(self, scenes: Sequence[Scene], workload: Workload) -> list[tuple[int, int]]:
        """The pairs of these scenes, as places in the list of all views."""
        side, found = self._asked.validation.size, []
        for scene in scenes:
            first = len(self._views)
            self._views += [(view, scene.name) for view in scene.views]
            frames = load_frames(scene, side, side)
            chosen = scene_pairs(frames, workload.pair_graph, self._asked.min_covisible, self.truthful)
            found += [(first + i, first + j) for i, j in chosen]
        return found

    def train(self, index: int, count: int, size: int) -> Pairs:
        random, there = np.random.default_rng((self._seed, index)), len(self._learned)
        drawn = random.choice(there, count, replace=count > there)
        return self._batch([self._learned[k] for k in drawn], size)

    def held_out(self, pairs: int | None = None, size: int | None = None, batch: int | None = None) -> Iterator[Pairs]:
        wanted, step = self._asked.validation, batch or HELD_BATCH
        count = min(pairs or wanted.pairs, len(self._judged))
        held = [self._judged[k * len(self._judged) // count] for k in range(count)]
        for first in range(0, count, step):
            yield self._batch(held[first : first + step], size or wanted.size)

    def _batch(self, pairs: Sequence[tuple[int, int]], size: int) -> Pairs:
        both = [[self._frame(place, size) for place in pair] for pair in pairs]
        images = self._stacked([[frame.image for frame in pair] for pair in both])
        if not self.truthful:
            return PicturePairs(images)
        known = [[points_in_camera(frame) for frame in pair] for pair in both]
        poses = [_pose(second) @ np.linalg.inv(_pose(first)) for first, second in both]
        return PairBatch(
            images,
            self._stacked([[points for points, _ in pair] for pair in known]),
            self._stacked(poses),
            torch.from_numpy(np.array([[valid for _, valid in pair] for pair in known])).to(self._device),
            torch.ones(len(pairs), device=self._device),
        )

    def _frame(self, place: int, size: int) -> Frame:
        if size not in self._frames:

            def load(place: int) -> Frame:
                view, scene = self._views[place]
                return fit_to_shape(view, size, size, scene)

            self._frames[size] = Kept(len(self._views), load, _bytes_of, _KEPT)
        return self._frames[size][place]

    def _stacked(self, arrays: Any) -> Tensor:
        return torch.from_numpy(np.array(arrays, dtype=np.float32)).to(self._device)


def _pose(frame: Frame) -> np.ndarray:
    assert frame.world_to_cam is not None  # `scene_pairs` has looked
    return np.asarray(frame.world_to_cam, dtype=np.float64)


def _bytes_of(frame: Frame) -> int:
    return frame.image.nbytes + (0 if frame.depth is None else frame.depth.nbytes)
