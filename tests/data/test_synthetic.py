"""The ray tracer against closed forms and brute force, and what the random scenes promise."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk.data.render.intersect import BOX, CYLINDER, ELLIPSOID, SceneBatch, nearest_hit
from pqk.data.render.raytrace import pixel_rays, trace
from pqk.data.render.shade import normal_and_uv
from pqk.data.render.stream import covisible_share, invert_rigid, training_pairs
from pqk.data.render.synthetic import MARGIN, NEAREST, expose, render, sample_scenes, texture_bank
from pqk.settings.seeds import INDICES, LIMIT, SPLITS, split_seed

SIZE = 48


@pytest.fixture(scope="module")
def bank():
    return texture_bank()


def room_with(kind: int, half=(1.0, 1.0, 1.0), centre=(0.0, -1.0, 3.0), yaw=0.0, present=True) -> SceneBatch:
    """A room of 8 x 3 x 16 m with one object."""
    lights = torch.tensor([[[0.0, -2.9, 0.0, 0.5, 0.5, 0.5]]])
    surface = torch.full((1, 7, 8), 0.5)
    surface[..., 6:] = torch.tensor([0.0, 1.0])
    return SceneBatch(
        kinds=(kind,),
        half=torch.tensor([[half]]),
        centre=torch.tensor([[centre]]),
        turn=torch.tensor([[[math.cos(yaw), math.sin(yaw)]]]),
        present=torch.full((1, 1), float(present)),
        room=torch.tensor([[4.0, 3.0, 8.0]]),
        waves=torch.zeros(1, 4, 4),
        terrain=0,
        surface=surface,
        lights=lights,
        ambient=torch.tensor([0.3]),
        exposure=torch.ones(1, 1, 3),
    )


def camera(x=0.0, y=-1.5, z=0.0, turn=0.0, tilt=0.0) -> torch.Tensor:
    """(1,1,4,4) camera to world: `turn` about the vertical axis (to the right), then `tilt` downwards."""
    c, s, ct, st_ = math.cos(turn), math.sin(turn), math.cos(tilt), math.sin(tilt)
    rotation = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]) @ np.array([[1, 0, 0], [0, ct, st_], [0, -st_, ct]])
    pose = torch.eye(4).repeat(1, 1, 1, 1)
    pose[0, 0, :3, :3] = torch.from_numpy(rotation).float()
    pose[0, 0, :3, 3] = torch.tensor([x, y, z])
    return pose


def depth_of(scene, pose, focal=40.0, size=SIZE):
    return trace(scene, pose, torch.full((1, 1), focal), size, size, None)[1][0, 0]


def world_rays(pose, focal=40.0, size=SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Origin (3,) and directions (size*size,3), float64, of one view."""
    matrix = pose[0, 0].double().numpy()
    rays = pixel_rays(torch.tensor([focal]), size, size)[0].double().numpy()
    return matrix[:3, 3], rays @ matrix[:3, :3].T


def test_empty_room_is_the_closed_form():
    """Looking along z, 1.5 m above the floor: every depth is the nearest of five planes."""
    depth = depth_of(room_with(BOX, present=False), camera()).double().numpy()
    v, u = np.mgrid[:SIZE, :SIZE] + 0.5
    x, y = np.abs(u - SIZE / 2) / 40, (v - SIZE / 2) / 40
    expected = np.minimum(8.0, np.minimum(4.0 / x, 1.5 / np.abs(y)))  # floor and ceiling are both 1.5 m away
    np.testing.assert_allclose(depth, expected, rtol=2e-6)


@pytest.mark.parametrize("turn", [0.0, 0.4, 2.0, -2.5])
def test_turned_camera_sees_the_planes_of_the_room(turn):
    pose = camera(1.0, -1.2, 2.0, turn, 0.1)
    origin, rays = world_rays(pose)
    low, high = np.array([-4, -3.0, -8]), np.array([4, 0.0, 8])
    expected = (np.where(rays > 0, high, low) - origin) / rays
    depth = depth_of(room_with(BOX, present=False), pose).double().numpy().ravel()
    np.testing.assert_allclose(depth, expected.min(1), rtol=1e-5)


