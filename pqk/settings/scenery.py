"""Defines the look of rendered scenes, and which pairs count, in trainings of families that learn from scenes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from pqk.settings.yamlfile import Section

_Ends = Annotated[list[Annotated[float, Field(gt=0, lt=180)]], Field(min_length=2, max_length=2)]
_Frames = Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=2, max_length=2)]


class Scenery(Section):
    """Look of rendered scenes; angles in degrees.

    spread_deg: angle between the views of a pair. fov_deg: field of view of the cameras. min_covisible: share of a view
    that the other view must see; a pair with less has no ground truth. frames: of a set, fewest and most, in families
    that see sets of frames.
    """

    spread_deg: _Ends = Field(default=[4.0, 26.0])
    fov_deg: _Ends = Field(default=[55.0, 70.0])
    min_covisible: float = Field(default=0.25, ge=0, le=1)
    frames: _Frames = Field(default=[2, 2])

    @field_validator("spread_deg", "fov_deg", "frames")
    @classmethod
    def _from_low_to_high(cls, ends: list[Any]) -> list[Any]:
        if ends[0] > ends[1]:
            raise ValueError("must be [lowest, highest]")
        return ends
