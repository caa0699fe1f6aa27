"""Defines the settings that families of scenes share: which scenes are fed, at which size, how they are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from pqk.errors import nearest
from pqk.settings import evaluation, workload
from pqk.settings.workload import Calibration, SceneLists, refuse_shared_scenes
from pqk.settings.yamlfile import Section

LONGEST = 4096
"""Pixels of a side, at most."""


class Input(Section):
    """The static shape that the model is fed: images of one size, whose sides are multiples of PATCH."""

    PATCH: ClassVar[int] = 1

    shape: Annotated[tuple[int, ...], Field(strict=False)]

    @field_validator("shape")
    @classmethod
    def _multiples(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        patch, most = cls.PATCH, LONGEST // cls.PATCH * cls.PATCH
        right = len(shape) == 4 and shape[:2] == (1, 3)
        if not right or any(side % patch or not patch <= side <= most for side in shape[2:]):
            raise ValueError(f"must be [1, 3, H, W] with H and W multiples of {patch} from {patch} to {most}")
        return shape

    @property
    def height(self) -> int:
        return self.shape[2]

    @property
    def width(self) -> int:
        return self.shape[3]


class Workload(workload.Workload):
    """What is fed: scene lists, calibration set, the least overlap of views; a family adds how views go together."""

    scenes: SceneLists
    calibration: Calibration
    min_covisibility: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _apart(self) -> Self:
        """Splits of one folder name their scenes, and none is named in two."""
        refuse_shared_scenes(
            {
                "scenes.train": self.scenes.train,
                "scenes.validation": self.scenes.validation,
                "scenes.test": self.scenes.test,
                "calibration": self.calibration,
            }
        )
        return self

    @property
    def calibration_images(self) -> int:
        """How many images quantizers can be calibrated on."""
        return self.calibration.images


class Quality(evaluation.Quality):
    """Which metrics are recorded, and how predictions are brought to the scale of the ground truth.

    KNOWN: the metrics that the family's scoring gives.
    """

    KNOWN: ClassVar[Sequence[str]] = ()

    scale_alignment: Literal["median", "lstsq", "none"]
    chamfer_points: Annotated[int, Field(ge=16, le=1_000_000)]
    min_valid_pixels: Annotated[int, Field(ge=1, le=1_000_000)]

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name in (self.main_metric, *self.metrics):
            if name not in self.KNOWN:
                hint = nearest(name, self.KNOWN)
                raise ValueError(f"names the unknown metric {name!r}{hint}; known: {', '.join(self.KNOWN)}")
        return self