def inside(kind: int, points: np.ndarray, half, centre, yaw: float) -> np.ndarray:
    """Membership of the solid, written apart from the tracer. `yaw` turns the object's x axis to (cos, 0, -sin)."""
    offset = points - np.array(centre)
    c, s = math.cos(yaw), math.sin(yaw)
    x = offset @ np.array([c, 0, -s]) / half[0]
    y = offset[..., 1] / half[1]
    z = offset @ np.array([s, 0, c]) / half[2]
    if kind == BOX:
        return (np.abs(x) <= 1) & (np.abs(y) <= 1) & (np.abs(z) <= 1)
    if kind == ELLIPSOID:
        return x**2 + y**2 + z**2 <= 1
    return (x**2 + z**2 <= 1) & (np.abs(y) <= 1)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([BOX, ELLIPSOID, CYLINDER]),
    st.tuples(*[st.floats(0.2, 0.9)] * 3),
    st.floats(-3.1, 3.1),
    st.floats(-0.4, 0.4),
    st.floats(-0.2, 0.4),
)
def test_objects_against_brute_force(kind, half, yaw, turn, tilt):
    """March along each ray in steps of 4 mm: the first sample inside the solid is where the tracer hits it."""
    if kind == CYLINDER:
        half = (half[0], half[1], half[0])
    centre, pose, size = (0.3, -half[1], 3.0), camera(turn=turn, tilt=tilt), 16
    scene = room_with(kind, half, centre, yaw)
    depth = depth_of(scene, pose, 14.0, size).double().numpy().ravel()
    background = depth_of(room_with(kind, present=False), pose, 14.0, size).double().numpy().ravel()
    origin, rays = world_rays(pose, 14.0, size)
    t = np.arange(1.0, 5.0, 0.004)
    solid = inside(kind, origin + t[None, :, None] * rays[:, None], half, centre, yaw) & (t < background[:, None])
    first = np.where(solid.any(1), t[solid.argmax(1)], background)
    close = np.abs(depth - first) <= 0.005 + 1e-5 * first
    grazing = solid.sum(1) < 3  # the march may step over an edge that the tracer hits
    assert (close | grazing).all()
    hit = np.abs(depth - background) > 1e-4
    points = origin + depth[hit, None] * rays[hit]
    assert inside(
        kind, points, np.array(half) + 1e-4, centre, yaw
    ).all()  # every hit, grazing ones too, is on the solid
    entered = inside(kind, points + 1e-3 * rays[hit], half, centre, yaw)
    assert (entered | grazing[hit]).all()  # a ray that only grazes is out again after a millimetre
    assert not inside(kind, points - 1e-3 * rays[hit], half, centre, yaw).any()


def test_sphere_is_the_closed_form():
    """A ball of 1 m ahead: its nearest point lies 2 m away, and every hit is on the sphere to within 0.01 mm."""
    scene = room_with(ELLIPSOID, (1.0, 1.0, 1.0), (0.0, -1.5, 3.0))
    depth = depth_of(scene, camera(), 400.0)
    assert depth.min().item() == pytest.approx(2.0, abs=2e-5)
    origin, rays = world_rays(camera(), 400.0)
    points = origin + depth.double().numpy().ravel()[:, None] * rays
    assert np.abs(np.linalg.norm(points - [0, -1.5, 3.0], axis=1) - 1).max() < 1e-5


def floor_height(waves: np.ndarray, points: np.ndarray) -> np.ndarray:
    phase = waves[:, 1] * points[..., 0, None] + waves[:, 2] * points[..., 2, None] + waves[:, 3]
    return (waves[:, 0] * (1 + np.sin(phase))).sum(-1)


