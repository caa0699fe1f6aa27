"""Runners of the cases of DUSt3R: models, blocks, rotary embedding, losses, preprocessing, pairs, official files.

The names in the cases are those of the official network; `suffix _view1/_view2` is the view, `mid_*` are intermediate
results, compared where a module of ours has that output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pqk.data.scenes.pairs import pair_graph
from pqk.data.scenes.preprocess import unproject
from pqk.errors import PqkError
from pqk.families.build import build_model, empty_model
from pqk.families.checkpoint import load_model
from pqk.families.dust3r.configs import NAMED, Mode
from pqk.families.dust3r.layers import DecoderBlock, EncoderBlock
from pqk.families.dust3r.losses import (
    confidence_loss,
    normalise_jointly,
    regression_loss,
    scale_shift_invariant_error,
    to_camera1,
)
from pqk.families.dust3r.model import OUTPUTS, Dust3r, activate
from pqk.families.dust3r.preprocess import official_preprocess, official_size
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

THEIRS = {"pts3d_2": "pts3d_in_other_view_2"}
CRITERION = r"ConfLoss\(alpha=([\d.e-]+)\) over Regr3D\(L21, avg_dis\)"
UNBOUNDED = (-math.inf, math.inf)
MODULES = {
    r"patch_tokens": "patch_embed",
    r"(enc_norm|decoder_embed|dec_norm)": r"\1",
    r"enc_block_(.+)": r"enc_blocks.\1",
    r"linear": "proj",
    r"reassemble_(\d)": r"dpt.act_postprocess.\1",
    r"layer_rn_(\d)": r"dpt.scratch.layer_rn.\1",
    r"fusion_(\d)": r"dpt.scratch.refinenet\1",
    r"final_conv0": "dpt.head.0",
    r"final_conv2_prerelu": "dpt.head.2",
}
"""Name of an intermediate result, without its view -> the module whose output it is."""


def keys(case: Case) -> Iterator[Compared]:
    """Names, shapes and sharing of the weights of a released model: a table key, shape, numel, same_tensor_as."""
    name = case.name.partition("_keys.tsv")[0].replace("_", "-")
    if name not in NAMED:
        raise NotHandled(f"the configuration {name}")
    yield from compare_keys(case, empty_model("dust3r", NAMED[name]).state_dict(keep_vars=True))


def model(case: Case) -> Iterator[Compared]:
    """Whole forward passes of a small network whose weights are given."""
    net = build_model("dust3r", case.need("config"), case.weights())
    if "n_params" in case.info:
        yield compare("n_params", sum(weight.numel() for weight in net.parameters()), case.info["n_params"])
    yield from _forward(case, net, MARK)
    if "out_rope" in case:
        yield case.check("out_rope", _rotate(case, "in_rope_q", case["in_rope_pos"], net.sizes.rope_base))


def full(case: Case) -> Iterator[Compared]:
    """The official architecture with weights from the seed rule: 2.5 GB of memory, half a minute."""
    net = cast(Dust3r, empty_model("dust3r", case.need("config")))
    weights = draw_weights(case, net.state_dict())
    yield from compare_probes(case, weights)
    net.load_state_dict(weights, assign=True)
    yield from _forward(case, net, FULL_MARK)


def checkpoint(case: Case) -> Iterator[Compared]:
    """Files in the official layouts: outputs named out_NAME@FILE of the model loaded from FILE."""
    every = case.info.get("outputs_keep_every", 1)
    for file in dict.fromkeys(name.partition("@")[2] for name in case.names("out_")):
        path = case.path / file
        if not file or not path.exists() or case.path.resolve() not in path.resolve().parents:
            raise BadCase(f"{case.path} has no file {file!r}, which its outputs name")
        net = load_model(path)
        with torch.no_grad():
            out = net(*_images(case))
        for name in OUTPUTS:
            yield case.check(f"out_{THEIRS.get(name, name)}@{file}", out[name][:, ::every, ::every])


def blocks(case: Case) -> Iterator[Compared]:
    """One encoder block (enc.*) and one decoder block (dec.*)."""
    sizes = case.need("config")
    for part, kind in (("enc", EncoderBlock), ("dec", DecoderBlock)):
        if f"out_{part}" not in case:
            continue
        weights = case.weights(f"{part}.")
        dim, heads = sizes[f"{part}_dim"], sizes[f"{part}_heads"]
        block = kind(dim, BlockSize(heads, dim // heads, len(weights["mlp.fc1.bias"])))
        block.load_state_dict(weights)
        positions = ["xpos", "ypos"] if part == "dec" else ["pos"]
        inputs = [_tensor(case, f"in_{part}_{name}") for name in ("x", "y")[: len(positions)]]
        ropes = [_rope(case[f"in_{part}_{name}"], dim // heads) for name in positions]
        with torch.no_grad(), Tape(block) as tape:
            yield case.check(f"out_{part}", block(*inputs, *ropes))
        for name in case.names(f"mid_{part}."):
            for found in tape.calls(name.removeprefix(f"mid_{part}.")):
                yield case.check(name, found)


def rope(case: Case) -> Iterator[Compared]:
    """Rotary embedding of given queries at given positions, or at those of a grid."""
    for name in case.names("in_q"):
        index = name.removeprefix("in_q")
        query = _item(case.info.get("subcases"), int(index)) if index.isdigit() else {}
        if f"in_pos{index}" in case:
            positions = case[f"in_pos{index}"]
        elif "grid" in query:
            positions = grid_positions(*query["grid"])[None]
        else:
            raise BadCase(f"{case.path}: {name} has neither in_pos{index} nor a grid")
        if f"mid_pos{index}" in case:
            yield case.check(f"mid_pos{index}", positions)
        yield case.check(f"out_{index}", _rotate(case, name, positions, query.get("freq", 100.0)))


def loss(case: Case) -> Iterator[Compared]:
    """Confidence loss with its gradients, the plain loss and the validation criterion."""
    criterion = re.fullmatch(CRITERION, case.info.get("criterion", "ConfLoss(alpha=0.2) over Regr3D(L21, avg_dis)"))
    if criterion is None:
        raise NotHandled(f"the criterion {case.info['criterion']}")
    pred = {}
    for view in (1, 2):
        pred[f"pts3d_{view}"] = _tensor(case, f"in_pred_pts{view}").requires_grad_()
        pred[f"conf_{view}"] = _tensor(case, f"in_pred_conf{view}").requires_grad_()
    pose = _tensor(case, "in_pose1")
    gt1, gt2 = (to_camera1(_tensor(case, f"in_gt_pts{view}"), pose) for view in (1, 2))
    valid1, valid2 = (_tensor(case, f"in_valid{view}").bool() for view in (1, 2))
    total, details = confidence_loss(pred, gt1, gt2, valid1, valid2, float(criterion[1]))
    total.backward()
    found: dict[str, Any] = {
        "out_confloss": total,
        "out_confloss_detail.conf_loss_1": details["conf_loss_1"],
        "out_confloss_detail.conf_loss2": details["conf_loss_2"],
        "out_confloss_detail.Regr3D_pts3d_1": details["regr_1"],
        "out_confloss_detail.Regr3D_pts3d_2": details["regr_2"],
        "out_regr3d_mean": regression_loss(pred, gt1, gt2, valid1, valid2)[0],
        "out_regr3d_gtscale": regression_loss(pred, gt1, gt2, valid1, valid2, gt_scale=True)[0],
        "out_eval_scaleshiftinv_gtscale": scale_shift_invariant_error(pred, gt1, gt2, valid1, valid2)[0],
        "mid_gt1_in_cam1": gt1,
        "mid_gt2_in_cam1": gt2,
    }
    for view in (1, 2):
        found[f"out_grad_pts{view}"] = pred[f"pts3d_{view}"].grad
        found[f"out_grad_conf{view}"] = pred[f"conf_{view}"].grad
    for name, first, second in (("gt", gt1, gt2), ("pred", pred["pts3d_1"], pred["pts3d_2"])):
        first, second, found[f"mid_factor_{name}"] = normalise_jointly(first, second, valid1, valid2)
        # Ours are 0 at invalid pixels, so only the valid ones are compared.
        for view, points, valid in ((1, first, valid1), (2, second, valid2)):
            key = f"mid_{name}{view}_normalised"
            if key in case:
                yield compare(key, points[valid], _tensor(case, key)[valid])
    yield from (case.check(name, value) for name, value in found.items() if name in case)


def post(case: Case) -> Iterator[Compared]:
    """Activations of the raw map, and depth as world points."""
    raw = _tensor(case, "in_raw")
    found: dict[str, Any] = {}
    found["out_pts3d"], found["out_conf"] = activate(raw, Mode("exp", *UNBOUNDED), Mode("exp", 1, math.inf))
    found["out_square"] = activate(raw, Mode("square", *UNBOUNDED), Mode("exp", 1, math.inf))[0]
    for name in case.names("out_conf_"):
        if match := re.fullmatch(r"out_conf_(exp|sigmoid)_([\d.]+)_([\d.]+|inf)", name):
            found[name] = activate(raw, Mode("exp", *UNBOUNDED), Mode(match[1], float(match[2]), float(match[3])))[1]
    if "in_depth" in case:
        matrix, pose, depth = case["in_K"].astype(np.float64), case["in_cam2world"], case["in_depth"]
        matrix[:2, 2] += 0.5  # the case has pixel centres at whole numbers, we have corners there
        found["out_world"] = unproject(depth, matrix) @ pose[:3, :3].T + pose[:3, 3]
        found["out_world_valid"] = depth > 0
    yield from (case.check(name, value) for name, value in found.items() if name in case)


def preprocess(case: Case) -> Iterator[Compared]:
    """The table of output sizes, and small pictures, which must be equal code by code."""
    if "out_size_table_w_h" in case:
        found = [official_size(*query) for query in case.need("size_queries")]
        yield case.check("out_size_table_w_h", found)
    for index, (size, square_ok) in enumerate(case.info.get("image_queries", [])):
        tensor = official_preprocess(case[f"in_image{index}"], size, square_ok)[None]
        results = {
            "codes": np.rint((tensor.astype(np.float64) + 1) * 127.5).astype(np.uint8),
            "tensor": tensor,
            "true_shape": [tensor.shape[2:]],
        }
        for name, value in results.items():
            if f"out_{name}{index}" in case:
                yield case.check(f"out_{name}{index}", value, 0.0)


def pairs(case: Case) -> Iterator[Compared]:
    """Lists of pairs; of the window graphs only the set is defined. No pairs of one image: our list refuses it."""
    for index, query in enumerate(case.need("queries")):
        expected = [tuple(pair) for pair in case.answer(index)]
        try:
            found = pair_graph(
                query["n"], query["scene_graph"], symmetrize=query["symmetrize"], prefilter=query.get("prefilter")
            )
        except PqkError:
            if expected:
                raise
            found = []
        if query["scene_graph"].startswith(("swin", "logwin")):
            found, expected = sorted(found), sorted(expected)
        same = found == expected
        name = f"answers.{index} ({query['n']} {query['scene_graph']})"
        yield Compared(name, 0.0 if same else math.inf, 0.0, "" if same else f"{len(found)} pairs, not as expected")


KINDS = {
    "dust3r_keys": keys,
    "dust3r_model": model,
    "dust3r_full": full,
    "dust3r_ckpt": checkpoint,
    "dust3r_blocks": blocks,
    "dust3r_rope": rope,
    "dust3r_loss": loss,
    "dust3r_post": post,
    "dust3r_preprocess": preprocess,
    "dust3r_pairs": pairs,
}


def _forward(case: Case, net: Dust3r, mark: float) -> Iterator[Compared]:
    """The outputs of the network, and every intermediate result of the case that a module of ours has."""
    every = case.info.get("outputs_keep_every", 1)
    images = _images(case)
    shapes: list[Tensor] = []
    if net.config.get("landscape_only") and "in_true_shape1" in case:
        shapes = [_tensor(case, f"in_true_shape{view}") for view in (1, 2)]
    with torch.inference_mode(), Tape(net) as tape:
        out = net(*images, *shapes)
    for name in OUTPUTS:
        yield case.check(f"out_{THEIRS.get(name, name)}", out[name][:, ::every, ::every], mark)
    turned = any(bool((shape != torch.tensor(img.shape[2:])).any()) for shape, img in zip(shapes, images, strict=False))
    for name in [*case.names("out_head_raw"), *case.names("mid_")]:
        found = (
            None if turned else _intermediate(tape, name, images, net.sizes.patch_size)
        )  # turned samples run in groups of their own
        if found is not None:
            yield case.check(name, found, mark)


def _intermediate(tape: Tape, name: str, images: list[Tensor], patch: int) -> Any:
    """The intermediate result of that name, or None when we have none."""
    if match := re.fullmatch(r"out_head_raw([12])", name):
        return tape.only(f"downstream_head{match[1]}")
    if match := re.fullmatch(r"mid_head([12])\.(.+)", name):
        return tape.only(f"downstream_head{match[1]}.{_module(match[2])}")
    match = re.fullmatch(r"mid_(.+)_view([12])", name)
    if match is None:
        return None
    what, view = match[1], int(match[2]) - 1
    image = images[view]
    if what == "pos":
        grid = grid_positions(image.shape[2] // patch, image.shape[3] // patch)
        return np.broadcast_to(grid, (len(image), *grid.shape))
    if block := re.fullmatch(r"dec_block_(.+)", what):
        return tape.only(f"dec_blocks{'2' if view else ''}.{block[1]}")
    calls = tape.calls(_module(what))
    if len(calls) == 1:  # both views of one size go through the encoder as one batch
        calls = list(calls[0].chunk(2))
    return calls[view] if len(calls) == 2 else None


def _module(what: str) -> str:
    for pattern, path in MODULES.items():
        if match := re.fullmatch(pattern, what):
            return match.expand(path)
    return "no such module"


def _images(case: Case) -> list[Tensor]:
    return [_tensor(case, f"in_img{view}") for view in (1, 2)]


def _tensor(case: Case, name: str) -> Tensor:
    return torch.from_numpy(case[name].copy())


def _rope(positions: np.ndarray, head_dim: int, base: float = 100.0) -> Rope:
    """Tables for positions (B, N, 2), one set per sample."""
    cos, sin = (torch.from_numpy(table)[:, None] for table in rope_arrays(positions, head_dim, base))
    return Rope(cos, sin, positions.shape[1])


def _rotate(case: Case, name: str, positions: np.ndarray, base: float) -> Tensor:
    query = _tensor(case, name)
    return apply_rope(query, _rope(positions, query.shape[-1], base), query.shape[-1])


def _item(items: Any, index: int) -> dict[str, Any]:
    return items[index] if isinstance(items, list) and index < len(items) else {}
