"""What a run is fed: scenes as frames of the workload's shape, their pairs, and the calibration set."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pqk.data.scenes.covisibility import covisibility
from pqk.data.scenes.kept import Kept
from pqk.data.scenes.open import open_scene
from pqk.data.scenes.pairs import image_similarity, pair_graph
from pqk.data.scenes.preprocess import Frame, fit_to_shape
from pqk.data.scenes.scene import Scene, View, unreadable
from pqk.errors import PqkError
from pqk.families.contract import SampleSet
from pqk.families.dust3r.settings import PairGraph

_FRAMES = 256 * 2**20  # bytes of loaded pictures and depth that a scene keeps: 60 frames of 512x512 pixels


class Frames(Kept[Frame]):
    """The views of a scene as frames of one shape, loaded when they are asked for. `names` needs no loading."""

    def __init__(self, scene: Scene, views: Sequence[View], height: int, width: int, seed: int) -> None:
        self.scene, self.names = scene.name, [view.name for view in views]

        def load(index: int) -> Frame:
            return fit_to_shape(views[index], height, width, scene.name, _jitter(views[index], seed))

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


def load_frames(scene: Scene, height: int, width: int, views: int | None = None, seed: int = 0) -> Frames:
    """The scene's first `views` images (default: all), resized and cropped to the shape as they are asked for.

    Eval seed 0 crops the centre of every image; any other draws, per image, where the crop lies. Raises PqkError when
    there are fewer than two, and a frame, when it is asked for, for what its files raise.
    """
    chosen = scene.views[:views] if views else scene.views
    if len(chosen) < 2:
        raise PqkError(f"{scene.root}: a scene needs at least 2 images, found {len(chosen)}")
    return Frames(scene, chosen, height, width, seed)


def scene_pairs(
    frames: Sequence[Frame], graph: PairGraph, min_covisibility: float, ground_truth: bool
) -> list[tuple[int, int]]:
    """Ordered pairs of the scene. With ground truth, pairs that share too little of their view are left out.

    Every frame is loaded once here, so that a picture that cannot be used is refused before anything is computed.
    Raises PqkError for such a picture, when no pair is left, and for a view with ground truth that has no valid depth
    pixel at all.
    """
    topk = graph.kind == "topk"
    looked_at = (_looked_at(frame, ground_truth) for frame in frames)
    similarity = image_similarity(frame.image for frame in looked_at) if topk else None
    count = len(frames) if topk else sum(1 for _ in looked_at)
    pairs = pair_graph(count, graph.kind, graph.k, graph.symmetrize, similarity)
    if not ground_truth:
        return pairs
    overlapping = [(i, j) for i, j in pairs if _overlap(frames[i], frames[j]) >= min_covisibility]
    if not overlapping:
        raise PqkError(f"scene {frames[0].scene}: no pair shares {min_covisibility:.0%} of its view (min_covisibility)")
    return overlapping


def _looked_at(frame: Frame, ground_truth: bool) -> Frame:
    """The frame. Raises PqkError where its ground truth has no valid pixel."""
    if ground_truth and frame.depth is not None and not (frame.depth > 0).any():
        raise PqkError(f"scene {frame.scene}: the depth map of {frame.name} has no valid pixel (0 = no measurement)")
    return frame


def _overlap(a: Frame, b: Frame) -> float:
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

    folders: of the scenes. Images are taken scene by scene, so that images 2k and 2k+1 of the list are neighbours in a
    scene. Raises PqkError when there are none, or fewer than asked.
    """

    def __init__(self, folders: Sequence[Path], wanted: int, height: int, width: int) -> None:
        self.views: list[View] = []
        for scene in map(open_scene, folders):
            even = len(scene.views) - len(scene.views) % 2  # a pair must not straddle two scenes
            self.views.extend(scene.views[:even])
        source = ", ".join(map(str, folders[:3])) + (", ..." if len(folders) > 3 else "")
        if not self.views:
            raise PqkError(f"{source}: empty calibration set")
        if len(self.views) < wanted:
            raise PqkError(
                f"{source}: the calibration set has {len(self.views)} images (in pairs), {wanted} were asked for "
                "(quant.ptq.calibration_images)"
            )
        self.views = self.views[:wanted]
        self.shape = (height, width)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> Frame:
        # with its camera, so that it is undistorted and oriented as the pictures of an evaluation are
        return fit_to_shape(replace(self.views[index], depth_path=None, mask_path=None), *self.shape)


def learning_split(found: SampleSet) -> tuple[list[Scene], list[Scene]]:
    """Returns the scenes that are learned from and those held out, on which a training is judged.

    Of scenes in the natural order of their names every tenth is held out, of fewer than ten the last one. Of
    photographs in a single folder, in the order of their names, the last tenth is, at least two: neighbours mostly show
    the same, so that every tenth would not be apart. Raises PqkError where there is too little for both.
    """
    scenes = [open_scene(Path(folder)) for folder in found.where["folders"]]
    views = found.how["views"]
    scenes = [replace(scene, views=scene.views[:views]) for scene in scenes] if views else scenes
    for scene in scenes:
        if len(scene.views) < 2:
            raise PqkError(f"{scene.root}: a scene to train on needs at least 2 images, found {len(scene.views)}")
    if len(scenes) == 1 and not found.truthful:
        scene = scenes[0]
        last = len(scene.views) - max(2, len(scene.views) // 10)
        if last < 2:
            raise PqkError(
                f"{scene.root}: training needs at least 4 photographs, 2 of them to judge it, found {len(scene.views)}"
            )
        return [replace(scene, views=scene.views[:last])], [replace(scene, views=scene.views[last:])]
    if len(scenes) < 2:
        raise PqkError(f"{scenes[0].root}: training needs at least 2 scenes, one of them to judge it, found 1")
    held = set(range(9, len(scenes), 10)) or {len(scenes) - 1}
    learned = [scene for k, scene in enumerate(scenes) if k not in held]
    return learned, [scene for k, scene in enumerate(scenes) if k in held]
