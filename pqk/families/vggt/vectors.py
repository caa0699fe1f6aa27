"""Runners of the cases of VGGT: models, blocks and heads, parts, pose encodings, preprocessing, official files.

The names in the cases are those of the official network: `_iterK` is the round of a head that refines, `mid_*` are
intermediate results, compared where a module of ours has that input or output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor

from pqk.families.build import build_model, empty_model
from pqk.families.checkpoint import load_model
from pqk.families.layers import Rope, apply_rope, grid_positions, rope_arrays
from pqk.families.sizes import BlockSize
from pqk.families.tape import Tape
from pqk.families.vectors import (
    FULL_MARK,
    MARK,
    BadCase,
    Case,
    Compared,
    NotHandled,
    compare,
    compare_keys,
    compare_probes,
    draw_weights,
)
from pqk.families.vggt import geometry
from pqk.families.vggt.network.camera import CameraHead, activate_pose
from pqk.families.vggt.network.configs import NAMED, DptSize
from pqk.families.vggt.network.dpt import DptHead, place_embedding
from pqk.families.vggt.network.layers import DINO_EPS, EPS, Block, Dino
from pqk.families.vggt.network.model import Vggt, depth_maps, point_maps, rope_tables
from pqk.families.vggt.preprocess import load_square, official_preprocess, official_size

TRACK_MARK, FLOW_MARK = 1e-4, 1e-3
"""Of the track head's outputs and of what its later rounds begin with: a displacement turns its waves by up to 970
radians a pixel, so that rounding grows."""
THEIRS = {"track": "track", "vis": "track_vis", "conf": "track_conf"}
CHECKPOINT = "model.pt"
PATCH = 14
OUTPUTS = {
    r"patch_embed": "aggregator.patch_embed",
    r"dino\.norm": "aggregator.patch_embed.norm",
    r"(frame|global)_block_(\d+)": r"aggregator.\1_blocks.\2",
    r"(frame|global)_block_(\d+)\.attn": r"aggregator.\1_blocks.\2.attn",
    r"(frame|global)_block_(\d+)\.q_normed": r"aggregator.\1_blocks.\2.attn.q_norm",
    r"camera\.token_norm": "camera_head.token_norm",
    r"camera\.modulation": "camera_head.poseLN_modulation",
    r"camera\.trunk": "camera_head.trunk.LAST",
    r"camera\.delta": "camera_head.pose_branch",
    r"(depth|point)_head\.project_(\d)": r"\1_head.projects.\2",
    r"(depth|point)_head\.resized_(\d)": r"\1_head.resize_layers.\2",
    **{rf"(depth|point)_head\.layer_rn_{level}": rf"\1_head.scratch.layer{level + 1}_rn" for level in range(4)},
    r"(depth|point)_head\.fusion_(\d)": r"\1_head.scratch.refinenet\2",
    r"(depth|point)_head\.output_conv1": r"\1_head.scratch.output_conv1",
    r"(depth|point)_head\.raw": r"\1_head",
    r"track\.flow": "track_head.tracker.updateformer",
}
"""Name of an intermediate result, without its round -> the module whose output it is."""
INPUTS = {
    r"dino\.tokens_in": "aggregator.patch_embed.blocks.0",
    r"tokens_in": "aggregator.frame_blocks.0",
    r"(depth|point)_head\.final_in": r"\1_head.scratch.output_conv2",
    r"track\.corr_raw": "track_head.tracker.corr_mlp",
}
"""The same, of those that are a module's input."""


def keys(case: Case) -> Iterator[Compared]:
    """Names and shapes of the weights of the released model with its track head."""
    name = case.name.partition("_keys.tsv")[0].replace("_", "-")
    if name not in NAMED:
        raise NotHandled(f"the configuration {name}")
    yield from compare_keys(case, empty_model("vggt", {**NAMED[name], "enable_track": True}).state_dict(keep_vars=True))


