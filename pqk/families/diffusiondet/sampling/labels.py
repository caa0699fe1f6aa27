"""Moves class states with the boxes: absorbing-state diffusion, in which a class is forgotten but never changed.

Austin et al. 2021 (D3PM), sections 3.1 and 3.4 and appendix A.2. States are 0 ... K - 1 and the mask K. a_t is the
chance that a class is still known at time t; a at time -1 is 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk.families.diffusiondet.sampling import schedule

LEAST = 1e-8
"""Smallest probability in a logarithm."""


def known_share(name: str) -> Tensor:
    """Returns a_t (1000,) float64: linear 1 - (t + 1) / 1000, or cosine, which is abar_t of the boxes."""
    if name == "cosine":
        return torch.from_numpy(schedule.tables()["alphas_cumprod"].copy())
    return 1 - torch.arange(1, schedule.TIMES + 1, dtype=torch.float64) / schedule.TIMES


def share_at(name: str, t: Tensor | int) -> Tensor:
    """Returns a_t at times t, of which -1 is the clean state."""
    place = torch.as_tensor(t)
    table = torch.cat((known_share(name), torch.ones(1, dtype=torch.float64)))
    return table.to(place.device)[place]


def corrupt(y0: Tensor, t: Tensor, uniform: Tensor, classes: int, name: str) -> Tensor:
    """Returns the state at time t of classes y0 (N,): the class where uniform < a_t, else the mask."""
    return torch.where(uniform < share_at(name, t), y0, classes)


def corrupted_distribution(y0: Tensor, t: Tensor, classes: int, name: str) -> Tensor:
    """Returns the distribution (N, K + 1) of the state at time t: a_t on the class, the rest on the mask."""
    return mixed(F.one_hot(y0, classes + 1).double(), share_at(name, t))


def mixed(clean: Tensor, share: Tensor) -> Tensor:
    """Returns share * clean + (1 - share) * mask, (N, K + 1) float32. clean: distributions of the clean state."""
    mask = torch.zeros_like(clean)
    mask[..., -1] = 1
    share = share.to(clean.dtype).reshape(*share.shape, *[1] * (clean.ndim - share.ndim))
    return (share * clean + (1 - share) * mask).float()


def clean_distribution(logits: Tensor) -> Tensor:
    """Returns the predicted distribution (N, K + 1) of the clean state: p_k / max(1, sum p), the rest on the mask."""
    p = logits.sigmoid()
    p = p / p.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.cat((p, 1 - p.sum(dim=-1, keepdim=True)), dim=-1)


def previous(y: Tensor, clean: Tensor, t: int, after: int, uniform: Tensor, name: str) -> Tensor:
    """Returns the state at the earlier time `after` of states y (N,) at time t.

    A known class stays. A mask becomes class k with probability P_k (a_after - a_t) / (1 - a_t), drawn with `uniform`
    along the cumulative distribution. clean: P (N, K + 1).
    """
    then, now = share_at(name, after), share_at(name, t)
    chance = clean[..., :-1].double() * ((then - now) / (1 - now))
    drawn = (uniform[..., None].double() >= chance.cumsum(dim=-1)).sum(dim=-1)  # K where no class was reached
    return torch.where(y == clean.shape[-1] - 1, drawn, y)


def variational_loss(logits: Tensor, y0: Tensor, y: Tensor, t: Tensor, name: str) -> Tensor:
    """Returns the mean of w_t (-ln P_y0) over rows that are masked and have a class; 0 where there are none.

    w_t = (a_{t-1} - a_t) / (1 - a_t). logits: (N, K); y0, y: clean and noisy states (N,); t: times (N,).
    """
    classes = logits.shape[-1]
    rows = (y == classes) & (y0 < classes)
    if not rows.any():
        return logits.sum() * 0
    chosen = clean_distribution(logits)[rows].gather(-1, y0[rows, None])[:, 0]
    return (variational_weight(t[rows], name).to(chosen.dtype) * -chosen.clamp(min=LEAST).log()).mean()


def variational_weight(t: Tensor, name: str) -> Tensor:
    """Returns w_t = (a_{t-1} - a_t) / (1 - a_t), float64."""
    now = share_at(name, t)
    return (share_at(name, t - 1) - now) / (1 - now)
