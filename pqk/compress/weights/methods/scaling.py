"""Finds the factors of input features that make a weight easier to round: SmoothQuant's and AWQ's.

A layer computes `(W diag(s)) (x / s)`. In float nothing changes; rounded, features with large factors get finer steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pqk.compress.weights.methods.inputs import Inputs
from pqk.compress.weights.quantizers import decode, encode, grid_of
from pqk.compress.weights.schemes import Scheme

AWQ_ROWS = 256
"""Rows, evenly spread, that AWQ's search computes the error on: a row of the best factors is like any other."""
LIMIT = 1024.0
"""Factors stay within 1 / LIMIT and LIMIT, which float16 holds with full precision."""


def smooth_factors(matrix: Tensor, inputs: Inputs, alpha: float) -> Tensor:
    """Returns SmoothQuant's factors: `s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`, float16 (features,).

    matrix: the weight (rows, features). alpha: how much of the difficulty moves from the inputs into the weight, 0..1.
    Features that are 0 in all inputs or weights keep 1. Source: Xiao et al., ICML 2023, equation 4.
    """
    weights = matrix.abs().amax(0)
    factors = inputs.largest.to(weights) ** alpha / weights.clamp(min=1e-30) ** (1 - alpha)
    return _stored(factors, (inputs.largest.to(weights) > 0) & (weights > 0))


def awq_factors(matrix: Tensor, inputs: Inputs, scheme: Scheme, steps: int) -> Tensor | None:
    """Returns AWQ's factors: `s_j = mean|x_j|^a`, with the best a of 0, 1 / steps .. 1 - 1 / steps; None for a = 0.

    The best one has the least error of the layer's outputs when the weight is rounded.

    The error of a rounded row is `d G d^T` with d its difference and G the sum of x x^T, so no input is kept.
    Source: Lin et al., MLSys 2024, section 3.2; its search for clipping is left out.
    """
    step = -(-matrix.shape[0] // AWQ_ROWS)
    sample = matrix[::step]
    gram, mean = inputs.gram.to(sample), inputs.mean.to(sample)
    best: tuple[float, Tensor | None] = (_output_error(sample, None, gram, scheme), None)
    for index in range(1, steps):
        factors = _stored(mean.clamp(min=1e-30) ** (index / steps), mean > 0)
        error = _output_error(sample, factors, gram, scheme)
        if error < best[0]:
            best = error, factors
    return best[1]


def _output_error(matrix: Tensor, factors: Tensor | None, gram: Tensor, scheme: Scheme) -> float:
    scaled = matrix if factors is None else matrix * factors.float()
    scale, zero_point = grid_of(scaled, scheme)
    found = decode(encode(scaled, scale, zero_point, scheme), scale, zero_point, scheme)
    if factors is not None:
        found = found / factors.float()
    difference = found - matrix
    return float(((difference @ gram) * difference).sum())


def _stored(factors: Tensor, known: Tensor) -> Tensor:
    """Returns factors as they are kept: float16, divided by their geometric middle; 1 where nothing is known."""
    if not bool(known.any()):
        return torch.ones_like(factors, dtype=torch.float16)
    middle = (factors[known].max().sqrt() * factors[known].min().sqrt()).clamp(min=1e-30)
    return torch.where(known, factors / middle, 1.0).clamp(1 / LIMIT, LIMIT).to(torch.float16)
