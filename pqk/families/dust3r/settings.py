"""DUSt3R's part of the configuration: workload.yaml, eval.yaml, the uses of its graphs, its metrics."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pqk.families.contract import GraphUse, Metric
from pqk.families.dust3r.configs import NAMED as NAMED
from pqk.families.dust3r.parts import ATTENTION as ATTENTION
from pqk.families.dust3r.parts import KINDS as KINDS
from pqk.families.dust3r.parts import LAST_LAYERS as LAST_LAYERS
from pqk.families.dust3r.parts import part_of as part_of
from pqk.families.scenes import settings
from pqk.settings import evaluation
from pqk.settings.quant import Quant as Quant
from pqk.settings.yamlfile import Section, config_loader

SIGN = "enc_blocks.0.norm1.weight"
"""A weight that all checkpoints have, and no other family's."""

PATCH = 16
"""Side of a ViT patch in pixels; height and width must be multiples of it."""

STANDARD_SIDES = (384, 512, 640)
"""The square input sides that the dry run accepts in configs/workload.yaml."""

MIN_CALIBRATION = 512
"""Fewest calibration images of the standard workload; cards (ablations) may ask for fewer."""

GRAPHS = (
    GraphUse("encoder", unit="images"),
    # Every fourth pair: each passes both decoders and both heads, and costs four times as much as an image.
    GraphUse("decoder", after=("encoder",), every=4, unit="pairs"),
)

METRICS = (
    Metric("absrel", "", "lower", 0.0, drops=True),
    Metric("chamfer", "m", "lower", 0.0, guard=True, parts=("chamfer_accuracy", "chamfer_completeness")),
    Metric("rmse", "m", "lower", 0.0),
    Metric("delta1", "", "higher", 1.0, drops=True, guard=True),
    Metric("ause", "", "lower", 0.0, threshold="ause_rise", meaning="confidence"),
    Metric("reproj_px", "px", "lower", 0.0, guard=True),
    Metric("chamfer_paired", "m", "lower", 0.0),
)
"""What `pqk.families.dust3r.scoring.summarise` gives, the default main metric first."""


class Input(settings.Input):
    """The static shape that the model is fed."""

    PATCH = PATCH


class PairGraph(Section):
    """Which pairs of a scene's views are fed; pqk.data.scenes.pairs.pair_graph defines the kinds and k."""

    kind: Literal["neighbor", "complete", "topk"]
    k: Annotated[int, Field(ge=1, le=64)]
    symmetrize: bool


class Workload(settings.Workload):
    """What is fed: input shape, pair graph, scene lists, calibration set, seeds."""

    input: Input
    pair_graph: PairGraph

    @property
    def static(self) -> dict[str, Any]:
        """The graphs have the input's height and width."""
        return {"shape": [self.input.height, self.input.width]}

    @property
    def feeding(self) -> dict[str, Any]:
        """Pairs are those of the graph that share enough of their view."""
        graph = self.pair_graph.model_dump(mode="json")
        return {**self.static, "pair_graph": graph, "min_covisibility": self.min_covisibility}

    @property
    def neighbours(self) -> int:
        """How many views around an inner view of a generated scene must share enough of their view with it."""
        return self.pair_graph.k

    @property
    def together(self) -> int:
        """How many images are fed at once: a pair."""
        return 2

    def problems(self) -> list[str]:
        """A standard side, and calibration images enough."""
        shape, found = self.input.shape, []
        if shape[2] != shape[3] or shape[2] not in STANDARD_SIDES:
            allowed = ", ".join(map(str, STANDARD_SIDES))
            found.append(f"input.shape is {list(shape)} but must be [1, 3, H, W] with H = W out of {allowed}")
        if self.calibration.images < MIN_CALIBRATION:
            found.append(f"calibration.images is {self.calibration.images} but must be at least {MIN_CALIBRATION}")
        return found


class Quality(settings.Quality):
    """Which metrics are recorded, and how predictions are brought to the scale of the ground truth."""

    KNOWN = tuple(metric.name for metric in METRICS)


class Thresholds(evaluation.Thresholds):
    """Success lines. ause_rise: how much the sparsification error may be above the Teacher's."""

    ause_rise: Annotated[float, Field(ge=0, le=1)]


class Evaluation(evaluation.Evaluation):
    """What is measured and what counts as success."""

    quality: Quality
    thresholds: Thresholds


load_workload = config_loader(Workload, "workload")
load_evaluation = config_loader(Evaluation, "eval")
