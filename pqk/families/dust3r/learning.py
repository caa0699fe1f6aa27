"""Teaches DUSt3R (a `LearningPart`): each pair is seen in both orders, from one encoding per image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.families.contract import Batches, Join, SampleSet
from pqk.families.dust3r.batches import Pairs, PicturePairs, Rendered, own
from pqk.families.dust3r.configs import lowest_confidence, read_config
from pqk.families.dust3r.losses import confidence_loss, imitation_loss, output_probe, softened_kl
from pqk.families.dust3r.model import OUTPUTS
from pqk.families.dust3r.scoring import constant_depth, pair_depth
from pqk.families.dust3r.settings import PATCH, Workload
from pqk.families.layers import initialize
from pqk.families.losses import feature_loss
from pqk.settings.training import Training

TERMS = ("task", "kl", "features", "imitation", "probe")
UNIT = "pairs"
SOURCE = "pairs of procedural rooms rendered on the fly (pqk.data.render.synthetic), split 'train'"
REMEDY = "lower min_covisible"

Scored = list[list[dict[str, float]]]
Two = tuple[np.ndarray, np.ndarray]


def parts(model: Any) -> dict[str, nn.Module]:
    """Returns the encoder and the decoder of a model, which share its weights."""
    side = model.sizes.patch_size
    return {name: graph.module for name, graph in model.graphs(side, side).items()}


def as_exported(parts: Mapping[str, Any], workload: Workload) -> None:
    """Sets both graphs back to the workload's height and width."""
    for part in parts.values():
        part.set_grid(workload.input.height // PATCH, workload.input.width // PATCH)


def batches(
    asked: Training,
    device: torch.device,
    *,
    seed: int,
    held_seed: int,
    found: SampleSet | None = None,
    workload: Workload | None = None,
) -> Batches:
    """Returns rendered pairs, or those of the user's own scenes or photographs; see `LearningPart`."""
    if found is None or not found.own:
        return Rendered(asked, device, seed, held_seed)
    assert workload is not None
    return own(asked, device, seed, found, workload)


def forward(parts: Mapping[str, Any], batch: Pairs, watched: Sequence[int] | None = None) -> dict[str, Any]:
    """Returns the outputs for 2B samples: first all pairs in the order (a, b), then all in (b, a).

    watched: numbers of the decoder's blocks whose outputs are kept under 'features', with the encoder's tokens.
    """
    encoder, decoder = parts["encoder"], parts["decoder"]
    rows, cols = (side // encoder.sizes.patch_size for side in batch.images.shape[-2:])
    for part in (encoder, decoder):
        part.set_grid(rows, cols)
    with _watching(encoder, decoder, watched or ()) as features:
        tokens = encoder(batch.images.flatten(0, 1)).unflatten(0, batch.images.shape[:2])
        a, b = tokens[:, 0], tokens[:, 1]
        out = dict(zip(OUTPUTS, decoder(torch.cat([a, b]), torch.cat([b, a])), strict=True))
    return out if watched is None else {**out, "features": features}


def samples(batch: Pairs) -> int:
    """Returns the number of pairs."""
    return len(batch.images)


def share(batch: Pairs, first: int, last: int) -> PicturePairs:
    """Returns the pictures of some of the pairs."""
    return PicturePairs(batch.images[first:last])


def joined(out: Mapping[str, Any], join: Join) -> dict[str, Any]:
    """Returns the outputs for the whole batch; see `LearningPart`. Those of the decoder are in both orders."""
    found: dict[str, Any] = {name: join(out[name], 0, 2) for name in OUTPUTS}
    if "features" in out:  # of the encoder: of both pictures, pair by pair
        features = {
            name: each.unflatten(0, (-1, 2)) if name == "tokens" else each for name, each in out["features"].items()
        }
        found["features"] = {
            name: join(each).flatten(0, 1) if name == "tokens" else join(each, 0, 2) for name, each in features.items()
        }
    return found


@contextmanager
def _watching(encoder: Any, decoder: Any, layers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Fills the dictionary while the parts run; the hooks are gone afterwards, so that copies carry none."""
    seen: dict[str, Tensor] = {}
    watched: dict[str, nn.Module] = {"tokens": encoder.enc_norm} if layers else {}
    for number, layer in enumerate(layers):
        watched[f"first_{number}"] = decoder.dec_blocks[layer]
        watched[f"second_{number}"] = decoder.dec_blocks2[layer]

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: seen.update({name: output})

    handles = [part.register_forward_hook(keep(name)) for name, part in watched.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def losses(
    out: Mapping[str, Any],
    batch: Pairs,
    teacher: Mapping[str, Any] | None,
    terms: Collection[str],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Returns the losses that are asked for; see `LearningPart` and `pqk.families.dust3r.losses`."""
    found, alpha = {}, options["alpha"]
    with torch.autocast(batch.images.device.type, enabled=False):
        if "task" in terms:
            found["task"] = confidence_loss(out, *batch.ordered(), alpha)[0]
        if "kl" in terms:
            assert teacher is not None
            found["kl"] = softened_kl(teacher, out, *_counted(out, batch), alpha, options["temperature"])
        if "imitation" in terms:
            assert teacher is not None
            found["imitation"] = imitation_loss(out, teacher, alpha)
        if "probe" in terms:
            found["probe"] = output_probe(out)
    if "features" in terms:
        assert teacher is not None
        found["features"] = feature_loss(teacher["features"], out["features"], options["bridges"])
    return found


def _counted(out: Mapping[str, Tensor], batch: Pairs) -> tuple[Tensor, Tensor]:
    """Pixels of both views that count: those with ground truth, and of plain photographs all."""
    if isinstance(batch, PicturePairs) and batch.truth is None:
        first, second = (torch.ones_like(out[f"conf_{view}"], dtype=torch.bool) for view in (1, 2))
        return first, second
    return batch.ordered()[2:]


def features(teacher: Any, student: Any, seed: int) -> tuple[Sequence[int], Sequence[int], nn.ModuleDict]:
    """Returns as many of the Teacher's decoder blocks as the student has, evenly spread, all of the student's, and
    linear maps, with weights from the seed, for the features whose widths differ.
    """
    depth, wanted = len(teacher.dec_blocks), len(student.dec_blocks)
    layers = [depth - 1] if wanted == 1 else [_nearest(i * (depth - 1), wanted - 1) for i in range(wanted)]
    bridges = nn.ModuleDict()
    if teacher.sizes.enc_dim != student.sizes.enc_dim:
        bridges["tokens"] = nn.Linear(student.sizes.enc_dim, teacher.sizes.enc_dim)
    if teacher.sizes.dec_dim != student.sizes.dec_dim:
        for number in range(wanted):
            for name in ("first", "second"):
                bridges[f"{name}_{number}"] = nn.Linear(student.sizes.dec_dim, teacher.sizes.dec_dim)
    initialize(bridges, torch.Generator().manual_seed(seed))
    return layers, range(wanted), bridges


def _nearest(number: int, divisor: int) -> int:
    return (2 * number + divisor) // (2 * divisor)


def as_truth(batch: Pairs, out: Mapping[str, Tensor], config: Mapping[str, Any]) -> PicturePairs:
    """Returns the pairs with the Teacher's points as their truth, where it is above its lowest confidence."""
    low, found = lowest_confidence(config), []
    for view in (1, 2):
        points, conf = out[f"pts3d_{view}"].float(), out[f"conf_{view}"].float()
        found.append((points, torch.isfinite(points).all(-1) & torch.isfinite(conf) & (conf > low)))
    (points_1, valid_1), (points_2, valid_2) = found
    return PicturePairs(batch.images, (points_1, points_2, valid_1, valid_2))


def score(out: Mapping[str, Tensor], batch: Pairs) -> Scored:
    """Returns absrel and delta1 of each pair, in both of its orders where the first view has a valid pixel."""
    return _of_pairs(depth_scores(out["pts3d_1"], out["pts3d_2"], batch), batch)


def shift(out: Mapping[str, Tensor], uncut: Mapping[str, Tensor], batch: Pairs) -> float:
    """Returns how far the points X' of both views are from those X of the uncut network, relatively.

    The mean over valid pixels of |s X' - X| / |X|, with s = median |X| / median |X'| for each sample.
    """
    found, valid = [], torch.stack(batch.ordered()[2:], dim=1)
    cut, whole = (torch.stack([o[name].float() for name in ("pts3d_1", "pts3d_2")], dim=1) for o in (out, uncut))
    for moved, true, mask in zip(cut, whole, valid, strict=True):
        if bool(mask.any()):
            x, y = moved[mask], true[mask]
            far = y.norm(dim=-1).clamp(min=1e-6)
            scale = far.median() / x.norm(dim=-1).median().clamp(min=1e-6)
            found.append(((scale * x - y).norm(dim=-1) / far).mean())
    return float(torch.stack(found).mean())


def floor(batch: Pairs) -> Scored:
    """Returns what `score` would of a network that answers one depth everywhere, each view in its own camera."""
    return _of_pairs(constant_scores(batch), batch)


def _of_pairs(rows: Sequence[dict[str, float]], batch: Pairs) -> Scored:
    count, found = len(batch.images), iter(rows)
    pairs: Scored = [[] for _ in range(count)]
    for sample, seen in enumerate(batch.ordered()[2].flatten(1).any(1).tolist()):
        if seen:
            pairs[sample % count].append(next(found))
    return pairs


def depth_scores(points_1: Tensor, points_2: Tensor, pairs: Pairs) -> list[dict[str, float]]:
    """AbsRel and delta1 of each sample whose first view has a valid pixel, as the evaluation scores it (`pair_depth`).

    points_1, points_2: (2B,H,W,3) of both views, in the order of `pairs.ordered()`, on any device. What the evaluation
    would refuse still gets a number, because a network in training may pass through it: NaN for points that are not
    finite, and 1 and 0, those of a depth of zero, where no scale above 0 brings the depth to that of the truth.
    """
    found = []
    for points, truths, valids, pose in _samples((points_1, points_2), pairs):
        if not valids[0].any():
            continue
        if not all(np.isfinite(p[v]).all() for p, v in zip(points, valids, strict=True)):
            found.append({"absrel": math.nan, "delta1": math.nan})
            continue
        try:
            scores = pair_depth(points, truths, valids, pose).scores()
        except PqkError:  # the scale
            scores = {"absrel": 1.0, "delta1": 0.0}
        found.append({name: float(scores[name] or 0.0) for name in ("absrel", "delta1")})
    return found


def constant_scores(pairs: Pairs) -> list[dict[str, float]]:
    """What `depth_scores` gives a network that answers one depth everywhere, each view in its own camera."""
    found = []
    for _, truths, valids, pose in _samples(pairs.ordered()[:2], pairs):
        if valids[0].any():
            assert pose is not None
            scores = constant_depth(truths, valids, pose).scores()
            found.append({name: float(scores[name] or 0.0) for name in ("absrel", "delta1")})
    return found


def _samples(points: tuple[Tensor, Tensor], pairs: Pairs) -> Iterator[tuple[Two, Two, Two, np.ndarray | None]]:
    """Points, true points and valid pixels of both views, and the relative pose where it is known, sample by sample."""
    known = pairs.first_to_second()
    poses = itertools.repeat(None) if known is None else _numpy(known)
    tensors = (_numpy(t) for t in (*points, *pairs.ordered()))
    for p1, p2, t1, t2, v1, v2, pose in zip(*tensors, poses, strict=False):
        yield (p1, p2), (t1, t2), (v1, v2), pose


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    found: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    return found


def distance(out: Mapping[str, Tensor], teacher: Mapping[str, Tensor], options: Mapping[str, Any]) -> list[float]:
    """Returns `imitation_loss` of each pair, in both of its orders together."""
    count = len(out["conf_1"]) // 2
    orders = [torch.tensor([pair, count + pair], device=out["conf_1"].device) for pair in range(count)]

    def of(outputs: Mapping[str, Tensor], samples: Tensor) -> dict[str, Tensor]:
        return {name: outputs[name][samples] for name in OUTPUTS}

    return [float(imitation_loss(of(out, both), of(teacher, both), options["alpha"])) for both in orders]


def same_network(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configurations describe one network, however completely each is written."""
    return read_config(one) == read_config(other)
