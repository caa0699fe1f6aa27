"""Defines the quantization settings, `configs/quant.yaml`, as a frozen object."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from pqk.errors import nearest
from pqk.settings.keep import split_entry
from pqk.settings.training import Rounded
from pqk.settings.yamlfile import Section, Spec, config_loader

KEEP_GROUPS = ("LayerNorm", "Softmax", "AttentionScales")
"""Groups of nodes that a quantizer can keep in float."""
BITS = ((8, 8), (4, 16))
"""Bits of weights and activations: both lowered, or weights alone."""


class Ptq(Section):
    """Post-training quantization. A family may name groups of its own for the keep-list, and add settings.

    GROUPS: keep-list entries by the name of the group that stands for them; they take its place when a file is read.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    bits_w: Literal[4, 8]
    bits_a: Literal[8, 16]
    weights: Literal["per_channel", "per_tensor"]
    activations: Literal["per_tensor"]
    symmetric_activations: bool
    smooth_quant_alpha: Annotated[float | None, Field(ge=0, le=1)]
    bias_correction: Literal["none", "fast", "full"]
    weight_range: Literal["auto", "full", "half"]
    calibration_images: Annotated[int, Field(ge=2, le=100_000)]
    keep_list: Annotated[tuple[str, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _known_pair(self) -> Self:
        if (self.bits_w, self.bits_a) not in BITS:
            raise ValueError(
                f"must hold bits_w 8 with bits_a 8, or bits_w 4 with bits_a 16 (only weights are lowered), "
                f"and holds {self.bits_w} with {self.bits_a}"
            )
        return self

    @field_validator("keep_list")
    @classmethod
    def _groups_or_patterns(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        groups = (*KEEP_GROUPS, *cls.GROUPS)
        for entry in entries:
            _, wanted = split_entry(entry)
            if wanted in KEEP_GROUPS or entry in cls.GROUPS:
                continue
            # A bare word that is no group is far more often a misspelt group than a pattern.
            if not wanted or wanted.isalpha():
                raise ValueError(
                    f"must hold groups ({', '.join(groups)}) or regular expressions of node names "
                    f"such as '.*dec_blocks.0.*', and {entry!r} is neither{nearest(wanted, groups)}"
                )
            try:
                re.compile(wanted)
            except re.error as error:
                raise ValueError(f"must hold regular expressions, and {entry!r} is not one: {error}") from None
        if len(set(entries)) != len(entries):
            raise ValueError("must not hold an entry twice")
        return tuple(dict.fromkeys(own for entry in entries for own in cls.GROUPS.get(entry, (entry,))))


class TensorRT(Section):
    """Settings of backend trt for building and running its engines."""

    target: Annotated[str | None, Field(pattern=r"^\d+\.\d$")] = None
    workspace_mb: Annotated[int, Field(ge=1)] = 4096
    optimization_level: Annotated[int | None, Field(ge=0, le=5)] = None
    timing_cache: bool = True
    cuda_graph: bool = False


class Quant(Spec):
    """Settings for lowering precision, and the precision of the rest of the model.

    qat: quantization-aware training, used when PTQ drops more than thresholds.quality_drop_q_only_pct.
    """

    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    ptq: Ptq
    qat: Rounded
    float_rest: Literal["auto", "bf16", "f16", "f32"]
    trt: TensorRT = TensorRT()

    @classmethod
    def laid_over(cls, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        return Rounded.laid_over(values, overrides, "qat")


load_quant = config_loader(Quant, "quant")
