"""The workload: what every experiment is fed. `configs/workload.yaml` as a frozen object."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pqk.data.seeds import LIMIT
from pqk.spec.yamlfile import Section, Spec, config_loader

SYNTHETIC = "synthetic"
PATCH = 16
"""Side of a ViT patch in pixels; height and width must be multiples of it."""

STANDARD_SIDES = (384, 512, 640)
"""The square input sides that the dry run accepts in configs/workload.yaml."""

BaseSeed = Annotated[int, Field(ge=0, lt=LIMIT)]


class Input(Section):
    """The static shape that the model is fed."""

    shape: Annotated[tuple[int, ...], Field(strict=False)]

    @field_validator("shape")
    @classmethod
    def _multiples(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        sides = shape[2:]
        right = len(shape) == 4 and shape[:2] == (1, 3)
        if not right or any(side % PATCH or not PATCH <= side <= 4096 for side in sides):
            raise ValueError(f"must be [1, 3, H, W] with H and W multiples of {PATCH} from {PATCH} to 4096")
        return shape

    @property
    def height(self) -> int:
        return self.shape[2]

    @property
    def width(self) -> int:
        return self.shape[3]


class PairGraph(Section):
    """Which pairs of a scene's views are fed; pqk.data.pairs.pair_graph defines the kinds and k."""

    kind: Literal["neighbor", "complete", "topk"]
    k: Annotated[int, Field(ge=1, le=64)]
    symmetrize: bool


class SceneList(Section):
    """A fixed, ordered list of scenes: generated ones, or the scenes in a folder.

    For `source: synthetic`, `count` scenes of `views` views each are generated from `seed`. Otherwise `source` is
    a folder (relative to the project root, or absolute), `names` lists its scenes in order (default: all, sorted by
    name) and `count` and `views` limit how many of them are used.
    """

    source: Annotated[str, Field(min_length=1)]
    count: Annotated[int | None, Field(ge=1, le=100_000)] = None
    views: Annotated[int | None, Field(ge=2, le=1000)] = None
    seed: BaseSeed = 0
    names: Annotated[tuple[str, ...], Field(strict=False)] | None = None

    @field_validator("names")
    @classmethod
    def _plain_names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            if not name or name in {".", ".."} or "/" in name or "\\" in name or "\0" in name:
                raise ValueError(f"must hold plain folder names, and {name!r} is none")
        if names is not None and (not names or len(set(names)) != len(names)):
            raise ValueError("must hold at least one name and none twice")
        return names

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == SYNTHETIC and (self.count is None or self.views is None):
            raise ValueError("with source 'synthetic' needs both 'count' and 'views'")
        if self.source == SYNTHETIC and self.names is not None:
            raise ValueError("with source 'synthetic' takes no 'names'")
        return self


class SceneLists(Section):
    """The scenes of each split."""

    validation: SceneList
    test: SceneList


class Calibration(Section):
    """The images that quantizers observe: generated, `views_per_scene` to a scene, or from a folder of scenes."""

    source: Annotated[str, Field(min_length=1)]
    images: Annotated[int, Field(ge=2, le=100_000)]
    views_per_scene: Annotated[int, Field(ge=2, le=1000)]
    seed: BaseSeed = 0


class Seeds(Section):
    """The random state of training and of evaluation, kept apart so that one never moves the other."""

    train: BaseSeed
    eval: BaseSeed


class Workload(Spec):
    """What is fed: input shape, pair graph, scene lists, calibration set, seeds."""

    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    input: Input
    pair_graph: PairGraph
    scenes: SceneLists
    calibration: Calibration
    min_covisibility: Annotated[float, Field(ge=0, le=1)]
    seeds: Seeds


load_workload = config_loader(Workload, "workload")
