"""DUSt3R configurations: the named ones, and the reading of a configuration dictionary into checked sizes.

The keys are those of the official constructor; `enc_blocks`, `dec_blocks`, `dec_blocks2`, `enc_head_dim`,
`dec_head_dim` and `dpt` are our additions for pruned and small networks, `reduce` for networks that do less work
(letter T, see `pqk.families.dust3r.reduce`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pqk.errors import PqkError
from pqk.families.reducing import read_reduce
from pqk.families.sizes import LARGEST, BlockSize, count, is_count, known, levels, stack

PATCH_EMBEDS = ("PatchEmbedDust3R", "ManyAR_PatchEmbed")
DPT_WIDTHS: dict[str, Any] = {"feature_dim": 256, "last_dim": 128, "layer_dims": [96, 192, 384, 768]}

OF = "dust3r configuration"

_DEFAULTS: dict[str, Any] = {
    "output_mode": "pts3d",
    "head_type": "linear",
    "depth_mode": ["exp", "-inf", "inf"],
    "conf_mode": ["exp", 1, "inf"],
    "landscape_only": True,
    "patch_embed_cls": "PatchEmbedDust3R",
    "pos_embed": "RoPE100",
    "img_size": [224, 224],
    "patch_size": 16,
    "mlp_ratio": 4,
    "norm_im2_in_dec": True,
}
_SIZES = ("enc_embed_dim", "enc_depth", "enc_num_heads", "dec_embed_dim", "dec_depth", "dec_num_heads")
_ADDITIONS = ("dpt", "enc_blocks", "dec_blocks", "dec_blocks2", "enc_head_dim", "dec_head_dim", "reduce")
_IGNORED = ("freeze", "family")
"""Training-only, or not ours to read."""

_VIT_LARGE = {
    **_DEFAULTS,
    "landscape_only": False,
    "enc_embed_dim": 1024,
    "enc_depth": 24,
    "enc_num_heads": 16,
    "dec_embed_dim": 768,
    "dec_depth": 12,
    "dec_num_heads": 12,
}

NAMED: dict[str, dict[str, Any]] = {
    "dust3r-224-linear": {**_VIT_LARGE, "img_size": [224, 224]},
    "dust3r-512-linear": {**_VIT_LARGE, "img_size": [512, 512]},
    "dust3r-512-dpt": {**_VIT_LARGE, "img_size": [512, 512], "head_type": "dpt"},
    "dust3r-tiny": {
        **_VIT_LARGE,
        "img_size": [512, 512],
        "head_type": "dpt",
        "enc_embed_dim": 384,
        "enc_depth": 4,
        "enc_num_heads": 3,
        "enc_head_dim": 64,
        "dec_embed_dim": 256,
        "dec_depth": 3,
        "dec_num_heads": 2,
        "dec_head_dim": 64,
        "dec_blocks": [{"heads": 2, "ffn": 640}] * 3,
        "dec_blocks2": [{"heads": 2, "ffn": 640}] * 3,
        "dpt": {"feature_dim": 64, "last_dim": 32, "layer_dims": [48, 96, 128, 128]},
    },
}
"""The three released models and a small one for quick runs."""


@dataclass(frozen=True)
class DptSize:
    """Widths of a DPT head: the fused maps, the last convolutions, and the four reassembled levels."""

    feature_dim: int
    last_dim: int
    layer_dims: tuple[int, int, int, int]


@dataclass(frozen=True)
class Mode:
    """An output activation: its name and its lower and upper bound."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Dust3rConfig:
    """Checked sizes of one DUSt3R network."""

    enc_dim: int
    dec_dim: int
    enc_blocks: tuple[BlockSize, ...]
    dec_blocks: tuple[BlockSize, ...]
    dec_blocks2: tuple[BlockSize, ...]
    patch_size: int
    rope_base: float
    norm_memory: bool
    dpt: DptSize | None
    """None for the linear head."""
    depth_mode: Mode
    conf_mode: Mode
    tail: int = 1
    """How much coarser the grid is that the last convolutions of a DPT head run on."""
    merged: float = 0.0
    """Largest share of tokens that merging takes away."""


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON-able data: tuples become lists, infinities the strings "inf" and "-inf"."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) and math.isinf(value):
            return "inf" if value > 0 else "-inf"
        return value

    return plain(config)


