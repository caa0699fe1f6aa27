"""What a run is fed: scenes as frames of the workload's shape, their pairs, and the calibration set."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np

from pqk.data.covisibility import covisibility
from pqk.data.pairs import image_similarity, pair_graph
from pqk.data.preprocess import Frame, fit_to_shape
from pqk.data.scene import Scene, View, open_scenes
from pqk.errors import PqkError
from pqk.spec.workload import PairGraph


def load_frames(scene: Scene, height: int, width: int, views: int | None = None, seed: int = 0) -> list[Frame]:
    """The scene's first `views` images (default: all), resized and cropped to the shape. Raises PqkError.

    Eval seed 0 crops the centre of every image; any other draws, per scene and image, where the crop lies.
    """
    chosen = scene.views[:views] if views else scene.views
    if len(chosen) < 2:
        raise PqkError(f"{scene.root}: a scene needs at least 2 images, found {len(chosen)}")
    jitter = np.random.default_rng((seed, zlib.crc32(scene.name.encode()))) if seed else None
    return [fit_to_shape(view, height, width, scene.name, jitter) for view in chosen]


def scene_pairs(
    frames: list[Frame], graph: PairGraph, min_covisibility: float, ground_truth: bool
) -> list[tuple[int, int]]:
    """Ordered pairs of the scene. With ground truth, pairs that share too little of their view are left out.

    Raises PqkError when no pair is left, and for a view with ground truth that has no valid depth pixel at all.
    """
    similarity = image_similarity([f.image for f in frames]) if graph.kind == "topk" else None
    pairs = pair_graph(len(frames), graph.kind, graph.k, graph.symmetrize, similarity)
    if not ground_truth:
        return pairs
    for frame in frames:
        if frame.depth is not None and not (frame.depth > 0).any():
            raise PqkError(
                f"scene {frame.scene}: the depth map of {frame.name} has no valid pixel (0 = no measurement)"
            )
    overlapping = [(i, j) for i, j in pairs if _overlap(frames[i], frames[j]) >= min_covisibility]
    if not overlapping:
        raise PqkError(f"scene {frames[0].scene}: no pair shares {min_covisibility:.0%} of its view (min_covisibility)")
    return overlapping


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
    """The calibration images, one (1,3,H,W) float32 array at a time; iterating again starts anew.

    Images are taken scene by scene, so that images 2k and 2k+1 of the list are neighbours in a scene.
    Raises PqkError when there are none, or fewer than asked.
    """

    def __init__(self, folder: Path, wanted: int, height: int, width: int) -> None:
        self.views: list[View] = []
        for scene in open_scenes(folder):
            even = len(scene.views) - len(scene.views) % 2  # a pair must not straddle two scenes
            self.views.extend(scene.views[:even])
        if not self.views:
            raise PqkError(f"{folder}: empty calibration set")
        if len(self.views) < wanted:
            raise PqkError(
                f"{folder}: the calibration set has {len(self.views)} images (in pairs), {wanted} were asked for "
                "(quant.ptq.calibration_images)"
            )
        self.views = self.views[:wanted]
        self.shape = (height, width)

    def __len__(self) -> int:
        return len(self.views)

    def every_fourth_pair(self) -> CalibrationImages:
        """The images of pairs 0, 4, 8, ...; of a set with fewer than four pairs, its first pair."""
        chosen = copy(self)
        chosen.views = [view for k, view in enumerate(self.views) if k % 8 < 2]
        chosen.views = chosen.views[: len(chosen.views) - len(chosen.views) % 2]
        return chosen

    def __iter__(self) -> Iterator[np.ndarray]:
        for view in self.views:
            # with its camera, so that it is undistorted and oriented as the pictures of an evaluation are
            yield fit_to_shape(replace(view, depth_path=None, mask_path=None), *self.shape).image[None]
