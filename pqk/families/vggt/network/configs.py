"""VGGT configurations: the named ones, reading of a configuration into checked sizes, inference from weights.

The keys are those of the official constructor and of the parts it builds; `frame_blocks`, `global_blocks`, `blocks`
(of dino and camera) and `head_dim` are our additions for pruned and small networks, `reduce` for networks that do less
work (letter T, see `pqk.families.vggt.reduce`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pqk.errors import PqkError
from pqk.families.reducing import read_reduce
from pqk.families.sizes import LARGEST, BlockSize, count, is_count, known, levels, stack

OF = "vggt configuration"

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
    "reduce": None,
}
_HEADS = ("num_heads", "head_dim")
_STACK = ("depth", *_HEADS, "blocks")
_CAMERA = ("trunk_depth", *_HEADS, "blocks")
_IGNORED = ("family",)

NAMED: dict[str, dict[str, Any]] = {
    "vggt-1b": {},
    "vggt-tiny": {
        "img_size": 518,
        "embed_dim": 192,
        "depth": 4,
        "num_heads": 3,
        "head_dim": 64,
        "init_values": 0.3,
        "dino": {"depth": 4, "num_heads": 3},
        "camera": {"trunk_depth": 2, "num_heads": 3, "head_dim": 64},
        "dpt": {"features": 64, "out_channels": [48, 64, 96, 96]},
    },
}
"""The released model, which is the default of every key, and a small one for quick runs."""

_LAYERS_1B, _DEPTH_1B = (4, 11, 17, 23), 24


@dataclass(frozen=True)
class DptSize:
    """Widths of a DPT head: the fused maps and the four levels; layers: the rounds that it reads.

    resized: the four levels after they were resized (out_channels, but for a pruned network). last: of the map that is
    resized to the image (half of features, but for a pruned network). tail: how much coarser the grid of the last
    convolutions is, 1, 2 or 4.
    """

    features: int
    out_channels: tuple[int, int, int, int]
    layers: tuple[int, int, int, int]
    resized: tuple[int, int, int, int]
    last: int
    tail: int = 1


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
    merged: float
    """Largest share of patch tokens that merging takes away."""

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
    values = {**_DEFAULTS, **known(OF, config, (*_DEFAULTS, *_IGNORED))}
    dim = count(OF, values, "embed_dim")
    kind = "dino" if values["patch_embed"] in DINO_NAMES else values["patch_embed"]
    if kind not in ENCODERS:
        raise PqkError(f"{OF}: patch_embed must be one of {', '.join(ENCODERS)}, got {kind!r}")
    for key in ("enable_camera", "enable_depth", "enable_point", "enable_track"):
        if not isinstance(values[key], bool) and not (key == "enable_track" and values[key] is None):
            raise PqkError(f"{OF}: {key} must be true or false, got {values[key]!r}")
    patch_size, img_size = count(OF, values, "patch_size"), count(OF, values, "img_size")
    if img_size % patch_size:
        raise PqkError(f"{OF}: img_size {img_size} is not a multiple of patch_size {patch_size}")
    frame = stack(OF, values, dim, values["mlp_ratio"], values["frame_blocks"], "frame_blocks", rotary=True)
    across = stack(OF, values, dim, values["mlp_ratio"], values["global_blocks"], "global_blocks", rotary=True)
    if len(frame) != len(across):
        raise PqkError(
            OF + f": frame_blocks and global_blocks must be equally many, got {len(frame)} and {len(across)}"
        )
    tail, merged = read_reduce(OF, values["reduce"])
    return VggtConfig(
        img_size=img_size,
        patch_size=patch_size,
        dim=dim,
        registers=count(OF, values, "num_register_tokens", least=0),
        init_values=_positive(values, "init_values"),
        dino=_dino(values, dim) if kind == "dino" else None,
        frame_blocks=frame,
        global_blocks=across,
        camera=_camera(values, 2 * dim) if values["enable_camera"] else None,
        depth_head=values["enable_depth"],
        point_head=values["enable_point"],
        dpt=replace(_dpt(values["dpt"], len(frame)), tail=tail),
        track=_track(values["track"], values["dpt"]) if _wants_track(values) else None,
        merged=merged,
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


def _positive(values: Mapping[str, Any], key: str) -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
        raise PqkError(f"{OF}: {key} must be a number above 0, got {value!r}")
    return float(value)


def _dino(values: Mapping[str, Any], dim: int) -> tuple[BlockSize, ...]:
    given = known(OF, values["dino"], _STACK, "dino")
    merged = {"depth": 24, "num_heads": values["num_heads"], "head_dim": values["head_dim"], **given}
    return stack(OF, merged, dim, 4, given.get("blocks"), "dino.blocks", part="dino")


def _camera(values: Mapping[str, Any], dim: int) -> tuple[BlockSize, ...]:
    given = known(OF, values["camera"], _CAMERA, "camera")
    merged = {"trunk_depth": 4, "num_heads": values["num_heads"], **given}
    return stack(OF, merged, dim, 4, given.get("blocks"), "camera.blocks", part="camera", keys=("trunk_depth", *_HEADS))


def _dpt(given: Any, depth: int) -> DptSize:
    values = {**_DPT, **known(OF, given, tuple(_DPT), "dpt")}
    layers = layers_of(depth) if values["layers"] is None else values["layers"]
    right = isinstance(layers, Sequence) and not isinstance(layers, str) and len(layers) == 4
    if not right or not all(is_count(layer, 0) and layer < depth for layer in layers):
        raise PqkError(f"{OF}: dpt.layers must be four rounds from 0 to {depth - 1}, got {layers!r}")
    features, widths = count(OF, values, "features", "dpt"), levels(OF, values["out_channels"], "dpt.out_channels", 4)
    resized = widths if values["resized"] is None else levels(OF, values["resized"], "dpt.resized")
    if resized[2] != widths[2]:
        raise PqkError(f"{OF}: level 2 is not resized: dpt.resized must have {widths[2]} there")
    if values["last"] is None and features % 8:
        raise PqkError(f"{OF}: dpt.features must be a multiple of 8, got {features}")
    last = features // 2 if values["last"] is None else count(OF, values, "last", "dpt")
    if last % 4:
        raise PqkError(f"{OF}: dpt.last must be a multiple of 4, got {last}")
    return DptSize(features, widths, (layers[0], layers[1], layers[2], layers[3]), resized, last)


def _wants_track(values: Mapping[str, Any]) -> bool:
    """Whether the track head is built: asked for, or given by its sizes without a word against it."""
    if values["enable_track"] is None:
        return values["track"] is not None
    return bool(values["enable_track"])


def _track(given: Any, dpt: Any) -> TrackSize:
    values = {**_TRACK, **known(OF, given or {}, tuple(_TRACK), "track")}
    widths = values["out_channels"] if values["out_channels"] is not None else {**_DPT, **dpt}["out_channels"]
    latent = values["features"] if values["latent_dim"] is None else count(OF, values, "latent_dim", "track")
    sizes = {key: count(OF, values, key, "track") for key in _TRACK if key not in ("latent_dim", "out_channels")}
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise PqkError(
            f"{OF}: track.hidden_size {sizes['hidden_size']} is not a multiple of track.num_heads {sizes['num_heads']}"
        )
    return TrackSize(**sizes, latent_dim=latent, out_channels=levels(OF, widths, "track.out_channels"))
