"""Draws random rooms and camera paths for the ray tracer, `sample_scenes`: gravity-aligned, furnished, at eye height.

The look of the scenes decides whether a small model learns at all: a floor with objects on it, texture scale nearly
constant in metres, moderate focal lengths, no object nearer than `NEAREST` to a camera and no wall nearer than
`MARGIN`.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

from pqk.data.render.intersect import BOX, CYLINDER, ELLIPSOID, SceneBatch
from pqk.data.render.raytrace import trace

NEAREST = 0.7  # metres between a camera and the nearest object
MARGIN = 0.45  # metres between a camera and the nearest wall
N_TEXTURES, TEXTURE_SIZE = 32, 256
KINDS = (BOX,) * 8 + (ELLIPSOID,) * 3 + (CYLINDER,) * 3


@cache
def texture_bank(seed: int = 7) -> torch.Tensor:
    """Returns tileable grey patterns (T,R,R) in [0,1]: coloured noise, bricks, checks, planks and speckle.

    They are made once per process; whoever gets them only reads them.
    """
    rng = np.random.default_rng(seed)
    size = TEXTURE_SIZE
    fy, fx = np.meshgrid(np.fft.fftfreq(size) * size, np.fft.fftfreq(size) * size, indexing="ij")
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")

    def noise(power: float, stretch: float = 1.0) -> np.ndarray:
        spectrum = np.fft.fft2(rng.standard_normal((size, size)))
        radius = np.sqrt((fx * stretch) ** 2 + fy**2)
        radius[0, 0] = np.inf
        field = np.fft.ifft2(spectrum / radius**power).real
        low, high = np.percentile(field, [2, 98])
        return np.clip((field - low) / (high - low), 0, 1)

    bank = []
    for i in range(N_TEXTURES):
        kind = i % 6
        if kind == 0:
            pattern = noise(rng.uniform(1.0, 1.8))
        elif kind == 1:
            cells = int(rng.choice([4, 8]))
            pattern = (((x * cells // size) + (y * cells // size)) % 2) * 0.7 + 0.3 * noise(1.2)
        elif kind == 2:
            tall = size // int(rng.choice([4, 8]))
            wide = tall * 2
            shifted = x + (y // tall % 2) * (wide // 2)
            mortar = (y % tall < 4) | (shifted % wide < 4)
            tone = rng.uniform(0.35, 0.9, (size // tall, size // wide + 1))
            pattern = np.where(mortar, 0.05, tone[y // tall, shifted % size // wide]) * (0.75 + 0.25 * noise(1.0))
        elif kind == 3:
            planks = int(rng.choice([4, 8]))
            tone = rng.uniform(0.3, 0.9, planks)
            grain = noise(1.2, stretch=8.0).T
            pattern = tone[x * planks // size] * (0.6 + 0.4 * grain) * np.where(x % (size // planks) < 3, 0.3, 1.0)
        elif kind == 4:
            pattern = (noise(0.9) > rng.uniform(0.4, 0.6)) * 0.75 + 0.25 * noise(1.0)
        else:
            waves = np.sin(2 * np.pi * (int(rng.choice([4, 6, 8])) * x / size) + 5 * noise(1.8))
            pattern = 0.5 + 0.35 * waves + 0.15 * (noise(0.8) - 0.5)
        bank.append(np.clip(pattern, 0, 1))
    return torch.from_numpy(np.stack(bank).astype(np.float32))


def sample_cameras(
    room: torch.Tensor, views: int, generator: torch.Generator, spread: tuple[float, float], fov: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws arcs of cameras around a point of interest.

    room (B,3); `spread` degrees of arc between neighbouring views (lowest, highest); `fov` horizontal degrees.
    Returns cam_to_world (B,V,4,4), field of view in radians (B,V) and the point of interest (B,3).
    """
    batch, device = room.shape[0], room.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, device=device)

    zero = torch.zeros(batch, device=device)
    interest = torch.stack([uniform(-0.4, 0.4, batch) * room[:, 0], zero, uniform(-0.4, 0.4, batch) * room[:, 2]], -1)
    step = uniform(*spread, batch, 1) * math.pi / 180
    sign = torch.sign(uniform(-1, 1, batch, 1))
    order = torch.arange(views, device=device, dtype=torch.float32)[None] - (views - 1) / 2
    azimuth = uniform(0, 2 * math.pi, batch, 1) + sign * step * (order + uniform(-0.2, 0.2, batch, views))
    radius = uniform(1.8, 3.6, batch, 1) * uniform(0.94, 1.06, batch, views)
    x = interest[:, :1] + radius * torch.sin(azimuth)
    z = interest[:, 2:] + radius * torch.cos(azimuth)
    x = torch.maximum(torch.minimum(x, room[:, :1] - MARGIN), MARGIN - room[:, :1])
    z = torch.maximum(torch.minimum(z, room[:, 2:] - MARGIN), MARGIN - room[:, 2:])
    eye = -(uniform(1.25, 1.7, batch, 1) + uniform(-0.06, 0.06, batch, views))
    position = torch.stack([x, eye, z], -1)
    target = interest[:, None] + uniform(-0.12, 0.12, batch, views, 3)
    target = torch.stack([target[..., 0], -uniform(0.55, 1.15, batch, 1).expand(-1, views), target[..., 2]], -1)
    forward = target - position
    # a camera that the wall limits moved onto its target looks along its arc's direction instead
    forward = forward + 1e-3 * torch.stack([-torch.sin(azimuth), torch.zeros_like(x), -torch.cos(azimuth)], -1)
    forward = forward / forward.norm(dim=-1, keepdim=True)
    down = torch.tensor([0.0, 1.0, 0.0], device=device).expand_as(forward)
    right = torch.linalg.cross(down, forward)
    right = right / right.norm(dim=-1, keepdim=True)
    below = torch.linalg.cross(forward, right)
    roll = uniform(-0.04, 0.04, batch, views, 1)
    right, below = right * roll.cos() + below * roll.sin(), below * roll.cos() - right * roll.sin()
    pose = torch.eye(4, device=device).repeat(batch, views, 1, 1)
    pose[..., :3, :3] = torch.stack([right, below, forward], -1)
    pose[..., :3, 3] = position
    angle = uniform(*fov, batch, 1) * math.pi / 180
    return pose, angle.expand(batch, views), interest


