"""Rotates the columns of a matrix so that no column stands out: `rotate` and `unrotate`.

The rotation of n columns is `R = diag(signs) (H kron C)`, orthogonal: H the normalized Walsh-Hadamard matrix of the
largest power of two that divides n, C the orthonormal cosine transform (DCT-II) of what is left, signs random ones of a
seed. A layer computes `(W R) (R^T x) = W x`. The idea is that of QuaRot (Ashkboos et al., NeurIPS 2024),
which needs a tabulated Hadamard matrix for n that is no power of two; the cosine transform serves any n.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

FACTOR = 64
"""Largest Hadamard factor that is one matrix product: 64 x 64 is quick, and 4096 columns take two."""
CHUNK = 2**18
"""Values that are rotated at once: 1 MB in float32 stays in a core's cache."""


def rotate(matrix: Tensor, seed: int) -> Tensor:
    """Returns `matrix @ R` over the last dimension, in the dtype of the matrix."""
    factors, signs = _parts(matrix.shape[-1], seed)
    return _kron(matrix * signs.to(matrix), factors)


def unrotate(matrix: Tensor, seed: int) -> Tensor:
    """Returns `matrix @ R^T` over the last dimension: undoes `rotate`."""
    factors, signs = _parts(matrix.shape[-1], seed)
    return _kron(matrix, tuple(factor.T for factor in factors)) * signs.to(matrix)


def hadamard(size: int) -> Tensor:
    """Returns the normalized Walsh-Hadamard matrix of a power of two, float64 (Sylvester's construction)."""
    found = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while found.shape[0] < size:
        found = torch.kron(found, step)
    return found / size**0.5


def cosine_transform(size: int) -> Tensor:
    """Returns the orthonormal DCT-II matrix, float64: row k > 0 is `sqrt(2 / n) cos(pi (i + 1/2) k / n)`."""
    index = torch.arange(size, dtype=torch.float64)
    found = torch.cos(torch.pi * (index + 0.5) * index[:, None] / size) * (2 / size) ** 0.5
    found[0] = size**-0.5
    return found


@lru_cache(maxsize=64)
def _parts(size: int, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns the factors of the Kronecker product, the largest first, and the signs of the columns."""
    power = size & -size
    sizes = []
    while power > 1:
        sizes.append(min(power, FACTOR))
        power //= sizes[-1]
    factors = [hadamard(n) for n in sizes]
    odd = size // (size & -size)
    if odd > 1:
        factors.append(cosine_transform(odd).T.contiguous())
    # raw numbers of PCG64 are the same in every version of numpy
    bits = np.random.PCG64(seed).random_raw(size) >> np.uint64(63)
    return tuple(factors), torch.from_numpy(1.0 - 2.0 * bits.astype(np.float64))


def _kron(matrix: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """Returns `matrix @ (F0 kron F1 kron ...)` over the last dimension; works on a few rows at a time."""
    columns = matrix.shape[-1]
    flat, found = matrix.reshape(-1, columns), torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    last_first = [factor.to(matrix) for factor in reversed(factors)]
    out, step = found.view(-1, columns), max(1, CHUNK // columns)
    for start in range(0, flat.shape[0], step):
        part = flat[start : start + step]
        rows = part.shape[0]
        for factor in last_first:  # the last index is summed over and becomes the first one
            size = factor.shape[0]
            turned = (part.reshape(-1, size) @ factor).reshape(rows, columns // size, size)
            part = turned.transpose(1, 2).reshape(rows, columns)
        out[start : start + step] = part
    return found
