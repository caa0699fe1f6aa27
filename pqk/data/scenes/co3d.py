"""Reads CO3Dv2 in its official layout (https://github.com/facebookresearch/co3d): one scene per sequence.

    <root>/<category>/frame_annotations.jgz, sequence_annotations.jgz, set_lists/set_lists_<subset>.json
    <root>/<category>/<sequence>/images/frame000001.jpg
    <root>/<category>/<sequence>/depths/frame000001.jpg.geometric.png     float16 numbers in 16-bit grey
    <root>/<category>/<sequence>/depth_masks/frame000001.png              anything but 0: the depth counts
    <root>/<category>/<sequence>/masks/frame000001.png                    probability of the object, 255 = 1

A view's mask is the depth mask; the probability of the object is its foreground. Unit: each sequence has its own, so
lengths are not metres and cannot be compared across sequences. Part of the images is enough: views whose image is not
there are left out and counted in a note.

`draw` chooses the frames that the protocol of relative poses evaluates.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pqk.data.scenes.co3d_annotations import FRAMES, LISTS, Category, Frame, open_category
from pqk.data.scenes.folder import existing, refuse_dead_links
from pqk.data.scenes.names import natural
from pqk.data.scenes.ply import read_points
from pqk.data.scenes.scene import NoPictures, Scene, View
from pqk.errors import PqkError

LAYOUT = ("images", "depths", "depth_masks", "masks")  # what a sequence consists of
SEEN = (
    "apple", "backpack", "banana", "baseballbat", "baseballglove", "bench", "bicycle", "bottle", "bowl", "broccoli",
    "cake", "car", "carrot", "cellphone", "chair", "cup", "donut", "hairdryer", "handbag", "hydrant", "keyboard",
    "laptop", "microwave", "motorcycle", "mouse", "orange", "parkingmeter", "pizza", "plant", "stopsign", "teddybear",
    "toaster", "toilet", "toybus", "toyplane", "toytrain", "toytruck", "tv", "umbrella", "vase", "wineglass",
)  # fmt: skip
"""The 41 categories of the usual evaluation of relative poses (Wang et al., CVPR 2025), in its order."""
UNSEEN = ("ball", "book", "couch", "frisbee", "hotdog", "kite", "remote", "sandwich", "skateboard", "suitcase")
"""The other categories of the data set, which Pi3 evaluates too."""
PROTOCOL = "fewview_dev"  # the set list of the protocol; its list `test` counts
QUALITY = 0.5  # viewpoint_quality_score must be above it
FARTHEST = 1e5  # a sequence is left out when the three numbers of a frame's T add up to more
USED = "used"


# Scenes


def is_category(folder: Path) -> bool:
    """Returns whether a folder is that of a category: frame_annotations.jgz is in it."""
    return (folder / FRAMES).is_file()


def read(root: Path) -> Scene | None:
    """Returns the scene of a sequence's folder; None when `root` is not the folder of an annotated sequence.

    Views: the frames of the first set list of SUBSETS, of its first list of LISTS that has any of the sequence, in its
    order; all annotated frames by number where no list has any. Raises PqkError for malformed annotations, and
    NoPictures when the images of none are there.
    """
    if not is_category(root.parent):
        return None
    category = open_category(root.parent)
    return _sequence(category, root.name) if root.name in category.annotated else None


def read_category(folder: Path) -> tuple[list[Scene], str]:
    """Returns the sequences of a category that are evaluated, in natural order, and a note on those without images.

    These are the sequences of the list `test`, or all annotated ones in a category without a set list. The note is ''
    when every sequence has images. Raises PqkError for malformed annotations, and NoPictures when no image of any
    sequence is there.
    """
    category = open_category(folder)
    names = category.annotated if category.subset is None else category.set_list(category.subset).get(LISTS[0], {})
    scenes, absent = [], []
    for name in sorted(names, key=natural):
        try:
            scenes.append(_sequence(category, name))
        except NoPictures:
            absent.append(name)
    if not scenes:
        raise NoPictures(
            f"{folder}: no image of its {len(absent)} sequences is there{f', such as {absent[0]}' * bool(absent)}"
        )
    if absent:
        return (
            scenes,
            f"{folder}: {len(absent)} of {len(names)} sequences have no image here, such as {absent[0]}; skipped",
        )
    return scenes, ""


def point_cloud(folder: Path, sequence: str) -> np.ndarray | None:
    """Returns the points (N,3) float32 of a sequence of a category's folder, in its unit and world; None without any.

    Raises PqkError for a damaged or missing file, and for an unknown sequence.
    """
    info = open_category(folder).sequences().get(sequence)
    if info is None:
        raise PqkError(f"{folder / sequence}: sequence_annotations.jgz has no such sequence")
    return None if info.point_cloud is None else read_points(folder.parent / info.point_cloud)


def _sequence(category: Category, name: str) -> Scene:
    """Returns the scene of a sequence, without the views whose image is not there."""
    folder, subset = category.folder / name, category.subset
    choices = () if subset is None else LISTS
    found = next((frames for listed in choices if (frames := category.frames(name, subset, listed))), None)
    frames = category.frames(name, None, "") if found is None else found
    if folder.is_dir():
        refuse_dead_links(folder, LAYOUT)
    views = _views(category, list({frame.number: frame for frame in frames}.values()))
    there = tuple(view for view in views if view.image_path.is_file())
    if not there:
        raise NoPictures(
            f"{folder}: none of the {len(views)} images of this sequence is there, such as {views[0].name}"
        )
    files = [category.frames_file] + ([category.set_list_file(str(subset))] if found else [])
    known = any(view.K is not None for view in there)
    notes = tuple(_notes(folder, views, there))
    return Scene(f"{category.name}/{name}", folder, there, notes, tuple(files) if known else ())


def _notes(folder: Path, views: Sequence[View], there: Sequence[View]) -> Iterator[str]:
    if len(there) < len(views):
        yield f"{folder}: {len(there)} of {len(views)} frames have an image here, the others are left out"
    without = [view.name for view in there if view.K is None]
    if without:
        yield f"{folder}: {len(without)} of {len(there)} images lack a camera ({without[0]}, ...)"
    without = [view.name for view in there if view.depth_path is None]
    if 0 < len(without) < len(there):
        yield f"{folder}: {len(without)} of {len(there)} images lack depth ({without[0]}, ...)"


def _views(category: Category, frames: Sequence[Frame]) -> tuple[View, ...]:
    """Returns the views of frames, whether their images are there or not. Nothing is decoded."""

    def there(path: str | None) -> Path | None:
        return None if path is None else existing(category.root / path)

    return tuple(
        View(
            name=frame.image.removeprefix(f"{category.name}/{frame.sequence}/").removeprefix("images/"),
            image_path=category.root / frame.image,
            K=frame.K,
            world_to_cam=frame.world_to_cam,
            depth_path=there(frame.depth),
            mask_path=there(frame.depth_mask),
            size=frame.size,
            depth_factor=frame.depth_factor,
            foreground_path=there(frame.foreground),
        )
        for frame in frames
    )


# The protocol of relative poses


@dataclass(frozen=True, eq=False)
class Drawn:
    """The frames of one sequence that the protocol evaluates, in the order that the network is given them."""

    folder: Path  # of the category
    sequence: str
    ids: tuple[int, ...]  # indices into the sequence's entries of the list `test`
    frames: tuple[Frame, ...]

    def scene(self) -> Scene:
        """Returns these frames as a scene, in their order. Raises PqkError for an image that is not there."""
        category = open_category(self.folder)
        views = _views(category, self.frames)
        for view in views:
            if not view.image_path.is_file():
                raise PqkError(f"{view.image_path}: the protocol evaluates this image, and it is not there")
        files = (category.frames_file, category.set_list_file(PROTOCOL))
        folder = self.folder / self.sequence
        return Scene(f"{category.name}/{self.sequence}", folder, views, tuple(_notes(folder, views, views)), files)


def verdict(folder: Path, sequence: str, least: int = 50) -> str:
    """Returns USED when the protocol evaluates a sequence of a category's folder, else the reason why not, in words.

    A sequence is used when its viewpoint_quality_score is known and above 0.5, when the list `test` of the set list
    fewview_dev has at least `least` frames of it, and when T[0] + T[1] + T[2] is at most 1e5 in each of them, T being
    the translation as the file has it. Raises PqkError for malformed or missing files and for frames without a camera.
    """
    category = open_category(folder)
    if not _is_good(category, sequence):
        return f"quality not above {QUALITY}"
    frames = category.frames(sequence, PROTOCOL, "test")
    if len(frames) < least:
        return f"fewer than {least} test frames"
    for frame in frames:
        if frame.world_to_cam is None:
            raise PqkError(f"{category.frames_file}: {sequence} frame {frame.number} has no viewpoint")
        x, y, z = frame.world_to_cam[:3, 3]
        if z - x - y > FARTHEST:  # x and y change their sign on the way from PyTorch3D to OpenCV
            return "a frame with T0+T1+T2 > 1e5"
    return USED


def draw(
    root: Path,
    categories: Sequence[str] = SEEN,
    seed: int = 0,
    order: str = "sorted",
    count: int = 10,
    least: int = 50,
    sequences: int | None = None,
) -> Iterator[Drawn]:
    """Yields the frames that the protocol evaluates, sequence by sequence, category by category.

    root: the folder of the data set. seed: of one generator for the whole data set, the legacy one of numpy. For each
    sequence that `verdict` calls used, it draws `count` distinct indices below the number of the sequence's entries in
    the list `test`; other sequences draw nothing. order: "sorted", by name as text (Wang et al., seed 0), or
    "annotated", as in sequence_annotations.jgz (Pi3, seed 42). sequences: at most so many of a category (their fast
    evaluation, 10), chosen by `few` among those of good quality in the list, before the other two rules are applied.
    Another order of the frames is another evaluation: keep the drawn one for every variant of a network.
    Raises PqkError for malformed or missing files and arguments that do not fit.
    """
    if order not in ("sorted", "annotated"):
        raise PqkError(f"the order of sequences is 'sorted' or 'annotated', not {order!r}")
    if not 0 < count <= least:
        raise PqkError(f"{count} frames cannot be drawn of sequences with at least {least}")
    generator, chooser = np.random.RandomState(seed), random.Random(seed)
    for name in categories:
        category = open_category(root / name)
        listed = category.set_list(PROTOCOL).get("test", {})
        names = [each for each in category.sequences() if each in listed and _is_good(category, each)]
        if order == "sorted":
            names.sort()
        if sequences is not None:
            names = few(names, sequences, chooser)
        for sequence in names:
            if verdict(category.folder, sequence, least) == USED:
                frames = category.frames(sequence, PROTOCOL, "test")
                ids = tuple(int(k) for k in generator.choice(len(frames), count, replace=False))
                yield Drawn(category.folder, sequence, ids, tuple(frames[k] for k in ids))


def few(names: Sequence[str], count: int, chooser: random.Random) -> list[str]:
    """Returns `count` of the names as Python's `random.sample` draws them, sorted; all in their order if fewer."""
    return sorted(chooser.sample(list(names), count)) if len(names) >= count else list(names)


def _is_good(category: Category, sequence: str) -> bool:
    info = category.sequences().get(sequence)
    return info is not None and info.quality is not None and info.quality > QUALITY
