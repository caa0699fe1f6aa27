"""Ground truth of posed images with depth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from pqk.data.scenes.preprocess import unproject
from pqk.errors import PqkError
from pqk.families.metrics.geometry import Array


class PosedDepth(Protocol):
    """One posed image with depth. K follows COLMAP: the centre of the first pixel is (0.5, 0.5)."""

    @property
    def K(self) -> Array | None: ...  # (3, 3), pixels
    @property
    def world_to_cam(self) -> Array | None: ...  # (4, 4), rigid, metres
    @property
    def depth(self) -> Array | None: ...  # (H, W), z in metres, 0 = unknown


def refuse_broken_cameras(frames: Iterable[PosedDepth]) -> None:
    """Raises PqkError for a frame whose K or pose is missing, has a wrong shape, is not finite or has no inverse."""
    for frame in frames:
        for name, matrix, size in (("K", frame.K, 3), ("world_to_cam", frame.world_to_cam, 4)):
            if (
                matrix is None
                or np.shape(matrix) != (size, size)
                or not np.isfinite(matrix).all()
                or np.linalg.det(matrix) == 0
            ):
                raise PqkError(f"a frame's {name} must be a finite, invertible ({size}, {size}) matrix, got {matrix}")


def points_in_camera(frame: PosedDepth) -> tuple[Array, Array]:
    """Returns points (H, W, 3) float64 in the frame's camera, 0 where the depth is unknown, and the validity mask.

    X = z K^-1 (u + 0.5, v + 0.5, 1) (Hartley & Zisserman 2004, section 6.1), in metres. Raises PqkError for a frame
    without a depth map.
    """
    if frame.depth is None or np.ndim(frame.depth) != 2:
        raise PqkError("a frame without a depth map (H, W) has no ground truth to score against")
    depth = np.asarray(frame.depth, dtype=np.float64)
    valid = np.isfinite(depth) & (depth > 0)
    return unproject(np.where(valid, depth, 0.0), np.asarray(frame.K, dtype=np.float64)), valid