def sample_scenes(
    batch: int,
    views: int,
    generator: torch.Generator,
    terrain_share: float = 0.25,
    spread: tuple[float, float] = (5.0, 11.0),
    fov: tuple[float, float] = (55.0, 70.0),
) -> tuple[SceneBatch, torch.Tensor, torch.Tensor]:
    """Draws `batch` furnished rooms with `views` cameras each, on the generator's device.

    Returns the scenes, cam_to_world (B,V,4,4) and the horizontal field of view in radians (B,V).
    The same generator state gives the same scenes.
    """
    device = generator.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, device=device)

    terrain = round(batch * terrain_share) if batch > 1 else int(uniform(0, 1, 1).item() < terrain_share)
    room = torch.stack([uniform(2.4, 4.6, batch), uniform(2.4, 3.4, batch), uniform(2.4, 4.6, batch)], -1)
    pose, fov_angle, interest = sample_cameras(room, views, generator, spread, fov)
    objects = len(KINDS)
    angle = uniform(0, 2 * math.pi, batch, objects)
    half = torch.zeros(batch, objects, 3, device=device)
    centre = torch.zeros(batch, objects, 3, device=device)
    # furniture on the floor around the point of interest
    reach, bearing = 2.4 * uniform(0, 1, batch, objects).sqrt(), uniform(0, 2 * math.pi, batch, objects)
    centre[..., 0] = interest[:, :1] + reach * torch.sin(bearing)
    centre[..., 2] = interest[:, 2:] + reach * torch.cos(bearing)
    sizes = [uniform(0.15, 0.55, batch, 8), uniform(0.15, 0.5, batch, 8), uniform(0.15, 0.55, batch, 8)]
    half[:, 0:8] = torch.stack(sizes, -1)
    half[:, 8:11] = torch.stack([uniform(0.15, 0.5, batch, 3) for _ in range(3)], -1)
    radius = uniform(0.12, 0.4, batch, 3)
    half[:, 11:14] = torch.stack([radius, uniform(0.2, 0.65, batch, 3), radius], -1)
    centre[..., 1] = -half[..., 1]
    # wardrobes and shelves along the walls
    for slot in (4, 5):
        along = uniform(-0.85, 0.85, batch)
        wall = torch.sign(uniform(-1, 1, batch))
        half[:, slot] = torch.stack([uniform(0.3, 0.9, batch), uniform(0.4, 1.1, batch), uniform(0.15, 0.3, batch)], -1)
        centre[:, slot, 1] = -half[:, slot, 1]
        if slot == 4:
            centre[:, slot, 0], centre[:, slot, 2] = along * room[:, 0], wall * (room[:, 2] - half[:, slot, 2])
            angle[:, slot] = 0.0
        else:
            centre[:, slot, 2], centre[:, slot, 0] = along * room[:, 2], wall * (room[:, 0] - half[:, slot, 2])
            angle[:, slot] = math.pi / 2
    # small things on top of boxes 0, 1 and 2
    for slot, base in ((6, 0), (7, 1), (10, 2)):
        half[:, slot] = uniform(0.1, 0.22, batch, 3)
        centre[:, slot] = centre[:, base]
        centre[:, slot, 1] = 2 * centre[:, base, 1] - half[:, slot, 1]
    # a column from floor to ceiling
    half[:, 13, 1] = room[:, 1] / 2
    centre[:, 13, 1] = -room[:, 1] / 2
    half[:, 13, 0] = half[:, 13, 2] = uniform(0.12, 0.22, batch)
    present = (uniform(0, 1, batch, objects) < 0.8).float()
    present[:, 13] *= (uniform(0, 1, batch) < 0.4).float()
    for slot, base in ((6, 0), (7, 1), (10, 2)):
        present[:, slot] *= present[:, base]
    gap = (centre[:, None, :, ::2] - pose[:, :, None, :3, 3][..., ::2]).norm(dim=-1).amin(1)
    present *= (gap > half[..., ::2].norm(dim=-1) + NEAREST).float()
    # drawn even when unused, so that the later random numbers are the same with and without a rolling floor
    waves = torch.zeros(batch, 4, 4, device=device)
    heading, number = uniform(0, 2 * math.pi, batch, 4), uniform(0.8, 3.2, batch, 4)
    waves[..., 0] = uniform(0.015, 0.075, batch, 4)
    waves[..., 1], waves[..., 2] = number * torch.cos(heading), number * torch.sin(heading)
    waves[..., 3] = uniform(0, 2 * math.pi, batch, 4)
    surfaces = 6 + objects
    look = torch.empty(batch, surfaces, 8, device=device)
    look[..., :3] = uniform(0.15, 0.95, batch, surfaces, 3)
    darker = look[..., :3] * uniform(0.15, 0.75, batch, surfaces, 1)
    look[..., 3:6] = (darker + uniform(-0.1, 0.1, batch, surfaces, 3)).clamp(0.02, 1)
    look[..., 6] = torch.floor(uniform(0, N_TEXTURES, batch, surfaces)).clamp(max=N_TEXTURES - 1)
    look[..., 7] = uniform(1.0, 2.0, batch, surfaces)
    look[:, 3:6, 6:] = look[:, 2:3, 6:]  # the four walls share their pattern and mostly their colour
    look[:, 3:6, :6] = (look[:, 2:3, :6] * uniform(0.85, 1.15, batch, 3, 1)).clamp(0.02, 1)
    lights = torch.zeros(batch, 3, 6, device=device)
    lights[..., 0] = uniform(-0.8, 0.8, batch, 3) * room[:, :1]
    lights[..., 1] = -room[:, 1:2] * uniform(0.75, 0.97, batch, 3)
    lights[..., 2] = uniform(-0.8, 0.8, batch, 3) * room[:, 2:]
    lights[..., 3:] = uniform(0.25, 0.8, batch, 3, 1) * uniform(0.85, 1.15, batch, 3, 3)
    ambient = uniform(0.25, 0.5, batch)
    exposure = uniform(0.75, 1.3, batch, 1, 1) * uniform(0.92, 1.08, batch, views, 1) * uniform(0.95, 1.05, batch, 1, 3)
    turn = torch.stack([angle.cos(), angle.sin()], -1)
    scene = SceneBatch(KINDS, half, centre, turn, present, room, waves, terrain, look, lights, ambient, exposure)
    return scene, pose, fov_angle


