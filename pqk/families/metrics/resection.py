"""Finds cameras from points whose pixels are known: focal length (`focal_length`) and pose (`resect`)."""

from __future__ import annotations

import numpy as np

from pqk.errors import PqkError
from pqk.families.metrics.geometry import Array

_NEAR = 1e-3  # of the median depth: nearer points have no usable direction
_MOST = 4000  # points that a pose is found from
_STEPS = 300
_SETTLED = 1e-10


def centred_pixels(height: int, width: int) -> Array:
    """Returns (H,W,2) float64: x and y of every pixel's centre from the middle of the picture, in pixels."""
    y, x = np.mgrid[:height, :width].astype(np.float64) + 0.5
    return np.stack([x - width / 2, y - height / 2], axis=-1)


def focal_length(points: Array, weights: Array) -> float:
    """Returns the focal length in pixels of a camera that sees a point map (H,W,3), in its own frame.

    f = argmin of the sum of w |(u,v) - f (X/Z, Y/Z)| with the principal point in the middle, by Weiszfeld's iteration
    (Wang et al. 2024, DUSt3R, section 3.3). weights: (H,W), 0 or more. Raises PqkError where no point lies in front of
    the camera.
    """
    pixels = centred_pixels(*points.shape[:2]).reshape(-1, 2)
    places, usable = _in_front(points.reshape(-1, 3), weights.reshape(-1))
    directions = places[usable, :2] / places[usable, 2:]
    pixels, weight = pixels[usable], weights.reshape(-1)[usable].astype(np.float64)
    squares = (directions**2).sum(axis=1)
    focal = float((weight * (pixels * directions).sum(axis=1)).sum() / max((weight * squares).sum(), 1e-12))
    for _ in range(20):
        robust = weight / np.maximum(np.linalg.norm(pixels - focal * directions, axis=1), 1e-6)
        focal = float((robust * (pixels * directions).sum(axis=1)).sum() / max((robust * squares).sum(), 1e-12))
    if not (np.isfinite(focal) and focal > 0):
        raise PqkError(f"the points of the first picture fit no camera: its focal length would be {focal:g} pixels")
    return focal


def resect(points: Array, focal: float, weights: Array) -> Array:
    """Returns the pose (3,4) float64, from the frame of a point map (H,W,3) into the camera that sees it.

    focal: in pixels; the principal point is in the middle. The pose has the least sum of w |(I - V) (R X + t)|^2, where
    V projects onto the ray of the point's pixel, by orthogonal iteration (Lu, Hager and Mjolsness, PAMI 2000) from the
    pose of the frame itself. weights: (H,W), 0 or more. Raises PqkError where fewer than 6 points have a weight.
    """
    height, width = points.shape[:2]
    rays = np.concatenate([centred_pixels(height, width) / focal, np.ones((height, width, 1))], axis=-1).reshape(-1, 3)
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    flat, weight = points.reshape(-1, 3).astype(np.float64), weights.reshape(-1).astype(np.float64)
    usable = np.flatnonzero(np.isfinite(flat).all(axis=1) & np.isfinite(weight) & (weight > 0))
    if len(usable) < 6:
        raise PqkError("too few points of a picture are finite to find its camera")
    usable = usable[:: max(1, len(usable) // _MOST)]
    flat, rays, weight = flat[usable], rays[usable], weight[usable] / weight[usable].sum()
    unit = np.median(np.linalg.norm(flat, axis=1))  # so that nothing below depends on the unit of length
    flat = flat / unit
    onto = rays[:, :, None] * rays[:, None, :]  # V of each ray
    solve = np.linalg.inv(np.eye(3) - (weight[:, None, None] * onto).sum(axis=0))
    rotation, shift = np.eye(3), np.zeros(3)
    middle = weight @ flat
    for _ in range(_STEPS):
        turned = flat @ rotation.T
        shift = solve @ (weight @ (np.einsum("nij,nj->ni", onto, turned) - turned))
        seen = np.einsum("nij,nj->ni", onto, turned + shift)
        before = rotation
        u, _, vt = np.linalg.svd((weight[:, None] * (seen - weight @ seen)).T @ (flat - middle))
        rotation = u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt
        if np.abs(rotation - before).max() < _SETTLED:
            break
    turned = flat @ rotation.T
    shift = solve @ (weight @ (np.einsum("nij,nj->ni", onto, turned) - turned))
    return np.concatenate([rotation, unit * shift[:, None]], axis=1)


def _in_front(points: Array, weights: Array) -> tuple[Array, Array]:
    """Returns points in float64, and which of them are finite, have a weight and lie in front of the camera."""
    places = points.astype(np.float64)
    usable = np.isfinite(places).all(axis=1) & np.isfinite(weights) & (weights > 0)
    front = places[usable & (places[:, 2] > 0), 2]
    if not len(front):
        raise PqkError("no point of the first picture lies in front of its camera: there is nothing to see")
    return places, usable & (places[:, 2] > _NEAR * np.median(front))
