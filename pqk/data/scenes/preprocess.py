"""Scales and crops a view on disk to a workload's fixed shape, the input of a network: `fit_to_shape`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pqk.data.scenes.scene import View
from pqk.errors import PqkError

PATCH = 16  # both sides of a network input are multiples of the patch size, unless a network has another one
LONGEST = 20  # long side over short side; a strip would be enlarged to gigabytes before its centre is cropped


@dataclass(frozen=True, eq=False)
class Frame:
    """A view at the workload's shape. K, pose and depth are None where the view has none."""

    name: str
    image: np.ndarray  # (3,H,W) float32 in [-1,1], RGB
    K: np.ndarray | None  # (3,3) float64, for pixel centres at 0.5
    world_to_cam: np.ndarray | None  # (4,4) float64
    depth: np.ndarray | None  # (H,W) float32 metres along z; 0 = no measurement or masked out
    scene: str = ""


def fit_to_shape(
    view: View,
    height: int,
    width: int,
    scene: str = "",
    jitter: np.random.Generator | None = None,
    patch: int = PATCH,
) -> Frame:
    """Loads a view and brings it to (height, width): scales until it covers the shape, crops the centre.

    With `jitter` the place of the crop is drawn uniformly; an image of the shape's own aspect ratio leaves no room for
    that.

    The image is resampled by `resize` (an image smaller than the shape is enlarged, bicubic), depth and mask by nearest
    neighbour. K follows exactly: with pixel corners at whole numbers a resize is a pure scaling,
    fx' = sx fx, cx' = sx cx with sx = new width / old width, and a crop a pure shift, cx' = cx - left.
    Raises PqkError when height or width is not a multiple of `patch`, when the image is more than 20 times as long as
    it is wide (or the other way round), and as loading the view does.
    """
    if height < patch or width < patch or height % patch or width % patch:
        raise PqkError(f"workload shape {height}x{width}: height and width must be positive multiples of {patch}")
    image = view.load_image()
    old_height, old_width = image.shape[:2]
    if max(old_height, old_width) > LONGEST * min(old_height, old_width):
        raise PqkError(
            f"{view.image_path}: the image has {old_width}x{old_height} pixels; "
            f"its long side may be at most {LONGEST} times the short one"
        )
    scale = max(height / old_height, width / old_width)
    new_width, new_height = max(width, round(old_width * scale)), max(height, round(old_height * scale))
    if jitter is None:
        left, top = (new_width - width) // 2, (new_height - height) // 2
    else:
        left, top = int(jitter.integers(new_width - width + 1)), int(jitter.integers(new_height - height + 1))
    resized = resize(image, new_width, new_height)[top : top + height, left : left + width]

    K = None
    if view.K is not None:
        K = np.diag([new_width / old_width, new_height / old_height, 1.0]) @ view.K
        K[:2, 2] -= (left, top)

    depth = view.load_depth()
    if depth is not None:
        mask = view.load_mask()
        if mask is not None:
            depth = np.where(mask, depth, np.float32(0))
        rows = _nearest(top, height, old_height, new_height)
        columns = _nearest(left, width, old_width, new_width)
        depth = np.ascontiguousarray(depth[np.ix_(rows, columns)])
    pose = None if view.world_to_cam is None else view.world_to_cam.copy()
    return Frame(view.name, normalise(resized), K, pose, depth, scene)


def unproject(depth: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Returns points (H,W,3) float64 in camera coordinates, at pixel centres, from depth (H,W) along z and K (3,3)."""
    height, width = depth.shape
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(K).T
    return rays * depth[..., None].astype(np.float64)


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes (H,W,3) uint8 to (height,width,3) uint8: Lanczos where it shrinks, bicubic otherwise."""
    shrinks = max(image.shape[:2]) > max(width, height)
    kernel = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize((width, height), kernel))


def normalise(image: np.ndarray) -> np.ndarray:
    """Converts (H,W,3) uint8 to (3,H,W) float32 in [-1,1]; float32 throughout."""
    half = np.float32(0.5)
    return np.ascontiguousarray(((image.astype(np.float32) / np.float32(255) - half) / half).transpose(2, 0, 1))


def _nearest(offset: int, count: int, old: int, new: int) -> np.ndarray:
    """Returns the source index of each target pixel: the source pixel that holds the target pixel's centre."""
    # Integers only: floor((i + 0.5) * old / new) without rounding surprises on pixel borders.
    return (2 * (np.arange(count) + offset) + 1) * old // (2 * new)
