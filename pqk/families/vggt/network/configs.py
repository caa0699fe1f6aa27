"""VGGT configurations: the named ones, reading of a configuration into checked sizes, inference from weights.

The keys are those of the official constructor and of the parts it builds; `frame_blocks`, `global_blocks`, `blocks`
(of dino and camera) and `head_dim` are our additions for pruned and small networks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pqk.errors import PqkError, nearest

LARGEST, DEEPEST = 2**18, 1024
"""Upper bounds of a width or head count, and of the blocks of a stack: far above every known network."""

ENCODERS = ("dino", "conv")
DINO_NAMES = ("dinov2_vitl14_reg", "dinov2_vitb14_reg", "dinov2_vits14_reg", "dinov2_vitg2_reg")
"""Official names of the encoder of kind dino."""
DINO_REGISTERS = 4

_DPT: dict[str, Any] = {
    "features": 256,
    "out_channels": [256, 512, 1024, 1024],
    "layers": None,
    "resized": None,
    "last": None,
}
_TRACK: dict[str, Any] = {
    "features": 128,
    "iters": 4,
    "corr_levels": 7,
    "corr_radius": 4,
    "hidden_size": 384,
    "depth": 6,
    "num_heads": 8,
    "num_virtual_tracks": 64,
    "latent_dim": None,
    "out_channels": None,
}
_DEFAULTS: dict[str, Any] = {
    "img_size": 518,
    "patch_size": 14,
    "embed_dim": 1024,
    "depth": 24,
    "num_heads": 16,
    "head_dim": None,
    "mlp_ratio": 4,
    "num_register_tokens": 4,
    "init_values": 0.01,
    "patch_embed": "dino",
    "dino": {},
    "camera": {},
    "dpt": {},
    "track": None,
    "frame_blocks": None,
    "global_blocks": None,
    "enable_camera": True,
    "enable_depth": True,
    "enable_point": True,
    "enable_track": None,
}
_STACK = ("depth", "num_heads", "head_dim", "blocks")
_CAMERA = ("trunk_depth", "num_heads", "head_dim", "blocks")
_IGNORED = ("family",)

NAMED: dict[str, dict[str, Any]] = {
    "vggt-1b": {},
    "vggt-tiny": {
        "img_size": 518,
        "embed_dim": 192,
        "depth": 4,
        "num_heads": 3,
        "head_dim": 64,
        "init_values": 0.1,
        "dino": {"depth": 4, "num_heads": 3},
        "camera": {"trunk_depth": 2, "num_heads": 3, "head_dim": 64},
        "dpt": {"features": 64, "out_channels": [48, 64, 96, 96]},
    },
}
"""The released model, which is the default of every key, and a small one for quick runs."""

_LAYERS_1B, _DEPTH_1B = (4, 11, 17, 23), 24


@dataclass(frozen=True)
class BlockSize:
    """Sizes of one transformer block: attention heads, width of one head, hidden width of the MLP."""

    heads: int
    head_dim: int
    ffn: int


@dataclass(frozen=True)
class DptSize:
    """Widths of a DPT head: the fused maps and the four levels; layers: the rounds that it reads.

    resized: the four levels after they were resized (out_channels, but for a pruned network). last: of the map that is
    resized to the image (half of features, but for a pruned network).
    """

    features: int
    out_channels: tuple[int, int, int, int]
    layers: tuple[int, int, int, int]
    resized: tuple[int, int, int, int]
    last: int


@dataclass(frozen=True)
class TrackSize:
    """Sizes of the track head; see `pqk.families.vggt.network.track`."""

    features: int
    iters: int
    corr_levels: int
    corr_radius: int
    hidden_size: int
    depth: int
    num_heads: int
    num_virtual_tracks: int
    latent_dim: int
    out_channels: tuple[int, int, int, int]


@dataclass(frozen=True)
class VggtConfig:
    """Checked sizes of one VGGT network."""

    img_size: int
    patch_size: int
    dim: int
    registers: int
    init_values: float
    dino: tuple[BlockSize, ...] | None
    """None for the encoder of a single convolution."""
    frame_blocks: tuple[BlockSize, ...]
    global_blocks: tuple[BlockSize, ...]
    camera: tuple[BlockSize, ...] | None
    """Blocks of the camera head's trunk; None without that head."""
    depth_head: bool
    point_head: bool
    dpt: DptSize
    track: TrackSize | None

    @property
    def special(self) -> int:
        """Tokens of a frame before its patches: the camera token and the registers."""
        return 1 + self.registers


