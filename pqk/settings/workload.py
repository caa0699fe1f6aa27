"""The workload: what every experiment is fed. `configs/workload.yaml` as a frozen object."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from pqk.settings.seeds import LIMIT
from pqk.settings.yamlfile import Section, Spec, config_loader

SYNTHETIC = "synthetic"
PATCH = 16
"""Side of a ViT patch in pixels; height and width must be multiples of it."""

STANDARD_SIDES = (384, 512, 640)
"""The square input sides that the dry run accepts in configs/workload.yaml."""

BaseSeed = Annotated[int, Field(ge=0, lt=LIMIT)]


def _plain_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not name or name in {".", ".."} or "/" in name or "\0" in name:
            raise ValueError(f"must hold plain folder names, and {name!r} is none")
    if not names or len(set(names)) != len(names):
        raise ValueError("must hold at least one name and none twice")
    return names


SceneNames = Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_plain_names)]
"""Folders of scenes in `source`, in their order."""


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
    """Which pairs of a scene's views are fed; pqk.data.scenes.pairs.pair_graph defines the kinds and k."""

    kind: Literal["neighbor", "complete", "topk"]
    k: Annotated[int, Field(ge=1, le=64)]
    symmetrize: bool


class SceneList(Section):
    """A fixed, ordered list of scenes: generated ones, or the scenes in a folder.

    For `source: synthetic`, `count` scenes of `views` views each are generated from `seed`. Otherwise `source` is
    a folder (relative to the project root, or absolute), `names` lists its scenes in order (default: all, in the
    natural order of their names) and `count` and `views` limit how many of them are used.
    """

    source: Annotated[str, Field(min_length=1)]
    count: Annotated[int | None, Field(ge=1, le=100_000)] = None
    views: Annotated[int | None, Field(ge=2, le=1000)] = None
    seed: BaseSeed = 0
    names: SceneNames | None = None

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
    """The images that quantizers observe: generated, `views_per_scene` to a scene, or from a folder of scenes.

    Of a folder, `names` lists the scenes in order (default: all).
    """

    source: Annotated[str, Field(min_length=1)]
    images: Annotated[int, Field(ge=2, le=100_000)]
    views_per_scene: Annotated[int, Field(ge=2, le=1000)]
    seed: BaseSeed = 0
    names: SceneNames | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == SYNTHETIC and self.names is not None:
            raise ValueError("with source 'synthetic' takes no 'names'")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out names that are not given: a calibration set without them keeps the sha256 it always had."""
        values: dict[str, Any] = handler(self)
        if self.names is None:
            del values["names"]
        return values


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

    @model_validator(mode="after")
    def _apart(self) -> Self:
        """Splits of one folder name their scenes, and none is named in two."""
        splits: dict[str, SceneList | Calibration] = {
            "scenes.validation": self.scenes.validation,
            "scenes.test": self.scenes.test,
            "calibration": self.calibration,
        }
        for (a, first), (b, second) in combinations(splits.items(), 2):
            if first.source != second.source or first.source == SYNTHETIC:
                continue
            if first.names is None or second.names is None:
                raise ValueError(f"{a} and {b} take scenes of the same source, so both need 'names'")
            twice = [name for name in first.names if name in second.names]
            if twice:
                raise ValueError(f"{a} and {b} both name scene {twice[0]!r} of {first.source}; splits share no scene")
        return self


load_workload = config_loader(Workload, "workload")
