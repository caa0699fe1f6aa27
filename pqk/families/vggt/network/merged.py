"""Merges the patches of every frame for the alternating blocks: letter T, see `pqk.families.merging`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pqk.families.layers import Rope
from pqk.families.merging import Cells, Merged
from pqk.families.vggt.network.layers import batch_of, key_bias, repeated


class MergedFrames(NamedTuple):
    """What is left of the patches of S frames; special tokens are never merged.

    frames: of each one. ropes: tables with the bias of merged keys, of one frame's tokens (B * S, 1, P, head_dim) and
    of those of all frames (B, 1, S * P, head_dim).
    """

    frames: list[Merged]
    ropes: tuple[Rope, Rope]

    @property
    def tokens(self) -> list[Tensor]:
        """What is left of each frame, (B, M, C)."""
        return [frame.tokens for frame in self.frames]

    def undo(self, level: Tensor) -> Tensor:
        """What is left after a round, (B, S, M, 2 C), of the frame block and of the global one -> (B, S, N, 2 C)."""
        whole = [
            torch.cat([frame.undo(half) for half in level[:, index].chunk(2, dim=-1)], dim=-1)
            for index, frame in enumerate(self.frames)
        ]
        return torch.stack(whole, dim=1)


def merge(cells: Cells, tokens: Sequence[Tensor], special: int) -> MergedFrames:
    """Merges the patches (B, N, C) of each frame once, so that all rounds keep the same ones.

    special: tokens of a frame before its patches; they stand at (0, 0), where the rotary embedding turns nothing.
    """
    frames = [cells(one) for one in tokens]
    count, left = len(frames), special + frames[0].rope.tokens
    one = []
    for still, of_frames in ((1.0, [f.rope.cos for f in frames]), (0.0, [f.rope.sin for f in frames])):
        table = torch.stack(of_frames, dim=1).flatten(0, 1)
        leading = table.new_full((1, 1, special, table.shape[-1]), still)
        one.append(torch.cat((repeated(leading, batch_of(tokens[0]) * count), table), dim=2))
    every = [table.reshape(-1, 1, count * left, table.shape[-1]) for table in one]
    bias = key_bias(frames[0].rope, special)
    return MergedFrames(
        frames,
        (Rope(one[0], one[1], left, bias), Rope(every[0], every[1], count * left, repeated(bias, count, axis=3))),
    )
