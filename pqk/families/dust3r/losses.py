"""DUSt3R's training losses on point maps (Wang et al., CVPR 2024, section 3.2), and those against a Teacher.

Against a Teacher: the KL of two networks' densities of points (Hinton et al. 2015, arXiv 1503.02531; docs/methods.md
derives it), the distance of their features (Romero et al. 2015, arXiv 1412.6550), and the relative distance of their
outputs, for networks that round. On a handful of held-out pairs AbsRel varies by more than rounding costs; the distance
to the Teacher's own points, in which every pixel has a say, tells which of two checkpoints is better.

Shapes used below: B samples; H, W pixels (the two views may differ in size); points (B, H, W, 3) in any length unit;
confidences (B, H, W), above 0 (DUSt3R: above 1); validity masks (B, H, W), bool or 0/1. Everything is computed in
float32, whatever the input type. Boolean indexing would make CUDA wait for the host at each call, so invalid pixels
are replaced by constants and leave no value and no gradient, even when they hold NaN.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pqk.errors import PqkError
from pqk.families.losses import NEAREST, laplace_kl, masked_mean

Prediction = Mapping[str, Tensor]  # pts3d_1, pts3d_2 (B, H, W, 3) in camera 1; conf_1, conf_2 (B, H, W)

MIN_FACTOR = 1e-8
PRED_SCALE_RANGE = (1e-3, 1e3)


def to_camera1(world_points: Tensor, cam1_to_world: Tensor) -> Tensor:
    """Move world points (B, H, W, 3) into camera 1, whose rigid camera-to-world poses are (B, 4, 4).

    R^T (x - t), the inverse of a rigid motion. Written without matmul: TF32 or autocast would round it.
    Raises PqkError when the shapes do not fit.
    """
    if world_points.ndim != 4 or world_points.shape[-1] != 3 or cam1_to_world.shape != (len(world_points), 4, 4):
        raise PqkError(
            "to_camera1 needs points (B, H, W, 3) and poses (B, 4, 4), "
            f"got {tuple(world_points.shape)} and {tuple(cam1_to_world.shape)}"
        )
    pose = cam1_to_world.float()
    offset = world_points.float() - pose[:, None, None, :3, 3]
    return (offset[..., :, None] * pose[:, None, None, :3, :3]).sum(dim=-2)


def normalise_jointly(p1: Tensor, p2: Tensor, valid1: Tensor, valid2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide both point maps of each sample by their mean distance to the origin over the valid pixels.

    z = max(sum |p| over the valid pixels of both views / (n1 + n2 + 1e-8), 1e-8), "avg_dis" (DUSt3R, equation 3).
    Returns p1 / z, p2 / z (0 at invalid pixels) and z (B,). Gradients flow through z.
    """
    # Cleared before the division: its backward would turn an infinite invalid point into 0 * inf = NaN for all.
    p1, p2 = _clear(p1, valid1), _clear(p2, valid2)
    total = p1.norm(dim=-1).sum(dim=(1, 2)) + p2.norm(dim=-1).sum(dim=(1, 2))
    count = valid1.float().sum(dim=(1, 2)) + valid2.float().sum(dim=(1, 2))
    factor = (total / (count + 1e-8)).clamp_min(MIN_FACTOR)
    broad = factor[:, None, None, None]
    return p1 / broad, p2 / broad, factor


