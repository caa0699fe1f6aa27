"""Holds the noise schedule: how much of a signal is left at each time, and the times of a sampler.

Nichol and Dhariwal 2021, section 3.2 (cosine schedule); Ho et al. 2020 (posterior); Song et al. 2021, equations 12 and
16 (DDIM). Everything is float64: in float32 the last values are off.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pqk.families.diffusiondet.network.boxes import A

TIMES = 1000
OFFSET, LARGEST_BETA = 0.008, 0.999


@lru_cache(maxsize=1)
def tables() -> dict[str, np.ndarray]:
    """Returns the twelve tables of a checkpoint by name, (1000,) float64 each.

    f(u) = cos^2((u / T + 0.008) / 1.008 pi / 2); beta_t = 1 - f(t + 1) / f(t), limited to 0.999; alphas_cumprod is the
    product of 1 - beta, written abar below.
    """
    u = np.arange(TIMES + 1, dtype=np.float64) / TIMES
    left = np.cos((u + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2
    beta = np.clip(1 - left[1:] / left[:-1], 0, LARGEST_BETA)
    alpha = 1 - beta
    abar = np.cumprod(alpha)
    before = np.concatenate(([1.0], abar[:-1]))
    variance = beta * (1 - before) / (1 - abar)
    return {
        "betas": beta,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "log_one_minus_alphas_cumprod": np.log(1 - abar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.clip(variance, 1e-20, None)),
        "posterior_mean_coef1": beta * np.sqrt(before) / (1 - abar),
        "posterior_mean_coef2": (1 - before) * np.sqrt(alpha) / (1 - abar),
    }


NAMES = tuple(tables())


def at(name: str, t: Tensor | int) -> Tensor:
    """Returns the values of a table at times t, float64, in the shape and on the device of t."""
    place = torch.as_tensor(t)
    return torch.from_numpy(tables()[name]).to(place.device)[place]


@lru_cache(maxsize=16)
def time_pairs(steps: int) -> list[tuple[int, int]]:
    """Returns the times of a sampler, each with the next: from 999 down to -1 in equal steps, cut to integers."""
    return list(pairwise(torch.linspace(-1, TIMES - 1, steps + 1).int().tolist()[::-1]))


def diffuse(x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
    """Returns sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, float64. t broadcasts with x0 from the left."""
    keep, add = (_beside(at(name, t), x0) for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"))
    return keep * x0 + add * noise


def noise_in(x: A, x0: A, t: Tensor | int) -> A:
    """Returns the noise that turns x0 into x at time t: (x / sqrt(abar_t) - x0) / sqrt(1 / abar_t - 1), float64."""

    def factor(name: str) -> Any:
        return float(tables()[name][t]) if isinstance(t, int) else _beside(at(name, t), torch.as_tensor(x))

    return (factor("sqrt_recip_alphas_cumprod") * x - x0) / factor("sqrt_recipm1_alphas_cumprod")


def ddim_coefficients(t: int, after: int, eta: float) -> tuple[float, float, float]:
    """Returns the factors of x0, of the estimated noise and of fresh noise in a step from time t to `after` >= 0.

    sigma = eta sqrt((1 - abar_t / abar_t') (1 - abar_t') / (1 - abar_t)); the noise's is sqrt(1 - abar_t' - sigma^2).
    """
    abar = tables()["alphas_cumprod"]
    now, then = float(abar[t]), float(abar[after])
    sigma = eta * math.sqrt((1 - now / then) * (1 - then) / (1 - now))
    return math.sqrt(then), math.sqrt(1 - then - sigma**2), sigma


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """Returns values with as many axes as x, the missing ones at the end."""
    return values.reshape(*values.shape, *[1] * (x.ndim - values.ndim)).to(x.device)
