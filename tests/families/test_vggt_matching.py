"""Attention between frames is taught where the other frame shows the same place."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pqk.compress.train.teacher import train_teacher
from pqk.data.render.stream import training_sets
from pqk.data.render.synthetic import texture_bank
from pqk.errors import PqkError
from pqk.families.registry import family
from pqk.families.vggt.batches import Rendered, _known
from pqk.families.vggt.geometry import extri_intri_to_pose_encoding
from pqk.families.vggt.losses import Truth
from pqk.families.vggt.matching import Attended, match_loss, said_loss, same_places
from pqk.models import build_model
from pqk.settings.training import TrainSpec, load_training

SIZES = {
    "img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2, "head_dim": 16, "init_values": 0.3,
    "dino": {"depth": 1, "num_heads": 2}, "camera": {"trunk_depth": 1, "num_heads": 2, "head_dim": 16},
    "dpt": {"features": 16, "out_channels": [8, 8, 16, 16]},
}  # fmt: skip
learning = family("vggt").learning_part()


def wall(shift: tuple[float, float], side: int = 56, far: float = 2.0) -> Truth:
    """Two frames before one wall; the second camera stands `shift` patches to the right and below."""
    focal = float(side)
    rows, columns = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    local = torch.stack(((columns - side / 2) / focal, (rows - side / 2) / focal, torch.ones(side, side)), -1) * far
    step = torch.tensor([*(14 * value * far / focal for value in shift), 0.0])
    points = torch.stack((local, local + step))[None]
    extrinsics = torch.eye(4)[:3].repeat(1, 2, 1, 1)
    extrinsics[0, 1, :, 3] = -step
    intrinsics = torch.tensor([[focal, 0, side / 2], [0, focal, side / 2], [0, 0, 1]]).expand(1, 2, 3, 3)
    pose = extri_intri_to_pose_encoding(extrinsics, intrinsics, (side, side))
    depth = torch.full((1, 2, side, side), far)
    return Truth(depth, points, torch.ones(1, 2, side, side, dtype=torch.bool), pose)


MIDDLE = 0.5 / 14
"""Of the pixel whose point counts for a patch, from the patch's centre, in patches."""


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (-2, 1), (0, 3), (0.5, -1.25)])
def test_before_a_wall_places_move_with_the_camera(shift: tuple[float, float]) -> None:
    place, seen = same_places(wall(shift))
    assert place.shape == (1, 2, 2, 16, 2) and seen.shape == (1, 2, 2, 16)
    assert not seen[0, 0, 0].any() and not seen[0, 1, 1].any()  # a frame does not see itself
    for patch in range(16):
        for one, sign in ((0, -1), (1, 1)):  # what is seen from farther right lies farther left
            row, column = patch // 4 + sign * shift[1], patch % 4 + sign * shift[0]
            assert bool(seen[0, one, 1 - one, patch]) == (-0.5 <= row < 3.5 and -0.5 <= column < 3.5)
            assert place[0, one, 1 - one, patch].tolist() == pytest.approx([row + MIDDLE, column + MIDDLE], abs=1e-3)


def test_what_is_hidden_or_unknown_is_not_seen() -> None:
    truth = wall((1, 0))
    nearer = truth.depth.clone()
    nearer[0, 1, :, :28] *= 0.9  # something stands before the left half of the second frame
    hidden = same_places(Truth(nearer, truth.points, truth.valid, truth.pose))[1]
    unknown = truth.valid.clone()
    unknown[0, 0, :14] = False
    blind = same_places(Truth(truth.depth, truth.points, unknown, truth.pose))[1]
    plain = same_places(truth)[1]
    assert plain[0, 0, 1].sum() == 12 and hidden[0, 0, 1].sum() == 4 and torch.equal(hidden[0, 1, 0], plain[0, 1, 0])
    assert blind[0, 0, 1].sum() == 9 and not blind[0, 0, 1, :4].any() and torch.equal(blind[0, 1, 0], plain[0, 1, 0])


def test_rendered_frames_show_the_same_colour_at_the_same_place() -> None:
    """With the renderer's own cameras: matched patches look more alike than those at the same place of the image."""
    batch = training_sets(6, 2, 112, 3, texture_bank(), spread=(15.0, 26.0))
    found = _known(batch)
    place, seen = same_places(found.known())
    row, column = place.round().long().clamp(0, 7).unbind(-1)
    where = 8 * row + column
    colours = functional.avg_pool2d(found.images.flatten(0, 1), 14).flatten(2).transpose(1, 2).unflatten(0, (6, 2))
    apart: list[Tensor] = []
    for one in (0, 1):
        at = where[:, one, 1 - one, :, None].expand(-1, -1, 3)
        other = colours[:, 1 - one].gather(1, at)
        mask = seen[:, one, 1 - one]
        apart.append(torch.stack(((colours[:, one] - other)[mask].abs().mean(),
                                  (colours[:, one] - colours[:, 1 - one])[mask].abs().mean())))  # fmt: skip
    matched, unmatched = torch.stack(apart).mean(0)
    assert seen[:, 0, 1].float().mean() > 0.3 and matched < 0.7 * unmatched


def places_of(truth: Truth) -> Tensor:
    """What an attention puts out that says the place in the other frame first: (1, 2, 16, 5)."""
    place, _ = same_places(truth)
    other = torch.stack((place[:, 0, 1], place[:, 1, 0]), dim=1)
    return torch.cat((2 * (other + 0.5) - 4, torch.full((1, 2, 16, 3), 7.0)), dim=-1)


