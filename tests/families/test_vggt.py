"""VGGT: details that must show in the official answers, configurations, inference from shapes, geometry, pictures."""

import csv
import gzip
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pqk.bench.vectors import run_case
from pqk.errors import PqkError
from pqk.families.build import build_model, empty_model
from pqk.families.vectors import Case
from pqk.families.vggt import geometry
from pqk.families.vggt.network import camera, dpt, layers
from pqk.families.vggt.network.configs import NAMED, infer_config, layers_of, read_config
from pqk.families.vggt.preprocess import PATCH, SIDE, load_square, official_preprocess, official_size, read_images

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ("vggt_conv_s2_56x70", "vggt_dino_s2_56x56_b2_downsample", "vggt_track_s3_56x56")
TINY = Case(GOLDEN / "vggt_conv_s2_56x70").need("config")
FIVE_ROUNDS = {
    **TINY,
    "depth": 5,
    "num_register_tokens": 3,
    "dpt": {"features": 16, "out_channels": [8, 8, 12, 12], "layers": [0, 2, 3, 4]},
}
FOUR_HEADS = {
    **TINY,
    "embed_dim": 32,
    "num_heads": 4,
    "patch_embed": "dino",
    "dino": {"depth": 2, "num_heads": 4},
    "camera": {"trunk_depth": 1, "num_heads": 4},
    "dpt": {"features": 8, "out_channels": [8, 8, 8, 8], "layers": [0, 1, 2, 3]},
}


# ---------------------------------------------------------------- details of the network


def skip_without_relu(patch):
    patch.setattr(dpt.ResidualUnit, "forward", lambda self, x: x + self.conv2(F.relu(self.conv1(F.relu(x)))))


def without_antialiasing(patch):
    plain = F.interpolate
    patch.setattr(F, "interpolate", lambda x, **how: plain(x, **{**how, "antialias": False}))


def corners_not_aligned(patch):
    plain = F.interpolate
    patch.setattr(F, "interpolate", lambda x, **how: plain(x, **{**how, "align_corners": False}))


def without_rotation(patch):
    patch.setattr(layers, "apply_rope", lambda x, rope, head_dim: x)


def without_query_norm(patch):
    plain = layers.Attention._split_heads
    patch.setattr(layers.Attention, "_split_heads", lambda self, x, tokens: 2 * plain(self, x, tokens))


def epsilon(value):
    def change(patch):
        patch.setattr(
            nn.LayerNorm,
            "forward",
            lambda self, x: F.layer_norm(x, self.normalized_shape, self.weight, self.bias, value),
        )

    return change


def tanh_gelu(patch):
    patch.setattr(nn.GELU, "forward", lambda self, x: F.gelu(x, approximate="tanh"))


def activated_pose_goes_back(patch):
    def activate(raw):
        raw[..., 7:].relu_()
        return raw

    patch.setattr(camera, "activate_pose", activate)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("vggt_conv_s2_56x70", skip_without_relu),
        ("vggt_conv_s2_56x70", corners_not_aligned),
        ("vggt_conv_s2_56x70", without_rotation),
        ("vggt_conv_s2_56x70", tanh_gelu),
        ("vggt_conv_s2_56x70", activated_pose_goes_back),
        ("vggt_dino_s2_56x56_b2_downsample", without_antialiasing),
        ("vggt_blocks", without_query_norm),
        ("vggt_blocks", epsilon(1e-6)),
        ("vggt_blocks", epsilon(1e-5)),
    ],
)
def test_a_wrong_detail_shows(name, wrong, monkeypatch):
    wrong(monkeypatch)
    outcome = run_case(GOLDEN / name)
    assert not outcome.failure  # it ran to its end
    assert any(each.name.startswith("out_") and each.error > 10 * each.mark for each in outcome.compared)


@pytest.mark.parametrize("name", MODELS)
def test_every_intermediate_result_is_compared(name):
    assert run_case(GOLDEN / name).not_compared == 0