def confidence_loss(
    pred: Prediction, gt1: Tensor, gt2: Tensor, valid1: Tensor, valid2: Tensor, alpha: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """DUSt3R's confidence-aware loss (equation 4): per view the mean over valid pixels of conf * err - alpha ln(conf).

    err is the Euclidean distance of prediction and truth, each normalised by its own factor (`normalise_jointly`).
    The ground truth must be in camera 1 already (`to_camera1`). The mean pools the whole batch; a view without any
    valid pixel contributes 0.

    Returns the loss () and a dict of detached scalars: conf_loss_1, conf_loss_2, regr_1, regr_2 (mean err per view).
    Raises PqkError for a missing key or shapes that do not fit.
    """
    _check(pred, gt1, gt2, valid1, valid2, ("pts3d_1", "conf_1", "pts3d_2", "conf_2"))
    err1, err2 = _errors(pred, gt1, gt2, valid1, valid2, gt_scale=False)
    losses, details = [], {}
    for view, err, valid in ((1, err1, valid1), (2, err2, valid2)):
        conf = torch.where(valid.bool(), pred[f"conf_{view}"].float(), 1.0)
        losses.append(masked_mean(conf * err - alpha * conf.log(), valid))
        details[f"conf_loss_{view}"] = losses[-1].detach()
        details[f"regr_{view}"] = masked_mean(err, valid).detach()
    return losses[0] + losses[1], details


def regression_loss(
    pred: Prediction, gt1: Tensor, gt2: Tensor, valid1: Tensor, valid2: Tensor, gt_scale: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """DUSt3R's plain regression loss (equation 2): mean err over view 1's valid pixels plus the same over view 2's.

    With `gt_scale` the ground truth keeps its own unit (the prediction is normalised all the same).
    Returns the loss () and {regr_1, regr_2}, detached. Raises PqkError as `confidence_loss` does.
    """
    _check(pred, gt1, gt2, valid1, valid2, ("pts3d_1", "pts3d_2"))
    err1, err2 = _errors(pred, gt1, gt2, valid1, valid2, gt_scale)
    return _sum_of_means(err1, err2, valid1, valid2)


def scale_shift_invariant_error(
    pred: Prediction, gt1: Tensor, gt2: Tensor, valid1: Tensor, valid2: Tensor, gt_scale: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """DUSt3R's validation criterion (Regr3D_ScaleShiftInv): the regression error after a shift in z and a scale.

    After normalisation, per sample and over the valid pixels of both views: each side loses its median z; with
    centre = median per coordinate and scale = median distance to the centre, the prediction (its scale clipped to
    [1e-3, 1e3]) is multiplied by truth scale / prediction scale. Medians are the lower middle value.
    Returns the error () in the unit of the ground truth and {regr_1, regr_2}. Raises PqkError as `confidence_loss`.
    """
    _check(pred, gt1, gt2, valid1, valid2, ("pts3d_1", "pts3d_2"))
    p1, p2, _ = normalise_jointly(pred["pts3d_1"], pred["pts3d_2"], valid1, valid2)
    g1, g2 = gt1.float(), gt2.float()
    if not gt_scale:
        g1, g2, _ = normalise_jointly(g1, g2, valid1, valid2)
    p1, p2, pred_scale = _shift_and_scale(p1, p2, valid1, valid2)
    g1, g2, gt_size = _shift_and_scale(g1, g2, valid1, valid2)
    ratio = (gt_size / pred_scale.clamp(*PRED_SCALE_RANGE))[:, None, None, None]
    return _sum_of_means(_norm(p1 * ratio - g1, valid1), _norm(p2 * ratio - g2, valid2), valid1, valid2)


def softened_kl(
    teacher: Prediction, student: Prediction, valid1: Tensor, valid2: Tensor, conf_alpha: float, temperature: float
) -> Tensor:
    """KL of the Teacher's point densities to the student's, both softened, in the unit of the task loss: a scalar.

    A pixel's density is the one whose negative logarithm the confidence loss is: `exp(-3 c / conf_alpha |x - p|)` up to
    a constant, with confidence c and point p normalised as that loss does (each network by its own factor). Softening
    by a temperature divides the rate: p^(1/T), normalised anew. The confidence loss is conf_alpha / 3 times a negative
    log-likelihood in nats, so the KL is multiplied by the same factor. Per view the mean over valid pixels; the sum of
    both views. Predictions as `Dust3r` gives them; masks (B, H, W); conf_alpha and temperature above 0.
    """
    t1, t2, _ = normalise_jointly(teacher["pts3d_1"], teacher["pts3d_2"], valid1, valid2)
    s1, s2, _ = normalise_jointly(student["pts3d_1"], student["pts3d_2"], valid1, valid2)
    total = torch.zeros((), device=t1.device)
    for view, ours, theirs, valid in ((1, s1, t1, valid1), (2, s2, t2, valid2)):
        rates = [
            3 / (conf_alpha * temperature) * torch.where(valid.bool(), out[f"conf_{view}"].float(), 1.0)
            for out in (teacher, student)
        ]
        total = total + masked_mean(laplace_kl((ours - theirs).norm(dim=-1), *rates), valid)
    return conf_alpha / 3 * total


def imitation_loss(got: Mapping[str, Tensor], aim: Mapping[str, Tensor], alpha: float) -> Tensor:
    """How far outputs are from the Teacher's: sum over both views of mean(w * err) + alpha * mean(|ln c - ln c_T|).

    err = |x - x_T| / max(|x_T|, NEAREST) per pixel; w is the Teacher's confidence c_T over its mean in that view, so
    that pixels the Teacher knows nothing about (sky, occlusions) weigh little. Points (B, H, W, 3) in one unit,
    confidences (B, H, W) above 0; every pixel counts, as the Teacher answers everywhere. No unit.
    """
    total = torch.zeros((), device=got["conf_1"].device)
    for view in (1, 2):
        points, wanted = got[f"pts3d_{view}"].float(), aim[f"pts3d_{view}"].float()
        conf, trusted = got[f"conf_{view}"].float(), aim[f"conf_{view}"].float()
        err = (points - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(NEAREST)
        weight = trusted / trusted.mean(dim=(1, 2), keepdim=True)
        total = total + (weight * err).mean() + alpha * (conf.log() - trusted.log()).abs().mean()
    return total


def output_probe(out: Prediction) -> Tensor:
    """The points of both views, each relative to its distance, projected on random signs: a scalar.

    The squared gradient of it by a weight is on average how far the weight moves the points (Hutchinson 1990), which is
    the second order of a loss against the network's own outputs: the first is 0 there, and tells nothing of what may be
    cut where there is no ground truth. The signs are always the same.
    """
    generator, total = torch.Generator().manual_seed(0), torch.zeros((), device=out["pts3d_1"].device)
    for view in (1, 2):
        points = out[f"pts3d_{view}"].float()
        signs = torch.randint(2, points.shape, generator=generator).to(points) * 2 - 1
        far = points.detach().norm(dim=-1, keepdim=True).clamp_min(NEAREST)
        total = total + (signs * points / far).sum() / points[..., 0].numel() ** 0.5
    return total


def _errors(
    pred: Prediction, gt1: Tensor, gt2: Tensor, valid1: Tensor, valid2: Tensor, gt_scale: bool
) -> tuple[Tensor, Tensor]:
    """Distances (B, H, W) of normalised prediction and (normalised) truth, 0 at invalid pixels."""
    p1, p2, _ = normalise_jointly(pred["pts3d_1"], pred["pts3d_2"], valid1, valid2)
    g1, g2 = gt1.float(), gt2.float()
    if not gt_scale:
        g1, g2, _ = normalise_jointly(g1, g2, valid1, valid2)
    return _norm(p1 - g1, valid1), _norm(p2 - g2, valid2)


def _shift_and_scale(p1: Tensor, p2: Tensor, valid1: Tensor, valid2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both maps with the joint median z subtracted, and the median distance (B,) to the median point."""
    nan = float("nan")
    both = torch.cat(
        [torch.where(v.bool()[..., None], p, nan).flatten(1, 2) for p, v in ((p1, valid1), (p2, valid2))], dim=1
    )
    centre = both.nanmedian(dim=1).values  # (B, 3); NaN for a sample without valid pixels, which counts nowhere
    scale = (both - centre[:, None]).norm(dim=-1).nanmedian(dim=1).values
    shift = torch.nn.functional.pad(centre[:, 2:], (2, 0))[:, None, None]
    return p1 - shift, p2 - shift, scale


def _clear(points: Tensor, valid: Tensor) -> Tensor:
    """Points (B, H, W, 3) in float32 with every invalid one at the origin."""
    return torch.where(valid.bool()[..., None], points.float(), 0.0)


def _norm(points: Tensor, valid: Tensor) -> Tensor:
    """Euclidean norm (B, H, W); 0 with gradient 0 at invalid pixels."""
    return _clear(points, valid).norm(dim=-1)


def _sum_of_means(err1: Tensor, err2: Tensor, valid1: Tensor, valid2: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    mean1, mean2 = masked_mean(err1, valid1), masked_mean(err2, valid2)
    return mean1 + mean2, {"regr_1": mean1.detach(), "regr_2": mean2.detach()}


def _check(pred: Prediction, gt1: Tensor, gt2: Tensor, valid1: Tensor, valid2: Tensor, needed: tuple[str, ...]) -> None:
    missing = [key for key in needed if key not in pred]
    if missing:
        raise PqkError(f"the loss needs the prediction's {', '.join(missing)}; it has {', '.join(pred) or 'nothing'}")
    for view, gt, valid in ((1, gt1, valid1), (2, gt2, valid2)):
        points = pred[f"pts3d_{view}"]
        shapes = {"ground truth": gt.shape, "mask": (*valid.shape, 3)}
        if f"conf_{view}" in needed:
            shapes["confidence"] = (*pred[f"conf_{view}"].shape, 3)
        for name, shape in shapes.items():
            if points.ndim != 4 or points.shape[-1] != 3 or tuple(shape) != tuple(points.shape):
                raise PqkError(
                    f"view {view}: the {name} does not fit the predicted points: expected (B, H, W, 3) throughout "
                    f"(masks and confidences without the 3), got {tuple(shape)} and {tuple(points.shape)}"
                )
