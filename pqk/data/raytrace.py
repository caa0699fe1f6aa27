"""Batched ray tracing of rooms with boxes, ellipsoids, cylinders and rolling floors, in plain torch.

The same code renders files on a CPU and training pairs on the training device. World axes follow the cameras: x right,
y down, z forward; the floor is y = 0 and up is -y. Lengths are metres. All primitives are intersected in closed form,
except the rolling floor, whose root is bracketed by marching and closed by bisection (error under 0.1 mm; a crest that
a ray only grazes, for less than one marching step, is passed over).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

ROOM, BOX, ELLIPSOID, CYLINDER = 0, 1, 2, 3
FAR = 1e6


@dataclass
class SceneBatch:
    """B scenes as tensors. S = 6 room faces + O objects; objects are ordered boxes, ellipsoids, cylinders.

    half: (B,O,3) half sizes or radii; centre: (B,O,3); turn: (B,O,2) cosine and sine of the yaw; present: (B,O) 0/1.
    room: (B,3) half width, height, half depth. waves: (B,4,4) amplitude, kx, kz, phase of the floor's sine waves.
    surface: (B,S,8) colour A (3), colour B (3), texture index, metres per texture tile.
    lights: (B,L,6) position and colour; ambient: (B,); exposure: (B,V,3) gain per channel and view.
    """

    kinds: tuple[int, ...]
    half: torch.Tensor
    centre: torch.Tensor
    turn: torch.Tensor
    present: torch.Tensor
    room: torch.Tensor
    waves: torch.Tensor
    terrain: int  # the first `terrain` scenes of the batch have a rolling floor
    surface: torch.Tensor
    lights: torch.Tensor
    ambient: torch.Tensor
    exposure: torch.Tensor

    def to(self, device: torch.device | str) -> SceneBatch:
        """Copy to a device."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)}
        return SceneBatch(**{**values, **moved})

    def one(self, scene: int, view: int) -> SceneBatch:
        """The batch that holds a single scene, seen by a single camera."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen = {k: v[scene : scene + 1] for k, v in values.items() if isinstance(v, torch.Tensor)}
        chosen["exposure"] = chosen["exposure"][:, view : view + 1]
        return SceneBatch(**{**values, **chosen, "terrain": int(scene < self.terrain)})


def pixel_rays(focal: torch.Tensor, height: int, width: int, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """Camera-frame ray directions with z = 1 through pixel centres (+0.5); focal in pixels (N,) -> (N, h*W, 3).

    `rows` gives the rays of that band of image rows only.
    """
    device = focal.device
    first, last = rows or (0, height)
    v, u = torch.meshgrid(
        torch.arange(first, last, device=device) + 0.5, torch.arange(width, device=device) + 0.5, indexing="ij"
    )
    x = (u.reshape(1, -1) - width / 2) / focal[:, None]
    y = (v.reshape(1, -1) - height / 2) / focal[:, None]
    return torch.stack([x, y, torch.ones_like(x)], -1)


def _slab(origin: torch.Tensor, direction: torch.Tensor, half: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entry and exit parameters of an axis-aligned box centred at 0 (Kay & Kajiya 1986)."""
    inverse = 1.0 / direction
    a, b = (-half - origin) * inverse, (half - origin) * inverse
    return torch.minimum(a, b).amax(-1), torch.maximum(a, b).amin(-1)


