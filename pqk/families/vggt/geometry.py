"""Converts pose encodings to cameras and back, and depth maps to points of the world.

A pose encoding holds nine numbers: translation x, y, z; quaternion x, y, z, w of any length; vertical and horizontal
field of view in radians. Extrinsics are [R | t], from the world into the camera, with OpenCV's axes.
"""

from __future__ import annotations

import math
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

LEAST_FOV = 1e-6
"""Radians: a network may give 0, whose focal length would be infinite."""
LEAST_DEPTH = 1e-8


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Quaternions (..., 4), x, y, z, w of any length but 0 -> rotations (..., 3, 3)."""
    x, y, z, w = quaternion.unbind(-1)
    two = 2.0 / (quaternion * quaternion).sum(-1)
    rows = (
        1 - two * (y * y + z * z),
        two * (x * y - z * w),
        two * (x * z + y * w),
        two * (x * y + z * w),
        1 - two * (x * x + z * z),
        two * (y * z - x * w),
        two * (x * z - y * w),
        two * (y * z + x * w),
        1 - two * (x * x + y * y),
    )
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Rotations (..., 3, 3) -> unit quaternions (..., 4), x, y, z, w with w >= 0.

    Of the four equivalent formulas each rotation takes the one with the largest divisor (Shepperd 1978).
    """
    m = [[matrix[..., row, column] for column in range(3)] for row in range(3)]
    trace = m[0][0], m[1][1], m[2][2]
    four = torch.stack(  # four times the square of w, x, y, z
        (
            1 + trace[0] + trace[1] + trace[2],
            1 + trace[0] - trace[1] - trace[2],
            1 - trace[0] + trace[1] - trace[2],
            1 - trace[0] - trace[1] + trace[2],
        ),
        dim=-1,
    )
    length = four.clamp(min=0).sqrt()  # two times w, x, y, z
    a, b, c = m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]  # 4wx, 4wy, 4wz
    d, e, f = m[1][0] + m[0][1], m[0][2] + m[2][0], m[2][1] + m[1][2]  # 4xy, 4xz, 4yz
    w2, x2, y2, z2 = (length[..., index] ** 2 for index in range(4))
    candidates = torch.stack(
        [torch.stack(row, dim=-1) for row in ((w2, a, b, c), (a, x2, d, e), (b, d, y2, f), (c, e, f, z2))], dim=-2
    )
    candidates = candidates / (2 * length[..., None].clamp(min=0.1))
    best = length.argmax(dim=-1)[..., None, None].expand(*length.shape[:-1], 1, 4)
    w, x, y, z = candidates.gather(-2, best)[..., 0, :].unbind(-1)
    found = torch.stack((x, y, z, w), dim=-1)
    return torch.where(found[..., 3:] < 0, -found, found)


def pose_encoding_to_extri_intri(pose: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pose encodings (..., 9) of images of `size` (height, width) -> extrinsics (..., 3, 4), intrinsics (..., 3, 3).

    f_y = (H / 2) / tan(vertical / 2), f_x = (W / 2) / tan(horizontal / 2), principal point (W / 2, H / 2), in pixels.
    A field of view of 0 is taken as 1e-6 radians.
    """
    height, width = size
    rotation = quaternion_to_matrix(pose[..., 3:7])
    extrinsics = torch.cat((rotation, pose[..., :3, None]), dim=-1)
    fov = pose[..., 7:9].clamp(min=LEAST_FOV)
    intrinsics = torch.zeros(*pose.shape[:-1], 3, 3, dtype=pose.dtype, device=pose.device)
    intrinsics[..., 0, 0] = width / 2 / torch.tan(fov[..., 1] / 2)
    intrinsics[..., 1, 1] = height / 2 / torch.tan(fov[..., 0] / 2)
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = width / 2, height / 2
    intrinsics[..., 2, 2] = 1.0
    return extrinsics, intrinsics


def extri_intri_to_pose_encoding(extrinsics: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `pose_encoding_to_extri_intri`; principal points are not kept."""
    height, width = size
    vertical = 2 * torch.atan(height / 2 / intrinsics[..., 1, 1])
    horizontal = 2 * torch.atan(width / 2 / intrinsics[..., 0, 0])
    quaternion = matrix_to_quaternion(extrinsics[..., :3, :3])
    fov = torch.stack((vertical, horizontal), dim=-1)
    return torch.cat((extrinsics[..., :3, 3], quaternion, fov), dim=-1)


def invert_extrinsics(extrinsics: Tensor) -> Tensor:
    """World-to-camera (..., 3, 4) or (..., 4, 4) -> camera-to-world (..., 4, 4): R^T and -R^T t."""
    rotation, translation = extrinsics[..., :3, :3], extrinsics[..., :3, 3:]
    turned = rotation.transpose(-1, -2)
    upper = torch.cat((turned, -turned @ translation), dim=-1)
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=upper.dtype, device=upper.device)
    return torch.cat((upper, last.expand(*upper.shape[:-2], 1, 4)), dim=-2)


@overload
def unproject_depth(depth: Tensor, extrinsics: Tensor, intrinsics: Tensor) -> Tensor: ...
@overload
def unproject_depth(depth: np.ndarray, extrinsics: np.ndarray, intrinsics: np.ndarray) -> np.ndarray: ...
def unproject_depth(depth: Any, extrinsics: Any, intrinsics: Any) -> Any:
    """Depth maps (..., H, W, 1) or (..., H, W) with their cameras -> points of the world (..., H, W, 3).

    Pixel (u, v), counted from 0, goes to ((u - c_x) z / f_x, (v - c_y) z / f_y, z) and from the camera into the world.
    Points with a depth above 1e-8 count as valid. Takes tensors or arrays, and gives back what it was given.
    """
    if isinstance(depth, np.ndarray):
        return unproject_depth(*(torch.from_numpy(array) for array in (depth, extrinsics, intrinsics))).numpy()
    z = depth[..., 0] if depth.ndim == extrinsics.ndim + 1 else depth
    rows, columns = z.shape[-2:]
    v, u = torch.meshgrid(
        torch.arange(rows, dtype=z.dtype, device=z.device),
        torch.arange(columns, dtype=z.dtype, device=z.device),
        indexing="ij",
    )
    f_x, f_y, c_x, c_y = (intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    local = torch.stack(((u - c_x) * z / f_x, (v - c_y) * z / f_y, z), dim=-1)
    back = invert_extrinsics(extrinsics)
    flat = local.flatten(-3, -2) @ back[..., :3, :3].transpose(-1, -2) + back[..., None, :3, 3]
    return flat.unflatten(-2, (rows, columns))


def field_of_view(focal: float, side: int) -> float:
    """2 atan((side / 2) / f), in radians."""
    return 2 * math.atan(side / 2 / focal)
