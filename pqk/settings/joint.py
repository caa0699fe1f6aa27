"""Defines the settings of the joint recipe, `configs/joint.yaml`, as a frozen object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from pqk.settings.prune import Samples
from pqk.settings.training import Rounded
from pqk.settings.yamlfile import Section, Spec, config_loader


class GatedUnits(Section):
    """Units with gates: attention heads, groups of hidden units of the MLPs and of inner channels of convolutional
    blocks.
    """

    heads: bool
    ffn: bool
    inner: bool = False

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not (self.heads or self.ffn or self.inner):
            raise ValueError("must allow at least one of heads, ffn and inner")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out `inner` where it is off, so that a file without it keeps its former sha256."""
        return {name: value for name, value in handler(self).items() if name != "inner" or value}


class Gates(Section):
    """Settings of the gates `sigmoid(slope * logit)` in the first phase.

    epochs: number of the run's epochs with gates. start: initial value of the middle gate; spread: range of the logits,
    by rank of importance. rate: approximate change of a logit per step. slope: final slope, starting from 1. ramp:
    share of the phase after which the target is all of flops_cut. penalty and dual_rate: of the augmented Lagrangian.
    calibration_images: for the ranges of this phase alone.
    """

    epochs: Annotated[int, Field(ge=1, le=1000)]
    start: Annotated[float, Field(gt=0.5, lt=1)]
    spread: Annotated[float, Field(ge=0, le=20)]
    rate: Annotated[float, Field(gt=0, le=1)]
    slope: Annotated[float, Field(ge=1, le=100)]
    ramp: Annotated[float, Field(gt=0, le=1)]
    penalty: Annotated[float, Field(gt=0, le=1e6)]
    dual_rate: Annotated[float, Field(ge=0, le=1e6)]
    calibration_images: Annotated[int, Field(ge=2, le=100_000)]


class Joint(Spec):
    """Pruning, distillation and quantization in one training run.

    flops_cut: share of the network's FLOPs to cut; it is reached, and exceeded by less than any shut gate cuts.
    round_to: hidden units of a gate; widths stay multiples of it. samples: rendered training pairs for the importance
    that orders the units, and for refit, which corrects the layers behind cut units by least squares. train: the whole
    run; its first gates.epochs epochs have gates, the rest trains the cut network.
    """

    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    flops_cut: Annotated[float, Field(gt=0, lt=0.9)]
    units: GatedUnits
    round_to: Annotated[int, Field(ge=1, le=256)]
    samples: Samples
    refit: bool
    gates: Gates
    train: Rounded

    @model_validator(mode="after")
    def _two_phases(self) -> Self:
        if self.gates.epochs >= self.train.epochs:
            raise ValueError(
                f"must have fewer gates.epochs than train.epochs, and has {self.gates.epochs} of {self.train.epochs}"
            )
        if self.train.warmup * self.train.epochs >= self.gates.epochs:
            raise ValueError(
                f"must end train.warmup, {self.train.warmup:g} of {self.train.epochs} epochs, before the "
                f"{self.gates.epochs} of gates.epochs do"
            )
        return self

    @classmethod
    def laid_over(cls, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        return Rounded.laid_over(values, overrides, "train")


load_joint = config_loader(Joint, "joint")
