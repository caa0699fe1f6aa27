"""Merges the tokens of a grid in cells of 2x2 where they are most alike, and gives every token its own value back.

Letter T of a recipe, without training. Merging of look-alikes is ToMe's idea (Bolya et al. 2023, Token Merging); cells
are ours: a token that is merged with one from elsewhere in the image takes over the depth of another place.

Nothing here looks at the values of a tensor in Python, and all counts are Python numbers, so a module with cells traces
to a fixed graph: one TopK, one ScatterElements and Gathers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqk.families.layers import Rope, rope_arrays

CELL = 4
"""Tokens of a cell, which become one."""


def cells_to_merge(rows: int, cols: int, share: float) -> int:
    """Returns how many cells of a grid are merged so that at most `share` of its tokens are gone.

    A merged cell leaves one of its four tokens. The last row or column of an odd grid lies in no cell. One cell always
    stays whole.
    """
    return min((rows // 2) * (cols // 2) - 1, int(share * rows * cols / (CELL - 1)))


class Merged(NamedTuple):
    """What is left of a grid's tokens, and what brings them back.

    tokens: (B, M, C): merged cells first, then the cells that stay, then tokens outside of cells. rope: tables of their
    places, with the bias of the merged keys. start: all tokens before merging (B, N, C). places: for each of them, row
    by row, the token that stands for it (B, N).
    """

    tokens: Tensor
    rope: Rope
    start: Tensor
    places: Tensor

    def undo(self, tokens: Tensor) -> Tensor:
        """Tokens (B, M, C) as they are now -> (B, N, C): each token's first value plus the change of what stands for
        it.
        """
        return self.start + _take(tokens - self.tokens, self.places, self.rope.tokens)


class Cells(nn.Module):
    """The cells of one grid (rows x cols) of which `merged` become one token each.

    A cell's score is the squared length of the mean of its four normalised tokens, which is the mean cosine of its
    pairs; the cells with the highest scores are merged. A merged token is the mean, lies at the cell's centre, and as a
    key counts for four: log 4 is added to its scores of attention (proportional attention, Bolya et al. 2023,
    section 3).
    """

    bias: Tensor
    order: Tensor
    back: Tensor
    cos: Tensor
    sin: Tensor
    centre_cos: Tensor
    centre_sin: Tensor

    def __init__(self, rows: int, cols: int, merged: int, head_dim: int, base: float, corner: int) -> None:
        """corner: row and column of the first token, for the rotary embedding."""
        super().__init__()
        self.rows, self.cols, self.merged = rows, cols, merged
        grid = np.arange(rows * cols).reshape(rows, cols)
        inside = grid[: rows // 2 * 2, : cols // 2 * 2]
        cells = inside.reshape(rows // 2, 2, cols // 2, 2).transpose(0, 2, 1, 3).reshape(-1, CELL)
        outside = np.setdiff1d(grid, inside)
        self.cells, self.outside = len(cells), len(outside)
        self.left = rows * cols - (CELL - 1) * merged
        order = np.concatenate([cells.reshape(-1), outside])
        places = np.stack([order // cols, order % cols], axis=-1)
        centres = places[: cells.size].reshape(-1, CELL, 2).mean(axis=1)
        tables = {
            "bias": np.where(np.arange(self.left) < merged, math.log(CELL), 0).astype(np.float32)[None, None, None],
            "order": order,
            "back": np.argsort(order),
        }
        tables["cos"], tables["sin"] = rope_arrays(places + corner, head_dim, base)
        tables["centre_cos"], tables["centre_sin"] = rope_arrays(centres + corner, head_dim, base)
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(table)), persistent=False)

    def forward(self, x: Tensor) -> Merged:
        """x (B, rows * cols, C) -> what is left of it."""
        batch, inside, kept = _batch(x), self.cells * CELL, self.cells - self.merged
        by_cell = x[:, self.order]
        cells = (by_cell[:, :inside] if self.outside else by_cell).reshape(batch, self.cells, CELL, -1)
        score = F.normalize(cells, dim=-1).mean(dim=2).square().sum(dim=-1)
        ranked = score.topk(self.cells, dim=1).indices
        joined, alone = ranked[:, : self.merged], ranked[:, self.merged :]
        whole = _take(cells.reshape(batch, self.cells, -1), alone, self.cells)
        parts = [_take(cells.mean(dim=2), joined, self.cells), whole.reshape(batch, CELL * kept, -1)]
        if self.outside:
            parts.append(by_cell[:, inside:])
        return Merged(torch.cat(parts, dim=1), self._rope(joined, alone), x, self._places(ranked))

    def _rope(self, joined: Tensor, alone: Tensor) -> Rope:
        """Returns the tables of what is left, in its order."""
        batch, inside, width = _batch(alone), self.cells * CELL, self.cos.shape[-1]
        tables = []
        for of_tokens, of_centres in ((self.cos, self.centre_cos), (self.sin, self.centre_sin)):
            whole = of_tokens[:inside].reshape(self.cells, CELL * width)[alone]
            parts = [of_centres[joined], whole.reshape(batch, -1, width)]
            if self.outside:
                parts.append(of_tokens[inside:].expand(batch, -1, -1))
            tables.append(torch.cat(parts, dim=1).unsqueeze(1))
        return Rope(tables[0], tables[1], self.left, self.bias)

    def _places(self, ranked: Tensor) -> Tensor:
        """Returns for every token, row by row, the place of what stands for it: (B, N)."""
        batch, inside = _batch(ranked), self.cells * CELL
        steps = torch.arange(self.cells, device=ranked.device).expand(batch, -1)
        rank = torch.zeros_like(ranked).scatter(1, ranked, steps)
        alone = rank >= self.merged
        first = torch.where(alone, self.merged + (rank - self.merged) * CELL, rank)
        slots = torch.arange(CELL, device=ranked.device) * alone.unsqueeze(-1)
        places = (first.unsqueeze(-1) + slots).reshape(batch, inside)
        if self.outside:
            last = torch.arange(self.left - self.outside, self.left, device=ranked.device)
            places = torch.cat([places, last.expand(batch, -1)], dim=1)
        return places[:, self.back]


def grid_cells(rows: int, cols: int, share: float, head_dim: int, base: float, corner: int = 0) -> Cells | None:
    """Returns the cells of a grid; None where the share leaves nothing to merge."""
    merged = cells_to_merge(rows, cols, share)
    return Cells(rows, cols, merged, head_dim, base, corner) if merged > 0 else None


def _batch(x: Tensor) -> int:
    """Returns the batch; exported graphs have a batch of 1, and a traced size would become arithmetic on shapes."""
    return 1 if torch.jit.is_tracing() else x.shape[0]


def _take(x: Tensor, index: Tensor, count: int) -> Tensor:
    """x (B, count, C), index (B, M) -> (B, M, C): one Gather, as `torch.gather` needs an index for every channel."""
    batch = _batch(x)
    if batch > 1:
        index = index + count * torch.arange(batch, device=index.device).unsqueeze(1)
    taken = x.reshape(batch * count, -1)[index.reshape(-1)]
    return taken.unsqueeze(0) if batch == 1 else taken.reshape(batch, -1, x.shape[2])
