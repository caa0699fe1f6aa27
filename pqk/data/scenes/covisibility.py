"""Measures how much of one view another view sees, from ground-truth depth and cameras."""

from __future__ import annotations

import numpy as np

LEAST = 16
"""Least number of points that must be compared with measured depth for their agreement to represent the others."""


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
    """Returns the share in [0,1] of a's measured pixels whose 3D point is visible in view b.

    It is the share of points that project into b's image, times the share of these that are not hidden: b's depth there
    agrees with the point's depth within `tolerance` (relative). The latter is taken over the points near which b has a
    measurement (at most `stride` pixels away), so that sparse depth, as from a laser scanner, does not reduce the
    overlap. With fewer than LEAST of them, the points without a measurement count as hidden, up to that number. Not
    symmetric. One measured pixel of a is used in each cell of `stride` x `stride` pixels: the one nearest to its
    centre. Where every pixel is measured this is the share of the centres that agree.

    depth: (H,W) metres along z, 0 = no measurement; K: (3,3) for pixel centres at 0.5; pose: (4,4) world to camera.
    Returns 0.0 when a has no measured pixel.
    """
    v, u = _samples(depth_a > 0, stride)
    if v.size == 0:
        return 0.0
    pixels = np.stack([u + 0.5, v + 0.5, np.ones(u.shape)])
    points_a = np.linalg.inv(K_a) @ pixels * depth_a[v, u]
    a_to_b = pose_b @ np.linalg.inv(pose_a)
    points_b = a_to_b[:3, :3] @ points_a + a_to_b[:3, 3:]

    z = points_b[2]
    ahead = z > 1e-6
    x, y, _ = K_b @ (points_b / np.where(ahead, z, 1.0))
    height, width = depth_b.shape
    inside = ahead & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    measured = _nearest_depth(depth_b, y[inside].astype(np.int64), x[inside].astype(np.int64), stride)
    agrees = (measured > 0) & (np.abs(measured - z[inside]) <= tolerance * measured)
    landed, judged, seen = (int(np.count_nonzero(of)) for of in (inside, measured > 0, agrees))
    # One division of whole numbers: with judged == landed it is exactly seen / points.
    return landed * seen / (v.size * max(judged, min(landed, LEAST))) if landed else 0.0


def _samples(measured: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and columns of the measured pixel nearest to the centre of each cell that has one; (H,W) bool."""
    first = stride // 2
    rows, columns = np.arange(first, measured.shape[0], stride), np.arange(first, measured.shape[1], stride)
    centres = measured[np.ix_(rows, columns)]
    if centres.all():
        return np.repeat(rows, len(columns)), np.tile(columns, len(rows))
    v, u = np.nonzero(measured[: len(rows) * stride, : len(columns) * stride])
    cell = v // stride * len(columns) + u // stride
    off_centre = (v % stride - first) ** 2 + (u % stride - first) ** 2
    order = np.lexsort((off_centre, cell))
    chosen = order[np.unique(cell[order], return_index=True)[1]]
    return v[chosen], u[chosen]


def _nearest_depth(depth: np.ndarray, v: np.ndarray, u: np.ndarray, farthest: int) -> np.ndarray:
    """Returns the depth (N,) measured nearest to each pixel (rows and columns (N,) of depth (H,W)).

    It is 0 where that is farther than the mean distance between measurements (of a regular grid, its spacing) or than
    `farthest` pixels, so that a few measurements do not represent a whole view.
    """
    unmeasured = ~(depth > 0)
    if not unmeasured[v, u].any():
        return depth[v, u]
    if unmeasured.all():
        return np.zeros(v.shape, depth.dtype)
    from scipy.ndimage import distance_transform_edt  # slow to import, and rarely needed

    distance, (row, column) = distance_transform_edt(unmeasured, return_indices=True)
    near = distance[v, u] <= min(farthest, np.sqrt(depth.size / (depth.size - np.count_nonzero(unmeasured))))
    return np.where(near, depth[row[v, u], column[v, u]], 0)
