"""Renders an endless stream of training pairs on the training device, `training_pairs`: none is stored or repeated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pqk.data.render.raytrace import pixel_rays
from pqk.data.render.synthetic import render, sample_scenes


@dataclass
class PairBatch:
    """B pairs. images (B,2,3,H,W) in [-1,1]; own_points (B,2,H,W,3) metres, each view's in its own camera;
    one_to_two (B,4,4) from camera 1 to camera 2; valid (B,2,H,W) bool; covisible (B,) the smaller of the shares of view
    1 seen by view 2 and of view 2 seen by view 1.
    """

    images: torch.Tensor
    own_points: torch.Tensor
    one_to_two: torch.Tensor
    valid: torch.Tensor
    covisible: torch.Tensor

    def ordered(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns ground truth of both orders: gt1, gt2 (2B,H,W,3) in the first view's camera; valid1, valid2 (2B,H,W).

        The first B samples are (a, b), the last B are (b, a).
        """
        a, b = self.own_points[:, 0], self.own_points[:, 1]
        b_in_a, a_in_b = _move(invert_rigid(self.one_to_two), b), _move(self.one_to_two, a)
        valid1 = torch.cat([self.valid[:, 0], self.valid[:, 1]])
        valid2 = torch.cat([self.valid[:, 1], self.valid[:, 0]])
        return torch.cat([a, b]), torch.cat([b_in_a, a_in_b]), valid1, valid2

    def first_to_second(self) -> torch.Tensor:
        """Returns rigid motions (2B,4,4) from the first view's camera to the second's, for the samples of `ordered`."""
        return torch.cat([self.one_to_two, invert_rigid(self.one_to_two)])


@dataclass
class SetBatch:
    """B sets of S frames. images (B,S,3,H,W) in [0,1]; points (B,S,H,W,3) metres in the first frame's camera; depth
    (B,S,H,W) metres; from_first (B,S,4,4) from the first frame's camera to each frame's; focal (B,S) in pixels; valid
    (B,S,H,W) bool.
    """

    images: torch.Tensor
    points: torch.Tensor
    depth: torch.Tensor
    from_first: torch.Tensor
    focal: torch.Tensor
    valid: torch.Tensor


def invert_rigid(pose: torch.Tensor) -> torch.Tensor:
    """Returns the inverse of rigid motions (B,4,4)."""
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
    """Returns the share (B,) of a view's pixels that the other view sees: inside its frame, within 5 % of its depth.

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
    """Renders `batch` pairs of size x size on the bank's device. Pairs with too little overlap have no valid pixel."""
    generator = torch.Generator(device=bank.device).manual_seed(seed)
    with torch.no_grad():
        images, depth, focal, own, pose = _rendered(batch, 2, size, generator, bank, spread, fov)
        one_to_two = _relative(pose[:, 0], pose[:, 1])
        share = _shared(own, depth, focal, one_to_two, 0, 1)
        valid = _usable(depth) & (share > min_covisible)[:, None, None, None]
        return PairBatch(images * 2 - 1, own, one_to_two, valid, share)


def training_sets(
    batch: int,
    frames: int,
    size: int,
    seed: int,
    bank: torch.Tensor,
    spread: tuple[float, float] = (4.0, 26.0),
    fov: tuple[float, float] = (55.0, 70.0),
    min_covisible: float = 0.25,
) -> SetBatch:
    """Renders `batch` sets of frames of size x size on the bank's device.

    A set in which a frame shares too little with the one before it carries no valid pixel.
    """
    generator = torch.Generator(device=bank.device).manual_seed(seed)
    with torch.no_grad():
        images, depth, focal, own, pose = _rendered(batch, frames, size, generator, bank, spread, fov)
        enough = torch.ones(batch, dtype=torch.bool, device=bank.device)
        for k in range(1, frames):
            enough &= _shared(own, depth, focal, _relative(pose[:, k - 1], pose[:, k]), k - 1, k) > min_covisible
        from_first = torch.stack([_relative(pose[:, 0], pose[:, k]) for k in range(frames)], dim=1)
        to_first = invert_rigid(from_first.flatten(0, 1))
        points = _move(to_first, own.flatten(0, 1)).unflatten(0, (batch, frames))
        valid = _usable(depth) & enough[:, None, None, None]
        return SetBatch(images, points, depth, from_first, focal, valid)


def _rendered(
    batch: int,
    frames: int,
    size: int,
    generator: torch.Generator,
    bank: torch.Tensor,
    spread: tuple[float, float],
    fov: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images in [0,1], depth, focal length, points in each frame's own camera, and poses to the world."""
    scene, pose, angle = sample_scenes(batch, frames, generator, spread=spread, fov=fov)
    images, depth, focal = render(scene, pose, angle, size, size, bank, generator)
    rays = pixel_rays(focal.reshape(-1), size, size).reshape(batch, frames, size, size, 3)
    return images, depth, focal, rays * depth[..., None], pose


def _relative(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Motions (B,4,4) from the first camera to the second, of their poses to the world; without matmul, see `_move`."""
    back = invert_rigid(second)
    found = torch.eye(4, device=first.device).repeat(len(first), 1, 1)
    found[:, :3, :3] = (back[:, :3, :3, None] * first[:, None, :3, :3]).sum(2)
    found[:, :3, 3] = (back[:, :3, :3] * first[:, None, :3, 3]).sum(-1) + back[:, :3, 3]
    return found


def _shared(
    own: torch.Tensor, depth: torch.Tensor, focal: torch.Tensor, one_to_two: torch.Tensor, one: int, two: int
) -> torch.Tensor:
    """Returns the smaller of the shares (B,) of one frame that the other sees, in both directions."""
    return torch.minimum(
        covisible_share(own[:, one], one_to_two, depth[:, two], focal[:, one]),
        covisible_share(own[:, two], invert_rigid(one_to_two), depth[:, one], focal[:, two]),
    )


def _usable(depth: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(depth) & (depth > 0.1) & (depth < 50)
