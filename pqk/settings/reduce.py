"""Defines the settings of less work without training, `configs/reduce.yaml`, as a frozen object."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pqk.settings.yamlfile import Spec, config_loader


class Reduce(Spec):
    """tail: grid that the linear end of a dense head runs on. tokens: share of the tokens that are merged."""

    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    tail: Literal["full", "half", "quarter"]
    tokens: Annotated[float, Field(ge=0, le=0.6)]


load_reduce = config_loader(Reduce, "reduce")
