"""Defines scenes as tensors, `SceneBatch`, and intersects rays with them, `nearest_hit`.

Scenes are rooms with boxes, ellipsoids, cylinders and rolling floors. World axes follow the cameras: x right, y down, z
forward; the floor is y = 0 and up is -y. Lengths are metres. All primitives are intersected in closed form, except the
rolling floor, whose root is bracketed by marching and refined by bisection (error under 0.1 mm; a crest that a ray only
grazes, for less than one marching step, is missed). Vectors of rays are kept as planes, one tensor per component: torch
is several times faster on those than on triples.
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
        """Copies to a device."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)}
        return SceneBatch(**{**values, **moved})

    def one(self, scene: int, view: int) -> SceneBatch:
        """Returns the batch with a single scene, seen by a single camera."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen = {k: v[scene : scene + 1] for k, v in values.items() if isinstance(v, torch.Tensor)}
        chosen["exposure"] = chosen["exposure"][:, view : view + 1]
        return SceneBatch(**{**values, **chosen, "terrain": int(scene < self.terrain)})


Planes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # the components of a vector per ray


def _slab(origin: Planes, direction: Planes, half: Planes) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns entry and exit parameters of an axis-aligned box centred at 0 (Kay & Kajiya 1986)."""
    near, far = [], []
    for o, d, h in zip(origin, direction, half, strict=True):
        inverse = 1.0 / d
        a, b = (-h - o) * inverse, (h - o) * inverse
        near.append(torch.minimum(a, b))
        far.append(torch.maximum(a, b))
    return torch.maximum(torch.maximum(near[0], near[1]), near[2]), torch.minimum(torch.minimum(far[0], far[1]), far[2])


def turned(vector: Planes, cos: torch.Tensor, sin: torch.Tensor) -> Planes:
    """Rotates about the vertical axis into an object's own frame."""
    x, y, z = vector
    return cos * x - sin * z, y, sin * x + cos * z


def dot(a: Planes, b: Planes) -> torch.Tensor:
    """Returns the scalar product per ray."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def per_view(vectors: torch.Tensor) -> Planes:
    """Returns vectors (N,3), one per view, as planes (N,1) that broadcast over the rays of the view."""
    return vectors[:, 0, None], vectors[:, 1, None], vectors[:, 2, None]


def _bump(sines: list[list[torch.Tensor]], x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Returns the height of the rolling floor above y = 0 (non-negative): sum of a*(1 + sin(kx x + kz z + phase))."""
    height = torch.zeros_like(x)
    for a, kx, kz, phase in sines:
        height = height + a * (1 + torch.sin(kx * x + kz * z + phase))
    return height


def _hit_floor(
    origin: Planes, direction: Planes, waves: torch.Tensor, limit: torch.Tensor, steps: int = 40
) -> torch.Tensor:
    """Returns the first parameter t in [0, limit] at which the ray goes below the rolling floor; FAR without one."""
    top = 2 * waves[:, :, 0].sum(1)[:, None]
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    down = dy > 1e-6
    safe = torch.where(down, dy, torch.ones_like(dy))
    start = ((-top - oy) / safe).clamp(min=0.0)
    stop = torch.minimum((-oy / safe).clamp(min=0.0), limit)
    start = torch.minimum(start, stop)
    if lone_on_cpu(dy):  # most rays never come near the floor
        near = (down & (start < stop))[0]
        if not bool(near.all()):
            found = torch.full_like(stop, FAR)
            if bool(near.any()):
                lines = dx[:, near], dy[:, near], dz[:, near]
                found[:, near] = _hit_floor(origin, lines, waves, limit[:, near], steps)
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


def lone_on_cpu(rays: torch.Tensor) -> bool:
    """Returns whether rays (N,P) belong to a single camera on a CPU, where rays that need no work may be left out.

    On a GPU such a choice costs more than it saves: it waits for the device.
    """
    return len(rays) == 1 and rays.device.type == "cpu"


Window = tuple[int, int, int, int]  # first and last (exclusive) row, then column


