"""Teaches VGGT (a `LearningPart`): sets of frames, with losses on poses, depths and points."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.families.contract import Batches, Join, SampleSet
from pqk.families.layers import initialize
from pqk.families.losses import feature_loss
from pqk.families.vggt.batches import Rendered, Sets, own
from pqk.families.vggt.graphs import parts_of
from pqk.families.vggt.losses import Truth, imitation, output_probe, softened_kl, task_loss
from pqk.families.vggt.matching import match_loss, watching
from pqk.families.vggt.network.configs import read_config
from pqk.families.vggt.scoring import SetTruth, cameras_of, constant_scores, depth_scores, pose_scores
from pqk.families.vggt.settings import PATCH, Workload
from pqk.settings.training import Training

MATCH = "match"
TERMS = ("task", "kl", "features", "imitation", "probe", MATCH)
UNIT = "sets of frames"
SOURCE = "sets of frames of procedural rooms rendered on the fly (pqk.data.render.synthetic), split 'train'"
REMEDY = "lower min_covisible"

Scored = list[list[dict[str, float]]]
REPORTED = ("absrel", "delta1", "auc30")
MAPS = ("depth", "depth_conf", "world_points", "world_points_conf")


def parts(model: Any) -> dict[str, nn.Module]:
    """Returns the modules of all graphs of a model, which share its weights; the position table learns."""
    return dict(parts_of(model, (1, 1), 1, training=True))


def as_exported(parts: Mapping[str, Any], workload: Workload) -> None:
    """Sets the modules back to the workload's frames, height and width."""
    for part in parts.values():
        part.set_size(workload.input.height // PATCH, workload.input.width // PATCH, workload.input.frames)


def batches(
    asked: Training,
    device: torch.device,
    *,
    seed: int,
    held_seed: int,
    found: SampleSet | None = None,
    workload: Workload | None = None,
) -> Batches:
    """Returns rendered sets, or those of the user's own scenes or photographs; see `LearningPart`."""
    if found is None or not found.own:
        return Rendered(asked, device, seed, held_seed)
    assert workload is not None
    return own(asked, device, seed, found, workload)


def forward(parts: Mapping[str, Any], batch: Sets, watched: Sequence[int] | str | None = None) -> dict[str, Any]:
    """Returns the outputs for B sets: pose_enc (B, S, 9), depth (B, S, H, W) and so on; see `Vggt.forward`.

    'rounds' holds the poses after each round of the camera head where the part gives them, else the last alone.
    watched: numbers of the rounds whose outputs are kept under 'features', with the encoder's tokens; or 'match', for
    the attention that the loss of this name needs. Of a batch with `mapped` the maps are those of its first sets.
    """
    count, frames = batch.images.shape[:2]
    rows, cols = (side // PATCH for side in batch.images.shape[-2:])
    for part in parts.values():
        part.set_size(rows, cols, frames)
    with _exact(batch.images):
        tokens, special = parts["encoder"](batch.images.flatten(0, 1))
    tokens = tokens.unflatten(0, (count, frames))
    if watched == MATCH:
        with watching(parts["aggregator"]) as paid:
            out = behind_encoder(parts, tokens, special, batch.mapped, batch.gain)
        return {**out, "features": {MATCH: paid[0]}}
    assert not isinstance(watched, str)
    with _watching(parts, watched or ()) as features:
        out = behind_encoder(parts, tokens, special, batch.mapped, batch.gain)
    return out if watched is None else {**out, "features": {"tokens": tokens, **features} if watched else features}


def samples(batch: Sets) -> int:
    """Returns the number of sets."""
    return len(batch.images)


def share(batch: Sets, first: int, last: int) -> Sets:
    """Returns the images of some of the sets. Only a Teacher's training computes the maps of a part of them."""
    assert batch.mapped is None
    return Sets(batch.images[first:last], gain=batch.gain)


def joined(out: Mapping[str, Any], join: Join) -> dict[str, Any]:
    """Returns the outputs for the whole batch; see `LearningPart`."""
    found: dict[str, Any] = {name: join(each) for name, each in out.items() if name not in ("rounds", "features")}
    found["rounds"] = [join(each) for each in out["rounds"]]
    if "features" in out:
        found["features"] = {name: join(each) for name, each in out["features"].items()}
    return found


def behind_encoder(
    parts: Mapping[str, Any], tokens: Tensor, special: Tensor, mapped: int | None = None, gain: float = 1.0
) -> dict[str, Any]:
    """Returns the outputs for patch tokens (B, S, N, C) and the special tokens; see `forward` and `Sets`."""
    with _exact(tokens):
        camera, *levels = parts["aggregator"](special, *tokens.unbind(1))
    if gain != 1:
        camera = camera.detach() + gain * (camera - camera.detach())  # the same values
    if mapped is not None:
        levels = [level[: mapped * tokens.shape[1]] for level in levels]
    with torch.autocast(tokens.device.type, enabled=False):  # as the released recipe does
        pose = parts["camera"](camera.float())
    rounds = list(pose) if pose.ndim == 4 else [pose]
    depth, points = parts["depth"](*levels), parts["points"](*levels)
    maps = zip(MAPS, (depth[0][..., 0], depth[1], *points), strict=True)
    out: dict[str, Any] = {name: values.unflatten(0, (-1, tokens.shape[1])) for name, values in maps}
    return {**out, "pose_enc": rounds[-1], "rounds": rounds}


def _exact(tensor: Tensor) -> AbstractContextManager[Any]:
    """The context of encoder and aggregator: on a CPU they compute in float32 even under autocast.

    What frames differ by is small beside what they share: after 100 steps on eight fixed pairs the translations of a
    small network were 51 degrees off in bf16, 27 in float32; and attention in bf16 takes longer there (torch 2.13).
    """
    return torch.autocast("cpu", enabled=False) if tensor.device.type == "cpu" else nullcontext()


@contextmanager
def _watching(parts: Mapping[str, Any], rounds: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Fills the dictionary while the parts run; the hooks are gone afterwards, so that copies carry none."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: seen.update({name: output})

    blocks = parts["aggregator"].aggregator.global_blocks if rounds else ()
    handles = [blocks[layer].register_forward_hook(keep(f"round_{number}")) for number, layer in enumerate(rounds)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def losses(
    out: Mapping[str, Any],
    batch: Sets,
    teacher: Mapping[str, Any] | None,
    terms: Collection[str],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Returns the losses that are asked for; see `LearningPart` and `pqk.families.vggt.losses`."""
    found, alpha = {}, options["alpha"]
    with torch.autocast(batch.images.device.type, enabled=False):
        if "task" in terms:
            found["task"] = task_loss(out, out["rounds"], batch.known(), alpha)
        if "kl" in terms:
            assert teacher is not None
            found["kl"] = softened_kl(teacher, out, _counted(out, batch), alpha, options["temperature"])
        if "imitation" in terms:
            assert teacher is not None
            found["imitation"] = imitation(out, teacher, alpha).mean()
        if "probe" in terms:
            found["probe"] = output_probe(out)
        if MATCH in terms:
            found[MATCH] = match_loss(out["features"][MATCH], batch.known())
    if "features" in terms:
        assert teacher is not None
        found["features"] = feature_loss(teacher["features"], out["features"], options["bridges"])
    return found


def _counted(out: Mapping[str, Tensor], batch: Sets) -> Tensor:
    """Pixels that count: those with ground truth, and of plain photographs all."""
    return torch.ones_like(out["depth"], dtype=torch.bool) if batch.truth is None else batch.truth.valid


def features(teacher: Any, student: Any, seed: int) -> tuple[Sequence[int], Sequence[int], nn.ModuleDict]:
    """Returns as many of the Teacher's rounds as the student has, evenly spread, all of the student's, and linear maps,
    with weights from the seed, where their widths differ.
    """
    depth, wanted = len(teacher.sizes.frame_blocks), len(student.sizes.frame_blocks)
    layers = [depth - 1] if wanted == 1 else [round(i * (depth - 1) / (wanted - 1)) for i in range(wanted)]
    bridges = nn.ModuleDict()
    if teacher.sizes.dim != student.sizes.dim:
        for name in ("tokens", *(f"round_{number}" for number in range(wanted))):
            bridges[name] = nn.Linear(student.sizes.dim, teacher.sizes.dim)
    initialize(bridges, torch.Generator().manual_seed(seed))
    return layers, range(wanted), bridges


def as_truth(batch: Sets, out: Mapping[str, Tensor], config: Mapping[str, Any]) -> Sets:
    """Returns the sets with the Teacher's outputs as their truth, where they are finite and its confidence above 1."""
    depth, points, conf = out["depth"].float(), out["world_points"].float(), out["depth_conf"].float()
    valid = torch.isfinite(depth) & torch.isfinite(points).all(-1) & torch.isfinite(conf) & (conf > 1)
    return replace(batch, truth=Truth(depth, points, valid, out["pose_enc"].float()))


def score(out: Mapping[str, Tensor], batch: Sets) -> Scored:
    """Returns absrel, delta1 and auc30 of each set with a valid pixel in every frame.

    What the evaluation would refuse still gets a number, because a network in training may pass through it: NaN for
    outputs that are not finite, the worst values where no scale above 0 fits.
    """
    found: Scored = []
    for depth, pose, truth in zip(out["depth"], out["pose_enc"], _truths(batch), strict=True):
        mine, encoded = _numpy(depth), _numpy(pose)
        if truth is None:
            found.append([])
        elif not np.isfinite(mine[truth.valid]).all() or not np.isfinite(encoded).all():
            found.append([dict.fromkeys(REPORTED, math.nan)])
        else:
            found.append([_scored(mine, encoded, truth)])
    return found


def floor(batch: Sets) -> Scored:
    """Returns what `score` would of one depth everywhere and every camera at the first one."""
    truths = _truths(batch)
    return [[] if truth is None else [_reported(constant_scores(truth))] for truth in truths]


def _scored(depth: np.ndarray, pose: np.ndarray, truth: SetTruth) -> dict[str, float]:
    try:
        cameras = cameras_of({"pose_enc": pose}, depth.shape)
        return _reported(depth_scores(depth, truth)[0] | pose_scores(cameras, truth.cameras))
    except PqkError:  # the scale of the depths, or a quaternion of length 0
        return dict(zip(REPORTED, (1.0, 0.0, 0.0), strict=True))


def _reported(scores: Mapping[str, float | None]) -> dict[str, float]:
    """The scores that a training shows; of single frames poses have none."""
    return {name: float(value) for name in REPORTED if (value := scores[name]) is not None}


def _truths(batch: Sets) -> list[SetTruth | None]:
    """Returns the truth of each set as the evaluation has it; None where a frame has no valid pixel."""
    known, found = batch.known(), []
    for depth, valid, points, pose in zip(known.depth, known.valid, known.points, known.pose, strict=True):
        cameras = cameras_of({"pose_enc": _numpy(pose)}, tuple(depth.shape), "truth")
        seen = _numpy(valid)
        truth = SetTruth(_numpy(depth), seen, _numpy(points), seen, cameras)
        found.append(truth if seen.any(axis=(1, 2)).all() else None)
    return found


def shift(out: Mapping[str, Tensor], uncut: Mapping[str, Tensor], batch: Sets) -> float:
    """Returns how far the points X' are from those X of the uncut network, relatively.

    The mean over valid pixels of |s X' - X| / |X|, with s = median |X| / median |X'| for each set.
    """
    found, valid = [], batch.known().valid
    cut, whole = out["world_points"].float(), uncut["world_points"].float()
    for moved, true, mask in zip(cut, whole, valid, strict=True):
        if bool(mask.any()):
            x, y = moved[mask], true[mask]
            far = y.norm(dim=-1).clamp(min=1e-6)
            scale = far.median() / x.norm(dim=-1).median().clamp(min=1e-6)
            found.append(((scale * x - y).norm(dim=-1) / far).mean())
    return float(torch.stack(found).mean())


def distance(out: Mapping[str, Tensor], teacher: Mapping[str, Tensor], options: Mapping[str, Any]) -> list[float]:
    """Returns the loss 'imitation' of each set by itself."""
    return [float(value) for value in imitation(out, teacher, options["alpha"])]


def same_network(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configurations describe one network, however completely each is written."""
    return read_config(one) == read_config(other)


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    found: np.ndarray = (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()
    return found