def test_images_of_a_wrong_shape():
    net = build_model("vggt", TINY)
    for shape, sentence in (
        ((1, 2, 3, 56, 71), "multiples of 14, got 56x71"),
        ((1, 2, 3, 0, 56), "multiples of 14, got 0x56"),
        ((1, 2, 1, 56, 56), r"must be \(B, S, 3, H, W\)"),
        ((3, 56, 56), r"must be \(B, S, 3, H, W\)"),
        ((1, 0, 3, 56, 56), "."),
    ):
        with pytest.raises(PqkError, match=sentence) as caught:
            net(torch.zeros(shape))
        assert "\n" not in str(caught.value)
    with pytest.raises(PqkError, match="no track head; load it with enable_track=True"):
        net(torch.zeros(2, 3, 56, 56), torch.zeros(1, 2))


def test_frames_without_a_batch_are_one_sequence():
    net = build_model("vggt", TINY, generator=torch.Generator().manual_seed(1)).eval()
    images = torch.rand(3, 3, 28, 42)
    with torch.no_grad():
        one, many = net(images), net(torch.stack((images, images.flip(0))))
    for name, value in one.items():
        assert torch.allclose(value[0], many[name][0], atol=1e-6), name


def test_the_order_of_the_other_frames_plays_no_part():
    net = build_model("vggt", FOUR_HEADS, generator=torch.Generator().manual_seed(2)).eval()
    images, order = torch.rand(1, 4, 3, 28, 28), [0, 3, 1, 2]
    with torch.no_grad():
        one, other = net(images), net(images[:, order])
    for name, value in one.items():
        assert torch.allclose(value[:, order], other[name], atol=1e-5), name


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"embed_dimm": 3}, r"unknown key 'embed_dimm'.*did you mean 'embed_dim'"),
        ({"embed_dim": "wide"}, "embed_dim must be a whole number from 1"),
        ({"embed_dim": 10**9}, "embed_dim must be a whole number from 1 to 262144"),
        ({"depth": 0}, "depth must be a whole number from 1"),
        ({"depth": True}, "depth must be a whole number from 1"),
        ({"depth": 5000}, "depth must be at most 1024, got 5000"),
        ({"num_heads": 5}, "not a multiple of num_heads 5"),
        ({"head_dim": 6}, "multiple of 4"),
        ({"img_size": 57}, "img_size 57 is not a multiple of patch_size 14"),
        ({"patch_size": 14.0}, "patch_size must be a whole number"),
        ({"patch_embed": "dinov3"}, "patch_embed must be one of dino, conv"),
        ({"mlp_ratio": math.nan}, "mlp_ratio"),
        ({"init_values": 0}, "init_values must be a number above 0"),
        ({"enable_depth": 1}, "enable_depth must be true or false"),
        ({"enable_track": "yes"}, "enable_track must be true or false"),
        ({"num_register_tokens": -1}, "num_register_tokens must be a whole number from 0"),
        ({"camera": {"depth": 2}}, "unknown key 'depth' in camera"),
        ({"camera": {"trunk_depth": 2, "num_heads": 7}}, "not a multiple of camera.num_heads 7"),
        ({"patch_embed": "dino", "dino": [2]}, "dino of the vggt configuration must be a mapping"),
        ({"dpt": {"layers": [0, 1, 2, 4]}}, "dpt.layers must be four rounds from 0 to 3"),
        ({"dpt": {"features": 12}}, "dpt.features must be a multiple of 8"),
        ({"dpt": {"out_channels": [8, 8, 8]}}, "dpt.out_channels must be four multiples of 4"),
        ({"track": {"hidden_size": 20, "num_heads": 8}}, "track.hidden_size 20 is not a multiple"),
        ({"frame_blocks": [{"heads": 2}]}, r"frame_blocks\[0\]"),
        ({"frame_blocks": [{"heads": 2, "ffn": 8}]}, "must be equally many, got 1 and 4"),
    ],
)
def test_bad_configurations_name_the_key(change, sentence):
    with pytest.raises(PqkError, match=sentence) as caught:
        empty_model("vggt", {**TINY, **change})
    assert "\n" not in str(caught.value)


def test_the_released_model():
    assert layers_of(24) == (4, 11, 17, 23) and layers_of(4) == (0, 1, 2, 3)
    counts = {}
    for tracks in (False, True):
        net = empty_model("vggt", {**NAMED["vggt-1b"], "enable_track": tracks})
        counts[tracks] = sum(weight.numel() for weight in net.parameters())
    assert counts == {False: 1_190_596_120, True: 1_256_537_516}
    for config in NAMED.values():
        empty_model("vggt", config)


