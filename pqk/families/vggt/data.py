"""Opens VGGT's samples: windows of neighbouring images of a scene, generated or in a folder.

`pqk.families.scenes.sets` says what an eval seed draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pqk.data.scenes.open import open_scene
from pqk.data.scenes.preprocess import Frame
from pqk.data.scenes.scene import Scene
from pqk.errors import PqkError
from pqk.families.contract import Given, Maker, Sample, SampleSet
from pqk.families.scenes import sets
from pqk.families.scenes.frames import CalibrationImages, Frames, check_enough, first_frames, folders
from pqk.families.scenes.sets import SEED_DRAWS as SEED_DRAWS
from pqk.families.scenes.sets import can_grow as can_grow
from pqk.families.scenes.sets import refuse_overlap as refuse_overlap
from pqk.families.vggt.inputs import Window, count_windows, for_network, load, windows
from pqk.families.vggt.settings import PATCH, Workload

VIEWS = 6
"""Fewest images of the scene that is timed, put together out of several where these have fewer."""
MORE_VIEWS = 4
"""It has at least so many more than are fed at once, so that there are several windows."""


def open_split(
    split: str,
    workload: Workload,
    root: Path,
    make: Maker,
    given: Given = Given(),  # noqa: B008 (frozen)
    first: int = 0,
    count: int | None = None,
) -> SampleSet:
    """Returns the scenes of a split; see `pqk.families.contract.DataPart`.

    A user's scenes and pictures for the test are looked at here: each must be readable and have a window. Raises
    PqkError in one sentence for what a user must change.
    """

    def check(scene: Scene, truthful: bool) -> None:
        _windows(load(scene, workload), workload, truthful)

    return sets.open_split(split, workload, root, make, given, first, count, check)


def _windows(frames: Frames, workload: Workload, check_overlap: bool) -> list[Window]:
    return windows(frames, workload.together, workload.frame_sets, workload.min_covisibility, check_overlap)


def samples(found: SampleSet, workload: Workload, seed: int) -> Iterator[Sample]:
    """Yields the windows of every scene; see `load_frames` on `seed`.

    Views of generated scenes were placed so that neighbours share enough of their view, so there is nothing to check.
    Raises PqkError for a scene without any window, and for what its files raise.
    """
    for number, folder in enumerate(folders(found)):
        frames = load(open_scene(folder), workload, found.how["views"], seed)
        for window in _windows(frames, workload, found.truthful and found.own):
            yield _sample(number, [frames[place] for place in window], found.truthful)


def _sample(group: int, frames: Sequence[Frame], truthful: bool) -> Sample:
    together = tuple(map(for_network, frames))
    return Sample(group, ", ".join(frame.name for frame in frames), together, together if truthful else None)


def most(found: SampleSet, workload: Workload) -> int:
    """Returns how many windows the scenes have at most; too little overlap may leave fewer."""
    counts = (len(open_scene(path).views[: found.how["views"]]) for path in folders(found))
    return sum(count_windows(count, workload.together, workload.frame_sets) for count in counts)


class CalibrationSets:
    """Neighbouring calibration images in sets of so many as are fed at once. images: how many there are in all."""

    def __init__(self, pictures: CalibrationImages, together: int) -> None:
        self._pictures, self._together = pictures, together
        self.images = len(pictures)

    def __len__(self) -> int:
        return self.images // self._together

    def __getitem__(self, index: int) -> Sample:
        first = range(len(self))[index] * self._together
        frames = (self._pictures[place] for place in range(first, first + self._together))
        return Sample(0, str(index), tuple(map(for_network, frames)))


def calibration(found: SampleSet, workload: Workload, images: int) -> CalibrationSets:
    """Returns the first `images` calibration images in sets of neighbours: whole sets, and at least one.

    Raises PqkError where there are fewer.
    """
    together = workload.together
    wanted = max(1, images // together) * together
    height, width = workload.input.height, workload.input.width
    return CalibrationSets(CalibrationImages(folders(found), wanted, height, width, together, PATCH), together)


def timed(found: SampleSet, workload: Workload, images: int | None = None) -> list[Sample]:
    """Returns the windows over the first images of the scenes, whatever they share.

    images: how many; default: `VIEWS`, or `MORE_VIEWS` more than are fed at once where that is more. Raises PqkError
    where all scenes together have fewer images than are fed at once, or than asked.
    """
    wanted = images or max(VIEWS, workload.together + MORE_VIEWS)
    frames = first_frames(found, wanted, lambda scene: load(scene, workload, found.how["views"], least=1))
    check_enough(frames, images)
    if len(frames) < workload.together:
        raise PqkError(f"{len(frames)} images are too few to be timed, as {workload.together} are fed at once")
    chosen = windows(frames, workload.together, workload.frame_sets, workload.min_covisibility, False)
    return [_sample(0, [frames[place] for place in window], False) for window in chosen]


def example(workload: Workload) -> Sample:
    """Returns a set of random images in [0, 1], always the same ones."""
    random = np.random.default_rng(0)
    shape = (3, workload.input.height, workload.input.width)
    frames = tuple(
        Frame(f"frame {place}", random.random(shape, dtype=np.float32), None, None, None)
        for place in range(workload.together)
    )
    return Sample(0, ", ".join(frame.name for frame in frames), frames)


def digest(split: str, workload: Workload, sha256: Callable[[], str]) -> str:
    """Returns a sha256 of what a split is fed, seeds aside; see `pqk.families.scenes.sets.digest`.

    test: input shape and number of frames, which frames go together, test scenes, least covisibility.
    """
    fed = {
        "input": workload.input.model_dump(mode="json"),
        "frame_sets": workload.frame_sets.model_dump(mode="json"),
        "min_covisibility": workload.min_covisibility,
    }
    return sets.digest(split, workload, sha256, fed)
