"""Defines VGGT's camera head: from one token per frame to its pose, in four rounds of refinement."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqk.families.layers import Mlp
from pqk.families.sizes import BlockSize
from pqk.families.vggt.network.layers import DINO_EPS, EPS, Block, batch_of, repeated

VALUES = 9
"""Of a pose: translation x, y, z; quaternion x, y, z, w; vertical and horizontal field of view in radians."""
ROUNDS = 4


def activate_pose(raw: Tensor) -> Tensor:
    """Raw poses (..., 9) -> poses: the fields of view through relu, the rest as it is."""
    return torch.cat((raw[..., :7], F.relu(raw[..., 7:])), dim=-1)


class CameraHead(nn.Module):
    """Refines the pose of every frame: a trunk over the frames of a sequence, conditioned on the pose so far."""

    def __init__(self, width: int, sizes: tuple[BlockSize, ...]) -> None:
        super().__init__()
        self.width = width
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, VALUES))
        self.trunk = nn.ModuleList(Block(width, size) for size in sizes)
        self.token_norm = nn.LayerNorm(width, eps=EPS)
        self.trunk_norm = nn.LayerNorm(width, eps=EPS)
        self.adaln_norm = nn.LayerNorm(width, eps=DINO_EPS, elementwise_affine=False)
        self.embed_pose = nn.Linear(VALUES, width)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.pose_branch = Mlp(width, width // 2, VALUES)

    def forward(self, tokens: Tensor, frames: int) -> list[Tensor]:
        """Camera tokens (B, frames, width) -> the activated poses (B, frames, 9) after each round, the best one last.

        What a round hands on is the raw pose, and no gradient flows back through it.
        """
        t = self.token_norm(tokens)
        pose: Tensor | None = None
        start = repeated(repeated(self.empty_pose_tokens, frames, axis=1), batch_of(tokens))
        found = []
        for _ in range(ROUNDS):
            known = start if pose is None else pose.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(known)).split(self.width, dim=-1)
            u = gate * (self.adaln_norm(t) * (1 + scale) + shift) + t
            for block in self.trunk:
                u = block(u, frames)
            delta = self.pose_branch(self.trunk_norm(u))
            pose = delta if pose is None else known + delta
            found.append(activate_pose(pose))
        return found