def windows_of(
    scene: SceneBatch, cam_to_world: torch.Tensor, focal: float, height: int, width: int, rows: tuple[int, int]
) -> list[Window]:
    """Returns for each object the part of a band of rows that it can cover in the image of the single camera.

    Rows count from the top of the band. The corners of an object's box span its outline. An object that is absent or
    behind the camera has an empty window; one that reaches behind the camera has the whole band.
    """
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    cos, sin = scene.turn[0].unbind(-1)
    local = (scene.half[0][:, None] * corners).unbind(-1)
    world = torch.stack(turned((local[0], local[1], local[2]), cos[:, None], -sin[:, None]), -1)
    world = world + scene.centre[0][:, None]
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
    scene: SceneBatch, index: torch.Tensor, k: int, origin: torch.Tensor, direction: Planes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the parameters at which rays (N,P) from origin (N,3) enter object k, and whether they do (it is present,
    hit, and ahead).
    """
    kind = scene.kinds[k]
    cos, sin = scene.turn[index, k, 0, None], scene.turn[index, k, 1, None]
    size = per_view(scene.half[index, k])
    o = turned(per_view(origin - scene.centre[index, k]), cos, sin)
    d = turned(direction, cos, sin)
    if kind == BOX:
        near, far = _slab(o, d, size)
        hit = (near <= far) & (near > 0)
    elif kind == ELLIPSOID:
        oo = o[0] / size[0], o[1] / size[1], o[2] / size[2]
        dd = d[0] / size[0], d[1] / size[1], d[2] / size[2]
        a, b, c = dot(dd, dd), dot(oo, dd), dot(oo, oo) - 1
        disc = b * b - a * c
        near = (-b - disc.clamp(min=0).sqrt()) / a
        hit = (disc > 0) & (near > 0)
    else:
        radius, tall = size[0], size[1]
        (dx, dy, dz), (ox, oy, oz) = d, o
        a = dx * dx + dz * dz
        b = ox * dx + oz * dz
        disc = b * b - a * (ox * ox + oz * oz - radius * radius)
        root = disc.clamp(min=0).sqrt()
        y1, y2 = (-tall - oy) / dy, (tall - oy) / dy
        near = torch.maximum((-b - root) / a, torch.minimum(y1, y2))
        far = torch.minimum((-b + root) / a, torch.maximum(y1, y2))
        hit = (disc > 0) & (near <= far) & (near > 0)
    return near, hit & (scene.present[index, k, None] > 0)


def nearest_hit(
    scene: SceneBatch,
    index: torch.Tensor,
    origin: torch.Tensor,
    direction: Planes,
    windows: list[Window] | None = None,
    width: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the nearest hit of every ray (N,P) from origin (N,3): parameter t and surface number, both (N,P).

    Surfaces: 0 floor, 1 ceiling, 2-5 walls, 6+ objects. With `windows` (see `windows_of`; one camera, P = rows * width)
    each object is intersected only there.
    """
    half_x, tall, half_z = per_view(scene.room[index])
    sizes, middles = (half_x, tall / 2, half_z), (torch.zeros_like(tall), -tall / 2, torch.zeros_like(tall))
    safe_x, safe_y, safe_z = safe = tuple(torch.where(d.abs() < 1e-7, torch.full_like(d, 1e-7), d) for d in direction)
    x, y, z = (
        (torch.sign(d) * size - (o - middle)) / d
        for d, size, o, middle in zip(safe, sizes, per_view(origin), middles, strict=True)
    )
    best = torch.minimum(torch.minimum(x, y), z)
    # walls at the sides 2, 3; y down is the floor (0), up the ceiling (1); walls behind and ahead 4, 5
    sides, floor, ends = 2 + (safe_x > 0).long(), (safe_y <= 0).long(), 4 + (safe_z > 0).long()
    surface = torch.where(x == best, sides, torch.where(y == best, floor, ends))
    n = scene.terrain
    if n:
        rows = index < n
        count = len(index) if bool(rows.all()) else int(rows.sum())  # views are ordered by scene, rolling floors first
        lines = direction[0][:count], direction[1][:count], direction[2][:count]
        t = _hit_floor(per_view(origin[:count]), lines, scene.waves[index[:count]], best[:count])
        surface[:count] = torch.where(t < best[:count], torch.zeros_like(surface[:count]), surface[:count])
        best[:count] = torch.minimum(best[:count], t)
    if windows is None:
        for k in range(len(scene.kinds)):
            near, hit = _hit_object(scene, index, k, origin, (safe_x, safe_y, safe_z))
            hit = hit & (near < best)
            best = torch.where(hit, near, best)
            surface = torch.where(hit, torch.full_like(surface, 6 + k), surface)
        return best, surface
    grids = [plane.view(-1, width) for plane in safe]
    bests, surfaces = best.view(-1, width), surface.view(-1, width)
    for k, (r0, r1, c0, c1) in enumerate(windows):
        if r0 == r1:
            continue
        dx, dy, dz = (grid[r0:r1, c0:c1].reshape(1, -1) for grid in grids)
        near, hit = _hit_object(scene, index, k, origin, (dx, dy, dz))
        near, hit = near.view(r1 - r0, c1 - c0), hit.view(r1 - r0, c1 - c0)
        so_far = bests[r0:r1, c0:c1]
        hit = hit & (near < so_far)
        so_far.copy_(torch.where(hit, near, so_far))
        surfaces[r0:r1, c0:c1].masked_fill_(hit, 6 + k)
    return best, surface
