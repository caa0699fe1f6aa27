"""Defines the workload, `configs/workload.yaml`, as a frozen object: the part all families share, and scene lists."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from itertools import combinations
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from pqk.settings.seeds import LIMIT
from pqk.settings.yamlfile import Section, Spec

SYNTHETIC = "synthetic"
BaseSeed = Annotated[int, Field(ge=0, lt=LIMIT)]


def _plain_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not name or name in {".", ".."} or "/" in name or "\0" in name:
            raise ValueError(f"must hold plain folder names, and {name!r} is not one")
    if not names or len(set(names)) != len(names):
        raise ValueError("must hold at least one name and none twice")
    return names


SceneNames = Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_plain_names)]
"""Folders of scenes in `source`, in their order."""


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


class TrainList(Section):
    """Training data of P, K, QAT and PQK: an endless generated stream (synthetic), or the scenes in a folder.

    source, names, count, views: as in `SceneList`; the last three only for a folder. pictures: only pictures are read,
    and the Teacher's outputs replace the ground truth. Some samples of a folder are held out to validate a training.
    """

    source: Annotated[str, Field(min_length=1)] = SYNTHETIC
    names: SceneNames | None = None
    count: Annotated[int | None, Field(ge=2, le=100_000)] = None
    views: Annotated[int | None, Field(ge=2, le=100_000)] = None
    pictures: bool = False

    @model_validator(mode="after")
    def _of_a_folder(self) -> Self:
        if self.source == SYNTHETIC and (self.names or self.count or self.views or self.pictures):
            raise ValueError("with source 'synthetic' takes no 'names', 'count', 'views' or 'pictures'")
        return self


class SceneLists(Section):
    """The scenes of each split."""

    train: TrainList = TrainList()
    validation: SceneList
    test: SceneList

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out generated training data, so that a workload without a train list keeps its former sha256."""
        values: dict[str, Any] = handler(self)
        if self.train == TrainList():
            del values["train"]
        return values


class Calibration(Section):
    """The images for calibration: generated, `views_per_scene` per scene, or from a folder of scenes.

    For a folder, `names` lists the scenes in order (default: all).
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
        """Leaves out absent names, so that a calibration set without them keeps its former sha256."""
        values: dict[str, Any] = handler(self)
        if self.names is None:
            del values["names"]
        return values


class Seeds(Section):
    """The seeds of training and of evaluation, separate so that changing one does not change the other."""

    train: BaseSeed
    eval: BaseSeed


class Workload(Spec):
    """Inputs of every family: seeds, and the fields that a family adds (`SettingsPart.Workload`)."""

    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    seeds: Seeds

    @property
    @abstractmethod
    def static(self) -> dict[str, Any]:
        """Returns the settings that the exported graphs depend on, as plain JSON: part of their key."""

    @property
    def feeding(self) -> dict[str, Any]:
        """Returns the settings that turn data into samples, as plain JSON: part of the keys of all measurements."""
        return self.static

    @property
    def calling(self) -> dict[str, Any]:
        """Returns the settings that decide how often, and on what of their own making, the graphs are called.

        In the ledger they belong to the engine and not to its data; by default there are none.
        """
        return {}

    @property
    def calibration_images(self) -> int | None:
        """Returns how many images are available for calibration; None where this depends on the data."""
        return None

    def problems(self) -> list[str]:
        """Returns a sentence for each additional requirement of the standard workload that is not met."""
        return []


def refuse_shared_scenes(splits: Mapping[str, SceneList | TrainList | Calibration]) -> None:
    """Raises ValueError unless splits of the same folder name their scenes, and no scene is named in two splits."""
    for (a, first), (b, second) in combinations(splits.items(), 2):
        if first.source != second.source or first.source == SYNTHETIC:
            continue
        if first.names is None or second.names is None:
            raise ValueError(f"{a} and {b} take scenes of the same source, so both need 'names'")
        twice = [name for name in first.names if name in second.names]
        if twice:
            raise ValueError(f"{a} and {b} both name scene {twice[0]!r} of {first.source}; splits share no scene")