@pytest.mark.parametrize("seed", range(4))
def test_rolling_floor_hits_lie_on_the_floor(seed):
    """Points that the tracer puts on the rolling floor are on it to within 0.1 mm, and none lies below it."""
    generator = torch.Generator().manual_seed(seed)
    scene, pose, fov = sample_scenes(4, 2, generator, terrain_share=1.0)
    assert scene.terrain == 4
    scene = dataclasses.replace(scene, present=torch.zeros_like(scene.present))
    focal = SIZE / 2 / torch.tan(fov / 2)
    depth = trace(scene, pose, focal, SIZE, SIZE, None)[1]
    for b, v in itertools.product(range(4), range(2)):
        origin, rays = world_rays(pose[b : b + 1, v : v + 1], float(focal[b, v]))
        points = origin + depth[b, v].double().numpy().ravel()[:, None] * rays
        above = -points[:, 1] - floor_height(scene.waves[b].double().numpy(), points)
        width, height, length = scene.room[b].tolist()
        walls = np.abs(np.abs(points[:, [0, 2]]) - [width, length]).min(1)
        shell = np.minimum(walls, np.abs(points[:, 1] + height)) < 1e-4
        assert np.abs(above[~shell]).max() < 1e-4
        assert (~shell).sum() > 100
        assert above.min() > -1e-4


def test_colour_is_lambert_on_the_floor(bank):
    """One white light, one plain surface: the floor's radiance is the shading formula."""
    scene = room_with(BOX, present=False)
    pose = camera(tilt=0.6)
    colour, depth = trace(scene, pose, torch.full((1, 1), 40.0), SIZE, SIZE, bank)
    origin, rays = world_rays(pose)
    points = origin + depth[0, 0].double().numpy().ravel()[:, None] * rays
    floor = points[:, 1] > -1e-4
    toward = np.array([0.0, -2.9, 0.0]) - points[floor]
    distance = np.linalg.norm(toward, axis=1)
    expected = 0.5 * (0.3 * 1.25 + 0.5 * (-toward[:, 1] / distance) / (1 + 0.08 * distance**2))
    assert floor.sum() > 500
    got = colour[0, 0].permute(1, 2, 0).reshape(-1, 3).double().numpy()[floor]
    np.testing.assert_allclose(got, np.repeat(expected[:, None], 3, 1), rtol=1e-4)


@pytest.mark.parametrize("kind", [BOX, ELLIPSOID, CYLINDER])
def test_normals_agree_with_the_depth(kind):
    """The normal from neighbouring depths and the shading normal are the same where the surface is smooth."""
    scene = room_with(kind, (0.8, 0.7, 0.8), (0.0, -0.9, 2.6), 0.5)
    pose, size, focal = camera(tilt=0.2), 96, 160.0
    origin, rays = world_rays(pose, focal, size)
    index = torch.zeros(1, dtype=torch.long)
    start, direction = torch.from_numpy(origin)[None].float(), torch.from_numpy(rays)[None].float()
    t, surface = nearest_hit(scene, index, start, direction.unbind(-1))
    points = start[:, None] + t[..., None] * direction
    normals = torch.stack(normal_and_uv(scene, index, points.unbind(-1), surface)[0], -1)
    normals = normals.reshape(size, size, 3).numpy()
    assert np.abs(np.linalg.norm(normals, axis=-1) - 1).max() < 1e-5
    xyz = points.reshape(size, size, 3).double().numpy()
    across, down = xyz[1:-1, 2:] - xyz[1:-1, :-2], xyz[2:, 1:-1] - xyz[:-2, 1:-1]
    geometric = np.cross(down, across)  # y points down, so this order faces the camera
    geometric /= np.linalg.norm(geometric, axis=-1, keepdims=True)
    number = surface.reshape(size, size).numpy()
    parts = [number[1:-1, 2:], number[1:-1, :-2], number[2:, 1:-1], number[:-2, 1:-1]]
    on_object = np.logical_and.reduce([part == 6 for part in parts])
    agreement = (geometric * normals[1:-1, 1:-1]).sum(-1)[on_object]
    assert on_object.sum() > 1000
    assert np.median(agreement) > 0.9999
    assert (agreement > 0.99).mean() > 0.9  # edges of the box and of the cylinder's cap differ


