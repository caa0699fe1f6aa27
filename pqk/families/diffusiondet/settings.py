"""DiffusionDet's part of the configuration: workload.yaml, eval.yaml, the uses of its graphs, its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pqk.families.contract import GraphUse
from pqk.families.detection import settings
from pqk.families.detection.settings import METRICS as METRICS
from pqk.families.detection.settings import PATCH as PATCH
from pqk.families.detection.settings import Evaluation as Evaluation
from pqk.families.detection.settings import load_evaluation as load_evaluation
from pqk.families.diffusiondet.network.configs import LARGEST_PROPOSALS
from pqk.families.diffusiondet.network.configs import NAMED as NAMED
from pqk.families.diffusiondet.parts import ATTENTION as ATTENTION
from pqk.families.diffusiondet.parts import DYNAMIC, POOLING
from pqk.families.diffusiondet.parts import KINDS as KINDS
from pqk.families.diffusiondet.parts import LAST_LAYERS as LAST_LAYERS
from pqk.families.diffusiondet.parts import part_of as part_of
from pqk.settings import quant
from pqk.settings.yamlfile import Section, config_loader

SIGN = "head.head_series.0.inst_interact.dynamic_layer.weight"
"""A weight that every checkpoint of the family has, and none of another family."""

GRAPHS = (
    GraphUse("backbone", unit="images"),
    GraphUse("head", after=("backbone", "head"), unit="sets of noisy boxes"),
)
"""The boxes of a step are made of what the head found in the step before."""


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
    neighbours: how many boxes, the nearest ones, a box attends to; 0: to none; null: as the network was trained.
    """

    signal_scale: Annotated[float, Field(gt=0, le=100)] = 2.0
    noise_std: Annotated[tuple[float, ...], Field(strict=False, min_length=4, max_length=4)] = (1.0, 1.0, 1.0, 1.0)
    label_state: Literal["sample", "dist"] | None = None
    classes: Annotated[int | None, Field(ge=1, le=LARGEST_PROPOSALS)] = None
    label_schedule: Literal["linear", "cosine"] = "linear"
    quality_head: bool = False
    geo_feat: bool = False
    neighbours: Annotated[int | None, Field(ge=0, le=LARGEST_PROPOSALS)] = None

    @model_validator(mode="after")
    def _counted(self) -> Self:
        if (self.label_state is None) != (self.classes is None):
            raise ValueError("label_state and classes belong together: give both, or neither")
        return self


class Workload(settings.Workload):
    """What is fed: the size of images, the sampler, lists of images, calibration set, seeds."""

    sampler: Sampler
    network: Network = Network()

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
    def calling(self) -> dict[str, Any]:
        """Samplers of all kinds are compared on the same images."""
        return self.feeding


class Ptq(quant.Ptq):
    """Post-training quantization.

    Groups for the keep-list: the layers right before classes and boxes, the products inside attention, the sums
    over the maps in which boxes are pooled, and the products of dynamic convolutions.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "LastLayers": LAST_LAYERS,
        "AttentionProducts": ATTENTION,
        "Pooling": POOLING,
        "DynamicConvolutions": DYNAMIC,
    }


class Quant(quant.Quant):
    """How precision is lowered."""

    ptq: Ptq


load_workload = config_loader(Workload, "workload")