def model(case: Case) -> Iterator[Compared]:
    """Whole forward passes of a small network whose weights are given."""
    net = build_model("vggt", case.need("config"), case.weights())
    yield from _count(case, net)
    yield from _forward(case, net, MARK)


def full(case: Case) -> Iterator[Compared]:
    """The official architecture with weights from the seed rule: 6 GB of memory, about a minute."""
    config = case.need("config")
    if config == {"vggt": "default constructor"}:
        config = {**NAMED["vggt-1b"], "enable_track": True}
    net = cast(Vggt, empty_model("vggt", config))
    yield from _count(case, net)
    weights = draw_weights(case, net.state_dict())
    yield from compare_probes(case, weights)
    net.load_state_dict(weights, assign=True)
    yield from _forward(case, net, FULL_MARK)


def checkpoint(case: Case) -> Iterator[Compared]:
    """A bare state dict, whose configuration is in the shapes of its weights."""
    if not (case.path / CHECKPOINT).is_file():
        raise BadCase(f"{case.path} has no file {CHECKPOINT}")
    yield from _forward(case, load_model(case.path / CHECKPOINT), MARK)


def blocks(case: Case) -> Iterator[Compared]:
    """One block of the aggregator (aa.*), one of the image encoder (dino.*), a camera head and a depth head."""
    sizes = case.need("config")
    dim, heads = sizes["dim"], sizes["heads"]
    for part, eps, qk_norm in (("aa", EPS, True), ("dino", DINO_EPS, False)):
        weights = case.weights(f"{part}.")
        block = Block(dim, BlockSize(heads, dim // heads, len(weights["mlp.fc1.bias"])), eps, qk_norm)
        block.load_state_dict(weights)
        x, rope = _tensor(case, f"in_{part}_x"), None
        if f"in_{part}_pos" in case:
            rope = _rope(case[f"in_{part}_pos"], dim // heads)
        with torch.no_grad(), Tape(block) as tape:
            yield case.check(f"out_{part}", block(x, x.shape[1], rope))
        for name in case.names(f"mid_{part}."):
            yield from _checked(case, name, tape.only(name.removeprefix(f"mid_{part}.")))
    yield from _camera_block(case, BlockSize(heads, dim // heads, 4 * dim))
    yield from _depth_block(case, dim)


def parts(case: Case) -> Iterator[Compared]:
    """Rotary embedding, place embedding, resized position tables, activations."""
    for index, query in enumerate(case.info.get("rope", [])):
        special = np.zeros((query["special"], 2), np.int64)
        positions = np.concatenate((special, grid_positions(*query["grid"]) + 1))
        positions = np.broadcast_to(positions, (query["shape"][0], *positions.shape))
        yield case.check(f"mid_rope_pos{index}", positions)
        queries, head_dim = _tensor(case, f"in_rope_q{index}"), query["shape"][-1]
        yield case.check(f"out_rope{index}", apply_rope(queries, _rope(positions, head_dim, query["freq"]), head_dim))
    for index, (columns, rows, width, height, channels) in enumerate(case.info.get("uv", [])):
        yield case.check(f"out_uv_embed{index}", place_embedding(columns, rows, width / height, channels))
    for index, (side, height, width, channels) in enumerate(case.info.get("posembed", [])):
        encoder = Dino(channels, PATCH, side // PATCH, ())
        encoder.pos_embed = torch.nn.Parameter(_tensor(case, f"in_posembed{index}"), requires_grad=False)
        yield case.check(f"out_posembed{index}", encoder.table((height // PATCH, width // PATCH)))
    raw = _tensor(case, "in_raw")
    v, c = raw[:, :3].permute(0, 2, 3, 1), raw[:, 3]
    length = v.norm(dim=-1, keepdim=True)
    points, conf = point_maps(raw)
    found = {
        "out_act_inv_log": points,
        "out_act_exp": torch.cat([depth_maps(raw[:, [index, 3]])[0] for index in range(3)], dim=-1),
        "out_conf_expp1": conf,
        "out_pose_act": activate_pose(_tensor(case, "in_pose")),
        # The network has no use for these.
        "out_act_linear": v,
        "out_act_norm_exp": v / length * torch.expm1(length),
        "out_act_xy_inv_log": torch.cat((v[..., :2] * points[..., 2:], points[..., 2:]), dim=-1),
        "out_conf_expp0": torch.exp(c),
        "out_conf_sigmoid": torch.sigmoid(c),
    }
    yield from (case.check(name, value) for name, value in found.items() if name in case)


def pose_encodings(case: Case) -> Iterator[Compared]:
    """Pose encodings to cameras and back, and depth as points of the world."""
    height, width = case.need("hw")
    extrinsics, intrinsics = geometry.pose_encoding_to_extri_intri(_tensor(case, "in_pose_enc"), (height, width))
    yield case.check("out_extrinsics", extrinsics)
    yield case.check("out_intrinsics", intrinsics)
    again = geometry.extri_intri_to_pose_encoding(extrinsics, intrinsics, (height, width))
    yield case.check("out_pose_enc_roundtrip", again)
    encoding = _tensor(case, "in_pose_enc")
    encoding[..., 3:7] /= encoding[..., 3:7].norm(dim=-1, keepdim=True)
    units = geometry.pose_encoding_to_extri_intri(encoding, (height, width))[0]
    yield case.check("mid_extrinsics_of_unit_quaternion", units)
    yield case.check("out_extrinsics_inverse", geometry.invert_extrinsics(units[0]))
    points = geometry.unproject_depth(_tensor(case, "in_depth"), units[0], intrinsics[0])
    yield case.check("out_world_points", points)
    rotations = geometry.quaternion_to_matrix(_tensor(case, "in_quat"))
    yield case.check("out_quat_to_mat", rotations)
    yield case.check("out_mat_to_quat", geometry.matrix_to_quaternion(rotations))


def preprocess(case: Case) -> Iterator[Compared]:
    """The table of output sizes, and small pictures, which must be equal value by value."""
    if "out_size_table_w_h" in case:
        found = [official_size(width, height, mode) for width, height, mode in case.need("size_queries")]
        yield case.check("out_size_table_w_h", found)
    for index, mode in enumerate(case.info.get("image_queries", [])):
        image = case[f"in_image{index}"]
        if mode.isdigit():
            tensor, places = load_square([image], int(mode))
            yield case.check(f"out_coords{index}", places)
        else:
            tensor = official_preprocess([image], mode)
        codes = tensor.astype(np.float64) * 255
        yield case.check(f"out_tensor_x255_{index}", np.rint(codes).astype(np.uint8))
        yield compare(f"whole numbers {index}", codes, np.rint(codes), 1e-6)


KINDS = {
    "vggt_keys": keys,
    "vggt_model": model,
    "vggt_full": full,
    "vggt_ckpt": checkpoint,
    "vggt_blocks": blocks,
    "vggt_parts": parts,
    "vggt_geometry": pose_encodings,
    "vggt_preprocess": preprocess,
}


def _count(case: Case, net: torch.nn.Module) -> Iterator[Compared]:
    if "n_params" in case.info:
        yield compare("n_params", sum(weight.numel() for weight in net.parameters()), case.info["n_params"])


def _forward(case: Case, net: Vggt, mark: float) -> Iterator[Compared]:
    """The outputs of the network, and every intermediate result of the case that a module of ours has."""
    points = _tensor(case, "in_query_points") if "in_query_points" in case else None
    images = _tensor(case, "in_images")
    with torch.inference_mode(), Tape(net) as tape:
        out = net(images, points)
    for name, value in out.items():
        expected = f"out_{THEIRS.get(name, name)}"
        if expected in case:
            yield case.check(expected, value, TRACK_MARK if name in THEIRS else mark)
    for calls in tape.calls("camera_head"):
        for index, pose in enumerate(calls):
            if f"out_pose_enc_iter{index}" in case:
                yield case.check(f"out_pose_enc_iter{index}", pose, mark)
    if "mid_pos" in case:  # by their rotary tables, which is what the network has of them
        frames, (height, width) = images.shape[1], images.shape[-2:]
        grid = height // net.sizes.patch_size, width // net.sizes.patch_size
        ours = rope_tables(net.sizes, grid, frames)[0]
        theirs = rope_arrays(case["mid_pos"], net.sizes.frame_blocks[0].head_dim)
        yield compare("mid_pos", np.broadcast_to(np.stack(ours)[:, None], np.stack(theirs).shape), np.stack(theirs))
    for name in case.names("mid_"):
        yield from _checked(case, name, _intermediate(tape, net, name), FLOW_MARK if "track" in name else mark)


def _intermediate(tape: Tape, net: Vggt, name: str) -> Tensor | None:
    """The intermediate result of that name, or None when we have none."""
    what, _, turn = name.removeprefix("mid_").partition("_iter")
    for table, recorded in ((OUTPUTS, tape.calls), (INPUTS, tape.inputs)):
        for pattern, template in table.items():
            if match := re.fullmatch(pattern, what):
                path = match.expand(template)
                if net.sizes.camera is not None:
                    path = path.replace("LAST", str(len(net.sizes.camera) - 1))
                calls = recorded(path)
                found = calls[int(turn or 0)] if int(turn or 0) < len(calls) else None
                if what == "track.corr_raw" and found is not None:  # (B, S, Q, values); theirs is (B * Q, S, values)
                    found = found.transpose(1, 2).flatten(0, 1)
                return found
    return None


def _camera_block(case: Case, size: BlockSize) -> Iterator[Compared]:
    weights = case.weights("camera.")
    tokens = _tensor(case, "in_cam_tokens")[:, :, 0]
    depth = len({key.split(".")[1] for key in weights if key.startswith("trunk.")})
    head = CameraHead(tokens.shape[-1], (size,) * depth)
    head.load_state_dict(weights)
    with torch.no_grad(), Tape(head) as tape:
        poses = head(tokens, tokens.shape[1])
    for index, pose in enumerate(poses):
        yield case.check(f"out_camera_iter{index}", pose)
    for name in case.names("mid_camera."):
        yield from _checked(case, name, tape.only(name.removeprefix("mid_camera.")))


def _depth_block(case: Case, dim: int) -> Iterator[Compared]:
    """A depth head that reads four sets of tokens (layer, B, S, P, C), of which the last ones are the patches."""
    weights = case.weights("dpt.")
    height, width = case.need("config")["hw"]
    first, second, third, fourth = (len(weights[f"projects.{level}.bias"]) for level in range(4))
    features, last = (len(weights[f"scratch.{name}.weight"]) for name in ("layer1_rn", "output_conv1"))
    widths = first, second, third, fourth
    size = DptSize(features, widths, (0, 1, 2, 3), widths, last)
    head = DptHead(dim, size, 2, PATCH)
    head.load_state_dict(weights)
    grid = height // PATCH, width // PATCH
    tokens = _tensor(case, "in_dpt_tokens")[:, :, :, -grid[0] * grid[1] :]
    with torch.no_grad():
        raw = head([layer.flatten(0, 1) for layer in tokens], grid)
    yield from _checked(case, "mid_dpt.raw", raw)
    for name, maps in zip(("out_depth", "out_depth_conf"), depth_maps(raw), strict=True):
        yield case.check(name, maps.unflatten(0, tokens.shape[1:3]))


def _checked(case: Case, name: str, found: Tensor | None, mark: float = MARK) -> Iterator[Compared]:
    """Compares with an intermediate result, where there is one on both sides."""
    if found is not None and name in case:
        yield case.check(name, found, mark)


def _tensor(case: Case, name: str) -> Tensor:
    return torch.from_numpy(case[name].copy())


def _rope(positions: np.ndarray, head_dim: int, base: float = 100.0) -> Rope:
    """Tables for positions (B, N, 2), one set per sample."""
    cos, sin = (torch.from_numpy(table)[:, None] for table in rope_arrays(positions, head_dim, base))
    return Rope(cos, sin, positions.shape[1])
