"""Opens the samples of a run: validation, on which everything is decided, and test, which is scored once at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pqk.data.scenes.open import open_scene
from pqk.data.scenes.overlap import refuse_overlap
from pqk.errors import PqkError
from pqk.families.dust3r.inputs import load_frames, scene_pairs
from pqk.recipe import stages
from pqk.recipe.eval_seed import draw, seed_scenes, seeded_list
from pqk.recipe.request import Request
from pqk.recipe.stages import Context, Scenes
from pqk.settings.card import Experiment
from pqk.settings.workload import SYNTHETIC, Workload


@dataclass(frozen=True)
class Split:
    """Scenes of one split, and how they are read.

    views: of each scene only so many; None is all. truthful: they carry ground truth that a model is scored against.
    """

    scenes: Scenes
    views: int | None
    truthful: bool


def validation_split(ctx: Context, experiment: Experiment, root: Path) -> Split:
    """Opens the scenes of `workload.scenes.validation`. Raises PqkError when one is missing."""
    workload = experiment.workload
    asked = workload.scenes.validation
    found = stages.listed_scenes(ctx, "validation", asked, workload, root)
    return Split(found, asked.views, _truthful(found))


def test_split(ctx: Context, request: Request, experiment: Experiment, root: Path) -> Split:
    """Opens the scenes that a run is scored on: those asked for on the command line, else `workload.scenes.test`, as
    the eval seed draws them.

    A user's scenes and pictures are looked at here, before the long stages: each must be readable and have a pair.
    Raises PqkError in one sentence for what a user must change.
    """
    workload, seed = experiment.workload, experiment.workload.seeds.eval
    if request.scenes and request.images:
        raise PqkError("--scenes and --images exclude each other: scenes with ground truth, or pictures without")
    if request.images:
        found = Split(draw(stages.folder_scenes(request.images, pictures=True), seed)[0], None, False)
    elif request.scenes:
        scenes, _ = draw(stages.folder_scenes(request.scenes), seed)
        for folder in scenes.folders:
            refuse_partial_truth(folder)
        found = Split(scenes, None, _truthful(scenes))
    else:
        scenes, _ = seed_scenes(ctx, workload, root, seed)
        return Split(scenes, workload.scenes.test.views, _truthful(scenes))
    for folder in found.scenes.folders:
        frames = load_frames(open_scene(folder), workload.input.height, workload.input.width)
        scene_pairs(frames, workload.pair_graph, workload.min_covisibility, found.truthful)
    return found


def more_test_scenes(ctx: Context, workload: Workload, root: Path, first: int, count: int) -> Split:
    """Generates test scenes number `first` to `first + count - 1`, which go on where those of the workload end."""
    asked = workload.scenes.test
    more = seeded_list(asked, workload.seeds.eval).model_copy(update={"count": count})
    return Split(stages.listed_scenes(ctx, "test", more, workload, root, first), asked.views, True)


def check_apart(
    request: Request, workload: Workload, validation: Split, test: Split, calibration: Scenes | None
) -> None:
    """Raise PqkError when two splits share a scene or a picture of the user; seeds keep generated ones apart."""
    scenes = workload.scenes
    own: dict[str, Scenes] = {}
    if scenes.validation.source != SYNTHETIC:
        own["validation"] = validation.scenes
    if request.scenes or request.images or scenes.test.source != SYNTHETIC:
        own["test"] = test.scenes
    if calibration is not None and workload.calibration.source != SYNTHETIC:
        own["calibration"] = calibration
    refuse_overlap({name: [open_scene(folder) for folder in found.folders] for name, found in own.items()})


def can_grow(request: Request, workload: Workload) -> bool:
    """Whether more test scenes can be made: generated ones can, those of a folder are all there are."""
    return not (request.scenes or request.images) and workload.scenes.test.source == SYNTHETIC


def _truthful(scenes: Scenes) -> bool:
    truths = {path: open_scene(path).has_ground_truth for path in scenes.folders}
    if any(truths.values()) and not all(truths.values()):
        without = next(path for path, has in truths.items() if not has)
        raise PqkError(f"{without}: this scene has no ground truth while others have; evaluate them apart")
    return all(truths.values())


def refuse_partial_truth(folder: Path) -> None:
    """Raise PqkError for a scene of which some views have depth and others have not."""
    scene = open_scene(folder)
    lacking = [view.name for view in scene.views if view.depth_path is None]
    if 0 < len(lacking) < len(scene.views):
        raise PqkError(
            f"{folder}: view {lacking[0]!r} has no depth ({len(lacking)} of the {len(scene.views)} views have none); "
            "add it, or take these views or all depth out of the scene"
        )
