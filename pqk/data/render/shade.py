"""Computes the colours of hit points, `radiance`: normals, textures, and Lambert's law under fading point lights."""

from __future__ import annotations

import torch

from pqk.data.render.intersect import BOX, ELLIPSOID, Planes, SceneBatch, dot, lone_on_cpu, per_view, turned

_FACES = ((0, -1, 0), (0, 1, 0), (1, 0, 0), (-1, 0, 0), (0, 0, 1), (0, 0, -1))  # normals of floor, ceiling, walls


def radiance(
    scene: SceneBatch, index: torch.Tensor, point: Planes, surface: torch.Tensor, bank: torch.Tensor
) -> torch.Tensor:
    """Returns the linear radiance (N,3,P) of the points (N,P) of N views.

    index: (N,) scene of each view; surface: (N,P) numbers; bank: textures, see `_texture`.
    """
    normal, (u, v) = normal_and_uv(scene, index, point, surface)
    flat = index[:, None] * scene.surface.shape[1] + surface
    look = scene.surface.reshape(-1, 8).unbind(-1)
    tile = look[7][flat]
    pattern = _texture(bank, look[6][flat], u / tile, v / tile)
    plain = scene.ambient[index][:, None] * (1.0 - 0.25 * normal[1])
    light = [plain, plain, plain]
    for i in range(scene.lights.shape[1]):
        lx, ly, lz = per_view(scene.lights[index, i, :3])
        toward = lx - point[0], ly - point[1], lz - point[2]
        distance = dot(toward, toward).sqrt().clamp(min=0.1)
        lambert = dot(normal, toward).clamp(min=0) / distance
        fading = 1 + 0.08 * distance * distance
        colour = per_view(scene.lights[index, i, 3:])
        light = [light[c] + lambert * colour[c] / fading for c in range(3)]
    exposure = scene.exposure.reshape(-1, 3)
    albedo = (look[c][flat] + (look[3 + c] - look[c])[flat] * pattern for c in range(3))
    return torch.stack([a * light[c] * exposure[:, c, None] for c, a in enumerate(albedo)], 1)


def normal_and_uv(
    scene: SceneBatch, index: torch.Tensor, point: Planes, surface: torch.Tensor
) -> tuple[Planes, tuple[torch.Tensor, torch.Tensor]]:
    """Returns world normals and texture coordinates in metres, anchored to the surface that was hit; planes (N,P)."""
    normal, uv = _of_room(scene, index, point, surface)
    if not scene.kinds:
        return normal, uv
    if lone_on_cpu(surface):  # most points lie on the room
        hit = (surface[0] >= 6).nonzero()[:, 0]
        if len(hit):
            part = point[0][:, hit], point[1][:, hit], point[2][:, hit]
            of_objects = _of_objects(scene, index, part, surface[:, hit])
            for whole, found in zip((*normal, *uv), (*of_objects[0], *of_objects[1]), strict=True):
                whole[:, hit] = found
        return normal, uv
    in_room = surface < 6
    of_objects = _of_objects(scene, index, point, surface)
    nx, ny, nz = (torch.where(in_room, a, b) for a, b in zip(normal, of_objects[0], strict=True))
    u, v = (torch.where(in_room, a, b) for a, b in zip(uv, of_objects[1], strict=True))
    return (nx, ny, nz), (u, v)


def _of_room(
    scene: SceneBatch, index: torch.Tensor, point: Planes, surface: torch.Tensor
) -> tuple[Planes, tuple[torch.Tensor, torch.Tensor]]:
    """Returns normals and texture coordinates as if every point lay on floor, ceiling or walls."""
    faces = torch.tensor(_FACES, device=surface.device, dtype=point[0].dtype)
    face = surface.clamp(max=5)
    nx, ny, nz = (column[face] for column in faces.unbind(-1))
    if scene.terrain:
        rows = int((index < scene.terrain).sum())
        waves = scene.waves[index[:rows]]
        x, z = point[0][:rows], point[2][:rows]
        gx, gz = torch.zeros_like(x), torch.zeros_like(x)
        for i in range(waves.shape[1]):
            a, kx, kz, phase = (waves[:, i, j, None] for j in range(4))
            slope = a * torch.cos(kx * x + kz * z + phase)
            gx, gz = gx + kx * slope, gz + kz * slope
        length = (gx * gx + 1 + gz * gz).sqrt()
        floor = surface[:rows] == 0
        for plane, value in ((nx, -gx / length), (ny, -1 / length), (nz, -gz / length)):
            plane[:rows] = torch.where(floor, value, plane[:rows])
    return (nx, ny, nz), _laid((nx, ny, nz), point)


