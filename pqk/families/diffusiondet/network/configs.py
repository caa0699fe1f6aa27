"""DiffusionDet configurations: the named ones, and reading of a configuration into checked sizes and options.

The keys of the plain detector are those of the paper's code in lower case; `num_heads` counts the stages of the
iterative head and `nheads` the heads of its attention. The switches below `label_state` are extensions; with all of
them at their defaults the network and its losses are the published ones. Of a network that was cut, `dim_feedforward`
and `dim_dynamic` may be lists with a number for each stage, and `inner` has one for each bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pqk.errors import PqkError, nearest
from pqk.families.sizes import DEEPEST, LARGEST, count, is_count, known

OF = "diffusiondet configuration"

LABEL_STATES = ("sample", "dist")
"""A class drawn for each box, or the distribution that it would be drawn from."""
LABEL_DIFFUSION = ("off", "d3pm_mask")
LABEL_SCHEDULES = ("linear", "cosine")
BIAS_TYPES = ("relation", "mlp")
CLASS_LOSSES = ("focal", "qfl")
LARGEST_PROPOSALS = LARGEST
LEVELS = 4
"""Feature maps that boxes are pooled from, of strides 4, 8, 16 and 32."""

_DEFAULTS: dict[str, Any] = {
    "hidden_dim": 256,
    "nheads": 8,
    "dim_feedforward": 2048,
    "dim_dynamic": 64,
    "num_heads": 6,
    "num_classes": 80,
    "num_proposals": 500,
    "num_cls": 1,
    "num_reg": 3,
    "blocks": [3, 4, 6, 3],
    "stem_out": 64,
    "res2_out": 256,
    "width_per_group": 64,
    "inner": None,
    "snr_scale": 2.0,
    "sample_step": 1,
    "ota_k": 5,
    "label_state": None,
    "label_diffusion": "off",
    "label_schedule": "linear",
    "d3pm_vb_weight": 0.0,
    "quality_head": False,
    "quality_weight": 1.0,
    "quality_score_reweight": False,
    "quality_guidance_scale": 0.0,
    "geo_feat": False,
    "geo_bias": False,
    "geo_bias_type": "relation",
    "geo_bias_topk": 0,
    "disable_self_attn": False,
    "cls_loss_type": "focal",
    "qfl_beta": 2.0,
    "box_loss_iou_weight_power": 0.0,
    "noise_std": [1.0, 1.0, 1.0, 1.0],
    "norm": "frozen",
}
_IGNORED = ("family",)

NORMS = ("frozen", "batch")
"""Norms of the backbone: fixed, as of a pretrained one, or learned along with everything else from nothing."""

NAMED: dict[str, dict[str, Any]] = {
    "diffusiondet-r50": {},
    "diffusiondet-r101": {"blocks": [3, 4, 23, 3]},
    "diffusiondet-tiny": {
        "hidden_dim": 64,
        "nheads": 4,
        "dim_feedforward": 256,
        "dim_dynamic": 16,
        "num_heads": 3,
        "num_proposals": 100,
        "blocks": [2, 2, 2, 2],
        "stem_out": 16,
        "res2_out": 64,
        "width_per_group": 16,
        "num_classes": 3,
        "norm": "batch",
    },
}
"""The released COCO models (ResNet-50 is the default of every key, and ResNet-101), and a small one for quick runs."""


@dataclass(frozen=True)
class BackboneSize:
    """Sizes of the ResNet and of the feature pyramid on it.

    stem, res2: channels out of the first convolution and of the first group; every further group doubles them. inner:
    channels inside of each bottleneck, group by group: out of its first and of its 3x3 convolution. out: channels of
    the pyramid. learns: norms and first groups are trained too.
    """

    stem: int
    res2: int
    inner: tuple[tuple[int, ...], ...]
    out: int
    learns: bool


@dataclass(frozen=True)
class StageSize:
    """Sizes of one stage of the head, and which of the extensions it has.

    bias: how geometry biases the attention; None: it does not. nearest: neighbours that a box attends to; 0: all.
    """

    dim: int
    heads: int
    ffn: int
    dynamic: int
    classes: int
    cls_layers: int
    reg_layers: int
    quality: bool = False
    geometry: bool = False
    bias: str | None = None
    nearest: int = 0
    attends: bool = True


@dataclass(frozen=True)
class DiffusionDetConfig:
    """Checked sizes and options of one detector."""

    backbone: BackboneSize
    head: tuple[StageSize, ...]
    """Each stage; they differ in the widths `ffn` and `dynamic` alone."""
    proposals: int
    scale: float
    """Signal scale s: boxes are coded in [-s, s]."""
    steps: int
    candidates: int
    """Largest IoUs whose sum says how many proposals a truth gets."""
    label_state: str | None
    label_diffusion: bool
    label_schedule: str
    label_weight: float
    quality_weight: float
    quality_scores: bool
    quality_guidance: float
    class_loss: str
    qfl_beta: float
    iou_power: float
    noise_std: tuple[float, ...]

    @property
    def stage(self) -> StageSize:
        """Returns the first stage, for all that the stages have in common."""
        return self.head[0]

    @property
    def stages(self) -> int:
        return len(self.head)


def read_config(config: Mapping[str, Any]) -> DiffusionDetConfig:
    """Checks a configuration. Raises PqkError naming the key for an unknown or impossible value."""
    values = {**_DEFAULTS, **known(OF, config, (*_DEFAULTS, *_IGNORED))}
    dim, heads = count(OF, values, "hidden_dim"), count(OF, values, "nheads")
    if dim % heads:
        raise PqkError(f"{OF}: hidden_dim {dim} is not a multiple of nheads {heads}")
    if dim % 2 or dim < 4:
        raise PqkError(f"{OF}: hidden_dim must be even and at least 4, got {dim}")
    geometry = _flag(values, "geo_feat")
    if geometry and dim % 8:
        raise PqkError(f"{OF}: hidden_dim must be a multiple of 8 with geo_feat, got {dim}")
    bias_type = _choice(values, "geo_bias_type", BIAS_TYPES)
    label_state = None if values["label_state"] is None else _choice(values, "label_state", LABEL_STATES)
    diffused = _choice(values, "label_diffusion", LABEL_DIFFUSION) != "off"
    if diffused and label_state is None:
        raise PqkError(f"{OF}: label_diffusion needs a label_state: {' or '.join(LABEL_STATES)}")
    quality = _flag(values, "quality_head")
    reweighted, guidance = _flag(values, "quality_score_reweight"), _number(values, "quality_guidance_scale")
    if not quality and (reweighted or guidance):
        raise PqkError(f"{OF}: quality_score_reweight and quality_guidance_scale need quality_head")
    stages = count(OF, values, "num_heads")
    if stages > DEEPEST:
        raise PqkError(f"{OF}: num_heads must be at most {DEEPEST}, got {stages}")
    stage = StageSize(
        dim=dim,
        heads=heads,
        ffn=0,
        dynamic=0,
        classes=count(OF, values, "num_classes"),
        cls_layers=_layers(values, "num_cls"),
        reg_layers=_layers(values, "num_reg"),
        quality=quality,
        geometry=geometry,
        bias=bias_type if _flag(values, "geo_bias") else None,
        nearest=count(OF, values, "geo_bias_topk", least=0),
        attends=not _flag(values, "disable_self_attn"),
    )
    widths = zip(*(_of_stages(values, key, stages) for key in ("dim_feedforward", "dim_dynamic")), strict=True)
    steps = count(OF, values, "sample_step")
    if steps > 1000:
        raise PqkError(f"{OF}: sample_step must be at most 1000, got {steps}")
    return DiffusionDetConfig(
        backbone=BackboneSize(
            stem=count(OF, values, "stem_out"),
            res2=count(OF, values, "res2_out"),
            inner=_inner(values),
            out=dim,
            learns=_choice(values, "norm", NORMS) == "batch",
        ),
        head=tuple(replace(stage, ffn=ffn, dynamic=dynamic) for ffn, dynamic in widths),
        proposals=count(OF, values, "num_proposals"),
        scale=_number(values, "snr_scale", above=True),
        steps=steps,
        candidates=count(OF, values, "ota_k"),
        label_state=label_state,
        label_diffusion=diffused,
        label_schedule=_choice(values, "label_schedule", LABEL_SCHEDULES),
        label_weight=_number(values, "d3pm_vb_weight"),
        quality_weight=_number(values, "quality_weight"),
        quality_scores=reweighted,
        quality_guidance=guidance,
        class_loss=_choice(values, "cls_loss_type", CLASS_LOSSES),
        qfl_beta=_number(values, "qfl_beta"),
        iou_power=_number(values, "box_loss_iou_weight_power"),
        noise_std=_noise_std(values["noise_std"]),
    )


def _layers(values: Mapping[str, Any], key: str) -> int:
    found = count(OF, values, key, least=0)
    if found > DEEPEST:
        raise PqkError(f"{OF}: {key} must be at most {DEEPEST}, got {found}")
    return found


def _blocks(given: Any) -> tuple[int, ...]:
    if not _is_list(given, LEVELS) or not all(is_count(blocks) and blocks <= DEEPEST for blocks in given):
        raise PqkError(f"{OF}: blocks must be {LEVELS} whole numbers from 1 to {DEEPEST}, got {given!r}")
    return tuple(given)


def _of_stages(values: Mapping[str, Any], key: str, stages: int) -> tuple[int, ...]:
    """Returns the width of each stage: one number for all of them, or a list."""
    given = values[key]
    if not isinstance(given, Sequence) or isinstance(given, str):
        return (count(OF, values, key),) * stages
    if len(given) != stages or not all(map(is_count, given)):
        raise PqkError(
            f"{OF}: {key} must be a whole number from 1 to {LARGEST}, or a list of {stages} (num_heads), got {given!r}"
        )
    return tuple(given)


def _inner(values: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Returns the inner channels of each bottleneck: those of `inner`, else doubled from group to group."""
    blocks, width, given = _blocks(values["blocks"]), count(OF, values, "width_per_group"), values["inner"]
    if given is None:
        return tuple((width << level,) * many for level, many in enumerate(blocks))
    right = _is_list(given, LEVELS) and all(_is_list(group, many) for group, many in zip(given, blocks, strict=True))
    if not right or not all(is_count(channels) for group in given for channels in group):
        raise PqkError(
            f"{OF}: inner must be {LEVELS} lists of {', '.join(map(str, blocks))} (blocks) whole numbers from 1 to "
            f"{LARGEST}, or null, got {given!r}"
        )
    return tuple(tuple(group) for group in given)


def _is_list(given: Any, entries: int) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str) and len(given) == entries


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values[key]
    if not isinstance(value, bool):
        raise PqkError(f"{OF}: {key} must be true or false, got {value!r}")
    return value


def _choice(values: Mapping[str, Any], key: str, allowed: Sequence[str]) -> str:
    value = values[key]
    if not isinstance(value, str) or value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        raise PqkError(f"{OF}: {key} must be one of {', '.join(allowed)}, got {value!r}{hint}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(values: Mapping[str, Any], key: str, above: bool = False) -> float:
    """Returns a number of at least 0; above: greater than 0."""
    value = values[key]
    if not _is_number(value) or value < 0 or (above and value == 0):
        raise PqkError(f"{OF}: {key} must be a number {'above' if above else 'of at least'} 0, got {value!r}")
    return float(value)


def _noise_std(given: Any) -> tuple[float, ...]:
    if not _is_list(given, 4) or not all(_is_number(value) and value > 0 for value in given):
        raise PqkError(f"{OF}: noise_std must be four numbers above 0, got {given!r}")
    return tuple(float(value) for value in given)
