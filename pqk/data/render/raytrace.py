"""Traces rays through batches of generated scenes in plain torch: `trace`.

The same code renders files on a CPU and training pairs on the training device.
"""

from __future__ import annotations

import torch

from pqk.data.render.intersect import SceneBatch, lone_on_cpu, nearest_hit, per_view, windows_of
from pqk.data.render.shade import radiance


def pixel_rays(focal: torch.Tensor, height: int, width: int, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """Returns ray directions (N, h*W, 3) in the camera frame, with z = 1, through pixel centres (+0.5).

    focal: (N,) in pixels. rows: only the rays of that band of image rows.
    """
    device = focal.device
    first, last = rows or (0, height)
    v, u = torch.meshgrid(
        torch.arange(first, last, device=device) + 0.5, torch.arange(width, device=device) + 0.5, indexing="ij"
    )
    x = (u.reshape(1, -1) - width / 2) / focal[:, None]
    y = (v.reshape(1, -1) - height / 2) / focal[:, None]
    return torch.stack([x, y, torch.ones_like(x)], -1)


def trace(
    scene: SceneBatch,
    cam_to_world: torch.Tensor,
    focal: torch.Tensor,
    height: int,
    width: int,
    bank: torch.Tensor | None,
    rows: tuple[int, int] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Renders V views of each of B scenes.

    cam_to_world (B,V,4,4), focal (B,V) in pixels. Returns linear radiance (B,V,3,h,W) (None without a texture bank) and
    depth along z in metres (B,V,h,W). `rows` renders only that band of image rows.
    """
    batch, views = focal.shape
    index = torch.arange(batch, device=focal.device).repeat_interleave(views)
    pose = cam_to_world.reshape(-1, 4, 4)
    x, y, _ = pixel_rays(focal.reshape(-1), height, width, rows).unbind(-1)
    windows = None
    if lone_on_cpu(x):
        windows = windows_of(scene, pose[0], float(focal.reshape(-1)[0]), height, width, rows or (0, height))
    if rows is not None:
        height = rows[1] - rows[0]
    # no matmul: TF32 and autocast would round the rays
    dx, dy, dz = (x * pose[:, j, 0, None] + y * pose[:, j, 1, None] + pose[:, j, 2, None] for j in range(3))
    origin = pose[:, :3, 3]
    t, surface = nearest_hit(scene, index, origin, (dx, dy, dz), windows, width)
    depth = t.reshape(batch, views, height, width)  # rays have z = 1, so the parameter is the depth
    if bank is None:
        return None, depth
    ox, oy, oz = per_view(origin)
    point = ox + t * dx, oy + t * dy, oz + t * dz
    colour = radiance(scene, index, point, surface, bank)
    return colour.reshape(batch, views, 3, height, width), depth
