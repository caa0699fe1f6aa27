"""Gives the random numbers of a sampler: drawn from a seed, or given.

Every draw has a row for each proposal, and the first ones are used where fewer are needed: what a model keeps changes
no later number, so models that differ a little see the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from pqk.errors import PqkError

PARTS = ("init", "step", "renew")
_SEEDS = 1_000_003


class Noise(Protocol):
    """Standard-normal rows (count, 4) for one image; `uniform` gives numbers in [0, 1). pair: of times, from 0."""

    def start(self) -> Tensor: ...

    def step(self, pair: int, count: int) -> Tensor: ...

    def renew(self, pair: int, count: int) -> Tensor: ...

    def uniform(self, pair: int, count: int) -> Tensor: ...


class DrawnNoise:
    """Draws on the CPU, so that every machine sees the same numbers. seed: of the evaluation; image: its number."""

    def __init__(self, proposals: int, seed: int, image: int) -> None:
        self._proposals = proposals
        self._generator = torch.Generator().manual_seed((seed * _SEEDS + image) % 2**63)

    def start(self) -> Tensor:
        return torch.randn(self._proposals, 4, generator=self._generator)

    def step(self, pair: int, count: int) -> Tensor:
        return self.start()[:count]

    def renew(self, pair: int, count: int) -> Tensor:
        return self.start()[:count]

    def uniform(self, pair: int, count: int) -> Tensor:
        return torch.rand(self._proposals, generator=self._generator)[:count]


class GivenNoise:
    """Gives the rows of arrays: init (N, 4), step and renew (pairs, N, 4), of which a single step needs only init."""

    def __init__(self, init: Tensor, step: Tensor | None = None, renew: Tensor | None = None) -> None:
        self._parts = {"init": init, "step": step, "renew": renew}

    def start(self) -> Tensor:
        return self._part("init")

    def step(self, pair: int, count: int) -> Tensor:
        return self._rows("step", pair, count)

    def renew(self, pair: int, count: int) -> Tensor:
        return self._rows("renew", pair, count)

    def uniform(self, pair: int, count: int) -> Tensor:
        raise PqkError("given noise holds no uniform numbers, which label states need; give a seed")

    def _part(self, name: str) -> Tensor:
        found = self._parts[name]
        if found is None:
            raise PqkError(f"the given noise lacks {name!r}, which several steps need")
        return found

    def _rows(self, name: str, pair: int, count: int) -> Tensor:
        part = self._part(name)
        if pair >= len(part):
            raise PqkError(f"the given noise has {len(part)} rounds of {name!r}; the steps need more")
        return part[pair, :count]


def given_noise(noise: Tensor | Mapping[str, Tensor], images: int, proposals: int) -> list[GivenNoise]:
    """Returns the noise of each image from arrays.

    noise: start rows (images, N, 4), or these under 'init' with 'step' and 'renew' (pairs, N, 4), which are of a single
    image. Raises PqkError for other names or shapes.
    """
    parts = {"init": noise} if isinstance(noise, Tensor) else dict(noise)
    unknown = [name for name in parts if name not in PARTS]
    if unknown or "init" not in parts:
        raise PqkError(f"noise holds {', '.join(parts) or 'nothing'}; it must hold init, and may hold step and renew")
    init = parts.pop("init")
    if init.ndim == 2:
        init = init[None]
    if tuple(init.shape) != (images, proposals, 4):
        raise PqkError(f"the start noise has the shape {tuple(init.shape)} instead of {(images, proposals, 4)}")
    if images > 1 and parts:
        raise PqkError("noise of several steps can be given for one image at a time")
    for name, part in parts.items():
        if part.ndim != 3 or tuple(part.shape[1:]) != (proposals, 4):
            raise PqkError(f"the noise {name!r} has the shape {tuple(part.shape)} instead of (pairs, {proposals}, 4)")
    return [GivenNoise(rows, **parts) for rows in init]
