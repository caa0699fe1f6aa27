"""Opens the detector's samples: images with boxes, generated, in a set of the user's, or photographs without boxes.

An eval seed draws the sampler's noise; the images stay the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pqk.data.detection.coco import read_coco
from pqk.data.detection.generate import ANNOTATIONS, IMAGES, SetPlan, make_set
from pqk.data.detection.sample import DetectionSample, DetectionSet
from pqk.data.detection.sets import open_set
from pqk.data.scenes.folder import image_files
from pqk.data.scenes.names import natural
from pqk.data.scenes.picture import read_picture, upright
from pqk.errors import PqkError
from pqk.families.contract import Given, Maker, Sample, SampleSet
from pqk.families.detection.inputs import fit
from pqk.families.detection.scoring import Truth
from pqk.families.detection.settings import ImageList, TrainList, Workload
from pqk.files import sha256_file, sha256_json
from pqk.settings.workload import SYNTHETIC

SEED_DRAWS: Literal["samples", "noise"] = "noise"
TIMED = 4
"""Images that are timed by default; the sampler does the same work on any."""
NARROWEST = 96
"""Pixels that a generated image is wide at least."""
HELD_OUT = 8
"""One image in so many of a set that is learned from is held out to judge the training."""

_CODE = ("pqk.data.detection.generate",)


def open_split(
    split: str,
    workload: Workload,
    root: Path,
    make: Maker,
    given: Given = Given(),  # noqa: B008 (frozen)
    first: int = 0,
    count: int | None = None,
) -> SampleSet:
    """Returns the images of a split; see `pqk.families.contract.DataPart`.

    A folder that is given as scenes has COCO's form; one that is given as images holds photographs, also in folders
    below. Raises PqkError in one sentence for what a user must change.
    """
    if split == "train":
        return _train(workload, root, given)
    if split == "test" and (given.scenes or given.images):
        found = _given(given.scenes, given.images, ("--scenes", "--images"))
    else:
        asked: ImageList = workload.calibration if split == "calibration" else getattr(workload.sets, split)
        if asked.source == SYNTHETIC:
            many = asked.images or 0 if count is None else count
            found = _generated(split, asked, workload, make, first, many)
        else:
            found = _listed(asked, root)
    if split == "test":
        found = replace(found, drawn=f"{len(found.groups)} images, eval seed {workload.seeds.eval}")
    return found


def _generated(split: str, asked: ImageList, workload: Workload, make: Maker, first: int, count: int) -> SampleSet:
    """Returns `count` generated images from number `first` on, as large as the network's input takes."""
    width = max(NARROWEST, min(workload.input.width, workload.input.height * 4 // 3))
    plan = SetPlan(split, asked.seed, count, width, width * 3 // 4, first)
    inputs = {name: getattr(plan, name) for name in ("split", "seed", "images", "width", "height", "first")}
    folder, sha256 = make(split, inputs, _CODE, lambda path: make_set(path, plan))
    where = {"folder": str(folder / plan.name)}
    how = {"images": None, "first": first}
    return SampleSet(where, how, _names(opened(where).samples), sha256, truthful=split != "calibration")


def _listed(asked: ImageList | TrainList, root: Path) -> SampleSet:
    """Returns the images of a folder of COCO's form, or of a set that a YAML file names."""
    path = _under(root, asked.source)
    if path.suffix in (".yaml", ".yml"):
        if asked.set is None:
            raise PqkError(f"{path}: names sets; say which one with `set`")
        where = {"file": str(path), "set": asked.set}
    elif asked.set is not None:
        raise PqkError(f"{path}: `set` is for a YAML file that names sets, and this is a folder")
    else:
        where = {"folder": str(path)}
    return _set(where, {"images": asked.images}, truthful=True)


def _given(scenes: Path | None, images: Path | None, options: tuple[str, str]) -> SampleSet:
    if scenes and images:
        raise PqkError(f"{options[0]} and {options[1]} exclude each other: images with boxes, or pictures without")
    where = {"folder": str(scenes.absolute())} if scenes else {"pictures": str(images.absolute() if images else "")}
    return _set(where, {"images": None}, truthful=scenes is not None)


def _set(where: Mapping[str, Any], how: Mapping[str, Any], truthful: bool) -> SampleSet:
    """Returns a set of the user's, hashed by its pictures and, where it counts, what is annotated in them."""
    found, samples = opened(where), _chosen(where, how)
    content = [sha256_file(sample.image_path) for sample in samples]
    told = [_annotated(sample) for sample in samples] if truthful else []
    sha256 = sha256_json({"pictures": content, "objects": told, "classes": list(found.classes)})
    return SampleSet(where, how, _names(samples), sha256, truthful, own=True)


def _annotated(sample: DetectionSample) -> list[Any]:
    arrays = (sample.boxes, sample.labels, sample.areas, sample.crowd, sample.ignored)
    return [str(sample.id), *(array.tolist() for array in arrays)]


def _names(samples: Sequence[DetectionSample]) -> tuple[str, ...]:
    """Returns the names of images: of their files, with the folders that tell them apart where two have one name."""
    paths = [sample.image_path for sample in samples]
    short = [path.stem for path in paths]
    if len(set(short)) == len(short):
        return tuple(short)
    above = os.path.commonpath([path.parent for path in paths])
    return tuple(path.relative_to(above).as_posix() for path in paths)


def _train(workload: Workload, root: Path, given: Given) -> SampleSet:
    """What is learned from: nothing that exists yet, or a set, some of whose images are held out."""
    if given.train_scenes or given.train_images:
        found = _given(given.train_scenes, given.train_images, ("--train-scenes", "--train-images"))
    else:
        asked = workload.sets.train
        if asked.source == SYNTHETIC:
            return SampleSet({}, {"images": None}, (), sha256_json(SYNTHETIC), True)
        if asked.pictures:
            where = {"pictures": str(_under(root, asked.source))}
            found = _set(where, {"images": asked.images}, truthful=False)
        else:
            found = _listed(asked, root)
    learned, held = learning_split(found)
    what = "images with boxes" if found.truthful else "photographs"
    drawn = f"{len(learned)} {what}, judged on {len(held)} other{'s' if len(held) > 1 else ''}"
    return replace(found, own=True, drawn=drawn)


def learning_split(found: SampleSet) -> tuple[list[DetectionSample], list[DetectionSample]]:
    """Returns the images to learn from, and those to be judged on, one in `HELD_OUT`, evenly spread.

    Raises PqkError for fewer than two.
    """
    samples = images_of(found)
    if len(samples) < 2:
        raise PqkError(f"{_place(found.where)}: a training needs at least 2 images, one of them to be judged on")
    count = max(1, len(samples) // HELD_OUT)
    held = {k * len(samples) // count for k in range(count)}
    return [s for k, s in enumerate(samples) if k not in held], [s for k, s in enumerate(samples) if k in held]


def opened(where: Mapping[str, Any]) -> DetectionSet:
    """Returns the set that lies there, read once. Raises PqkError as its reader does."""
    return _opened(tuple(sorted(where.items())))


@lru_cache(maxsize=8)
def _opened(where: tuple[tuple[str, str], ...]) -> DetectionSet:
    place = dict(where)
    if "file" in place:
        return open_set(place["set"], Path(place["file"]))
    if "pictures" in place:
        return _photographs(Path(place["pictures"]))
    folder = Path(place["folder"])
    if not (folder / ANNOTATIONS).is_file():
        raise PqkError(
            f"{folder}: has no {ANNOTATIONS} beside a folder {IMAGES}; --images takes pictures without boxes"
        )
    return read_coco(folder / ANNOTATIONS, folder / IMAGES)


def _photographs(folder: Path) -> DetectionSet:
    """Returns the pictures in a folder and in those below it, without objects."""
    if not folder.is_dir():
        raise PqkError(f"{folder}: is no folder with pictures")
    samples = []
    nothing = np.zeros(0)
    for number, path in enumerate(_pictures(folder)):
        try:
            width, height = upright(*read_picture(path)).size
        except ValueError as error:
            raise PqkError(str(error)) from None
        boxes = np.zeros((0, 4), np.float32)
        flags = nothing.astype(bool)
        samples.append(
            DetectionSample(number, path, width, height, boxes, nothing.astype(np.int64), nothing, flags, flags)
        )
    if not samples:
        raise PqkError(f"{folder}: holds no picture that can be read")
    return DetectionSet(folder.name, (), (), tuple(samples))


def _pictures(folder: Path) -> Iterator[Path]:
    """Yields the picture files in a folder, then those of each folder below, in natural order; no link is followed."""
    yield from image_files(folder)
    below = (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    for path in sorted(below, key=lambda path: natural(path.name)):
        if not path.name.startswith("."):
            yield from _pictures(path)


def _place(where: Mapping[str, Any]) -> str:
    return str(where.get("folder") or where.get("pictures") or f"{where.get('file')}, set {where.get('set')}")


def _chosen(where: Mapping[str, Any], how: Mapping[str, Any]) -> tuple[DetectionSample, ...]:
    found = opened(where).samples[: how["images"]]
    if not found:
        raise PqkError(f"{_place(where)}: holds no image")
    return found


def images_of(found: SampleSet) -> tuple[DetectionSample, ...]:
    """Returns the images of a set, in their order."""
    return _chosen(found.where, found.how)


def classes_of(found: SampleSet) -> tuple[str, ...]:
    """Returns the names of the classes of a set; () for photographs."""
    return opened(found.where).classes


def samples(found: SampleSet, workload: Workload, seed: int) -> Iterator[Sample]:
    """Yields an image after the other. Raises PqkError for a picture that cannot be read."""
    for number in range(len(images_of(found))):
        yield _sample(found, workload, number, number)


def _sample(found: SampleSet, workload: Workload, number: int, group: int) -> Sample:
    one, height, width = images_of(found)[number], workload.input.height, workload.input.width
    truth = Truth(one, classes_of(found)) if found.truthful else None
    number += found.how.get("first", 0)  # what is made later of a set has the noise that it has in a longer one
    return Sample(group, one.image_path.name, fit(one.load_image(), height, width, number), truth)


def most(found: SampleSet, workload: Workload) -> int:
    """Returns how many images there are."""
    return len(images_of(found))


class CalibrationImages:
    """Calibration images. images: how many there are."""

    def __init__(self, found: SampleSet, workload: Workload, images: int) -> None:
        self._found, self._workload, self.images = found, workload, images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Sample:
        return _sample(self._found, self._workload, range(len(self))[index], 0)


def calibration(found: SampleSet, workload: Workload, images: int) -> CalibrationImages:
    """Returns the first `images` calibration images. Raises PqkError where there are fewer."""
    there = len(images_of(found))
    if there < images:
        raise PqkError(f"{_place(found.where)}: {images} calibration images are asked for, and there are {there}")
    return CalibrationImages(found, workload, images)


def timed(found: SampleSet, workload: Workload, images: int | None = None) -> list[Sample]:
    """Returns the first images of the set as one group. Raises PqkError where there are fewer than asked."""
    there = len(images_of(found))
    if images is not None and there < images:
        raise PqkError(f"{images} images are asked for, and there are {there}")
    return [_sample(found, workload, number, 0) for number in range(min(there, images or TIMED))]


def example(workload: Workload) -> Sample:
    """Returns a picture of random colours, always the same one."""
    shape = (workload.input.height, workload.input.width, 3)
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Sample(0, "image 0", fit(picture, workload.input.height, workload.input.width, 0))


def can_grow(workload: Workload, given: Given) -> bool:
    """Whether more test images can be made: generated ones can, those of a set are all there are."""
    return not (given.scenes or given.images) and workload.sets.test.source == SYNTHETIC


def refuse_overlap(sets: Mapping[str, SampleSet]) -> None:
    """Raises PqkError when two of the user's splits share a picture, by its content."""
    seen: dict[str, tuple[str, Path]] = {}
    for split, found in sets.items():
        for sample in images_of(found):
            before = seen.setdefault(sha256_file(sample.image_path), (split, sample.image_path))
            if before[0] != split:
                raise PqkError(
                    f"{sample.image_path}: this picture is in the {split} set and, as {before[1]}, in the {before[0]} "
                    "set; splits share no image"
                )


def digest(split: str, workload: Workload, sha256: Callable[[], str]) -> str:
    """Returns a sha256 of what a split is fed, seeds aside. test: input shape, and the images."""
    if split == "calibration":
        asked = workload.calibration
        return sha256_json(asked.model_dump(mode="json")) if asked.source == SYNTHETIC else sha256()
    test = workload.sets.test
    images: dict[str, Any] = test.model_dump(mode="json")
    if test.source != SYNTHETIC:
        images = {"sha256": sha256()}
    return sha256_json({"shape": [workload.input.height, workload.input.width], "images": images})


def _under(root: Path, source: str) -> Path:
    path = Path(source).expanduser()
    return path if path.is_absolute() else root / path