def inferred(config):
    """What is read off the shapes of a network of this configuration, and what was put in."""
    found = infer_config(empty_model("vggt", config).state_dict())
    assert found["enable_track"] is False
    return read_config(found), read_config({**config, "enable_track": False})


@pytest.mark.parametrize(
    "config",
    [
        *(Case(GOLDEN / name).need("config") for name in (*MODELS, "vggt_checkpoint")),
        *NAMED.values(),
        FIVE_ROUNDS,
        FOUR_HEADS,
        {**FOUR_HEADS, "enable_camera": False, "enable_point": False},
        {**FOUR_HEADS, "mlp_ratio": 2.5, "num_register_tokens": 0},
    ],
)
def test_the_shapes_tell_the_configuration(config):
    found, wanted = inferred(config)
    found = replace(found, init_values=wanted.init_values)  # of fresh weights only
    if wanted.dino is None:
        found = replace(found, img_size=wanted.img_size)  # of a table that it does not have
    assert found == wanted


def test_where_shapes_leave_a_choice_it_is_that_of_the_released_model():
    other = {**FOUR_HEADS, "camera": {"trunk_depth": 1, "num_heads": 8}, "dino": {"depth": 2, "num_heads": 2}}
    found, wanted = inferred({**other, "dpt": {**other["dpt"], "layers": [0, 0, 1, 2]}})
    assert found != wanted
    assert {block.heads for block in (*found.dino, *found.camera)} == {4}
    assert found.dpt.layers == (0, 1, 2, 3)


def test_its_own_list_of_weights_gives_the_released_configuration():
    with gzip.open(GOLDEN / "vggt_keys" / "vggt_1b_keys.tsv.gz", "rt") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert len(rows) == 1797 and sum(int(row["numel"]) for row in rows) == 1_256_537_516
    shapes = {row["key"]: torch.empty([int(n) for n in row["shape"].split("x")], device="meta") for row in rows}
    found = infer_config(shapes)
    assert read_config(found) == read_config(NAMED["vggt-1b"])
    tracks = {"enable_track": True}
    assert read_config({**found, **tracks}) == read_config({**NAMED["vggt-1b"], **tracks})


# ---------------------------------------------------------------- geometry

lengths = st.floats(-5, 5, allow_nan=False)
parts = st.tuples(*[st.floats(-1, 1, allow_nan=False)] * 4).filter(lambda q: sum(x * x for x in q) > 1e-2)
angles = st.floats(0.05, 3.0)
sides = st.tuples(st.integers(1, 5), st.integers(1, 5)).map(lambda grid: (14 * grid[0], 14 * grid[1]))


def encoding(place, quaternion, vertical, horizontal):
    """A pose encoding (9,) float64 with a unit quaternion whose w is not negative."""
    unit = torch.tensor(quaternion, dtype=torch.float64)
    unit = unit / unit.norm()
    unit = -unit if unit[3] < 0 else unit
    return torch.cat((torch.tensor(place, dtype=torch.float64), unit, torch.tensor([vertical, horizontal])))


