"""DiffusionDet's part of the configuration: workload.yaml, eval.yaml, the uses of its graphs, its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from pqk.errors import nearest
from pqk.families.contract import GraphUse, Metric
from pqk.families.diffusiondet.network.configs import LARGEST_PROPOSALS
from pqk.families.diffusiondet.network.configs import NAMED as NAMED
from pqk.families.diffusiondet.parts import ATTENTION as ATTENTION
from pqk.families.diffusiondet.parts import KINDS as KINDS
from pqk.families.diffusiondet.parts import LAST_LAYERS as LAST_LAYERS
from pqk.families.diffusiondet.parts import POOLING
from pqk.families.diffusiondet.parts import part_of as part_of
from pqk.settings import evaluation, quant, workload
from pqk.settings.workload import SYNTHETIC, BaseSeed
from pqk.settings.yamlfile import Section, config_loader

SIGN = "head.head_series.0.inst_interact.dynamic_layer.weight"
"""A weight that every checkpoint of the family has, and none of another family."""

PATCH = 32
"""Sides of the network's input are multiples of it: the stride of the coarsest map."""

LONGEST = 2048
"""Pixels of a side, at most."""

GRAPHS = (
    GraphUse("backbone", unit="images"),
    GraphUse("head", after=("backbone", "head"), unit="sets of noisy boxes"),
)
"""The boxes of a step are made of what the head found in the step before."""

METRICS = (
    Metric("ap", "", "higher", 100.0, drops=True),
    Metric("ap50", "", "higher", 100.0, drops=True),
    Metric("ap75", "", "higher", 100.0, drops=True),
    Metric("ap_small", "", "higher", 100.0),
    Metric("ap_medium", "", "higher", 100.0),
    Metric("ap_large", "", "higher", 100.0),
)
"""What `pqk.families.diffusiondet.scoring.summarise` gives, 0 to 100, the default main metric first."""


class Input(Section):
    """The static shape that images are fitted into, padded at the right and below; sides are multiples of 32."""

    shape: Annotated[tuple[int, ...], Field(strict=False)]

    @field_validator("shape")
    @classmethod
    def _multiples(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        right = len(shape) == 4 and shape[:2] == (1, 3)
        if not right or any(side % PATCH or not PATCH <= side <= LONGEST for side in shape[2:]):
            raise ValueError(f"must be [1, 3, H, W] with H and W multiples of {PATCH} from {PATCH} to {LONGEST}")
        return shape

    @property
    def height(self) -> int:
        return self.shape[2]

    @property
    def width(self) -> int:
        return self.shape[3]


class Sampler(Section):
    """How noisy boxes become detections.

    steps: calls of the head for an image. boxes: noisy boxes, static in the engine. eta: share of fresh noise in a
    step, 0 for none. renewal: score below which a box is replaced by a fresh one after a step; null: none is. ensemble:
    detections of several steps are pooled. largest_iou: of two detections of one class. scores: of the classes, or
    their geometric mean with the quality head's. quality_guidance: power of the quality in what renewal compares.
    """

    steps: Annotated[int, Field(ge=1, le=1000)]
    boxes: Annotated[int, Field(ge=1, le=LARGEST_PROPOSALS)]
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    renewal: Annotated[float | None, Field(ge=0, lt=1)] = 0.5
    ensemble: bool = True
    largest_iou: Annotated[float, Field(gt=0, le=1)] = 0.5
    scores: Literal["classes", "quality"] = "classes"
    quality_guidance: Annotated[float, Field(ge=0, le=10)] = 0.0


class Network(Section):
    """What a sampler must know of the network that it runs; an export of another network is refused.

    signal_scale: boxes are coded in [-s, s]. noise_std: factors of the noise on cx, cy, w and h. label_state: of a
    network that diffuses classes, with its number of classes. geo_feat: the network takes the size of the picture.
    """

    signal_scale: Annotated[float, Field(gt=0, le=100)] = 2.0
    noise_std: Annotated[tuple[float, ...], Field(strict=False, min_length=4, max_length=4)] = (1.0, 1.0, 1.0, 1.0)
    label_state: Literal["sample", "dist"] | None = None
    label_schedule: Literal["linear", "cosine"] = "linear"
    classes: Annotated[int | None, Field(ge=1, le=LARGEST_PROPOSALS)] = None
    quality_head: bool = False
    geo_feat: bool = False

    @model_validator(mode="after")
    def _counted(self) -> Self:
        if (self.label_state is None) != (self.classes is None):
            raise ValueError("label_state and classes belong together: give both, or neither")
        return self


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
    """What is fed: the size of images, the sampler, lists of images, calibration set, seeds."""

    input: Input
    sampler: Sampler
    network: Network = Network()
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

    @model_validator(mode="after")
    def _has_quality(self) -> Self:
        """What is scored by quality needs the head that gives it."""
        if not self.network.quality_head and (self.sampler.scores == "quality" or self.sampler.quality_guidance):
            raise ValueError("sampler.scores: quality and sampler.quality_guidance need network.quality_head: true")
        return self

    @property
    def static(self) -> dict[str, Any]:
        """The graphs have the input's height and width, so many boxes, and the inputs that the network asks for."""
        network = self.network.model_dump(mode="json")
        return {"shape": [self.input.height, self.input.width], "boxes": self.sampler.boxes, "network": network}

    @property
    def feeding(self) -> dict[str, Any]:
        """The sampler decides how often the head runs, and on which boxes."""
        return {**self.static, "sampler": self.sampler.model_dump(mode="json")}

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


class Ptq(quant.Ptq):
    """Post-training quantization.

    Groups for the keep-list: the layers right before classes and boxes, the products inside attention, and the sums
    over the maps in which boxes are pooled.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "LastLayers": LAST_LAYERS,
        "AttentionProducts": ATTENTION,
        "Pooling": POOLING,
    }


class Quant(quant.Quant):
    """How precision is lowered."""

    ptq: Ptq


load_workload = config_loader(Workload, "workload")
load_evaluation = config_loader(Evaluation, "eval")
