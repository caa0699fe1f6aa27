"""VGGT's part of the configuration: workload.yaml, eval.yaml, the uses of its graphs, its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pqk.families.contract import GraphUse, Metric
from pqk.families.scenes import settings
from pqk.families.vggt.network.configs import NAMED as NAMED
from pqk.families.vggt.parts import ATTENTION as ATTENTION
from pqk.families.vggt.parts import KINDS as KINDS
from pqk.families.vggt.parts import LAST_LAYERS as LAST_LAYERS
from pqk.families.vggt.parts import POSE_LAYERS
from pqk.families.vggt.parts import part_of as part_of
from pqk.settings import evaluation, quant
from pqk.settings.yamlfile import Section, config_loader

SIGN = "aggregator.camera_token"
"""A weight that every checkpoint of the family has, and none of another family."""

PATCH = 14
"""Side of a ViT patch in pixels; height and width must be multiples of it."""

MOST_FRAMES = 64

GRAPHS = (
    GraphUse("encoder", unit="images"),
    GraphUse("aggregator", after=("encoder",), unit="sets of frames"),
    GraphUse("camera", after=("encoder", "aggregator"), unit="sets of frames"),
    GraphUse("depth", after=("encoder", "aggregator"), unit="sets of frames"),
    GraphUse("points", after=("encoder", "aggregator"), unit="sets of frames"),
)

METRICS = (
    Metric("absrel", "", "lower", 0.0, drops=True),
    Metric("delta1", "", "higher", 1.0, drops=True, guard=True),
    Metric("rmse", "m", "lower", 0.0),
    Metric("chamfer", "m", "lower", 0.0, guard=True, parts=("chamfer_accuracy", "chamfer_completeness")),
    Metric("pose_miss30", "", "lower", 0.0, threshold="pose_miss30_rise", meaning="pose error"),
    Metric("ause", "", "lower", 0.0, threshold="ause_rise", meaning="confidence"),
    Metric("rot_deg", "deg", "lower", 0.0),
    Metric("trans_deg", "deg", "lower", 0.0),
    Metric("auc3", "", "higher", 1.0),
    Metric("auc5", "", "higher", 1.0),
    Metric("auc15", "", "higher", 1.0),
    Metric("auc30", "", "higher", 1.0),
    Metric("rra5", "", "higher", 1.0),
    Metric("rra15", "", "higher", 1.0),
    Metric("rra30", "", "higher", 1.0),
    Metric("rta5", "", "higher", 1.0),
    Metric("rta15", "", "higher", 1.0),
    Metric("rta30", "", "higher", 1.0),
)
"""What `pqk.families.vggt.scoring.summarise` gives, the default main metric first. pose_miss30 is 1 - auc30."""


class Input(settings.Input):
    """The static shape that the model is fed: so many frames of one size at once."""

    PATCH = PATCH

    frames: Annotated[int, Field(ge=1, le=MOST_FRAMES)]


class FrameSets(Section):
    """Which frames of a scene are fed together: windows of neighbouring views, in the order of the scene.

    step: views from the start of one window to the start of the next. most: windows of a scene, evenly spread.
    """

    step: Annotated[int, Field(ge=1, le=1000)]
    most: Annotated[int | None, Field(ge=1, le=100_000)] = None


class Workload(settings.Workload):
    """What is fed: frames and their size, which frames go together, scene lists, calibration set, seeds."""

    input: Input
    frame_sets: FrameSets

    @property
    def static(self) -> dict[str, Any]:
        """The graphs have the input's frames, height and width."""
        return {"frames": self.input.frames, "shape": [self.input.height, self.input.width]}

    @property
    def feeding(self) -> dict[str, Any]:
        """Sets are windows of frames, each of which shares enough of its view with the one before."""
        sets = self.frame_sets.model_dump(mode="json")
        return {**self.static, "frame_sets": sets, "min_covisibility": self.min_covisibility}

    @property
    def neighbours(self) -> int:
        """Views around an inner one of a generated scene that share enough with it: the one before, the one after."""
        return 2

    @property
    def together(self) -> int:
        """How many images are fed at once."""
        return self.input.frames

    def problems(self) -> list[str]:
        """Calibration images enough for one set."""
        if self.calibration.images < self.input.frames:
            return [f"calibration.images is {self.calibration.images} but must be at least {self.input.frames}"]
        return []


class Quality(settings.Quality):
    """Which metrics are recorded, and how predictions are brought to the scale of the ground truth."""

    KNOWN = tuple(metric.name for metric in METRICS)


class Thresholds(evaluation.Thresholds):
    """Success lines. pose_miss30_rise, ause_rise: how much these metrics may be above the Teacher's."""

    pose_miss30_rise: Annotated[float, Field(ge=0, le=1)]
    ause_rise: Annotated[float, Field(ge=0, le=1)]


class Evaluation(evaluation.Evaluation):
    """What is measured and what counts as success."""

    quality: Quality
    thresholds: Thresholds


class Ptq(quant.Ptq):
    """Post-training quantization.

    special_tokens: whether ranges are measured with the camera and register tokens (measured) or on patches alone
    (left_out). Groups for the keep-list: layers that a pose goes through in the camera head, the layers right before
    the outputs, and the products inside attention.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "PoseLayers": (POSE_LAYERS,),
        "LastLayers": LAST_LAYERS,
        "AttentionProducts": ATTENTION,
    }

    special_tokens: Literal["measured", "left_out"] = "measured"


class Quant(quant.Quant):
    """How precision is lowered."""

    ptq: Ptq


load_workload = config_loader(Workload, "workload")
load_evaluation = config_loader(Evaluation, "eval")