def read_config(config: Mapping[str, Any]) -> Dust3rConfig:
    """Checks a configuration and works out the sizes of every block.

    Raises PqkError naming the key for an unknown, missing or impossible value.
    """
    values = {**_DEFAULTS, **known(OF, config, (*_DEFAULTS, *_SIZES, *_ADDITIONS, *_IGNORED))}
    for key, choices in (
        ("output_mode", ("pts3d",)),
        ("head_type", ("linear", "dpt")),
        ("patch_embed_cls", PATCH_EMBEDS),
    ):
        if values[key] not in choices:
            raise PqkError(f"{OF}: {key} must be one of {', '.join(choices)}, got {values[key]!r}")
    for key in ("landscape_only", "norm_im2_in_dec"):
        if not isinstance(values[key], bool):
            raise PqkError(f"{OF}: {key} must be true or false, got {values[key]!r}")
    enc_dim, dec_dim = count(OF, values, "enc_embed_dim"), count(OF, values, "dec_embed_dim")
    enc_blocks = _stack(values, "enc", enc_dim, values.get("enc_blocks"), "enc_blocks")
    dec_blocks = _stack(values, "dec", dec_dim, values.get("dec_blocks"), "dec_blocks")
    dec_blocks2 = dec_blocks
    if values.get("dec_blocks2") is not None:
        dec_blocks2 = _stack(values, "dec", dec_dim, values["dec_blocks2"], "dec_blocks2")
    if len(dec_blocks) != len(dec_blocks2):
        raise PqkError(
            f"{OF}: both decoders need the same number of blocks, got {len(dec_blocks)} and {len(dec_blocks2)}"
        )
    patch_size = count(OF, values, "patch_size")
    dpt = None
    if values["head_type"] == "dpt":
        dpt = _dpt(values.get("dpt") or {})
        if patch_size != 16:
            raise PqkError(f"{OF}: a DPT head needs patch_size 16, got {patch_size}")
        dpt_hooks(len(dec_blocks))
    depth_mode = _mode(values, "depth_mode", ("exp", "linear", "square"))
    if (depth_mode.low, depth_mode.high) != (-math.inf, math.inf):
        raise PqkError(f"{OF}: depth_mode must be unbounded (-inf, inf), got {values['depth_mode']!r}")
    return Dust3rConfig(
        enc_dim=enc_dim,
        dec_dim=dec_dim,
        enc_blocks=enc_blocks,
        dec_blocks=dec_blocks,
        dec_blocks2=dec_blocks2,
        patch_size=patch_size,
        rope_base=_rope_base(values["pos_embed"]),
        norm_memory=values["norm_im2_in_dec"],
        dpt=dpt,
        depth_mode=depth_mode,
        conf_mode=_mode(values, "conf_mode", ("exp", "sigmoid")),
        **_reduced(values.get("reduce"), dpt),
    )


def dpt_hooks(depth: int) -> tuple[int, int, int, int]:
    """Which entries of the token list (0 = encoder, 1..depth = decoder layers) feed the four levels of a DPT head.

    Raises PqkError when the decoder is too shallow for four different entries (depth below 3).
    """
    hooks = (0, 2 * depth // 4, 3 * depth // 4, depth)
    if len(set(hooks)) < 4:
        raise PqkError(f"a DPT head reads four different decoder layers, so dec_depth must be at least 3, got {depth}")
    return hooks


def _stack(values: Mapping[str, Any], part: str, dim: int, listed: Any, name: str) -> tuple[BlockSize, ...]:
    """Sizes of the blocks of the encoder (part enc) or a decoder (dec)."""
    keys = (f"{part}_depth", f"{part}_num_heads", f"{part}_head_dim")
    return stack(OF, values, dim, values["mlp_ratio"], listed, name, keys=keys, rotary=True)


def _reduced(given: Any, dpt: DptSize | None) -> dict[str, Any]:
    """Reads the key `reduce`; see `read_reduce`."""
    tail, merged = read_reduce(OF, given)
    if tail > 1 and dpt is None:
        raise PqkError(f"{OF}: reduce.tail is {given['tail']}, but a linear head has no tail to fold")
    return {"tail": tail, "merged": merged}


def _dpt(given: Any) -> DptSize:
    widths = {**DPT_WIDTHS, **known(OF, given, tuple(DPT_WIDTHS), "dpt")}
    layers = levels(OF, widths["layer_dims"], "dpt.layer_dims")
    if not is_count(widths["feature_dim"]) or widths["feature_dim"] % 2:
        raise PqkError(f"{OF}: dpt.feature_dim must be an even number to {LARGEST}, got {widths['feature_dim']!r}")
    return DptSize(widths["feature_dim"], count(OF, widths, "last_dim", "dpt"), layers)


def _mode(values: Mapping[str, Any], key: str, names: Sequence[str]) -> Mode:
    """Reads [name, low, high]; the bounds are numbers or the strings "inf" and "-inf"."""
    value = values[key]
    try:
        name, low, high = value
        low, high = float(low), float(high)
    except (TypeError, ValueError):
        raise PqkError(f"{OF}: {key} must be [name, low, high], got {value!r}") from None
    if name not in names:
        raise PqkError(f"{OF}: {key} must be one of {', '.join(names)}, got {name!r}")
    if not low < high or (name == "sigmoid" and math.isinf(high - low)):
        raise PqkError(f"{OF}: {key} has impossible bounds {value!r}")
    return Mode(name, low, high)


def lowest_confidence(config: Mapping[str, Any]) -> float:
    """The bound that confidences of this configuration lie above: 1 for the official 1 + e^c, 0 for a plain sigmoid."""
    low = read_config(config).conf_mode.low
    return low if math.isfinite(low) else 1.0  # with an infinite one no confidence is finite


def _rope_base(text: Any) -> float:
    match = re.fullmatch(r"RoPE(\d+(?:\.\d+)?)", str(text))
    if match is None or float(match[1]) <= 0:
        raise PqkError(f"{OF}: pos_embed must be RoPE followed by its base (RoPE100), got {text!r}")
    return float(match[1])