@settings(max_examples=60, deadline=None)
@given(place=st.tuples(lengths, lengths, lengths), quaternion=parts, fov=st.tuples(angles, angles), size=sides)
def test_pose_encodings_come_back(place, quaternion, fov, size):
    pose = encoding(place, quaternion, *fov)
    cameras = geometry.pose_encoding_to_extri_intri(pose, size)
    again = geometry.extri_intri_to_pose_encoding(*cameras, size)
    assert torch.allclose(again[[0, 1, 2, 7, 8]], pose[[0, 1, 2, 7, 8]], atol=1e-9)
    assert min((again[3:7] - sign * pose[3:7]).abs().max() for sign in (1, -1)) < 1e-7  # either, where w is 0
    rotation = cameras[0][:, :3]
    assert torch.allclose(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert torch.linalg.det(rotation) > 0
    scaled = torch.cat((pose[:3], 3.7 * pose[3:7], pose[7:]))
    assert torch.allclose(geometry.pose_encoding_to_extri_intri(scaled, size)[0], cameras[0], atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    axis=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda a: sum(x * x for x in a) > 1e-2),
    short=st.floats(-1e-3, 1e-3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_turns_of_nearly_half_a_circle_come_back(axis, short, dtype):
    direction = torch.tensor(axis, dtype=torch.float64)
    direction = direction / direction.norm()
    half = (math.pi - short) / 2
    quaternion = torch.cat((direction * math.sin(half), torch.tensor([math.cos(half)], dtype=torch.float64))).to(dtype)
    rotation = geometry.quaternion_to_matrix(quaternion)
    found = geometry.matrix_to_quaternion(rotation)
    assert found[3] >= 0 and abs(float(found.norm()) - 1) < 1e-5
    assert torch.allclose(geometry.quaternion_to_matrix(found), rotation, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(
    quaternion=parts, place=st.tuples(lengths, lengths, lengths), fov=st.tuples(angles, angles), seed=st.integers(0, 99)
)
def test_what_is_unprojected_projects_to_its_pixel(quaternion, place, fov, seed):
    size = (28, 42)
    extrinsics, intrinsics = geometry.pose_encoding_to_extri_intri(encoding(place, quaternion, *fov), size)
    depth = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    points = geometry.unproject_depth(depth, extrinsics, intrinsics)
    seen = points @ extrinsics[:, :3].T + extrinsics[:, 3]
    assert torch.allclose(seen[..., 2], depth, atol=1e-9)
    pixels = (seen @ intrinsics.T)[..., :2] / seen[..., 2:]
    v, u = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    assert torch.allclose(pixels, torch.stack((u, v), dim=-1), atol=1e-6)
    with_channel = geometry.unproject_depth(depth[..., None].numpy(), extrinsics.numpy(), intrinsics.numpy())
    assert np.array_equal(with_channel, points.numpy())


@given(st.tuples(st.floats(0, 3), st.floats(0, 3)))
def test_a_field_of_view_of_zero_stays_finite(fov):
    for values in (fov, (0.0, fov[1]), (0.0, 0.0)):
        pose = torch.tensor([0, 0, 0, 0, 0, 0, 1, *values])
        extrinsics, intrinsics = geometry.pose_encoding_to_extri_intri(pose, (56, 70))
        again = geometry.extri_intri_to_pose_encoding(extrinsics, intrinsics, (56, 70))
        assert intrinsics.isfinite().all() and (intrinsics[[0, 1], [0, 1]] > 0).all() and again.isfinite().all()
        points = geometry.unproject_depth(torch.ones(56, 70), extrinsics, intrinsics)
        assert points.isfinite().all()


# ---------------------------------------------------------------- pictures


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), mode=st.sampled_from(["crop", "pad"]))
def test_sizes_are_multiples_of_the_patch(width, height, mode):
    try:
        found = official_size(width, height, mode)
    except PqkError as error:
        assert re.search("leaves no 14-pixel patch|would be enlarged to 518x", str(error))
        assert max(width, height) > 70 * min(width, height)
        return
    assert all(side % PATCH == 0 and PATCH <= side <= SIDE for side in found)
    assert found == (SIDE, SIDE) or (mode == "crop" and found[0] == SIDE)


def test_ties_go_to_the_even_multiple():
    assert official_size(74, 5) == (518, 28)  # 2.5 patches
    assert official_size(74, 7) == (518, 56)  # 3.5 patches


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ((74, 1), "an image of 74x1 pixels leaves no 14-pixel patch"),
        ((1, 100, "pad"), "an image of 1x100 pixels leaves no 14-pixel patch"),
        ((1, 10**6), "would be enlarged to 518x518000000 pixels; at most 178956970 are made"),
        ((0, 5), "the width of an image must be a whole number of pixels above 0, got 0"),
        ((5, 2.5), "the height of an image must be a whole number of pixels above 0, got 2.5"),
        ((5, 5, "crob"), r"not 'crob' \(did you mean 'crop'\?\)"),
    ],
)
def test_impossible_sizes(query, sentence):
    with pytest.raises(PqkError, match=sentence):
        official_size(*query)


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_the_middle_of_a_tall_image_stays():
    image = noise(1077, SIDE)  # 1078 rows after rounding: nearly unchanged
    found = official_preprocess([image])
    whole = np.asarray(Image.fromarray(image).resize((SIDE, 1078), Image.Resampling.BICUBIC))
    assert found.shape == (1, 3, SIDE, SIDE) and found.dtype == np.float32
    assert np.array_equal(found[0], whole[280 : 280 + SIDE].transpose(2, 0, 1).astype(np.float32) / np.float32(255))