def test_bands_are_the_whole_image(bank):
    whole, parts = [
        render(*sample_scenes(4, 2, g), 64, 64, bank, g, band=band)
        for band, g in ((None, torch.Generator().manual_seed(3)), (24, torch.Generator().manual_seed(3)))
    ]
    assert torch.equal(whole[1], parts[1])
    assert torch.equal(whole[0], parts[0])


def test_a_seed_is_a_scene(bank):
    first, again, other = (training_pairs(3, 32, seed, bank) for seed in (11, 11, 12))
    assert torch.equal(first.images, again.images) and torch.equal(first.own_points, again.own_points)
    assert not torch.equal(first.images, other.images)
    assert first.images.min() >= -1 and first.images.max() <= 1
    assert first.images.std() > 0.1


ITEM = st.tuples(st.sampled_from(sorted(SPLITS)), st.integers(0, LIMIT - 1), st.integers(0, INDICES - 1))


@given(ITEM, ITEM)
def test_seeds_of_different_items_differ(first, second):
    assert (split_seed(*first) == split_seed(*second)) == (first == second)
    assert 0 <= split_seed(*first) < 2**32


@given(ITEM, ITEM)
def test_different_items_draw_different_numbers(first, second):
    """On a CPU too, whose generator drops the high bits of a seed without a word."""
    draws = [torch.rand(4, generator=torch.Generator().manual_seed(split_seed(*item))) for item in (first, second)]
    assert torch.equal(*draws) == (first == second)


@pytest.mark.parametrize("base, index", [(-1, 0), (LIMIT, 0), (0, -1), (0, INDICES)])
def test_seeds_out_of_range(base, index):
    with pytest.raises(ValueError, match="must be from 0 to"):
        split_seed("test", base, index)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_nearer_than_promised(seed):
    scene, pose, fov = sample_scenes(8, 2, torch.Generator().manual_seed(seed))
    position = pose[..., :3, 3]
    assert ((scene.room[:, None, ::2] - position[..., ::2].abs()) >= MARGIN - 1e-5).all()
    focal = 40 / 2 / torch.tan(fov / 2)
    with_objects = trace(scene, pose, focal, 40, 40, None)[1]
    empty = dataclasses.replace(scene, present=torch.zeros_like(scene.present))
    without = trace(empty, pose, focal, 40, 40, None)[1]
    objects = with_objects < without - 1e-4
    rays = pixel_rays(focal.reshape(-1), 40, 40).norm(dim=-1).reshape(with_objects.shape)
    assert objects.any()
    assert (with_objects * rays)[objects].min() >= NEAREST
    assert with_objects.max() < 15
    turn = pose[..., :3, :3]
    assert torch.allclose(turn.transpose(-1, -2) @ turn, torch.eye(3).expand_as(turn), atol=1e-5)
    assert torch.allclose(torch.linalg.det(turn), torch.ones(8, 2), atol=1e-5)