def _of_objects(
    scene: SceneBatch, index: torch.Tensor, point: Planes, surface: torch.Tensor
) -> tuple[Planes, tuple[torch.Tensor, torch.Tensor]]:
    """Returns normals and texture coordinates as if every point lay on an object (points of the room: on the first)."""
    k = (surface - 6).clamp(min=0)
    flat = index[:, None] * len(scene.kinds) + k

    def pick(table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(column[flat] for column in table.reshape(-1, table.shape[-1]).unbind(-1))

    (cos, sin), half, centre = pick(scene.turn), pick(scene.half), pick(scene.centre)
    local = turned((point[0] - centre[0], point[1] - centre[1], point[2] - centre[2]), cos, sin)
    kind = torch.tensor(scene.kinds, device=surface.device)[k]
    scaled = local[0] / half[0], local[1] / half[1], local[2] / half[2]
    box = _face(scaled)
    nothing = torch.zeros_like(cos)
    around = (local[0] * local[0] + local[2] * local[2]).sqrt()
    on_cap = scaled[1].abs() > around / half[0]
    tube = (
        torch.where(on_cap, nothing, local[0]),
        torch.where(on_cap, torch.sign(local[1]), nothing),
        torch.where(on_cap, nothing, local[2]),
    )
    x, y, z = (
        torch.where(kind == BOX, box[c], torch.where(kind == ELLIPSOID, scaled[c] / half[c], tube[c])) for c in range(3)
    )
    length = dot((x, y, z), (x, y, z)).sqrt().clamp(min=1e-9)
    normal = x / length, y / length, z / length
    return turned(normal, cos, -sin), _laid(normal, local)


def _largest(vector: Planes) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns whether the x component is the largest in size, and whether y is; of equal ones the first counts."""
    x, y, z = (component.abs() for component in vector)
    is_x = (x >= y) & (x >= z)
    return is_x, ~is_x & (y >= z)


def _face(scaled: Planes) -> Planes:
    """Returns the outward normal of the face of a box at a point of its surface, in units of the half sizes."""
    is_x, is_y = _largest(scaled)
    nothing = torch.zeros_like(scaled[0])
    return (
        torch.where(is_x, torch.sign(scaled[0]), nothing),
        torch.where(is_y, torch.sign(scaled[1]), nothing),
        torch.where(is_x | is_y, nothing, torch.sign(scaled[2])),
    )


def _laid(normal: Planes, anchor: Planes) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns texture coordinates: the point projected along the largest component of the normal."""
    is_x, is_y = _largest(normal)
    return torch.where(is_x, anchor[2], anchor[0]), torch.where(is_y, anchor[2], anchor[1])


def _texture(bank: torch.Tensor, number: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Returns values in [0,1]: bilinear lookup with wrap-around in square textures (T,R,R); u, v in tiles."""
    size = bank.shape[-1]

    def cell(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns both neighbouring texels, and the weight of the second."""
        x = (tiles - torch.floor(tiles)) * size
        low = torch.floor(x)
        first = low.long()
        first = torch.where(first >= size, first - size, first)  # rounding can reach the end of the tile
        second = torch.where(first == size - 1, 0, first + 1)
        return first, second, x - low

    x0, x1, fx = cell(u)
    y0, y1, fy = cell(v)
    flat, base = bank.reshape(-1), number.long() * (size * size)
    row0, row1 = base + y0 * size, base + y1 * size
    top = flat[row0 + x0] * (1 - fx) + flat[row0 + x1] * fx
    bottom = flat[row1 + x0] * (1 - fx) + flat[row1 + x1] * fx
    return top * (1 - fy) + bottom * fy
