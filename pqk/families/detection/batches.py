"""Makes the batches that the detector learns from: generated images, or those of the user's own set or photographs."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pqk.data.detection.compose import CLASSES
from pqk.data.detection.generate import SetPlan, render_image
from pqk.data.detection.sample import DetectionSample
from pqk.errors import PqkError
from pqk.families.contract import SampleSet
from pqk.families.detection.data import classes_of, learning_split
from pqk.settings.training import Training

POOL = 2048
"""Different generated images of a training; each is changed anew whenever it is drawn."""
HELD_BATCH = 64
"""Held-out images of one batch."""
SMALLEST_CROP = 0.6
"""Share of each side that a crop keeps at least."""
LEAST_SEEN = 0.3
"""Share of a box that a crop must keep; of one that shows less nothing is asked."""


@dataclass(frozen=True, eq=False)
class Pictured:
    """An image (h, w, 3) uint8 with boxes (G, 4) float32 in its pixels, labels (G,) int64, areas (G,) float64.

    counted (G,) bool: objects to learn from and to score; the others are crowds and the like, which count neither way.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    counted: np.ndarray


@dataclass
class Images:
    """B images with their truth: pictures, each of its own size. Boxes are in pixels of the picture.

    seed: of the noise that boxes start from. held: boxes start from noise alone, as in an inference of one step; else
    they are the truth with the noise of a drawn time. truthful: the truth is known. first: number of the first picture
    among those of the seed. least: height and width that they are padded to at least, those of a whole batch for a part
    of it.
    """

    pictures: list[Pictured]
    classes: tuple[str, ...]
    seed: tuple[int, ...]
    device: torch.device
    held: bool = False
    truthful: bool = True
    first: int = 0
    least: tuple[int, int] = (0, 0)

    def images(self) -> list[Tensor]:
        """Returns the images, (3, h, w) float32 with values 0 ... 255."""
        arrays = (np.ascontiguousarray(one.image.transpose(2, 0, 1)) for one in self.pictures)
        return [torch.from_numpy(array).to(self.device, torch.float32) for array in arrays]

    def targets(self) -> list[dict[str, Tensor]]:
        """Returns `labels` (G,) and `boxes` (G, 4) of each image. Raises PqkError where the truth is not known."""
        if not self.truthful:
            raise PqkError("plain photographs have no ground truth to learn from")
        return [
            {
                "labels": torch.from_numpy(one.labels[one.counted]).to(self.device),
                "boxes": torch.from_numpy(one.boxes[one.counted]).to(self.device),
            }
            for one in self.pictures
        ]


