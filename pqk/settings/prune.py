"""Defines the pruning settings, `configs/prune.yaml`, as a frozen object: whole units are cut from a network."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from pqk.settings.training import Fit, Side
from pqk.settings.yamlfile import Section, Spec, config_loader


class Units(Section):
    """Units that may be cut: attention heads, hidden units of the MLPs, channels of a DPT head, inner channels of
    convolutional blocks, whole blocks.
    """

    heads: bool
    ffn: bool
    dpt: bool
    blocks: bool
    inner: bool = False

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not (self.heads or self.ffn or self.dpt or self.inner or self.blocks):
            raise ValueError("must allow at least one of heads, ffn, dpt, inner and blocks")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out `inner` where nothing of it is cut, so that a file without it keeps its former sha256."""
        return {name: value for name, value in handler(self).items() if name != "inner" or value}


class Samples(Section):
    """Rendered training pairs for the gradients of importance taylor and for the outputs of `refit`."""

    pairs: Annotated[int, Field(ge=1, le=4096)]
    size: Side


class Sensitivity(Section):
    """Scan of how far the points move when a group loses a share of its units, on held-out pairs.

    enabled: without the scan all groups lose the same share. levels: rising shares of the units of a group; no group
    loses more than the last one.
    """

    enabled: bool
    pairs: Annotated[int, Field(ge=1, le=4096)]
    size: Side
    levels: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False, min_length=1)]

    @field_validator("levels")
    @classmethod
    def _rising(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if list(levels) != sorted(set(levels)):
            raise ValueError("must be rising shares such as [0.25, 0.5, 0.75]")
        return levels


class Prune(Spec):
    """Choice and number of the units to cut, and the fine-tuning that follows.

    rho: share of the network's parameters (or FLOPs, see `measure`) to cut; it is reached, and exceeded by less than
    the last step cuts. refit: correct the layers behind heads, MLP units and inner channels by least squares.
    """

    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    rho: Annotated[float, Field(gt=0, lt=0.9)]
    measure: Literal["params", "flops"]
    importance: Literal["l1", "l2", "taylor"]
    samples: Samples
    refit: bool
    units: Units
    round_to: Annotated[int, Field(ge=1, le=256)]
    sensitivity: Sensitivity
    train: Fit

    @model_validator(mode="after")
    def _blocks_are_compared(self) -> Self:
        if self.units.blocks and not self.sensitivity.enabled:
            raise ValueError("units.blocks needs sensitivity.enabled: only the scan can choose the blocks to cut")
        return self


load_prune = config_loader(Prune, "prune")
