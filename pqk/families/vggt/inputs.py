"""Chooses the frames of a scene that are fed together, and brings their pictures to the range that VGGT takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pqk.data.scenes.preprocess import Frame
from pqk.data.scenes.scene import Scene
from pqk.errors import PqkError
from pqk.families.scenes.frames import Frames, load_frames, looked_at, overlap
from pqk.families.vggt.settings import PATCH, FrameSets, Workload

Window = tuple[int, ...]
"""Places of the frames that are fed together, in the order of the scene."""


def load(scene: Scene, workload: Workload, views: int | None = None, seed: int = 0, least: int | None = None) -> Frames:
    """Returns the scene's first `views` images (default: all) as frames of the workload's shape, in [-1, 1].

    seed: see `load_frames`. Raises PqkError for fewer than `least` images (default: those of one set).
    """
    height, width = workload.input.height, workload.input.width
    return load_frames(scene, height, width, views, seed, PATCH, workload.together if least is None else least)


def for_network(frame: Frame) -> Frame:
    """Returns the frame with its picture in [0, 1], which the network takes, in place of [-1, 1]."""
    return replace(frame, image=(frame.image + 1) / 2)


def count_windows(frames: int, together: int, sets: FrameSets) -> int:
    """Returns how many windows a scene has at most; too little overlap may leave fewer."""
    found = len(range(0, frames - together + 1, sets.step))
    return found if sets.most is None else min(found, sets.most)


def windows(
    frames: Sequence[Frame], together: int, sets: FrameSets, min_covisibility: float, check_overlap: bool
) -> list[Window]:
    """Returns windows of `together` neighbouring frames: one starts every `sets.step` frames.

    check_overlap: left out are windows with a frame that shares less than `min_covisibility`, 0..1, of its view with
    the frame before it, or that frame with it. Of what is left at most `sets.most` windows are taken, evenly spread.
    Every frame is loaded once here, so that a picture that cannot be used is refused before anything is computed.
    Raises PqkError for such a picture, when no window is left, and, with check_overlap, for a frame without camera or
    depth and for one without a valid depth pixel.
    """
    shared: list[float] = []
    before: Frame | None = None
    for frame in frames:
        looked_at(frame, check_overlap)
        if check_overlap and together > 1 and before is not None:
            shared.append(min(overlap(before, frame), overlap(frame, before)))
        before = frame
    found = [tuple(range(start, start + together)) for start in range(0, len(frames) - together + 1, sets.step)]
    if check_overlap:
        found = [window for window in found if all(shared[place] >= min_covisibility for place in window[:-1])]
    if not found:
        raise PqkError(
            f"scene {frames[0].scene}: no {together} neighbouring images each share {min_covisibility:.0%} of their "
            "view with the one before (min_covisibility)"
        )
    count = len(found) if sets.most is None else min(len(found), sets.most)
    return [found[place * len(found) // count] for place in range(count)]