def _turned(vector: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate about the vertical axis into an object's own frame."""
    x, y, z = vector.unbind(-1)
    return torch.stack([cos * x - sin * z, y, sin * x + cos * z], -1)


def _bump(sines: list[list[torch.Tensor]], x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Height of the rolling floor above y = 0 (non-negative): sum of a*(1 + sin(kx x + kz z + phase))."""
    height = torch.zeros_like(x)
    for a, kx, kz, phase in sines:
        height = height + a * (1 + torch.sin(kx * x + kz * z + phase))
    return height


def _hit_floor(
    origin: torch.Tensor, direction: torch.Tensor, waves: torch.Tensor, limit: torch.Tensor, steps: int = 40
) -> torch.Tensor:
    """First parameter t in [0, limit] at which the ray goes below the rolling floor; FAR where it does not."""
    top = 2 * waves[:, :, 0].sum(1)[:, None]
    ox, oy, oz = (origin[:, None, i] for i in range(3))
    dx, dy, dz = direction.unbind(-1)
    down = dy > 1e-6
    safe = torch.where(down, dy, torch.ones_like(dy))
    start = ((-top - oy) / safe).clamp(min=0.0)
    stop = torch.minimum((-oy / safe).clamp(min=0.0), limit)
    start = torch.minimum(start, stop)
    if _lone_on_cpu(direction):  # most rays never come near the floor
        near = (down & (start < stop))[0]
        if not bool(near.all()):
            found = torch.full_like(stop, FAR)
            if bool(near.any()):
                found[:, near] = _hit_floor(origin, direction[:, near], waves, limit[:, near], steps)
            return found

    sines = [[wave[:, j, None] for j in range(4)] for wave in waves.unbind(1)]

    def below(t: torch.Tensor) -> torch.Tensor:
        return oy + t * dy + _bump(sines, ox + t * dx, oz + t * dz)

    low, high = start, stop
    found = torch.zeros_like(down)
    for i in range(1, steps + 1):
        t = start + (stop - start) * (i / steps)
        crossed = (below(t) >= 0) & ~found
        high = torch.where(crossed, t, high)
        low = torch.where(found | crossed, low, t)
        found = found | crossed
    for _ in range(14):
        middle = 0.5 * (low + high)
        inside = below(middle) >= 0
        high, low = torch.where(inside, middle, high), torch.where(inside, low, middle)
    return torch.where(down & found, high, torch.full_like(high, FAR))


def _lone_on_cpu(rays: torch.Tensor) -> bool:
    """Whether (N,P,3) rays leave a single camera on a CPU: rays that need no work may be left out there.

    On a GPU such a choice costs more than it saves: it waits for the device.
    """
    return len(rays) == 1 and rays.device.type == "cpu"


Window = tuple[int, int, int, int]  # first and last (exclusive) row, then column


def _windows(
    scene: SceneBatch, cam_to_world: torch.Tensor, focal: float, height: int, width: int, rows: tuple[int, int]
) -> list[Window]:
    """Per object the part of a band of rows that it can cover in the image of the one camera, rows from the band's top.

    The corners of an object's box span its outline. An object that is absent or behind the camera has an empty window;
    one that reaches behind the camera has the whole band.
    """
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    cos, sin = scene.turn[0].unbind(-1)
    local = scene.half[0][:, None] * corners
    world = _turned(local, cos[:, None], -sin[:, None]) + scene.centre[0][:, None]
    seen = (world - cam_to_world[:3, 3]) @ cam_to_world[:3, :3]  # (O,8,3) in the camera
    z = seen[..., 2]
    ahead = z.clamp(min=1e-3)
    u, v = (focal * seen[..., axis] / ahead for axis in (0, 1))
    edges = torch.stack([v.amin(1) + height / 2, v.amax(1) + height / 2, u.amin(1) + width / 2, u.amax(1) + width / 2])
    found = []
    for k, (top, bottom, left, right) in enumerate(edges.T.tolist()):
        if scene.present[0, k] <= 0 or z[k].max() <= 0:
            found.append((0, 0, 0, 0))
        elif z[k].min() < 0.05:
            found.append((0, rows[1] - rows[0], 0, width))
        else:  # a pixel of slack on each side: rounding must never cut an outline
            r0, r1 = max(int(top) - 1, rows[0]), min(int(bottom) + 2, rows[1])
            c0, c1 = max(int(left) - 1, 0), min(int(right) + 2, width)
            found.append((r0 - rows[0], r1 - rows[0], c0, c1) if r0 < r1 and c0 < c1 else (0, 0, 0, 0))
    return found


def _hit_object(
    scene: SceneBatch, index: torch.Tensor, k: int, origin: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where rays (N,P,3) enter object k, and whether they do (it is present, hit, and ahead), both (N,P)."""
    kind = scene.kinds[k]
    cos, sin = scene.turn[index, k, 0], scene.turn[index, k, 1]
    size = scene.half[index, k]
    o = _turned(origin - scene.centre[index, k], cos, sin)
    d = _turned(direction, cos[:, None], sin[:, None])
    if kind == BOX:
        near, far = _slab(o[:, None], d, size[:, None])
        hit = (near <= far) & (near > 0)
    elif kind == ELLIPSOID:
        oo, dd = (o / size)[:, None], d / size[:, None]
        a, b, c = (dd * dd).sum(-1), (oo * dd).sum(-1), (oo * oo).sum(-1) - 1
        disc = b * b - a * c
        near = (-b - disc.clamp(min=0).sqrt()) / a
        hit = (disc > 0) & (near > 0)
    else:
        radius, tall = size[:, 0, None], size[:, 1, None]
        dx, dy, dz = d.unbind(-1)
        ox, oy, oz = (o[:, i, None] for i in range(3))
        a = dx * dx + dz * dz
        b = ox * dx + oz * dz
        disc = b * b - a * (ox * ox + oz * oz - radius * radius)
        root = disc.clamp(min=0).sqrt()
        y1, y2 = (-tall - oy) / dy, (tall - oy) / dy
        near = torch.maximum((-b - root) / a, torch.minimum(y1, y2))
        far = torch.minimum((-b + root) / a, torch.maximum(y1, y2))
        hit = (disc > 0) & (near <= far) & (near > 0)
    return near, hit & (scene.present[index, k, None] > 0)


def _nearest(
    scene: SceneBatch,
    index: torch.Tensor,
    origin: torch.Tensor,
    direction: torch.Tensor,
    windows: list[Window] | None = None,
    width: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest hit of every ray: parameter t and surface number, both (N,P).

    Surfaces: 0 floor, 1 ceiling, 2-5 walls, 6+ objects. With `windows` (see `_windows`; one camera, P = rows * width)
    each object is looked for only there.
    """
    room = scene.room[index]
    centre = torch.stack([torch.zeros_like(room[:, 0]), -room[:, 1] / 2, torch.zeros_like(room[:, 0])], -1)
    half = torch.stack([room[:, 0], room[:, 1] / 2, room[:, 2]], -1)
    safe = torch.where(direction.abs() < 1e-7, torch.full_like(direction, 1e-7), direction)
    sides = (torch.sign(safe) * half[:, None] - (origin - centre)[:, None]) / safe
    best, axis = sides.min(-1)
    positive = torch.gather(safe, -1, axis[..., None])[..., 0] > 0
    # axis 0: walls 2, 3; axis 1: y down is the floor (0), up the ceiling (1); axis 2: walls 4, 5
    surface = torch.where(axis == 1, torch.where(positive, 0, 1), torch.where(axis == 0, 2, 4) + positive.long())
    n = scene.terrain
    if n:
        rows = index < n
        if bool(rows.all()):
            t = _hit_floor(origin, direction, scene.waves[index], best)
            surface = torch.where(t < best, torch.zeros_like(surface), surface)
            best = torch.minimum(best, t)
        else:
            count = int(rows.sum())  # views are ordered by scene, so the rolling floors come first
            t = _hit_floor(origin[:count], direction[:count], scene.waves[index[:count]], best[:count])
            surface[:count] = torch.where(t < best[:count], torch.zeros_like(surface[:count]), surface[:count])
            best[:count] = torch.minimum(best[:count], t)
    if windows is None:
        for k in range(len(scene.kinds)):
            near, hit = _hit_object(scene, index, k, origin, safe)
            hit = hit & (near < best)
            best = torch.where(hit, near, best)
            surface = torch.where(hit, torch.full_like(surface, 6 + k), surface)
        return best, surface
    rays, bests, surfaces = safe.view(-1, width, 3), best.view(-1, width), surface.view(-1, width)
    for k, (r0, r1, c0, c1) in enumerate(windows):
        if r0 == r1:
            continue
        near, hit = _hit_object(scene, index, k, origin, rays[r0:r1, c0:c1].reshape(1, -1, 3))
        near, hit = near.view(r1 - r0, c1 - c0), hit.view(r1 - r0, c1 - c0)
        so_far = bests[r0:r1, c0:c1]
        hit = hit & (near < so_far)
        so_far.copy_(torch.where(hit, near, so_far))
        surfaces[r0:r1, c0:c1].masked_fill_(hit, 6 + k)
    return best, surface


def _normal_and_uv(
    scene: SceneBatch, index: torch.Tensor, point: torch.Tensor, surface: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """World normals (N,P,3) and texture coordinates in metres (N,P,2), anchored to the surface that was hit."""
    n_objects = len(scene.kinds)
    k = (surface - 6).clamp(min=0)
    flat = (index[:, None] * n_objects + k).reshape(-1)

    def pick(table: torch.Tensor) -> torch.Tensor:
        return table.reshape(-1, table.shape[-1])[flat].reshape(*surface.shape, -1)

    turn, half = pick(scene.turn), pick(scene.half)
    cos, sin = turn[..., 0], turn[..., 1]
    local = _turned(point - pick(scene.centre), cos, sin)
    kind = torch.tensor(scene.kinds, device=point.device)[k]
    scaled = local / half
    box = torch.nn.functional.one_hot(scaled.abs().argmax(-1), 3).to(local) * torch.sign(scaled)
    ball = scaled / half
    side = torch.stack([local[..., 0], torch.zeros_like(cos), local[..., 2]], -1)
    cap = torch.stack([torch.zeros_like(cos), torch.sign(local[..., 1]), torch.zeros_like(cos)], -1)
    on_cap = scaled[..., 1].abs() > (side.norm(dim=-1) / half[..., 0])
    tube = torch.where(on_cap[..., None], cap, side)
    normal = torch.where((kind == BOX)[..., None], box, torch.where((kind == ELLIPSOID)[..., None], ball, tube))
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    in_room = (surface < 6)[..., None]
    anchor = torch.where(in_room, point, local)
    faces = torch.tensor(
        [[0, -1, 0], [0, 1, 0], [1, 0, 0], [-1, 0, 0], [0, 0, 1], [0, 0, -1.0]], device=point.device, dtype=point.dtype
    )
    flat_normal = faces[surface.clamp(max=5)]
    if scene.terrain:
        rows = int((index < scene.terrain).sum())
        waves = scene.waves[index[:rows]]
        x, z = point[:rows, :, 0], point[:rows, :, 2]
        gx, gz = torch.zeros_like(x), torch.zeros_like(x)
        for i in range(waves.shape[1]):
            a, kx, kz, phase = (waves[:, i, j, None] for j in range(4))
            slope = a * torch.cos(kx * x + kz * z + phase)
            gx, gz = gx + kx * slope, gz + kz * slope
        floor = torch.stack([-gx, -torch.ones_like(gx), -gz], -1)
        floor = floor / floor.norm(dim=-1, keepdim=True)
        flat_normal[:rows] = torch.where((surface[:rows] == 0)[..., None], floor, flat_normal[:rows])
    world = _turned(normal, cos, -sin)
    axis = torch.where(in_room, flat_normal, normal).abs().argmax(-1)
    u = torch.where(axis == 0, anchor[..., 2], anchor[..., 0])
    v = torch.where(axis == 1, anchor[..., 2], anchor[..., 1])
    return torch.where(in_room, flat_normal, world), torch.stack([u, v], -1)


def _texture(bank: torch.Tensor, number: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    """Bilinear lookup with wrap-around in a bank of square textures (T,R,R); uv in tiles -> values in [0,1]."""
    size = bank.shape[-1]
    xy = (uv - torch.floor(uv)) * size
    low = torch.floor(xy)
    f = xy - low
    x0, y0 = low.long().remainder(size).unbind(-1)
    x1, y1 = (x0 + 1).remainder(size), (y0 + 1).remainder(size)
    flat, base = bank.reshape(-1), number.long() * size * size
    top = flat[base + y0 * size + x0] * (1 - f[..., 0]) + flat[base + y0 * size + x1] * f[..., 0]
    bottom = flat[base + y1 * size + x0] * (1 - f[..., 0]) + flat[base + y1 * size + x1] * f[..., 0]
    return top * (1 - f[..., 1]) + bottom * f[..., 1]


def trace(
    scene: SceneBatch,
    cam_to_world: torch.Tensor,
    focal: torch.Tensor,
    height: int,
    width: int,
    bank: torch.Tensor | None,
    rows: tuple[int, int] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Render V views of each of B scenes.

    cam_to_world (B,V,4,4), focal (B,V) in pixels. Returns linear radiance (B,V,3,h,W) (None without a texture bank) and
    depth along z in metres (B,V,h,W). `rows` renders only that band of image rows.
    """
    batch, views = focal.shape
    index = torch.arange(batch, device=focal.device).repeat_interleave(views)
    pose = cam_to_world.reshape(-1, 4, 4)
    rays = pixel_rays(focal.reshape(-1), height, width, rows)
    windows = None
    if _lone_on_cpu(rays):
        windows = _windows(scene, pose[0], float(focal.reshape(-1)[0]), height, width, rows or (0, height))
    if rows is not None:
        height = rows[1] - rows[0]
    # no matmul: TF32 and autocast would round the rays
    right, down, ahead = (rays[..., j, None] * pose[:, None, :3, j] for j in range(3))
    direction = right + down + ahead
    origin = pose[:, :3, 3]
    t, surface = _nearest(scene, index, origin, direction, windows, width)
    depth = t.reshape(batch, views, height, width)  # rays have z = 1, so the parameter is the depth
    if bank is None:
        return None, depth
    point = origin[:, None] + t[..., None] * direction
    normal, uv = _normal_and_uv(scene, index, point, surface)
    n_surfaces = scene.surface.shape[1]
    look = scene.surface.reshape(-1, 8)[(index[:, None] * n_surfaces + surface).reshape(-1)].reshape(*surface.shape, 8)
    pattern = _texture(bank, look[..., 6], uv / look[..., 7:8])
    albedo = look[..., :3] + (look[..., 3:6] - look[..., :3]) * pattern[..., None]
    light = scene.ambient[index][:, None, None] * (1.0 - 0.25 * normal[..., 1:2])
    for i in range(scene.lights.shape[1]):
        toward = scene.lights[index, i, :3][:, None] - point
        distance = toward.norm(dim=-1, keepdim=True).clamp(min=0.1)
        lambert = (normal * toward).sum(-1, keepdim=True).clamp(min=0) / distance
        light = light + lambert * scene.lights[index, i, 3:][:, None] / (1 + 0.08 * distance * distance)
    colour = albedo * light * scene.exposure.reshape(-1, 3)[:, None]
    return colour.reshape(batch, views, height, width, 3).permute(0, 1, 4, 2, 3), depth
