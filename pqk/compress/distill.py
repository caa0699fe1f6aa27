"""Method K: a smaller student learns from the truth and from a Teacher's points and confidences.

`L = alpha L_task + beta KL(p_T || p_S) + gamma |F_T - F_S|^2` (Hinton et al. 2015, arXiv 1503.02531, with densities of
3-D points in place of classes; Romero et al. 2015, arXiv 1412.6550, for the features). docs/methods.md derives the KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqk.compress.cut.student import evenly
from pqk.compress.train.fit import Fitted, Stop, fit
from pqk.compress.train.loop import Progress
from pqk.compress.train.pairs import SymmetricPairs
from pqk.data.render.stream import PairBatch
from pqk.families.dust3r.layers import initialize
from pqk.families.dust3r.losses import Prediction, confidence_loss, masked_mean, normalise_jointly
from pqk.settings.distill import Distill

_SERIES_BELOW = 0.5
_SERIES = [(-1) ** n * (3 - n) / math.factorial(n + 1) for n in range(2, 15)]
"""Near 0 the closed form of the mean distance loses digits; its power series, from s^2 on, is exact up to there."""


def laplace_kl(distance: Tensor, rate_p: Tensor, rate_q: Tensor) -> Tensor:
    """KL(p || q) in nats, element by element, of two densities `rate^3 / (8 pi) exp(-rate |x - centre|)` of 3-D points.

    distance: between the two centres, at least 0, in the unit in which the rates are per unit; rates above 0.
    With t = ln(rate_q / rate_p) and s = rate_p distance it is `3 (e^t - 1 - t) + e^t (h(s) - 3)`, where
    `h(s) = s + 4 / s - e^-s (1 + 4 / s)` is the mean distance of a draw of p (rate 1) from a point at distance s.
    Both terms are at least 0, and 0 only where rates and centres agree.
    """
    log_ratio = rate_q.log() - rate_p.log()
    return 3 * (torch.expm1(log_ratio) - log_ratio) + log_ratio.exp() * _farther(rate_p * distance)


def _farther(s: Tensor) -> Tensor:
    """h(s) - 3: how much farther away, on average, a point at distance s is than the centre; s^2 / 6 near 0."""
    small = s.clamp(max=_SERIES_BELOW)
    series = torch.zeros_like(small)
    for coefficient in reversed(_SERIES):
        series = series * small + coefficient
    large = s.clamp(min=_SERIES_BELOW)
    closed = large - 3 - torch.exp(-large) - 4 * torch.expm1(-large) / large
    return torch.where(s < _SERIES_BELOW, small.square() * series, closed)


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


class PairsWithFeatures(SymmetricPairs):
    """SymmetricPairs whose outputs also hold `features`: the encoder's tokens and the outputs of decoder blocks.

    layers: which blocks of both decoders, in the order in which another network's are compared with them.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__(model)
        self.layers = tuple(layers)

    def forward(self, images: Tensor) -> dict[str, Any]:
        with self._watched() as features:
            return {**super().forward(images), "features": features}

    @contextmanager
    def _watched(self) -> Iterator[dict[str, Tensor]]:
        """Fills the dictionary while the model runs; the hooks are gone afterwards, so that copies carry none."""
        seen: dict[str, Tensor] = {}
        parts: dict[str, nn.Module] = {"tokens": self.model.enc_norm}
        for number, layer in enumerate(self.layers):
            parts[f"first_{number}"] = self.model.dec_blocks[layer]
            parts[f"second_{number}"] = self.model.dec_blocks2[layer]

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda module, args, output: seen.update({name: output})

        handles = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def feature_loss(teacher: dict[str, Tensor], student: dict[str, Tensor], bridges: nn.ModuleDict) -> Tensor:
    """Mean over the features of `|F_T - F_S|^2 / |F_T|^2`, squares of all tokens and samples together: a scalar.

    Relative, because the stream of a decoder grows from block to block, and every layer should count alike. bridges:
    a linear map from the student's width to the Teacher's for every feature whose widths differ.
    """
    parts = []
    for name, target in teacher.items():
        ours = bridges[name](student[name]) if name in bridges else student[name]
        error = (ours.float() - target.float()).square().mean()
        parts.append(error / target.float().square().mean().clamp_min(1e-8))
    return torch.stack(parts).mean()


def distill(
    teacher: Any,
    student: Any,
    spec: Distill,
    *,
    seed: int,
    scratch: Path,
    device: str = "auto",
    stop: Stop | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Train `student`, a DUSt3R of any size, in place; returns its best averaged weights.

    The Teacher sees the same rendered pairs in both orders and is not changed; it moves to the training device. Up to
    loss.task_share of the run beta is beta_start, then it rises in a line to beta_end. Features are only looked at when
    gamma is above 0: the encoder's tokens and as many decoder blocks as the student has, evenly spread over the
    Teacher's. seed, scratch, device, stop and report, and what is raised: as in `fit`. history tells the drop against
    the Teacher.
    """
    loss = spec.loss
    weighs_kl = max(loss.beta_start, loss.beta_end) > 0
    teacher.eval()
    layers = evenly(len(teacher.dec_blocks), len(student.dec_blocks))
    guide: SymmetricPairs = SymmetricPairs(teacher)
    bridges = nn.ModuleDict()
    if loss.gamma > 0:
        guide = PairsWithFeatures(teacher, layers)
        bridges = _bridges(teacher, student, len(layers), seed)

    def loss_of(module: nn.Module, pairs: PairBatch, share: float) -> Tensor:
        gt1, gt2, valid1, valid2 = pairs.ordered()
        out = module(pairs.images)
        total = loss.alpha * confidence_loss(out, gt1, gt2, valid1, valid2, spec.train.alpha)[0]
        if not weighs_kl and not loss.gamma:
            return total
        with torch.no_grad():
            aim = guide(pairs.images)
        if weighs_kl:
            kl = softened_kl(aim, out, valid1, valid2, spec.train.alpha, loss.temperature)
            total = total + loss.beta_at(share) * kl
        if loss.gamma:
            total = total + loss.gamma * feature_loss(aim["features"], out["features"], bridges)
        return total

    def pairs_of(model: nn.Module) -> nn.Module:
        return PairsWithFeatures(model, range(len(layers))) if loss.gamma > 0 else SymmetricPairs(model)

    return fit(
        student,
        spec.train,
        loss_of,
        seed=seed,
        scratch=scratch,
        device=device,
        teacher=teacher,
        extra=bridges if len(bridges) else None,
        pairs_of=pairs_of,
        stop=stop,
        report=report,
    )


def _bridges(teacher: Any, student: Any, layers: int, seed: int) -> nn.ModuleDict:
    """Linear maps, with weights from the seed, for the features whose widths differ."""
    bridges = nn.ModuleDict()
    if teacher.sizes.enc_dim != student.sizes.enc_dim:
        bridges["tokens"] = nn.Linear(student.sizes.enc_dim, teacher.sizes.enc_dim)
    if teacher.sizes.dec_dim != student.sizes.dec_dim:
        for number in range(layers):
            for name in ("first", "second"):
                bridges[f"{name}_{number}"] = nn.Linear(student.sizes.dec_dim, teacher.sizes.dec_dim)
    initialize(bridges, torch.Generator().manual_seed(seed))
    return bridges
