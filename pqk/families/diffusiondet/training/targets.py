"""Makes what the head is trained on: the truths of an image with noise on them, among boxes of nothing.

Chen et al. 2023, section 3.3. Truths are cx, cy, w, h relative to the image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pqk.families.diffusiondet.network.boxes import from_signal
from pqk.families.diffusiondet.sampling import schedule

WHOLE = (0.5, 0.5, 1.0, 1.0)
"""Stands for the truths of an image that has none, as a start for the diffusion only."""
SPREAD, SMALLEST = 1 / 6, 1e-4


class Draws(NamedTuple):
    """Random numbers of one image.

    t: time (), 0 ... 999. noise: (N, 4) standard normal. padding: rows (at least N - truths, 4) standard normal, of
    boxes of nothing. chosen: which truths stay (G,) bool where there are more than N; None: the first N.
    """

    t: Tensor
    noise: Tensor
    padding: Tensor
    chosen: Tensor | None = None


class Noisy(NamedTuple):
    """x0: signals (N, 4), truths first. x: the same with noise (N, 4) float64.

    chosen: which truth a row comes from (N,) int64, -1 of a row of nothing.
    """

    x0: Tensor
    x: Tensor
    chosen: Tensor


def draw(proposals: int, truths: int, generator: torch.Generator | None = None) -> Draws:
    """Returns fresh random numbers for one image, in the order t, noise, padding or choice."""
    t = torch.randint(0, schedule.TIMES, (), generator=generator)
    noise = torch.randn(proposals, 4, generator=generator)
    if truths > proposals:
        order = torch.randperm(truths, generator=generator)
        return Draws(t, noise, torch.zeros(0, 4), order < proposals)
    return Draws(t, noise, torch.randn(proposals - min(truths, proposals), 4, generator=generator))


def noisy_boxes(truths: Tensor, draws: Draws, scale: float, noise_std: tuple[float, ...] = (1.0,) * 4) -> Noisy:
    """Returns the signals of truths (G, 4) and boxes of nothing, without and with the noise of time t.

    Padding is normal / 6 + 0.5 on all four numbers, with sizes of at least 1e-4. noise_std: factors of the noise.
    """
    proposals = len(draws.noise)
    index = torch.arange(len(truths), device=truths.device)
    if not len(truths):
        starts = truths.new_tensor([WHOLE])
        index = torch.full((1,), -1, device=truths.device)
    elif len(truths) > proposals:
        chosen = index < proposals if draws.chosen is None else draws.chosen.to(index.device).bool()
        starts, index = truths[chosen], index[chosen]
    else:
        starts = truths
    padding = draws.padding[: proposals - len(starts)].to(truths) * SPREAD + 0.5
    padding = torch.cat((padding[:, :2], padding[:, 2:].clamp(min=SMALLEST)), dim=1)
    x0 = (torch.cat((starts, padding)) * 2 - 1) * scale
    std = x0.new_tensor(noise_std)
    x = schedule.diffuse(x0, draws.t.to(x0.device).reshape(()), draws.noise.to(x0) * std)
    index = torch.cat((index, index.new_full((len(padding),), -1)))
    return Noisy(x0, x, index)


def start_boxes(noisy: Noisy, whwh: Tensor, scale: float) -> Tensor:
    """Returns the head's input boxes (N, 4) float32, corners in pixels of an image whose w, h, w, h are whwh (4,)."""
    return from_signal(noisy.x, whwh.to(noisy.x), scale).float()