def test_images_of_different_sizes_are_padded_with_white():
    flat, tall = noise(140, SIDE), noise(280, SIDE, seed=1)
    found = official_preprocess([flat, tall])
    assert found.shape == (2, 3, 280, SIDE)
    alone = official_preprocess([flat])[0]
    assert np.array_equal(found[0, :, 70:210], alone)
    assert (found[0, :, :70] == 1).all() and (found[0, :, 210:] == 1).all()
    assert np.array_equal(found[1], official_preprocess([tall])[0])


@pytest.mark.parametrize(("shape", "inside"), [((140, 518), np.s_[:, 189:329, :]), ((518, 140), np.s_[:, :, 189:329])])
def test_padding_to_the_square_is_white(shape, inside):
    image = noise(*shape)
    (found,) = official_preprocess([image], "pad")
    assert found.shape == (3, SIDE, SIDE)
    assert np.array_equal(found[inside], image.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
    outside = np.ones_like(found, dtype=bool)
    outside[inside] = False
    assert (found[outside] == 1).all()


def test_transparent_pixels_are_white_and_grey_ones_are_grey():
    image = noise(SIDE, SIDE, 4)
    image[..., 3] = 0
    assert (official_preprocess([image]) == 1).all()
    image[..., 3] = 255
    assert np.array_equal(official_preprocess([image]), official_preprocess([image[..., :3]]))
    grey = noise(SIDE, SIDE, 1)
    assert np.array_equal(official_preprocess([grey[..., 0]]), official_preprocess([grey.repeat(3, axis=-1)]))


def test_the_square_loader():
    tensors, places = load_square([np.full((31, 60, 3), 200, np.uint8), np.full((60, 60), 90, np.uint8)], 120)
    assert tensors.shape == (2, 3, 120, 120) and tensors.dtype == places.dtype == np.float32
    assert places.tolist() == [[0, 28, 120, 90, 60, 31], [0, 0, 120, 120, 60, 60]]  # 14 rows above, 15 below
    assert (tensors[0, :, :20] == 0).all() and (tensors[0, :, 100:] == 0).all()
    assert np.allclose(tensors[0, :, 40:80], 200 / 255) and np.allclose(tensors[1], 90 / 255)
    with pytest.raises(PqkError, match="the side of the square must be a whole number of pixels above 0, got 0"):
        load_square([noise(3, 3)], 0)
    with pytest.raises(PqkError, match="at most 178956970 are made"):
        load_square([noise(3, 3)], 10**5)
    with pytest.raises(PqkError, match="at most 178956970 are made"):
        load_square([noise(1, 20000)])


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((4, 4, 3)), r"got float64 \(4, 4, 3\)"),
        (np.zeros((4, 4, 2), np.uint8), r"got uint8 \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got uint8 \(0, 4, 3\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got uint8 \(1, 4, 4, 3\)"),
        ("a.png", "got str"),
    ],
)
def test_what_is_no_image(image, sentence):
    for prepare in (official_preprocess, load_square):
        with pytest.raises(PqkError, match=sentence):
            prepare([noise(30, 30), image])
        with pytest.raises(PqkError, match="there are no images"):
            prepare([])


def test_pictures_in_files(tmp_path):
    image = noise(20, 30, 4)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image[..., 0]).save(tmp_path / "b.png")
    clear, grey = read_images([tmp_path / "a.png", str(tmp_path / "b.png")])
    assert np.array_equal(official_preprocess([clear]), official_preprocess([image]))
    assert clear.shape == (20, 30, 3) and np.array_equal(grey, image[..., :1].repeat(3, axis=-1))
    (tmp_path / "c.png").write_text("no picture")
    for name, sentence in (("c.png", "c.png: not an image"), ("absent.png", "absent.png: the image does not exist")):
        with pytest.raises(PqkError, match=sentence):
            read_images([tmp_path / name])
