"""Draws rooms with things to detect, and renders them with exact boxes: `render_picture`.

Every solid thing in a room is one of `CLASSES`, and every one that can be seen is annotated: a thing that shows too
little of itself is taken out of the room before it is rendered. So no picture shows anything that its annotation keeps
silent about. Shapes are told apart by outline and shading alone; colours and patterns are drawn the same way for all.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.ndimage import find_objects

from pqk.data.render.intersect import BOX, CYLINDER, ELLIPSOID, Planes, SceneBatch, nearest_hit, per_view, windows_of
from pqk.data.render.raytrace import pixel_rays
from pqk.data.render.shade import radiance
from pqk.data.render.synthetic import N_TEXTURES, NEAREST, expose, sample_cameras

CLASSES = ("ball", "box", "cylinder")
SHAPES = {"ball": ELLIPSOID, "box": BOX, "cylinder": CYLINDER}
THINGS = {"empty": (0, 0), "usual": (3, 9), "crowded": (16, 28)}
"""How many things are tried in a room, lowest and highest; those without a free place on the floor are left out."""
LEAST_PIXELS = 24
"""Visible pixels from which a thing counts as seen."""
LEAST_SIDE = 4
"""Pixels that each side of the box of its visible pixels must have."""
LEAST_SHARE = 0.1
"""Least share of its visible pixels in the rectangle, inside the image, that the corners of its own box span."""
SIZES = (0.05, 0.6)
"""Metres: smallest and largest half size before it is stretched, drawn so that each doubling is equally likely."""
REACH = 2.0  # metres around the point of interest in which things stand
TRIES = 30  # places that are tried for a thing


@dataclass(frozen=True)
class Thing:
    """One solid thing. half: half sizes or radii in metres; centre in metres, y down; turn: yaw in radians."""

    name: str
    half: tuple[float, float, float]
    centre: tuple[float, float, float]
    turn: float

    @property
    def radius(self) -> float:
        """Returns the radius of the circle on the floor that holds the thing."""
        return math.hypot(self.half[0], self.half[2]) if self.name == "box" else max(self.half[0], self.half[2])


@dataclass(frozen=True, eq=False)
class Picture:
    """A rendered image. pixels (H,W,3) uint8; surface (H,W): 0..5 the room, 6 + k the thing of `names[k]`.

    names: of all things that are in the room; seen: the positions of those that are visible, and annotated.
    boxes: (N,4) whole pixels x1 y1 x2 y2 of what is visible of each seen thing; areas: (N,) visible pixels.
    """

    pixels: np.ndarray
    surface: np.ndarray
    names: tuple[str, ...]
    seen: tuple[int, ...]
    boxes: np.ndarray
    areas: np.ndarray


def render_picture(seed: int, filling: str, width: int, height: int, bank: torch.Tensor) -> Picture:
    """Renders the room of a seed (below 2^32, as in `split_seed`). filling: a key of THINGS; bank: of `texture_bank`.

    Equal arguments give equal pixels.
    """
    generator, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    room = random.uniform([2.4, 2.4, 2.4], [4.2, 3.2, 4.2])
    pose, fov, interest = sample_cameras(torch.tensor(room[None], dtype=torch.float32), 1, generator, (5, 11), (55, 70))
    eye = pose[0, 0, :3, 3].double().numpy()
    things = _furnish(random, filling, room, interest[0].double().numpy(), eye)
    scene = _scene(random, room, things)
    focal = width / 2 / torch.tan(fov / 2)
    x, y, _ = pixel_rays(focal[0], height, width).unbind(-1)
    rx, ry, rz = (x * pose[0, :, j, 0] + y * pose[0, :, j, 1] + pose[0, :, j, 2] for j in range(3))
    depth, surface, spans = _hits(scene, pose, focal, (rx, ry, rz), width, height)
    seen, boxes, areas = visible(surface, spans)
    if len(seen) < len(np.unique(surface[surface >= 6])):  # others show a little: the room without them
        kept = torch.zeros_like(scene.present)
        kept[0, list(seen)] = 1.0
        scene = replace(scene, present=kept)
        depth, surface, spans = _hits(scene, pose, focal, (rx, ry, rz), width, height)
        seen, boxes, areas = visible(surface, spans)
    light = _shade(scene, pose, (rx, ry, rz), depth, surface, bank)
    pixels = (expose(light, generator).permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8)
    return Picture(pixels, surface, tuple(thing.name for thing in things), seen, boxes, areas)


def visible(surface: np.ndarray, spans: np.ndarray) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """Returns which things count as seen in a map of surface numbers (H,W), their boxes (N,4) and visible pixels (N,).

    spans: (things,) pixels of the rectangle that each could cover inside the image, for LEAST_SHARE.
    A box is that of the visible pixels: whole numbers x1 y1 x2 y2, x2 and y2 one beyond the last pixel.
    """
    numbers = np.maximum(surface - 5, 0)  # 0 the room, 1 + k thing k
    pixels = np.bincount(numbers.ravel(), minlength=len(spans) + 1)[1:]
    seen, boxes = [], []
    for k, place in enumerate(find_objects(numbers, len(spans))):
        if place is None or pixels[k] < max(LEAST_PIXELS, LEAST_SHARE * spans[k]):
            continue
        rows, columns = place
        if min(rows.stop - rows.start, columns.stop - columns.start) >= LEAST_SIDE:
            seen.append(k)
            boxes.append((columns.start, rows.start, columns.stop, rows.stop))
    return tuple(seen), np.array(boxes, np.int64).reshape(-1, 4), pixels[seen].astype(np.int64)


# The room


def _furnish(
    random: np.random.Generator, filling: str, room: np.ndarray, interest: np.ndarray, eye: np.ndarray
) -> list[Thing]:
    """Draws things that stand on the floor around the point of interest, and small ones on top of boxes.

    None reaches into another, through a wall, or nearer than NEAREST to the camera.
    """
    low, high = THINGS[filling]
    things: list[Thing] = []
    free: list[Thing] = []  # boxes with nothing on top
    for _ in range(random.integers(low, high + 1)):
        name = CLASSES[random.integers(len(CLASSES))]
        size = math.exp(random.uniform(*np.log(SIZES)))
        half = _stretched(random, name, size)
        turn = random.uniform(0, 2 * math.pi)
        if free and random.uniform() < 0.3:
            base = free.pop(random.integers(len(free)))
            across = 0.9 * min(base.half[0], base.half[2]) / Thing(name, half, (0, 0, 0), 0).radius
            upward = (room[1] / 2 - base.half[1]) / half[1]  # to the ceiling
            shrink = min(1.0, across, 0.9 * upward)
            half = (half[0] * shrink, half[1] * shrink, half[2] * shrink)
            things.append(Thing(name, half, (base.centre[0], 2 * base.centre[1] - half[1], base.centre[2]), turn))
            continue
        for _ in range(TRIES):
            reach, bearing = REACH * math.sqrt(random.uniform()), random.uniform(0, 2 * math.pi)
            x, z = interest[0] + reach * math.sin(bearing), interest[2] + reach * math.cos(bearing)
            thing = Thing(name, half, (x, -half[1], z), turn)
            inside = abs(x) + thing.radius < room[0] and abs(z) + thing.radius < room[2]
            near = math.hypot(x - eye[0], z - eye[2]) < thing.radius + NEAREST
            standing = (other for other in things if other.centre[1] == -other.half[1])
            if inside and not near and not any(_touch(thing, other) for other in standing):
                things.append(thing)
                if name == "box":
                    free.append(thing)
                break
    return things


def _stretched(random: np.random.Generator, name: str, size: float) -> tuple[float, float, float]:
    """Returns half sizes of a thing: a ball is nearly round, a cylinder as wide as deep, a box of any proportion."""
    if name == "cylinder":
        wide, tall = (float(size * random.uniform(*ends)) for ends in ((0.6, 1.0), (0.7, 1.8)))
        return wide, tall, wide
    wide, tall, deep = size * random.uniform(*((0.9, 1.1) if name == "ball" else (0.6, 1.3)), 3)
    return float(wide), float(tall), float(deep)


def _touch(one: Thing, other: Thing) -> bool:
    apart = math.hypot(one.centre[0] - other.centre[0], one.centre[2] - other.centre[2])
    return apart < one.radius + other.radius


def _scene(random: np.random.Generator, room: np.ndarray, things: list[Thing]) -> SceneBatch:
    """Returns the room with its things, lights and surfaces: a pale room, things of one strong colour each."""

    def tensor(values: object, *shape: int) -> torch.Tensor:
        return torch.tensor(np.asarray(values, dtype=np.float64).reshape(shape), dtype=torch.float32)

    count = len(things)
    look = np.zeros((6 + count, 8))
    for k in range(6 + count):
        if k in (3, 4, 5):  # the four walls are alike
            look[k] = look[2]
            continue
        strong = k >= 6
        hue, bright = random.uniform(), random.uniform(0.45, 0.95)
        colour = np.array(colorsys.hsv_to_rgb(hue, random.uniform(0.55, 1.0) if strong else 0.12, bright))
        look[k, :3], look[k, 3:6] = colour, colour * random.uniform(0.35, 0.8)
        look[k, 6] = random.integers(N_TEXTURES)
        look[k, 7] = random.uniform(0.4, 1.0) if strong else random.uniform(1.0, 2.0)
    lights = np.zeros((3, 6))
    lights[:, 0] = random.uniform(-0.8, 0.8, 3) * room[0]
    lights[:, 1] = -room[1] * random.uniform(0.75, 0.97, 3)
    lights[:, 2] = random.uniform(-0.8, 0.8, 3) * room[2]
    lights[:, 3:] = random.uniform(0.25, 0.8, (3, 1)) * random.uniform(0.9, 1.1, (3, 3))
    return SceneBatch(
        tuple(SHAPES[thing.name] for thing in things),
        half=tensor([thing.half for thing in things], 1, count, 3),
        centre=tensor([thing.centre for thing in things], 1, count, 3),
        turn=tensor([(math.cos(thing.turn), math.sin(thing.turn)) for thing in things], 1, count, 2),
        present=torch.ones(1, count),
        room=tensor(room, 1, 3),
        waves=torch.zeros(1, 4, 4),
        terrain=0,
        surface=tensor(look, 1, 6 + count, 8),
        lights=tensor(lights, 1, 3, 6),
        ambient=tensor(random.uniform(0.25, 0.5), 1),
        exposure=tensor(random.uniform(0.75, 1.3) * random.uniform(0.95, 1.05, 3), 1, 1, 3),
    )


# Rays


def _hits(
    scene: SceneBatch, pose: torch.Tensor, focal: torch.Tensor, rays: Planes, width: int, height: int
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Returns depth (1,H*W) in metres, surface numbers (H,W), and the pixels that each thing could cover (things,)."""
    windows = windows_of(scene, pose[0, 0], float(focal), height, width, (0, height))
    depth, surface = nearest_hit(scene, torch.zeros(1, dtype=torch.long), pose[0, :, :3, 3], rays, windows, width)
    spans = np.array([(bottom - top) * (right - left) for top, bottom, left, right in windows], np.int64)
    return depth, surface.view(height, width).numpy(), spans


def _shade(
    scene: SceneBatch, pose: torch.Tensor, rays: Planes, depth: torch.Tensor, surface: np.ndarray, bank: torch.Tensor
) -> torch.Tensor:
    """Returns the linear radiance (3,H,W) of what the rays hit."""
    ox, oy, oz = per_view(pose[0, :, :3, 3])
    point = ox + depth * rays[0], oy + depth * rays[1], oz + depth * rays[2]
    light = radiance(scene, torch.zeros(1, dtype=torch.long), point, torch.from_numpy(surface).view(1, -1), bank)
    return light[0].view(3, *surface.shape)