def expose(radiance: torch.Tensor, generator: torch.Generator, noise: float = 0.012) -> torch.Tensor:
    """Converts linear radiance to display values in [0,1]: soft shoulder, gamma 1/2.2, sensor noise of std `noise`."""
    soft = 1 - torch.exp(-1.1 * radiance.clamp(min=0))
    image = soft.clamp(min=1e-6) ** (1 / 2.2)
    image = image + noise * torch.randn(image.shape, generator=generator, device=image.device)
    return image.clamp(0, 1)


def render(
    scene: SceneBatch,
    pose: torch.Tensor,
    fov: torch.Tensor,
    height: int,
    width: int,
    bank: torch.Tensor,
    generator: torch.Generator,
    band: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Renders and returns images (B,V,3,H,W) in [0,1], depth (B,V,H,W) in metres, focal length in pixels (B,V).

    band: render one view and that many rows at a time, which is faster on a CPU: the working set stays in its cache,
    and objects are only intersected where they can be seen.
    """
    focal = width / 2 / torch.tan(fov / 2)
    if band is None:
        radiance, depth = trace(scene, pose, focal, height, width, bank)
        assert radiance is not None
    else:
        radiance = torch.empty(*focal.shape, 3, height, width, device=pose.device)
        depth = torch.empty(*focal.shape, height, width, device=pose.device)
        for b, v in np.ndindex(*focal.shape):
            one, camera, f = scene.one(b, v), pose[b : b + 1, v : v + 1], focal[b : b + 1, v : v + 1]
            for row in range(0, height, band):
                rows = (row, min(row + band, height))
                colour, z = trace(one, camera, f, height, width, bank, rows)
                assert colour is not None
                radiance[b, v, :, rows[0] : rows[1]], depth[b, v, rows[0] : rows[1]] = colour[0, 0], z[0, 0]
    return expose(radiance, generator), depth, focal
