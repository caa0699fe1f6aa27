"""Says what rendered scenes look like, and which pairs count, in trainings of the families that learn from scenes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from pqk.settings.yamlfile import Section

_Ends = Annotated[list[Annotated[float, Field(gt=0, lt=180)]], Field(min_length=2, max_length=2)]


class Scenery(Section):
    """Angles in degrees. min_covisible: the share of a view that the other one must see; a pair with less has no truth.

    spread_deg: between the views of a pair. fov_deg: of the cameras.
    """

    spread_deg: _Ends = Field(default=[4.0, 26.0])
    fov_deg: _Ends = Field(default=[55.0, 70.0])
    min_covisible: float = Field(default=0.25, ge=0, le=1)

    @field_validator("spread_deg", "fov_deg")
    @classmethod
    def _from_low_to_high(cls, ends: list[float]) -> list[float]:
        if ends[0] > ends[1]:
            raise ValueError("must be [lowest, highest]")
        return ends
