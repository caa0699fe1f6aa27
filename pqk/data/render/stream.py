"""Draws endless training pairs, rendered on the training device: nothing is stored, nothing is seen twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pqk.data.render.raytrace import pixel_rays
from pqk.data.render.synthetic import render, sample_scenes


@dataclass
class PairBatch:
    """B pairs. images (B,2,3,H,W) in [-1,1]; own_points (B,2,H,W,3) metres, each view's in its own camera;
    one_to_two (B,4,4) from camera 1 to camera 2; valid (B,2,H,W) bool; covisible (B,) share of view 1 seen by view 2
    and back, the smaller of the two.
    """

    images: torch.Tensor
    own_points: torch.Tensor
    one_to_two: torch.Tensor
    valid: torch.Tensor
    covisible: torch.Tensor

    def ordered(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ground truth of both orders: gt1, gt2 (2B,H,W,3) in the first view's camera; valid1, valid2 (2B,H,W).

        The first B samples are (a, b), the last B are (b, a).
        """
        a, b = self.own_points[:, 0], self.own_points[:, 1]
        b_in_a, a_in_b = _move(invert_rigid(self.one_to_two), b), _move(self.one_to_two, a)
        valid1 = torch.cat([self.valid[:, 0], self.valid[:, 1]])
        valid2 = torch.cat([self.valid[:, 1], self.valid[:, 0]])
        return torch.cat([a, b]), torch.cat([b_in_a, a_in_b]), valid1, valid2

    def first_to_second(self) -> torch.Tensor:
        """Rigid motions (2B,4,4) from the first view's camera to the second's, for the samples of `ordered`."""
        return torch.cat([self.one_to_two, invert_rigid(self.one_to_two)])


def invert_rigid(pose: torch.Tensor) -> torch.Tensor:
    """Inverse of rigid motions (B,4,4)."""
    turn = pose[:, :3, :3].transpose(1, 2)
    inverse = pose.clone()
    inverse[:, :3, :3] = turn
    inverse[:, :3, 3] = -(turn * pose[:, None, :3, 3]).sum(-1)
    return inverse


def _move(pose: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Applies rigid motions (B,4,4) to points (B,H,W,3); written without matmul, which TF32 would round."""
    return (pose[:, None, None, :3, :3] * points[..., None, :]).sum(-1) + pose[:, None, None, :3, 3]


def covisible_share(
    points: torch.Tensor, to_other: torch.Tensor, other_depth: torch.Tensor, focal: torch.Tensor, stride: int = 8
) -> torch.Tensor:
    """Share (B,) of a view's pixels that the other view sees: inside its frame and within 5 % of its depth.

    points (B,H,W,3) in the view's camera, to_other (B,4,4), other_depth (B,H,W), focal (B,) in pixels of both views.
    """
    height, width = other_depth.shape[1:]
    moved = _move(to_other, points[:, stride // 2 :: stride, stride // 2 :: stride])
    z = moved[..., 2].clamp(min=1e-3)
    u = (moved[..., 0] / z * focal[:, None, None] + width / 2).floor().long()
    v = (moved[..., 1] / z * focal[:, None, None] + height / 2).floor().long()
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height) & (moved[..., 2] > 1e-3)
    flat = (v.clamp(0, height - 1) * width + u.clamp(0, width - 1)).flatten(1)
    seen = torch.gather(other_depth.flatten(1), 1, flat).reshape(z.shape)
    return (inside & ((seen - z).abs() < 0.05 * z)).float().mean((1, 2))


def training_pairs(
    batch: int,
    size: int,
    seed: int,
    bank: torch.Tensor,
    spread: tuple[float, float] = (4.0, 26.0),
    fov: tuple[float, float] = (55.0, 70.0),
    min_covisible: float = 0.25,
) -> PairBatch:
    """Renders `batch` pairs of size x size on the bank's device. Pairs with too little overlap carry no valid pixel."""
    device = bank.device
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        scene, pose, angle = sample_scenes(batch, 2, generator, spread=spread, fov=fov)
        images, depth, focal = render(scene, pose, angle, size, size, bank, generator)
        rays = pixel_rays(focal.reshape(-1), size, size).reshape(batch, 2, size, size, 3)
        points = rays * depth[..., None]
        to_world = pose.reshape(-1, 4, 4)
        first, second = to_world[0::2], to_world[1::2]
        back = invert_rigid(second)
        turn = (back[:, :3, :3, None] * first[:, None, :3, :3]).sum(2)
        one_to_two = torch.eye(4, device=device).repeat(batch, 1, 1)
        one_to_two[:, :3, :3] = turn
        one_to_two[:, :3, 3] = (back[:, :3, :3] * first[:, None, :3, 3]).sum(-1) + back[:, :3, 3]
        share = torch.minimum(
            covisible_share(points[:, 0], one_to_two, depth[:, 1], focal[:, 0]),
            covisible_share(points[:, 1], invert_rigid(one_to_two), depth[:, 0], focal[:, 1]),
        )
        valid = torch.isfinite(depth) & (depth > 0.1) & (depth < 50) & (share > min_covisible)[:, None, None, None]
        return PairBatch(images * 2 - 1, points, one_to_two, valid, share)