class Source(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pictured: ...


class Rendered:
    """Generated images of one split and seed, `count` of them, kept as the JPEG files that a set of them would hold."""

    def __init__(self, split: str, seed: int, count: int, size: int) -> None:
        self._plan = SetPlan(split, seed, count, size, size * 3 // 4)
        self._files = lru_cache(maxsize=None)(lambda index: render_image(self._plan, index))

    def __len__(self) -> int:
        return self._plan.images

    def __getitem__(self, index: int) -> Pictured:
        data, objects = self._files(index)
        with Image.open(io.BytesIO(data)) as picture:
            image = np.asarray(picture.convert("RGB"))
        labels = np.array(objects["labels"], np.int64)
        boxes = np.array(objects["boxes"], np.float32).reshape(-1, 4)
        return Pictured(image, boxes, labels, np.array(objects["areas"], np.float64), np.ones(len(labels), bool))


class Own:
    """The images of a set of the user's."""

    def __init__(self, samples: Sequence[DetectionSample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Pictured:
        one = self._samples[index]
        return Pictured(one.load_image(), one.boxes, one.labels, one.areas, ~(one.crowd | one.ignored))


class Drawn:
    """Batches drawn from one source to learn from and another to be judged on (a `Batches`).

    A training image is flipped or not and cropped or not, by random numbers that follow from the number of its batch.
    """

    def __init__(
        self,
        asked: Training,
        device: torch.device,
        seed: int,
        held_seed: int,
        sources: tuple[Source, Source],
        classes: tuple[str, ...] = CLASSES,
        truthful: bool = True,
    ) -> None:
        """sources: to learn from, and to be judged on."""
        self.truthful = truthful
        self._wanted: Any = asked.validation  # type: ignore[attr-defined]
        self._device, self._seed, self._held_seed = device, seed, held_seed
        self._learned, self._judged = sources
        self._classes = classes

    def train(self, index: int, count: int, size: int) -> Images:
        source = self._learned
        random = np.random.default_rng((self._seed, index))
        drawn = random.choice(len(source), count, replace=count > len(source))
        pictures = [resized(changed(source[int(k)], random), size) for k in drawn]
        return Images(pictures, self._classes, (self._seed, index), self._device, truthful=self.truthful)

    def held_out(self, pairs: int | None = None, size: int | None = None, batch: int | None = None) -> Iterator[Images]:
        source, side = self._judged, size or self._wanted.size
        count, step = min(pairs or self._wanted.pairs, len(source)), batch or HELD_BATCH
        for first in range(0, count, step):
            pictures = [resized(source[k], side) for k in range(first, min(first + step, count))]
            yield Images(pictures, self._classes, (self._held_seed,), self._device, True, self.truthful, first)


def batches_of(asked: Training, device: torch.device, seed: int, held_seed: int, found: SampleSet | None) -> Drawn:
    """Returns batches of generated images, or of the user's set or photographs; see `LearningPart.batches`."""
    if found is not None and found.own:
        return own(asked, device, seed, found)
    return rendered(asked, device, seed, held_seed)


def rendered(asked: Training, device: torch.device, seed: int, held_seed: int) -> Drawn:
    """Returns batches of generated images: `POOL` of the training split, and the validation split's first ones."""
    held: Any = asked.validation  # type: ignore[attr-defined]
    largest = max(stage.size for stage in asked.stages)  # rendered once, whatever size a stage then asks for
    learned, judged = Rendered("train", seed, POOL, largest), Rendered("validation", held_seed, POOL, held.size)
    return Drawn(asked, device, seed, held_seed, (learned, judged))


def own(asked: Training, device: torch.device, seed: int, found: SampleSet) -> Drawn:
    """Returns batches of a set of the user's, or of photographs without boxes; some images are held out."""
    learned, judged = learning_split(found)
    sources = Own(learned), Own(judged)
    return Drawn(asked, device, seed, seed, sources, classes_of(found), found.truthful)


def changed(one: Pictured, random: np.random.Generator) -> Pictured:
    """Returns an image mirrored or not, and whole or cropped, each with a chance of a half."""
    flip, crop = random.random(2) < 0.5
    share, at = random.uniform(SMALLEST_CROP, 1, 2), random.random(2)
    if flip:
        width = one.image.shape[1]
        boxes = np.stack(
            (width - one.boxes[:, 2], one.boxes[:, 1], width - one.boxes[:, 0], one.boxes[:, 3]), axis=1
        ).astype(np.float32)
        one = Pictured(one.image[:, ::-1], boxes, one.labels, one.areas, one.counted)
    return cropped(one, share, at) if crop else one


def cropped(one: Pictured, share: np.ndarray, at: np.ndarray) -> Pictured:
    """Returns a part of an image: so large a share of (width, height), placed at so much of the room that is left."""
    whole = np.array(one.image.shape[1::-1])
    size = np.maximum(1, (whole * share).astype(int))
    corner = ((whole - size + 1) * at).astype(int)
    (x, y), (w, h) = corner, size
    inside = np.clip(one.boxes - np.array([x, y, x, y], np.float32), 0, np.array([w, h, w, h], np.float32))
    left, before = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (inside, one.boxes))
    seen = left >= LEAST_SEEN * np.maximum(before, 1e-6)
    share_seen = left[seen] / np.maximum(before[seen], 1e-6)
    return Pictured(
        one.image[y : y + h, x : x + w],
        inside[seen],
        one.labels[seen],
        one.areas[seen] * share_seen,
        one.counted[seen],
    )


def resized(one: Pictured, size: int) -> Pictured:
    """Returns an image whose longer side has so many pixels."""
    height, width = one.image.shape[:2]
    scale = size / max(height, width)
    if scale == 1:
        return one
    new = max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))
    factor = np.array([new[0] / width, new[1] / height] * 2, np.float32)
    image = Image.fromarray(np.ascontiguousarray(one.image)).resize(new, Image.Resampling.BILINEAR)
    return Pictured(np.asarray(image), one.boxes * factor, one.labels, one.areas * factor[0] * factor[1], one.counted)


def generator(batch: Images, number: int) -> torch.Generator:
    """Returns the random numbers of one image of a batch, on the CPU."""
    state = np.random.SeedSequence((*batch.seed, batch.first + number)).generate_state(
        1
    )  # 32 bits: torch ignores all higher ones
    return torch.Generator().manual_seed(int(state[0]))
