"""How much of one view another view sees, from ground-truth depth and cameras."""

from __future__ import annotations

import numpy as np


def covisibility(
    depth_a: np.ndarray,
    K_a: np.ndarray,
    pose_a: np.ndarray,
    depth_b: np.ndarray,
    K_b: np.ndarray,
    pose_b: np.ndarray,
    stride: int = 4,
    tolerance: float = 0.05,
) -> float:
    """Share in [0,1] of a's measured pixels whose 3D point view b sees.

    A point is seen when it lies in front of b, projects into b's image, and b's depth there agrees with the point's
    depth within `tolerance` (relative), so that nothing hides it. Not symmetric. Every `stride`-th pixel of a is used.

    depth: (H,W) metres along z, 0 = no measurement; K: (3,3) for pixel centres at 0.5; pose: (4,4) world to camera.
    Returns 0.0 when a has no measured pixel.
    """
    first = stride // 2
    rows, columns = np.nonzero(depth_a[first::stride, first::stride] > 0)
    if rows.size == 0:
        return 0.0
    v, u = rows * stride + first, columns * stride + first
    pixels = np.stack([u + 0.5, v + 0.5, np.ones(u.shape)])
    points_a = np.linalg.inv(K_a) @ pixels * depth_a[v, u]
    a_to_b = pose_b @ np.linalg.inv(pose_a)
    points_b = a_to_b[:3, :3] @ points_a + a_to_b[:3, 3:]

    z = points_b[2]
    ahead = z > 1e-6
    x, y, _ = K_b @ (points_b / np.where(ahead, z, 1.0))
    height, width = depth_b.shape
    inside = ahead & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    measured = depth_b[y[inside].astype(np.int64), x[inside].astype(np.int64)]
    agrees = (measured > 0) & (np.abs(measured - z[inside]) <= tolerance * measured)
    return float(np.count_nonzero(agrees) / rows.size)
