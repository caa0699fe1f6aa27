"""Opens the splits of families whose samples are views of scenes, generated or in a folder.

What an eval seed draws:

- the test scenes. Seed 0: those of the workload. Generated scenes, seed s: as many scenes of the test split with base
  seed (workload's + s), none of which any other eval seed, training or calibration shares. Scenes of a folder, seed s:
  half of them, drawn without replacement. Two halves overlap, so their scores are not independent; the ledger's
  intervals count with that (`pqk.record.ledger.halves_interval`).
- with the scenes, their samples; and the pixels that a distance of clouds takes.
- where images are cropped, if they leave room: the centre for seed 0, anywhere for seed s.

Nothing is added to pictures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from pqk.data.scenes.open import open_scene, open_scenes
from pqk.data.scenes.overlap import refuse_overlap as refuse_shared
from pqk.data.scenes.scene import Scene
from pqk.errors import PqkError
from pqk.families.contract import Given, Maker, SampleSet
from pqk.families.scenes.frames import folders, learning_split
from pqk.files import sha256_json
from pqk.settings.seeds import LIMIT
from pqk.settings.workload import SYNTHETIC, Calibration, SceneList, SceneLists, Seeds, TrainList

SEED_DRAWS: Literal["samples", "noise"] = "samples"

_SCENE_CODE = ("pqk.data.render.generate",)
_SIDES = 16
"""Sides of generated pictures are multiples of it."""


class Shape(Protocol):
    """The size of a picture as a network is fed it, in pixels."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


class Workload(Protocol):
    """What a workload of scenes holds, whatever its family adds.

    neighbours: of an inner view of a generated scene, as many views around it share enough of their view with it.
    together: how many images are fed at once.
    """

    @property
    def input(self) -> Shape: ...
    @property
    def scenes(self) -> SceneLists: ...
    @property
    def calibration(self) -> Calibration: ...
    @property
    def min_covisibility(self) -> float: ...
    @property
    def seeds(self) -> Seeds: ...
    @property
    def neighbours(self) -> int: ...
    @property
    def together(self) -> int: ...


Check = Callable[[Scene, bool], object]
"""Raises PqkError for a scene that has no sample; the bool: whether it is scored against ground truth."""


@dataclass(frozen=True)
class Scenes:
    """Scene folders in order, the sha256 of what the readers take from them, and the folder they lie in."""

    folders: tuple[Path, ...]
    sha256: str
    root: Path


def open_split(
    split: str,
    workload: Workload,
    root: Path,
    make: Maker,
    given: Given,
    first: int,
    count: int | None,
    check: Check,
) -> SampleSet:
    """Returns the scenes of a split; see `pqk.families.contract.DataPart`.

    check: looks at each of the user's scenes for the test, which must be readable and have a sample. Raises PqkError
    in one sentence for what a user must change.
    """
    if split == "calibration":
        return _calibration(workload, root, make)
    if split == "train":
        return _train(workload, root, given)
    if split == "test" and (given.scenes or given.images):
        return _given(workload, given, check)
    asked = getattr(workload.scenes, split)
    drawn = ""
    if split == "test" and asked.source == SYNTHETIC:
        asked = seeded_list(asked, workload.seeds.eval)
        drawn = f"{asked.count} generated, base seed {asked.seed}"
    if count is not None:
        asked = asked.model_copy(update={"count": count})
    scenes = listed_scenes(split, asked, workload, root, make, first)
    if split == "test" and asked.source != SYNTHETIC:
        scenes, drawn = draw(scenes, workload.seeds.eval)
    return _set(scenes, asked.views, _truthful(scenes), asked.source != SYNTHETIC, drawn)


def _set(scenes: Scenes, views: int | None, truthful: bool, own: bool, drawn: str = "") -> SampleSet:
    names = tuple(folder.name for folder in scenes.folders)
    where = {"folders": [str(folder) for folder in scenes.folders]}
    return SampleSet(where, {"views": views}, names, scenes.sha256, truthful, own, drawn)


def _given(workload: Workload, given: Given, check: Check) -> SampleSet:
    if given.scenes and given.images:
        raise PqkError("--scenes and --images exclude each other: scenes with ground truth, or pictures without")
    if given.images:
        scenes, drawn = draw(folder_scenes(given.images, pictures=True), workload.seeds.eval)
        found = _set(scenes, None, False, True, drawn)
    else:
        assert given.scenes is not None
        scenes, drawn = draw(folder_scenes(given.scenes), workload.seeds.eval)
        for folder in scenes.folders:
            refuse_partial_truth(folder)
        found = _set(scenes, None, _truthful(scenes), True, drawn)
    for folder in scenes.folders:
        check(open_scene(folder), found.truthful)
    return found


