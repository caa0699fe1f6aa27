"""Loads scenes as frames of a workload's shape, takes calibration images from scenes, splits what is learned from."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pqk.data.scenes.covisibility import covisibility
from pqk.data.scenes.kept import Kept
from pqk.data.scenes.open import open_scene
from pqk.data.scenes.preprocess import PATCH, Frame, fit_to_shape
from pqk.data.scenes.scene import Scene, View, unreadable
from pqk.errors import PqkError
from pqk.families.contract import SampleSet

_FRAMES = 256 * 2**20  # bytes of loaded pictures and depth that a scene keeps: 60 frames of 512x512 pixels


class Frames(Kept[Frame]):
    """The views of a scene as frames of one shape, loaded when they are asked for. `names` needs no loading."""

    def __init__(
        self, scene: Scene, views: Sequence[View], height: int, width: int, seed: int, patch: int = PATCH
    ) -> None:
        self.scene, self.names = scene.name, [view.name for view in views]

        def load(index: int) -> Frame:
            return fit_to_shape(views[index], height, width, scene.name, _jitter(views[index], seed), patch)

        super().__init__(len(views), load, _bytes_of, _FRAMES)


def _bytes_of(frame: Frame) -> int:
    return frame.image.nbytes + (0 if frame.depth is None else frame.depth.nbytes)


def _jitter(view: View, seed: int) -> np.random.Generator | None:
    """What draws a picture's crop: seeded by the picture's bytes, so that no name and no order moves it."""
    if not seed:
        return None
    try:
        return np.random.default_rng((seed, zlib.crc32(view.image_path.read_bytes())))
    except OSError as error:
        raise unreadable(error, view.image_path) from error


def load_frames(
    scene: Scene,
    height: int,
    width: int,
    views: int | None = None,
    seed: int = 0,
    patch: int = PATCH,
    least: int = 2,
) -> Frames:
    """Returns the scene's first `views` images (default: all), resized and cropped to the shape as they are asked for.

    Eval seed 0 crops the centre of every image; any other draws, per image, where the crop lies. patch: both sides are
    multiples of it. Raises PqkError when there are fewer than `least`, and a frame, when it is asked for, for what its
    files raise.
    """
    chosen = scene.views[:views] if views else scene.views
    if len(chosen) < least:
        all_taken = len(chosen) == len(scene.views)
        found = f"found {len(chosen)}" if all_taken else f"{len(chosen)} of its {len(scene.views)} asked for"
        raise PqkError(f"{scene.root}: a scene needs at least {least} images, {found}")
    return Frames(scene, chosen, height, width, seed, patch)


def first_frames(found: SampleSet, most: int, load: Callable[[Scene], Sequence[Frame]]) -> list[Frame]:
    """Returns the first `most` frames of the scenes of a set, one scene after the other; fewer where there are fewer.

    load: the frames of a scene. Names get the place of their scene in front, as two scenes may share a name.
    """
    frames: list[Frame] = []
    for number, folder in enumerate(folders(found)):
        loaded = load(open_scene(folder))
        fresh = (loaded[k] for k in range(min(len(loaded), most - len(frames))))
        frames += [replace(frame, name=f"{number} {frame.name}") for frame in fresh]
        if len(frames) == most:
            break
    return frames


def check_enough(frames: Sequence[Frame], asked: int | None) -> None:
    """Raises PqkError where the scenes of a set have fewer images than were asked for."""
    if asked is not None and len(frames) < asked:
        raise PqkError(
            f"all scenes of this list together have {len(frames)} images, {asked} were asked for: raise its count or "
            "views (workload.scenes)"
        )


def folders(found: SampleSet) -> list[Path]:
    """Returns the scene folders of a set, in the order of its groups."""
    return [Path(folder) for folder in found.where["folders"]]


def looked_at(frame: Frame, ground_truth: bool) -> Frame:
    """Returns the frame. Raises PqkError where its ground truth has no valid pixel."""
    if ground_truth and frame.depth is not None and not (frame.depth > 0).any():
        raise PqkError(f"scene {frame.scene}: the depth map of {frame.name} has no valid pixel (0 = no measurement)")
    return frame


def overlap(a: Frame, b: Frame) -> float:
    """Returns the share, 0..1, of a's pixels whose points b sees; see `covisibility`. Not symmetric.

    Raises PqkError for a frame without camera or depth.
    """
    if (
        a.depth is None
        or b.depth is None
        or a.K is None
        or b.K is None
        or a.world_to_cam is None
        or b.world_to_cam is None
    ):
        raise PqkError(f"scene {a.scene}: {a.name} or {b.name} has no camera or depth")
    return covisibility(a.depth, a.K, a.world_to_cam, b.depth, b.K, b.world_to_cam, stride=8)


class CalibrationImages:
    """The calibration images as frames, each decoded when it is asked for.

    folders: of the scenes. together: how many images are fed at once. Images are taken scene by scene, a multiple of
    `together` from each, so that the images k * together to k * together + together - 1 of the list are neighbours in
    a scene. Raises PqkError when there are none, or fewer than `wanted`.
    """

    def __init__(
        self, folders: Sequence[Path], wanted: int, height: int, width: int, together: int = 2, patch: int = PATCH
    ) -> None:
        self.views: list[View] = []
        for scene in map(open_scene, folders):
            whole = len(scene.views) - len(scene.views) % together  # a set must not straddle two scenes
            self.views.extend(scene.views[:whole])
        source = ", ".join(map(str, folders[:3])) + (", ..." if len(folders) > 3 else "")
        if not self.views:
            raise PqkError(f"{source}: empty calibration set")
        if len(self.views) < wanted:
            sets = {1: "", 2: " (in pairs)"}.get(together, f" (in sets of {together})")
            raise PqkError(
                f"{source}: the calibration set has {len(self.views)} images{sets}, {wanted} were asked for "
                "(quant.ptq.calibration_images)"
            )
        self.views = self.views[:wanted]
        self.shape, self.patch = (height, width), patch

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> Frame:
        # with its camera, so that it is undistorted and oriented as the pictures of an evaluation are
        return fit_to_shape(replace(self.views[index], depth_path=None, mask_path=None), *self.shape, patch=self.patch)


def learning_split(found: SampleSet, together: int = 2) -> tuple[list[Scene], list[Scene]]:
    """Returns the scenes that are learned from and those held out, on which a training is judged.

    Of scenes in the natural order of their names every tenth is held out, of fewer than ten the last one. Of
    photographs in a single folder, in the order of their names, the last tenth is, at least `together`, the images of
    one sample: neighbours mostly show the same, so that every tenth would not be apart. Raises PqkError where there is
    too little for both.
    """
    scenes = [open_scene(folder) for folder in folders(found)]
    views = found.how["views"]
    scenes = [replace(scene, views=scene.views[:views]) for scene in scenes] if views else scenes
    for scene in scenes:
        if len(scene.views) < together:
            raise PqkError(
                f"{scene.root}: a scene to train on needs at least {together} images, found {len(scene.views)}"
            )
    if len(scenes) == 1 and not found.truthful:
        scene = scenes[0]
        last = len(scene.views) - max(together, len(scene.views) // 10)
        if last < together:
            raise PqkError(
                f"{scene.root}: training needs at least {2 * together} photographs, {together} of them to judge it, "
                f"found {len(scene.views)}"
            )
        return [replace(scene, views=scene.views[:last])], [replace(scene, views=scene.views[last:])]
    if len(scenes) < 2:
        raise PqkError(f"{scenes[0].root}: training needs at least 2 scenes, one of them to judge it, found 1")
    held = set(range(9, len(scenes), 10)) or {len(scenes) - 1}
    learned = [scene for k, scene in enumerate(scenes) if k not in held]
    return learned, [scene for k, scene in enumerate(scenes) if k in held]