def test_two_views_agree(bank):
    """A point of view 1 moved into view 2 has view 2's depth there, or lies behind something (5 % off at edges)."""
    pairs = training_pairs(6, 96, 4, bank, spread=(4.0, 8.0))
    points, depth2 = pairs.own_points[:, 0], pairs.own_points[:, 1, ..., 2]
    moved = (pairs.one_to_two[:, None, None, :3, :3] * points[..., None, :]).sum(-1) + pairs.one_to_two[
        :, None, None, :3, 3
    ]
    x, y = pairs.own_points[:, 1, ..., 0], pairs.own_points[:, 1, ..., 1]
    focal = ((torch.arange(96) + 0.5 - 48) / (x / depth2))[:, 0, 0]
    assert torch.allclose(y[:, 0, 0], (0.5 - 48) / focal * depth2[:, 0, 0], rtol=1e-4)
    u = moved[..., 0] / moved[..., 2] * focal[:, None, None] + 48
    v = moved[..., 1] / moved[..., 2] * focal[:, None, None] + 48
    seen = (u > 1) & (u < 95) & (v > 1) & (v < 95) & (moved[..., 2] > 0.1)
    cell = (v.long().clamp(0, 95) * 96 + u.long().clamp(0, 95)).flatten(1)
    there = torch.gather(depth2.flatten(1), 1, cell).reshape(u.shape)
    difference = ((moved[..., 2] - there) / there)[seen]
    assert seen.float().mean() > 0.4
    assert (difference < 0.05).float().mean() > 0.75  # the rest is hidden by something nearer
    assert (difference < -0.05).float().mean() < 0.02  # nothing may be seen through
    assert difference.abs().median() < 0.01


def test_recorded_overlap_is_that_of_the_points(bank):
    pairs = training_pairs(8, 64, 9, bank)
    focal = 64 / 2 / ((pairs.own_points[:, 0, 0, -1, 0] / pairs.own_points[:, 0, 0, -1, 2]) * 64 / 63)
    back = covisible_share(
        pairs.own_points[:, 1], invert_rigid(pairs.one_to_two), pairs.own_points[:, 0, ..., 2], focal
    )
    there = covisible_share(pairs.own_points[:, 0], pairs.one_to_two, pairs.own_points[:, 1, ..., 2], focal)
    assert torch.allclose(torch.minimum(back, there), pairs.covisible, atol=0.035)  # the focal length is rounded
    assert torch.equal(pairs.valid.flatten(1).any(1), pairs.covisible > 0.25)


def test_ordered_truth_is_symmetric(bank):
    pairs = training_pairs(3, 32, 5, bank)
    gt1, gt2, valid1, valid2 = pairs.ordered()
    assert torch.equal(gt1, torch.cat([pairs.own_points[:, 0], pairs.own_points[:, 1]]))
    assert torch.equal(valid1, torch.cat([valid2[3:], valid2[:3]]))
    turn, shift = pairs.one_to_two[:, None, None, :3, :3], pairs.one_to_two[:, None, None, :3, 3]
    again = (turn * gt2[:3, ..., None, :]).sum(-1) + shift  # view 2 in camera 1, moved back into camera 2
    assert torch.allclose(again, pairs.own_points[:, 1], atol=1e-4)


def test_bank_is_in_range_and_tiles(bank):
    assert bank.dtype == torch.float32 and bank.min() >= 0 and bank.max() <= 1
    assert (bank.flatten(1).std(1) > 0.05).all()
    for axis in (1, 2):
        steps = (bank - bank.roll(1, axis)).abs()
        seam = steps.select(axis, 0).mean(-1)
        inside_steps = steps.mean(-1 if axis == 1 else -2)[:, 1:]
        # the step over the seam is no larger than the largest step inside
        assert (seam <= inside_steps.amax(1) * 1.5 + 1e-3).all()


@given(st.integers(0, 2**31), st.floats(0, 50))
@settings(max_examples=20, deadline=None)
def test_exposure_stays_in_range(seed, scale):
    radiance = torch.rand(1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * scale - 0.1
    image = expose(radiance, torch.Generator().manual_seed(seed))
    assert image.min() >= 0 and image.max() <= 1
    clean = expose(radiance, torch.Generator().manual_seed(seed), noise=0.0)
    order = radiance.flatten().argsort()
    assert (clean.flatten()[order].diff() >= -1e-6).all()