def layers_of(depth: int) -> tuple[int, int, int, int]:
    """The rounds that a DPT head reads in a network of `depth` rounds: VGGT-1B's 4, 11, 17, 23 of 24, scaled down."""
    first, second, third, last = (layer * depth // _DEPTH_1B for layer in _LAYERS_1B)
    return first, second, third, last


def read_config(config: Mapping[str, Any]) -> VggtConfig:
    """Checks a configuration and works out the sizes of every block.

    Raises PqkError naming the key for an unknown or impossible value.
    """
    values = {**_DEFAULTS, **_known(config, (*_DEFAULTS, *_IGNORED), "the vggt configuration")}
    dim = _count(values, "embed_dim")
    kind = "dino" if values["patch_embed"] in DINO_NAMES else values["patch_embed"]
    if kind not in ENCODERS:
        raise PqkError(f"vggt configuration: patch_embed must be one of {', '.join(ENCODERS)}, got {kind!r}")
    for key in ("enable_camera", "enable_depth", "enable_point", "enable_track"):
        if not isinstance(values[key], bool) and not (key == "enable_track" and values[key] is None):
            raise PqkError(f"vggt configuration: {key} must be true or false, got {values[key]!r}")
    patch_size, img_size = _count(values, "patch_size"), _count(values, "img_size")
    if img_size % patch_size:
        raise PqkError(f"vggt configuration: img_size {img_size} is not a multiple of patch_size {patch_size}")
    frame = _blocks(values, "", dim, values["mlp_ratio"], values["frame_blocks"], "frame_blocks", turned=True)
    across = _blocks(values, "", dim, values["mlp_ratio"], values["global_blocks"], "global_blocks", turned=True)
    if len(frame) != len(across):
        raise PqkError(
            "vggt configuration: frame_blocks and global_blocks must be equally many, got "
            f"{len(frame)} and {len(across)}"
        )
    return VggtConfig(
        img_size=img_size,
        patch_size=patch_size,
        dim=dim,
        registers=_count(values, "num_register_tokens", least=0),
        init_values=_positive(values, "init_values"),
        dino=_dino(values, dim) if kind == "dino" else None,
        frame_blocks=frame,
        global_blocks=across,
        camera=_camera(values, 2 * dim) if values["enable_camera"] else None,
        depth_head=values["enable_depth"],
        point_head=values["enable_point"],
        dpt=_dpt(values["dpt"], len(frame)),
        track=_track(values["track"], values["dpt"]) if _wants_track(values) else None,
    )


def infer_config(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of bare weights, from their shapes.

    Where shapes leave a choice the values are VGGT-1B's: its encoder and its camera head have as many heads as its
    frame blocks, its DPT heads read rounds 4, 11, 17 and 23 of 24. The track head is left out; its sizes are given.
    Raises PqkError for a missing weight.
    """

    def shape(key: str) -> Sequence[int]:
        if key not in weights:
            raise PqkError(f"it is no complete VGGT checkpoint: it lacks {key}")
        return tuple(weights[key].shape)

    def deep(stack: str) -> int:
        found = {int(match[1]) for key in weights if (match := re.match(re.escape(stack) + r"\.(\d+)\.", key))}
        return len(found)

    dim = shape("aggregator.camera_token")[-1]
    head_dim = shape("aggregator.frame_blocks.0.attn.q_norm.weight")[0]
    heads = shape("aggregator.frame_blocks.0.attn.qkv.weight")[0] // 3 // head_dim
    config: dict[str, Any] = {
        "embed_dim": dim,
        "depth": deep("aggregator.frame_blocks"),
        "num_heads": heads,
        "head_dim": head_dim,
        "mlp_ratio": _ratio(shape("aggregator.frame_blocks.0.mlp.fc1.weight")[0], dim),
        "num_register_tokens": shape("aggregator.register_token")[2],
        "enable_camera": "camera_head.empty_pose_tokens" in weights,
        "enable_depth": "depth_head.norm.weight" in weights,
        "enable_point": "point_head.norm.weight" in weights,
        "enable_track": False,
    }
    if "aggregator.patch_embed.proj.weight" in weights:
        config |= {"patch_embed": "conv", "patch_size": shape("aggregator.patch_embed.proj.weight")[-1]}
        config["img_size"] = 37 * config["patch_size"]
    else:
        side = round((shape("aggregator.patch_embed.pos_embed")[1] - 1) ** 0.5)
        config["patch_size"] = shape("aggregator.patch_embed.patch_embed.proj.weight")[-1]
        config["img_size"] = side * config["patch_size"]
        config["dino"] = {"depth": deep("aggregator.patch_embed.blocks"), "num_heads": heads}
    if config["enable_camera"]:
        inner = shape("camera_head.trunk.0.attn.qkv.weight")[0] // 3
        config["camera"] = {"trunk_depth": deep("camera_head.trunk"), "num_heads": heads, "head_dim": inner // heads}
    heads_of_maps = [name for name in ("depth", "point") if config[f"enable_{name}"]]
    prefix = f"{heads_of_maps[0]}_head" if heads_of_maps else None
    if prefix is not None:
        config["dpt"] = {
            "features": shape(f"{prefix}.scratch.layer1_rn.weight")[0],
            "out_channels": [shape(f"{prefix}.projects.{level}.weight")[0] for level in range(4)],
        }
    if "track_head.tracker.query_ref_token" in weights:
        extractor, tracker = "track_head.feature_extractor", "track_head.tracker.updateformer"
        config["track"] = {
            "features": shape(f"{extractor}.scratch.layer1_rn.weight")[0],
            "out_channels": [shape(f"{extractor}.projects.{level}.weight")[0] for level in range(4)],
            "hidden_size": shape(f"{tracker}.input_transform.weight")[0],
            "latent_dim": shape("track_head.tracker.corr_mlp.fc2.weight")[0],
            "depth": deep(f"{tracker}.space_virtual_blocks"),
            "num_virtual_tracks": shape(f"{tracker}.virual_tracks")[1],
        }
    return config


def _ratio(hidden: int, dim: int) -> float | int:
    return hidden // dim if hidden % dim == 0 else hidden / dim


def _known(given: Any, allowed: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise PqkError(f"{where} must be a mapping, got {given!r}")
    for key in given:
        if key not in allowed:
            raise PqkError(f"unknown key {key!r} in {where}{nearest(str(key), allowed)}")
    return dict(given)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def _count(values: Mapping[str, Any], key: str, where: str = "", least: int = 1) -> int:
    if not _is_count(values.get(key), least):
        name = f"{where}.{key}" if where else key
        raise PqkError(
            f"vggt configuration: {name} must be a whole number from {least} to {LARGEST}, got {values.get(key)!r}"
        )
    return values[key]


def _positive(values: Mapping[str, Any], key: str) -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
        raise PqkError(f"vggt configuration: {key} must be a number above 0, got {value!r}")
    return float(value)


def _blocks(
    values: Mapping[str, Any],
    where: str,
    dim: int,
    ratio: Any,
    listed: Any,
    name: str,
    depth: str = "depth",
    turned: bool = False,
) -> tuple[BlockSize, ...]:
    """Block sizes of one stack: from its list when it has one, otherwise depth times the same block."""
    dot = f"{where}." if where else ""
    if values.get("head_dim") is not None:
        head_dim = _count(values, "head_dim", where)
    else:
        heads = _count(values, "num_heads", where)
        if dim % heads:
            raise PqkError(
                f"vggt configuration: a width of {dim} is not a multiple of {dot}num_heads {heads}; give {dot}head_dim"
            )
        head_dim = dim // heads
    if turned and head_dim % 4:
        raise PqkError(f"vggt configuration: the head width must be a multiple of 4 (rotary embedding), got {head_dim}")
    if listed is None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 1 <= dim * ratio <= LARGEST:
            raise PqkError(
                f"vggt configuration: mlp_ratio must make the MLP 1 to {LARGEST} wide, got {ratio!r} times {dim}"
            )
        size = BlockSize(_count(values, "num_heads", where), head_dim, round(dim * ratio))
        deep = _count(values, depth, where)
        if deep > DEEPEST:
            raise PqkError(f"vggt configuration: {dot}{depth} must be at most {DEEPEST}, got {deep}")
        return (size,) * deep
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not 1 <= len(listed) <= DEEPEST:
        raise PqkError(f"vggt configuration: {name} must be a list of 1 to {DEEPEST} blocks, got {listed!r:.80}")
    sizes = []
    for index, block in enumerate(listed):
        if not isinstance(block, Mapping) or set(block) != {"heads", "ffn"} or not all(map(_is_count, block.values())):
            raise PqkError(
                f"vggt configuration: {name}[{index}] must be {{heads: ..., ffn: ...}} with numbers to {LARGEST}, "
                f"got {block!r}"
            )
        sizes.append(BlockSize(block["heads"], head_dim, block["ffn"]))
    return tuple(sizes)


def _dino(values: Mapping[str, Any], dim: int) -> tuple[BlockSize, ...]:
    given = _known(values["dino"], _STACK, "dino of the vggt configuration")
    merged = {"depth": 24, "num_heads": values["num_heads"], "head_dim": values["head_dim"], **given}
    return _blocks(merged, "dino", dim, 4, given.get("blocks"), "dino.blocks")


def _camera(values: Mapping[str, Any], dim: int) -> tuple[BlockSize, ...]:
    given = _known(values["camera"], _CAMERA, "camera of the vggt configuration")
    merged = {"trunk_depth": 4, "num_heads": values["num_heads"], **given}
    return _blocks(merged, "camera", dim, 4, given.get("blocks"), "camera.blocks", depth="trunk_depth")


def _dpt(given: Any, depth: int) -> DptSize:
    values = {**_DPT, **_known(given, tuple(_DPT), "dpt of the vggt configuration")}
    layers = layers_of(depth) if values["layers"] is None else values["layers"]
    right = isinstance(layers, Sequence) and not isinstance(layers, str) and len(layers) == 4
    if not right or not all(_is_count(layer, 0) and layer < depth for layer in layers):
        raise PqkError(f"vggt configuration: dpt.layers must be four rounds from 0 to {depth - 1}, got {layers!r}")
    features, widths = _count(values, "features", "dpt"), _levels(values["out_channels"], "dpt.out_channels", 4)
    resized = widths if values["resized"] is None else _levels(values["resized"], "dpt.resized")
    if resized[2] != widths[2]:
        raise PqkError(f"vggt configuration: level 2 is not resized: dpt.resized must have {widths[2]} there")
    if values["last"] is None and features % 8:
        raise PqkError(f"vggt configuration: dpt.features must be a multiple of 8, got {features}")
    last = features // 2 if values["last"] is None else _count(values, "last", "dpt")
    if last % 4:
        raise PqkError(f"vggt configuration: dpt.last must be a multiple of 4, got {last}")
    return DptSize(features, widths, (layers[0], layers[1], layers[2], layers[3]), resized, last)


def _levels(widths: Any, where: str, step: int = 1) -> tuple[int, int, int, int]:
    right = isinstance(widths, Sequence) and not isinstance(widths, str) and len(widths) == 4
    if not right or not all(_is_count(width) and width % step == 0 for width in widths):
        what = "whole numbers from 1" if step == 1 else f"multiples of {step}"
        raise PqkError(f"vggt configuration: {where} must be four {what} to {LARGEST}, got {widths!r}")
    return (widths[0], widths[1], widths[2], widths[3])


def _wants_track(values: Mapping[str, Any]) -> bool:
    """Whether the track head is built: asked for, or given by its sizes without a word against it."""
    if values["enable_track"] is None:
        return values["track"] is not None
    return bool(values["enable_track"])


def _track(given: Any, dpt: Any) -> TrackSize:
    values = {**_TRACK, **_known(given or {}, tuple(_TRACK), "track of the vggt configuration")}
    levels = values["out_channels"] if values["out_channels"] is not None else {**_DPT, **dpt}["out_channels"]
    latent = values["features"] if values["latent_dim"] is None else _count(values, "latent_dim", "track")
    sizes = {key: _count(values, key, "track") for key in _TRACK if key not in ("latent_dim", "out_channels")}
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise PqkError(
            f"vggt configuration: track.hidden_size {sizes['hidden_size']} is not a multiple of track.num_heads "
            f"{sizes['num_heads']}"
        )
    return TrackSize(**sizes, latent_dim=latent, out_channels=_levels(levels, "track.out_channels"))
