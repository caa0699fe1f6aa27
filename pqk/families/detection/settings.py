"""Defines the settings that families of detectors share: which images are fed, at which size, and the metrics."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from pqk.errors import nearest
from pqk.families.contract import Metric
from pqk.families.scenes import settings as scenes
from pqk.settings import evaluation, workload
from pqk.settings.workload import SYNTHETIC, BaseSeed
from pqk.settings.yamlfile import Section, config_loader

PATCH = 32
"""Sides of the network's input are multiples of it: the stride of the coarsest map."""

METRICS = (
    Metric("ap", "", "higher", 100.0, drops=True),
    Metric("ap50", "", "higher", 100.0, drops=True),
    Metric("ap75", "", "higher", 100.0, drops=True),
    Metric("ap_small", "", "higher", 100.0),
    Metric("ap_medium", "", "higher", 100.0),
    Metric("ap_large", "", "higher", 100.0),
)
"""What `pqk.families.detection.scoring.summarise` gives, 0 to 100, the default main metric first."""


class Input(scenes.Input):
    """The static shape that images are fitted into, padded at the right and below; sides are multiples of 32."""

    PATCH = PATCH


class ImageList(Section):
    """A fixed, ordered list of images with boxes.

    For `source: synthetic`, `images` images are generated from `seed`. Otherwise `source` is a folder of COCO's form
    (annotations.json and images/), or a YAML file that names sets, of which `set` is taken; `images` limits how many
    are used.
    """

    source: Annotated[str, Field(min_length=1)]
    set: Annotated[str | None, Field(min_length=1)] = None
    images: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    seed: BaseSeed = 0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == SYNTHETIC and self.images is None:
            raise ValueError("with source 'synthetic' needs 'images'")
        if self.source == SYNTHETIC and self.set is not None:
            raise ValueError("with source 'synthetic' takes no 'set'")
        return self


class TrainList(Section):
    """What is learned from: images generated as they are needed (synthetic), or a set, as in `ImageList`.

    pictures: the images of a folder without boxes; the Teacher's detections replace the ground truth.
    """

    source: Annotated[str, Field(min_length=1)] = SYNTHETIC
    set: Annotated[str | None, Field(min_length=1)] = None
    images: Annotated[int | None, Field(ge=2, le=1_000_000)] = None
    pictures: bool = False

    @model_validator(mode="after")
    def _of_a_set(self) -> Self:
        if self.source == SYNTHETIC and (self.set or self.images or self.pictures):
            raise ValueError("with source 'synthetic' takes no 'set', 'images' or 'pictures'")
        return self


class ImageLists(Section):
    """The images of each split."""

    train: TrainList = TrainList()
    validation: ImageList
    test: ImageList


class Workload(workload.Workload):
    """What is fed: the size of images, lists of images, calibration set, seeds."""

    input: Input
    sets: ImageLists
    calibration: ImageList

    @model_validator(mode="after")
    def _apart(self) -> Self:
        """Splits of one set need sources of their own: nothing says which images are whose."""
        named: dict[str, ImageList | TrainList] = {
            "sets.train": self.sets.train,
            "sets.validation": self.sets.validation,
            "sets.test": self.sets.test,
            "calibration": self.calibration,
        }
        seen: dict[tuple[str, str | None], str] = {}
        for name, one in named.items():
            if one.source == SYNTHETIC:
                continue
            before = seen.setdefault((one.source, one.set), name)
            if before != name:
                raise ValueError(f"{before} and {name} take the same set; splits share no image")
        return self

    @property
    def calibration_images(self) -> int | None:
        """How many images quantizers can be calibrated on; of a whole set the data says it."""
        return self.calibration.images


class Quality(evaluation.Quality):
    """Which metrics are recorded."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = tuple(metric.name for metric in METRICS)
        for name in (self.main_metric, *self.metrics):
            if name not in known:
                raise ValueError(f"names the unknown metric {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        return self


class Evaluation(evaluation.Evaluation):
    """What is measured and what counts as success."""

    quality: Quality


load_evaluation = config_loader(Evaluation, "eval")
