"""Rounds a weight column by column and lets the columns that are left make up for the error: `gptq`.

Source: Frantar et al., ICLR 2023, algorithm 1, with the column order and the groups of its code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pqk.compress.weights.quantizers import grid_of, rounded
from pqk.compress.weights.schemes import Scheme
from pqk.errors import PqkError

TRIES = 4
"""How often the damping is made ten times larger before a matrix counts as hopeless."""


def gptq(
    matrix: Tensor,
    gram: Tensor,
    scheme: Scheme,
    damping: float = 0.01,
    block: int = 128,
    by_activation: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns codes (rows, cols), scale and zero point, as `encode` and `grid_of` do.

    matrix: float32 (rows, cols). gram: sum of x x^T of the layer's inputs (cols, cols).
    damping: part of the mean of gram's diagonal that is added to it. block: columns between two updates of all others.
    by_activation: columns of large inputs are rounded first, on the grid of the weight as it was; else in their own
    order, where the grid of a group is found when its turn comes. Columns without inputs are rounded to nearest.
    Raises PqkError when gram is not positive definite even with much damping.
    """
    cols = matrix.shape[1]
    work, gram = matrix.float().clone(), gram.float().clone()
    scale, zero_point = grid_of(work, scheme)
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1  # no input: no error to make up for, and none to take over
    order = torch.argsort(diagonal, descending=True, stable=True)
    size = scheme.group_size
    if not by_activation:
        order = torch.arange(cols, device=work.device)
        block = -(-block // size) * size if size else block  # a group ends in the block that it begins in
    work, inverse = work[:, order], _inverse_root(gram[order][:, order], damping)
    codes = torch.empty_like(work)
    for start in range(0, cols, block):
        end = min(start + block, cols)
        part = work[:, start:end].clone()
        errors, upper = torch.empty_like(part), inverse[start:end, start:end]
        for index in range(end - start):
            column = int(order[start + index])
            group = column // size if size else 0
            if size and not by_activation and column % size == 0:
                fresh, zero = grid_of(part[:, index : index + size], scheme, scale.dtype)
                scale[:, group] = fresh[:, 0]
                if zero is not None and zero_point is not None:
                    zero_point[:, group] = zero[:, 0]
            of_column, zero_of = _of_column(scale, zero_point, group, scheme)
            found = rounded(part[:, index], of_column, zero_of, scheme)
            codes[:, column] = found
            value = (found if zero_of is None else found - zero_of) * of_column
            error = (part[:, index] - value) / upper[index, index]
            part[:, index:] -= error[:, None] * upper[index, index:]
            errors[:, index] = error
        work[:, end:] -= errors @ inverse[start:end, end:]
    return codes.to(torch.int8 if scheme.symmetric else torch.uint8), scale, zero_point


def _of_column(scale: Tensor, zero_point: Tensor | None, group: int, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    if scheme.granularity == "group":
        return scale[:, group].float(), None if zero_point is None else zero_point[:, group].float()
    return scale.float(), None if zero_point is None else zero_point.float()


def _inverse_root(gram: Tensor, damping: float) -> Tensor:
    """Returns the upper triangle U with `U^T U` the inverse of gram plus damping."""
    middle = gram.diagonal().mean()
    for attempt in range(TRIES):
        added = torch.eye(gram.shape[0], device=gram.device) * (middle * damping * 10**attempt)
        for dtype in (torch.float32, torch.float64):
            lower, failed = torch.linalg.cholesky_ex((gram + added).to(dtype))
            if int(failed):
                continue
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper.float()
    raise PqkError("the inputs of a layer give no matrix that GPTQ can invert; give more calibration inputs")