def test_the_loss_is_that_of_the_attention_to_the_right_patch() -> None:
    """The wall moves by half a patch to the side: two patches share the attention that is right."""
    truth = wall((0.5 - MIDDLE, -MIDDLE))  # so that places lie between two centres, and on a row of them
    place, seen = same_places(truth)
    said = places_of(truth)
    paid = torch.full((1, 2, 2, 16, 2, 16), -9.0)
    for patch in range(16):
        if seen[0, 0, 1, patch]:
            row, column = place[0, 0, 1, patch].tolist()
            assert row == pytest.approx(round(row), abs=0.08)
            paid[0, :, 0, patch, 1, [4 * round(row) + math.floor(column), 4 * round(row) + math.ceil(column)]] = -1
    truth.valid[0, 1] = False  # the first frame alone asks
    assert seen[0, 0, 1].all()
    assert 1 <= float(match_loss(Attended(paid, said), truth)) < 2  # the leftmost lie beyond the first centre
    assert float(match_loss(Attended(paid.roll(2, -1), said), truth)) > 5
    paid.requires_grad_()
    match_loss(Attended(paid, said), truth).backward()
    assert paid.grad is not None and not paid.grad[0, :, 1].any() and not paid.grad[0, :, 0, :, 0].any()
    assert float(paid.grad.sum()) == pytest.approx(-1, abs=1e-4)  # weights that sum up to one, on the mean of all


def test_the_attention_must_say_where_it_looks() -> None:
    truth = wall((1, 0))
    place, seen = same_places(truth)
    said = places_of(truth).requires_grad_()
    assert float(said_loss(said.detach(), place, seen, (4, 4))) == pytest.approx(0, abs=1e-6)
    moved = said + 0.1
    moved_loss = said_loss(moved, place, seen, (4, 4))
    assert float(moved_loss.detach()) == pytest.approx(0.1)
    moved_loss.backward()
    assert said.grad is not None and not said.grad[..., 2:].any()
    assert int((said.grad[..., 0] != 0).sum()) == int(seen.sum())  # what is seen nowhere has nothing to say


def test_attention_learns_the_match_of_fixed_frames() -> None:
    """The aggregator's middle global block; the loss on cameras and maps plays no part."""
    torch.manual_seed(0)
    model = build_model("vggt", SIZES)
    parts = learning.parts(model)
    batch = _known(training_sets(2, 3, 56, 1, texture_bank()))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        out = learning.forward(parts, batch, "match")
        loss = learning.losses(out, batch, None, ("match",), {"alpha": 0.2})["match"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    paid = out["features"]["match"].paid
    assert paid.shape == (2, 2, 3, 16, 3, 16) and bool((paid.detach().exp().sum((-2, -1)) < 1).all())
    assert losses[0] > 3 and losses[-1] < losses[0] - 1 and losses[-1] > math.log(2)
    taught, behind = (model.aggregator.global_blocks[number].attn for number in (1, 2))
    assert not taught._forward_pre_hooks and taught.qkv.weight.grad.any() and behind.qkv.weight.grad is None


def test_maps_of_some_sets_are_those_of_all() -> None:
    model = build_model("vggt", SIZES).eval()
    asked = TrainSpec.model_validate(
        {"model": "vggt-tiny", "steps": 1, "stages": [{"size": 56, "batch": 4, "until": 1}], "match": {"maps": 0.5}}
    )
    batch = Rendered(asked, torch.device("cpu"), 0, 0).train(0, 4, 56)
    assert batch.mapped == 2 and len(batch.images) == 4
    with torch.no_grad():
        some = learning.forward(learning.parts(model), batch)
        batch.mapped = None
        every = learning.forward(learning.parts(model), batch)
    assert some["pose_enc"].shape[0] == 4 and torch.equal(some["pose_enc"], every["pose_enc"])
    for name in ("depth", "depth_conf", "world_points", "world_points_conf"):
        assert len(some[name]) == 2
        torch.testing.assert_close(some[name], every[name][:2])
    options = {"alpha": 0.2}
    assert bool(torch.isfinite(learning.losses(some, batch, None, ("task",), options)["task"]))


def test_the_gradient_of_the_cameras_can_be_larger_in_what_is_shared() -> None:
    model = build_model("vggt", SIZES)
    parts = learning.parts(model)
    batch = _known(training_sets(1, 2, 56, 1, texture_bank()))
    found = []
    for gain in (1.0, 30.0):
        batch.gain = gain
        out = learning.forward(parts, batch)
        weights = model.aggregator.frame_blocks[0].mlp.fc1.weight, model.camera_head.pose_branch.fc1.weight
        shared, own = torch.autograd.grad(out["pose_enc"].square().sum(), weights)
        found.append((out["pose_enc"].detach(), shared, own))
    for plain, larger, factor in zip(*found, (1, 30, 1), strict=True):
        assert plain.any()
        torch.testing.assert_close(larger, factor * plain)


def test_a_family_without_the_loss_refuses_it(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    stage = "[{size: 64, batch: 1, until: 1.0}]"
    file.write_text(f'version: "1"\nmodel: dust3r-tiny\nsteps: 1\nstages: {stage}\nmatch: {{weight: 1}}\n')
    with pytest.raises(PqkError, match="dust3r-tiny has no loss 'match'; leave match out"):
        train_teacher(load_training(file), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    file.write_text(file.read_text().replace("{weight: 1}", "{maps: 0}"))
    with pytest.raises(PqkError, match=r"match\.maps"):
        load_training(file)
