"""Draws training batches from the user's own scenes or photographs, `Own`, for families that learn from scenes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pqk.data.scenes.kept import Kept
from pqk.data.scenes.preprocess import Frame, fit_to_shape
from pqk.data.scenes.scene import Scene, View
from pqk.families.contract import SampleSet
from pqk.families.scenes.frames import learning_split
from pqk.settings.training import Training

HELD_BATCH = 8
"""Held-out samples of one batch."""
_KEPT = 2**30
"""Bytes of pictures and depth of one size that stay in memory."""

Together = tuple[int, ...]
"""Places, in a scene, of the views that are fed together."""


class Own:
    """Batches of the user's scenes, or of photographs without depth (a `Batches`).

    A training batch is drawn from the samples of the scenes that are not held out, seeded by its number; held out are
    samples evenly spread over those of the others. Pictures are cropped at their centre.
    """

    def __init__(
        self,
        asked: Training,
        seed: int,
        found: SampleSet,
        patch: int,
        choose: Callable[[Scene], Sequence[Together]],
        batch: Callable[[Sequence[Sequence[Frame]]], Any],
    ) -> None:
        """choose: returns the samples of a scene. batch: makes a batch of samples, each given as its frames.

        patch: sides of frames are multiples of it. Raises PqkError where there is too little for both parts.
        """
        self.truthful = found.truthful
        self._wanted: Any = asked.validation  # type: ignore[attr-defined]
        self._seed, self._patch, self._choose, self._made = seed, patch, choose, batch
        self._frames: dict[int, Kept[Frame]] = {}
        self._views: list[tuple[View, str]] = []
        learned, held = learning_split(found)
        self._learned = self._samples(learned)
        self._judged = self._samples(held)

    def _samples(self, scenes: Sequence[Scene]) -> list[Together]:
        """Returns the samples of these scenes, as places in the list of all views."""
        found = []
        for scene in scenes:
            first = len(self._views)
            self._views += [(view, scene.name) for view in scene.views]
            found += [tuple(first + place for place in together) for together in self._choose(scene)]
        return found

    def train(self, index: int, count: int, size: int) -> Any:
        random, there = np.random.default_rng((self._seed, index)), len(self._learned)
        drawn = random.choice(there, count, replace=count > there)
        return self._batch([self._learned[k] for k in drawn], size)

    def held_out(self, pairs: int | None = None, size: int | None = None, batch: int | None = None) -> Iterator[Any]:
        step = batch or HELD_BATCH
        count = min(pairs or self._wanted.pairs, len(self._judged))
        held = [self._judged[k * len(self._judged) // count] for k in range(count)]
        for first in range(0, count, step):
            yield self._batch(held[first : first + step], size or self._wanted.size)

    def _batch(self, samples: Sequence[Together], size: int) -> Any:
        return self._made([[self._frame(place, size) for place in together] for together in samples])

    def _frame(self, place: int, size: int) -> Frame:
        if size not in self._frames:

            def load(place: int) -> Frame:
                view, scene = self._views[place]
                return fit_to_shape(view, size, size, scene, patch=self._patch)

            self._frames[size] = Kept(len(self._views), load, _bytes_of, _KEPT)
        return self._frames[size][place]


def pose_of(frame: Frame) -> np.ndarray:
    """Returns the world-to-camera matrix (4, 4) float64 of a frame that has one."""
    assert frame.world_to_cam is not None  # the choice of samples has looked
    return np.asarray(frame.world_to_cam, dtype=np.float64)


def _bytes_of(frame: Frame) -> int:
    return frame.image.nbytes + (0 if frame.depth is None else frame.depth.nbytes)