def _calibration(workload: Workload, root: Path, make: Maker) -> SampleSet:
    """The calibration scenes; pictures only, as no quantizer looks at depth."""
    asked = workload.calibration
    if asked.source != SYNTHETIC:
        try:
            scenes = folder_scenes(_under(root, asked.source), asked.names, truth=False)
        except PqkError as error:
            raise PqkError(
                f"the calibration set (workload.calibration.source) is empty or unreadable: {error}"
            ) from error
        return _set(scenes, None, False, True)
    _refuse_few("calibration.views_per_scene", asked.views_per_scene, workload)
    in_sets = asked.views_per_scene - asked.views_per_scene % workload.together  # the others have no partners
    scenes = synthetic_scenes(
        "calibration", -(-asked.images // in_sets), asked.views_per_scene, asked.seed, workload, False, make
    )
    return _set(scenes, None, False, False)


def _train(workload: Workload, root: Path, given: Given) -> SampleSet:
    """What is learned from: nothing that exists yet, or scenes in a folder, some held out (see `learning_split`)."""
    if given.train_scenes and given.train_images:
        raise PqkError("--train-scenes and --train-images exclude each other: scenes with depth, or pictures without")
    asked, named = workload.scenes.train, given.train_scenes or given.train_images
    if named is not None:
        asked = TrainList(source=str(named.absolute()), pictures=given.train_images is not None)
    if asked.source == SYNTHETIC:
        return SampleSet({"folders": []}, {"views": None}, (), sha256_json(SYNTHETIC), True)
    folder = _under(root, asked.source)
    scenes = folder_scenes(folder, asked.names, asked.count, asked.pictures, not asked.pictures)
    if not asked.pictures:
        for path in scenes.folders:
            refuse_partial_truth(path)
        if not _truthful(scenes):
            raise PqkError(f"{folder}: these scenes have no depth to learn from; --train-images takes pictures without")
    found = _set(scenes, asked.views, not asked.pictures, True)
    learned, held = learning_split(found, workload.together)
    what = "photographs in folders" if asked.pictures else "scenes with depth"
    drawn = f"{len(learned)} {what}, judged on {len(held)} other{'s' if len(held) > 1 else ''}"
    if learned[0].root == held[0].root:
        drawn = f"{len(learned[0].views)} photographs, judged on the {len(held[0].views)} that follow them"
    return replace(found, drawn=drawn)


def synthetic_scenes(
    split: str, count: int, views: int, seed: int, workload: Workload, depth: bool, make: Maker, first: int = 0
) -> Scenes:
    """Generates (or reuses) `count` scenes of a split, from number `first` on.

    Their square pictures are as large as the longer side of the input, rounded up to a multiple of 16.
    """
    from pqk.data.render.generate import ScenePlan, make_scenes

    plan = ScenePlan(
        split=split,
        seed=seed,
        index=0,
        views=views,
        size=max(2 * _SIDES, -(-max(workload.input.height, workload.input.width) // _SIDES) * _SIDES),
        k=workload.neighbours,
        min_covisibility=workload.min_covisibility,
        depth=depth,
    )
    plans = [replace(plan, index=i) for i in range(first, first + count)]
    names = ("split", "seed", "views", "size", "k", "min_covisibility", "depth")
    inputs = {**{name: getattr(plan, name) for name in names}, "first": first, "count": count}
    folder, sha256 = make(split, inputs, _SCENE_CODE, lambda path: make_scenes(path, plans))
    return Scenes(tuple(folder / p.name for p in plans), sha256, folder)


def listed_scenes(split: str, scenes: SceneList, workload: Workload, root: Path, make: Maker, first: int = 0) -> Scenes:
    """Returns the scenes of a list: generated ones of `split` from number `first` on, or those of a folder.

    Raises PqkError when one is missing.
    """
    if scenes.source == SYNTHETIC:
        count, views = scenes.count or 0, scenes.views or 0
        _refuse_few(f"scenes.{split}.views", views, workload)
        return synthetic_scenes(split, count, views, scenes.seed, workload, True, make, first)
    return folder_scenes(_under(root, scenes.source), scenes.names, scenes.count)


def _refuse_few(name: str, views: int, workload: Workload) -> None:
    """Raises PqkError for generated scenes of fewer views than are fed at once."""
    if views < workload.together:
        raise PqkError(f"workload.{name} is {views}, but {workload.together} images are fed at once")


def folder_scenes(
    folder: Path,
    names: tuple[str, ...] | None = None,
    count: int | None = None,
    pictures: bool = False,
    truth: bool = True,
) -> Scenes:
    """Returns scenes that lie in a folder: all of them by name, or the listed ones in their order; at most `count`.

    pictures: see `open_scenes`. truth: whether depth and masks are read too, and so are part of the sha256.
    Raises PqkError for what the readers refuse.
    """
    found = [open_scene(folder / name) for name in names] if names else open_scenes(folder, pictures)
    chosen = found[:count]
    content = [scene.content(truth) for scene in chosen]
    if not any(scene["views"] for scene in content):
        raise PqkError(f"{folder}: no picture of these scenes was read, so nothing says what they are")
    return Scenes(tuple(scene.root for scene in chosen), sha256_json(content), folder)


def _under(root: Path, source: str) -> Path:
    path = Path(source).expanduser()
    return path if path.is_absolute() else root / path


def seeded_list(asked: SceneList, eval_seed: int) -> SceneList:
    """Returns a list of generated scenes with the base seed of an eval seed. Raises PqkError above the last seed."""
    base = asked.seed + eval_seed
    if base >= LIMIT:
        raise PqkError(f"eval seed {eval_seed}: the base seed of the test scenes would be {base}, above {LIMIT - 1}")
    return asked.model_copy(update={"seed": base})


def draw(listed: Scenes, eval_seed: int) -> tuple[Scenes, str]:
    """Returns what an eval seed draws of scenes in a folder, and that in words. Raises PqkError where there is one."""
    count = len(listed.folders)
    if eval_seed == 0:
        return listed, f"all {count} of the list"
    if count < 2:
        raise PqkError(
            f"eval seed {eval_seed} draws half of the scenes, and there is one, which only eval seed 0 takes; "
            "to seed the training alone: --set workload.seeds.train=N"
        )
    chosen = np.random.default_rng(eval_seed).choice(count, count // 2, replace=False)
    names = tuple(os.path.relpath(listed.folders[index], listed.root) for index in sorted(chosen))
    return folder_scenes(listed.root, names), f"half: {len(names)} of {count} of the list"


def _truthful(scenes: Scenes) -> bool:
    truths = {path: open_scene(path).has_ground_truth for path in scenes.folders}
    if any(truths.values()) and not all(truths.values()):
        without = next(path for path, has in truths.items() if not has)
        raise PqkError(f"{without}: this scene has no ground truth while others have; evaluate them apart")
    return all(truths.values())


def refuse_partial_truth(folder: Path) -> None:
    """Raises PqkError for a scene of which some views have depth and others have not."""
    scene = open_scene(folder)
    lacking = [view.name for view in scene.views if view.depth_path is None]
    if 0 < len(lacking) < len(scene.views):
        raise PqkError(
            f"{folder}: view {lacking[0]!r} has no depth ({len(lacking)} of the {len(scene.views)} views have none); "
            "add it, or take these views or all depth out of the scene"
        )


def can_grow(workload: Workload, given: Given) -> bool:
    """Whether more test scenes can be made: generated ones can, those of a folder are all there are."""
    return not (given.scenes or given.images) and workload.scenes.test.source == SYNTHETIC


def refuse_overlap(sets: Mapping[str, SampleSet]) -> None:
    """Raises PqkError when two of the user's splits share a scene or a picture."""
    refuse_shared({name: [open_scene(folder) for folder in folders(found)] for name, found in sets.items()})


def digest(split: str, workload: Workload, sha256: Callable[[], str], fed: Mapping[str, Any]) -> str:
    """Returns a sha256 of what a split is fed, seeds aside.

    test: the test scenes and `fed`, the parts of the workload that decide what samples they become. Calibration and
    validation are left out of it: they are part of how a model was made, and recipes that differ there are still
    evaluated on the same.
    """
    if split == "calibration":
        asked = workload.calibration
        return sha256_json(asked.model_dump(mode="json")) if asked.source == SYNTHETIC else sha256()
    test = workload.scenes.test
    scenes: dict[str, Any] = test.model_dump(mode="json")
    if test.source != SYNTHETIC:
        scenes = {"views": test.views, "sha256": sha256()}
    return sha256_json({**fed, "scenes": scenes})
