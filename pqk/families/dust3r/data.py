"""Opens DUSt3R's samples: ordered pairs of the images of a scene, generated or in a folder.

`pqk.families.scenes.sets` says what an eval seed draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pqk.data.scenes.open import open_scene
from pqk.data.scenes.pairs import image_similarity, most_pairs, pair_graph
from pqk.data.scenes.preprocess import Frame
from pqk.data.scenes.scene import Scene
from pqk.families.contract import Given, Maker, Sample, SampleSet
from pqk.families.dust3r.inputs import scene_pairs
from pqk.families.dust3r.settings import Workload
from pqk.families.scenes import sets
from pqk.families.scenes.frames import CalibrationImages, Frames, check_enough, first_frames, folders, load_frames
from pqk.families.scenes.sets import SEED_DRAWS as SEED_DRAWS
from pqk.families.scenes.sets import can_grow as can_grow
from pqk.families.scenes.sets import refuse_overlap as refuse_overlap

VIEWS = 6
"""Images of the scene that is timed, put together out of several where these have fewer."""


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

    A user's scenes and pictures for the test are looked at here: each must be readable and have a pair. Raises PqkError
    in one sentence for what a user must change.
    """

    def check(scene: Scene, truthful: bool) -> None:
        scene_pairs(_load(scene, workload), workload.pair_graph, workload.min_covisibility, truthful)

    return sets.open_split(split, workload, root, make, given, first, count, check)


def _load(scene: Scene, workload: Workload, views: int | None = None, seed: int = 0) -> Frames:
    return load_frames(scene, workload.input.height, workload.input.width, views, seed)


def samples(found: SampleSet, workload: Workload, seed: int) -> Iterator[Sample]:
    """Yields the pairs of every scene, as the workload's pair graph lists them; see `load_frames` on `seed`."""
    for number, folder in enumerate(folders(found)):
        frames = _load(open_scene(folder), workload, found.how["views"], seed)
        for i, j in scene_pairs(frames, workload.pair_graph, workload.min_covisibility, found.truthful):
            yield _sample(number, frames[i], frames[j], found.truthful)


def _sample(group: int, first: Frame, second: Frame, truthful: bool) -> Sample:
    both = first, second
    return Sample(group, f"{first.name}, {second.name}", both, both if truthful else None)


def most(found: SampleSet, workload: Workload) -> int:
    """Returns how many pairs the scenes have at most; too little overlap may leave fewer."""
    counts = (len(open_scene(path).views[: found.how["views"]]) for path in folders(found))
    return sum(most_pairs(count, **workload.pair_graph.model_dump(mode="json")) for count in counts)


class CalibrationPairs:
    """Neighbouring calibration images as pairs. images: how many there are in all."""

    def __init__(self, pictures: CalibrationImages) -> None:
        self._pictures = pictures
        self.images = len(pictures)

    def __len__(self) -> int:
        return self.images // 2

    def __getitem__(self, index: int) -> Sample:
        return Sample(0, str(index), (self._pictures[2 * index], self._pictures[2 * index + 1]))


def calibration(found: SampleSet, workload: Workload, images: int) -> CalibrationPairs:
    """Returns the first `images` calibration images (an even number) as pairs of neighbours. Raises PqkError."""
    return CalibrationPairs(
        CalibrationImages(folders(found), images - images % 2, workload.input.height, workload.input.width)
    )


def timed(found: SampleSet, workload: Workload, images: int | None = None) -> list[Sample]:
    """Returns the pairs of the pair graph over the first images of the scenes, whatever they share.

    images: how many; default: VIEWS, or fewer where there are fewer. Raises PqkError where there are fewer than asked.
    """
    frames = first_frames(found, images or VIEWS, lambda scene: _load(scene, workload, found.how["views"]))
    check_enough(frames, images)
    graph = workload.pair_graph
    alike = image_similarity(frame.image for frame in frames) if graph.kind == "topk" else None
    pairs = pair_graph(len(frames), graph.kind, graph.k, graph.symmetrize, alike)
    return [_sample(0, frames[i], frames[j], False) for i, j in pairs]


def example(workload: Workload) -> Sample:
    """Returns a pair of random images in [-1, 1], always the same ones."""
    random = np.random.default_rng(0)
    shape = (3, workload.input.height, workload.input.width)
    first, second = (
        Frame(name, random.uniform(-1, 1, shape).astype(np.float32), None, None, None) for name in ("first", "second")
    )
    return _sample(0, first, second, False)


def digest(split: str, workload: Workload, sha256: Callable[[], str]) -> str:
    """Returns a sha256 of what a split is fed, seeds aside; see `pqk.families.scenes.sets.digest`.

    test: input shape, pair graph, test scenes, least covisibility.
    """
    fed = {
        "input": workload.input.model_dump(mode="json"),
        "pair_graph": workload.pair_graph.model_dump(mode="json"),
        "min_covisibility": workload.min_covisibility,
    }
    return sets.digest(split, workload, sha256, fed)
