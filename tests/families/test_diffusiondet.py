"""DiffusionDet: its configurations, files, boxes, pooling, and what a family without recipes refuses."""

import csv
import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusiondet_toys import TINY, WHOLE, made, sentence_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from pqk.bench.vectors import run_case
from pqk.families.build import build_model, empty_model
from pqk.families.checkpoint import load_model, save_model
from pqk.families.detection import inputs
from pqk.families.diffusiondet import preprocess
from pqk.families.diffusiondet.checkpoint import averaged, read_backbone
from pqk.families.diffusiondet.network import backbone, head, roialign
from pqk.families.diffusiondet.network import boxes as coding
from pqk.families.diffusiondet.network.configs import NAMED, read_config
from pqk.families.diffusiondet.network.roialign import box_levels, pool, pyramid
from pqk.families.diffusiondet.sampling import sampler, schedule
from pqk.families.diffusiondet.training import losses, matcher, targets
from pqk.families.identify import family_of
from pqk.families.official import read_pickle
from pqk.families.registry import BUILT_IN, family, names
from pqk.recipe.experiment import experiment_family

GOLDEN = Path(__file__).parents[1] / "golden"
seeds = st.integers(0, 2**31)


# ---------------------------------------------------------------- details that must show in the official answers


def other_values(module, **values):
    return lambda patch: [patch.setattr(module, name, value) for name, value in values.items()]


def other_epsilon(patch):
    patch.setattr(
        nn.LayerNorm, "forward", lambda self, x: F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-6)
    )


def without_aligning(patch):
    plain = roialign._taps
    patch.setattr(roialign, "_taps", lambda start, stop, size: plain(start + 0.5, stop + 0.5, size))


def tanh_gelu(patch):
    patch.setattr(nn.GELU, "forward", lambda self, x: F.gelu(x, approximate="tanh"))


def cosine_before_sine(patch):
    plain = head.time_waves
    patch.setattr(head, "time_waves", lambda t, dim: plain(t, dim).roll(dim // 2, dims=-1))


def without_renewal(patch):
    patch.setattr(sampler.Step, "keep", property(lambda step: torch.ones(len(step.logits), dtype=torch.bool)))


def limited_noise(patch):
    plain = schedule.noise_in
    patch.setattr(schedule, "noise_in", lambda x, x0, t: plain(x.clamp(-2, 2), x0, t))


def stride_in_the_first_convolution(patch):
    plain = backbone.Bottleneck.forward

    def changed(self, x):
        self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride
        return plain(self, x)

    patch.setattr(backbone.Bottleneck, "forward", changed)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("model_4step", other_epsilon),
        ("model_4step", without_aligning),
        ("model_4step", other_values(roialign, CANONICAL_LEVEL=5)),
        ("model_4step", other_values(coding, DELTA_WEIGHTS=(10.0, 10.0, 5.0, 5.0))),
        ("model_4step", other_values(inputs, MEAN=(103.53, 116.28, 123.675))),
        ("model_4step", tanh_gelu),
        ("model_4step", cosine_before_sine),
        ("model_4step", without_renewal),
        ("model_4step", limited_noise),
        ("model_4step", stride_in_the_first_convolution),
        ("matcher", other_values(matcher, RADIUS=1.0)),
        ("train_step", other_values(losses, BOX_WEIGHT=2.0)),
        ("train_step", other_values(targets, SPREAD=1 / 3)),
        ("matcher", other_values(matcher, OUTSIDE=0.0)),
    ],
)
def test_a_wrong_detail_shows(case, change, monkeypatch):
    change(monkeypatch)
    assert run_case(GOLDEN / f"diffusiondet_{case}").state == "fails"


# ---------------------------------------------------------------- the network


def test_the_released_model_has_the_official_weights():
    model = empty_model("diffusiondet", NAMED["diffusiondet-r50"])
    with gzip.open(GOLDEN / "diffusiondet_keys" / "diffusiondet_keys.tsv.gz", "rt") as stream:
        rows = {row["key"]: row["shape"] for row in csv.DictReader(stream, delimiter="\t")}
    assert {key: "x".join(map(str, value.shape)) for key, value in model.state_dict().items()} == rows
    assert len(rows) == 549 and sum(p.numel() for p in model.parameters()) == 110_673_336
    assert all(parameter.is_meta for parameter in model.parameters())


def test_every_named_configuration_is_valid():
    for name, config in NAMED.items():
        assert empty_model("diffusiondet", config).config == config
        assert family_of(f"random:{name}") == "diffusiondet"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_head": 3}, "unknown key 'num_head' in the diffusiondet configuration (did you mean 'num_heads'?)"),
        ({"num_heads": 0}, "num_heads must be a whole number from 1"),
        ({"nheads": 5}, "hidden_dim 16 is not a multiple of nheads 5"),
        ({"hidden_dim": 15, "nheads": 5}, "hidden_dim must be even and at least 4, got 15"),
        ({"hidden_dim": 20, "geo_feat": True}, "hidden_dim must be a multiple of 8 with geo_feat"),
        ({"blocks": [3, 4, 6]}, "blocks must be 4 whole numbers from 1"),
        ({"snr_scale": 0}, "snr_scale must be a number above 0"),
        ({"sample_step": 1001}, "sample_step must be at most 1000"),
        ({"label_diffusion": "d3pm_mask"}, "label_diffusion needs a label_state"),
        ({"label_state": "dists"}, "label_state must be one of sample, dist, got 'dists' (did you mean 'dist'?)"),
        ({"quality_score_reweight": True}, "need quality_head"),
        ({"geo_bias": 1}, "geo_bias must be true or false, got 1"),
        ({"noise_std": [1, 1, 0, 1]}, "noise_std must be four numbers above 0"),
        ({"cls_loss_type": ["qfl"]}, "cls_loss_type must be one of focal, qfl"),
    ],
)
def test_a_wrong_configuration_names_the_key(change, sentence):
    assert sentence in sentence_of(read_config, {**TINY, **change})


def test_extensions_begin_without_a_change():
    """A network with all of them gives what the plain one gives, from the same weights."""
    torch.manual_seed(0)
    plain, extended = made(), made(WHOLE)
    extended.load_state_dict(plain.state_dict(), strict=False)
    image, start = torch.rand(1, 3, 64, 96), torch.rand(1, 12, 4) * 30
    start[..., 2:] += start[..., :2]
    with torch.no_grad():
        logits, refined = plain(image, start, 700)
        ours = extended(image, start, 700, whwh=torch.tensor([[96.0, 64, 96, 64]]))
    assert len(ours) == 3
    for got, want in zip(ours, (logits, refined), strict=False):
        torch.testing.assert_close(
            got, want, rtol=1e-2, atol=1e-2 * float(want.abs().max())
        )  # a relation begins near 0
    mlp = made({**WHOLE, "geo_bias_type": "mlp"})
    mlp.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        ours = mlp(image, start, 700, whwh=torch.tensor([[96.0, 64, 96, 64]]))
    torch.testing.assert_close(ours[0], logits)
    torch.testing.assert_close(ours[1], refined)
    torch.testing.assert_close(ours[2], torch.zeros(2, 1, 12))


def test_weights_that_are_not_trained():
    model = made()
    still = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert still == {
        n for n, _ in model.named_parameters() if n.startswith(("backbone.bottom_up.stem", "backbone.bottom_up.res2"))
    }
    loaded = build_model("diffusiondet", TINY, model.state_dict())
    assert {name for name, weight in loaded.named_parameters() if not weight.requires_grad} == still


def test_boxes_attend_to_their_neighbours_or_to_none():
    image, start = torch.rand(1, 3, 64, 64), torch.rand(1, 12, 4) * 30
    start[..., 2:] += start[..., :2]
    networks = [
        made({**TINY, **more})
        for more in ({}, {"geo_bias_topk": 12}, {"geo_bias_topk": 2}, {"disable_self_attn": True})
    ]
    with torch.no_grad():
        full, all_of_them, two, none = (net(image, start, 5)[0] for net in networks)
    assert torch.equal(full, all_of_them)
    assert not torch.allclose(full, two) and not torch.allclose(full, none) and not torch.allclose(two, none)


def test_boxes_stay_in_float32_under_autocast():
    for config in (TINY, WHOLE):
        model, whwh = made(config), torch.tensor([[96.0, 64, 96, 64]])
        image, start = torch.rand(1, 3, 64, 96), torch.rand(1, 12, 4) * 30
        start[..., 2:] += start[..., :2]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits, refined, *_ = model(image, start, 700, whwh=whwh)
        assert refined.dtype == torch.float32 and logits.isfinite().all()
        with torch.no_grad():
            plain = model(image, start, 700, whwh=whwh)[1]
        assert (refined - plain).abs().max() < 0.1 * plain.abs().max()
    assert "needs the sizes of the images" in sentence_of(model, image, start, 700)


# ---------------------------------------------------------------- files


def test_a_saved_model_comes_back(tmp_path):
    for number, config in enumerate((TINY, WHOLE)):
        model = made(config)
        folder = save_model(model, tmp_path / str(number))
        again = load_model(folder)
        assert family_of(folder) == again.family == "diffusiondet" and again.config == {**config, "norm": "frozen"}
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
        )


def test_the_schedule_stays_exact_in_half_precision(tmp_path):
    again = load_model(save_model(made(), tmp_path / "half", dtype="float16"))
    state = again.state_dict()
    for name, values in schedule.tables().items():
        assert state[name].dtype == torch.float64 and np.array_equal(state[name].numpy(), values)


def official_files(folder):
    """A published file, a training file with an average of other weights, and the two networks."""
    plain, average = made(seed=1), made(seed=2)
    torch.save({"model": plain.state_dict()}, folder / "model_only.pth")
    trainer = {"iteration": 7, "hooks": {}, "_trainer": {"optimizer": {"state": {0: {"step": torch.tensor(7.0)}}}}}
    training = {"model": plain.state_dict(), "ema_state": average.state_dict(), "trainer": trainer, "iteration": 7}
    torch.save(training, folder / "model_final.pth")
    return plain, average


def test_official_files(tmp_path):
    plain, average = official_files(tmp_path)
    bare = {key: value for key, value in plain.state_dict().items() if key not in schedule.NAMES}
    torch.save(bare, tmp_path / "bare.pth")  # without the tables of the schedule
    save_file(bare, tmp_path / "bare.safetensors")
    for name in ("model_only.pth", "model_final.pth", "bare.pth", "bare.safetensors"):
        model = load_model(tmp_path / name, nheads=4, num_proposals=12)
        assert family_of(tmp_path / name) == model.family == "diffusiondet" and not model.training
        assert model.config == {**TINY, "norm": "frozen"} | {"num_cls": 1, "num_reg": 3}
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())
    config, weights = averaged(read_pickle(tmp_path / "model_final.pth"))
    model = build_model("diffusiondet", {**config, "nheads": 4}, weights)
    assert torch.equal(model.head.time_mlp[1].weight, average.head.time_mlp[1].weight)
    assert "it holds no moving average" in sentence_of(averaged, read_pickle(tmp_path / "model_only.pth"))


def test_extensions_are_told_by_their_weights(tmp_path):
    torch.save({"model": made(WHOLE).state_dict()}, tmp_path / "a.pth")
    config = load_model(tmp_path / "a.pth").config
    assert config["quality_head"] and config["geo_feat"] and config["geo_bias"] and config["label_state"] == "sample"
    assert config["nheads"] == 4 and config["geo_bias_type"] == "relation"  # the bias has a column for each head


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"head.head_series.0.norm1.weight": None},
            "it is no complete DiffusionDet checkpoint: it lacks head.head_series.0",
        ),
        ({"head.head_series.1.norm1.weight": None}, "does not fit this model: it lacks 1 key"),
        ({"head.head_series.0.norm1.weight": torch.zeros(())}, "its weights have impossible shapes"),
        ({"betas": torch.zeros(500)}, "its noise schedule is not the cosine one of 1000 times: betas differs"),
        ({"alphas_cumprod": torch.linspace(1, 0, 1000)}, "alphas_cumprod differs"),
        ({"head.time_mlp.1.bias": "text"}, "'head.time_mlp.1.bias' is no tensor"),
        ({"head.time_mlp.1.bias": torch.full((64,), torch.nan)}, "values of head.time_mlp.1.bias are NaN"),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, change, sentence):
    state = {**made().state_dict(), **change}
    path = tmp_path / "a.pth"
    torch.save({"model": {key: value for key, value in state.items() if value is not None}}, path)
    said = sentence_of(lambda: load_model(path, nheads=4))
    assert sentence in said and str(path) in said


def test_files_that_are_not_to_be_trusted(tmp_path):
    official_files(tmp_path)
    whole = (tmp_path / "model_only.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:-500])
    assert "is damaged or no PyTorch file" in sentence_of(load_model, tmp_path / "cut.pth")
    torch.save({"model": made().state_dict(), "code": Path}, tmp_path / "code.pth")
    assert "is not safe to read" in sentence_of(load_model, tmp_path / "code.pth")


def backbone_file(path, protocol=2, **extra):
    state = made().state_dict()
    start = "backbone.bottom_up."
    arrays = {key.removeprefix(start): value.numpy() for key, value in state.items() if key.startswith(start)}
    content = {
        "model": {**arrays, "stem.fc.weight": np.zeros((3, 3), np.float32), **extra},
        "__author__": "torchvision",
    }
    path.write_bytes(pickle.dumps({**content, "matching_heuristics": True}, protocol=protocol))
    return state


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_backbone_to_start_from(tmp_path, protocol):
    path = tmp_path / "R-50.pkl"
    state = backbone_file(path, protocol)
    found = read_backbone(path)
    assert set(found) == {key for key in state if key.startswith("backbone.bottom_up.")}
    assert all(torch.equal(value, state[key]) for key, value in found.items())


def test_a_backbone_file_that_is_none(tmp_path):
    path = tmp_path / "a.pkl"
    backbone_file(path, extra=len)  # not print: Ray puts its own in that one's place
    assert "is not safe to read: it holds the type __builtin__.len, not only arrays" in sentence_of(read_backbone, path)
    backbone_file(path, extra=np.array([{}], dtype=object))
    assert "'extra' is no array of floating-point numbers" in sentence_of(read_backbone, path)
    path.write_bytes(path.read_bytes()[:100])
    assert "is damaged or no file of a backbone" in sentence_of(read_backbone, path)
    path.write_bytes(pickle.dumps({"model": {}}))
    assert "it has no 'model' with stem.conv1.weight" in sentence_of(read_backbone, path)
    assert str(tmp_path / "absent") in sentence_of(read_backbone, tmp_path / "absent")


# ---------------------------------------------------------------- recipes


def test_it_is_offered_to_recipes(tmp_path):
    folder = save_model(made(), tmp_path / "net")
    assert "diffusiondet" in BUILT_IN and "diffusiondet" in names()
    assert experiment_family(str(folder), Path.cwd()).name == "diffusiondet"
    for name in BUILT_IN:
        family(name).check_runs()


# ---------------------------------------------------------------- boxes


def corners_of(seed, count):
    """Random corners, of which some are equal and some empty, in a square of 300."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 7, (count, 4), generator=generator) * (150 / 7) * torch.rand(1, generator=generator)
    rows[::2] += torch.rand(len(rows[::2]), 4, generator=generator)
    rows[1::3, 2] = 0
    return torch.cat((rows[:, :2], rows[:, :2] + rows[:, 2:]), dim=1).double()


@settings(max_examples=15)
@given(seeds)
def test_overlaps_are_in_their_range(seed):
    one, other = corners_of(seed, 12)[:, None], corners_of(seed + 1, 9)[None]
    iou, union = coding.iou_and_union(one, other)
    found = coding.giou(one, other)
    assert ((iou >= 0) & (iou <= 1 + 1e-12)).all() and (union >= 0).all()
    assert (found <= iou + 1e-12).all() and (found >= -1 - 1e-12).all()
    assert torch.equal(iou, coding.iou_and_union(other, one)[0])
    itself = coding.iou_and_union(one, one)[0]
    assert torch.equal(itself, (coding.areas(one) > 0).double())


def test_overlaps_of_known_boxes():
    square = torch.tensor([0.0, 0, 2, 2])
    for other, iou, giou in (
        ([0.0, 0, 2, 2], 1, 1),
        ([1.0, 0, 3, 2], 1 / 3, 1 / 3),
        ([3.0, 0, 4, 2], 0, -2 / 8),
        ([1.0, 1, 1, 1], 0, 0),
    ):
        assert float(coding.iou_and_union(square, torch.tensor(other))[0]) == pytest.approx(iou)
        assert float(coding.giou(square, torch.tensor(other))) == pytest.approx(giou)
    point = torch.ones(4)
    assert float(coding.iou_and_union(point, point)[0]) == 0 and float(coding.giou(point, point)) == 0


@settings(max_examples=15)
@given(seeds, st.floats(0.5, 4))
def test_a_box_inside_of_the_image_comes_back_from_its_signal(seed, scale):
    whwh = torch.tensor([640.0, 600, 640, 600], dtype=torch.float64)
    corners = corners_of(seed, 9)
    signal = coding.as_signal(corners, whwh, scale)
    assert (signal.abs() <= scale * (1 + 1e-9)).all()
    torch.testing.assert_close(coding.from_signal(signal, whwh, scale), corners, rtol=0, atol=1e-9)
    torch.testing.assert_close(coding.to_corners(coding.to_centres(corners)), corners, rtol=0, atol=1e-9)


def test_deltas():
    box = torch.tensor([10.0, 20, 30, 60])
    assert torch.equal(coding.apply_deltas(box, torch.zeros(4)), box)
    moved = coding.apply_deltas(box, torch.tensor([1.0, -0.5, float(np.log(2)), 0]))
    torch.testing.assert_close(moved, torch.tensor([10.0, 10, 50, 50]))  # half a width, a quarter of a height
    huge = coding.apply_deltas(box, torch.tensor([0.0, 0, 99, -99]))
    assert float(huge[2] - huge[0]) == pytest.approx(20 * 100_000 / 16, rel=1e-5)
    assert float(huge[3] - huge[1]) == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------- pooling


def test_levels():
    sides = torch.tensor([0.0, 111.9, 112.1, 223.9, 224.1, 447.9, 448.1, 1e6, torch.nan])
    boxes = torch.stack((sides * 0, sides * 0, sides, sides), dim=-1)
    assert box_levels(boxes).tolist() == [2, 2, 3, 3, 4, 4, 5, 5, 2]


def sampled(map_, box, stride):
    """RoIAlign of one box on one map (C, h, w), sample by sample."""
    x1, y1, x2, y2 = (float(value) / stride - 0.5 for value in box)
    channels, height, width = map_.shape
    found = torch.zeros(channels, 7, 7)
    for row in range(14):
        for column in range(14):
            y, x = y1 + (y2 - y1) * (row + 0.5) / 14, x1 + (x2 - x1) * (column + 0.5) / 14
            if not (-1 <= y <= height and -1 <= x <= width):
                continue
            y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
            grid = torch.tensor([[[[2 * x / max(1, width - 1) - 1, 2 * y / max(1, height - 1) - 1]]]])
            found[:, row // 2, column // 2] += F.grid_sample(map_[None], grid, align_corners=True)[0, :, 0, 0] / 4
    return found


@settings(max_examples=6)
@given(seeds, st.floats(1, 400), st.floats(1, 400))
def test_pooling_is_the_mean_of_bilinear_samples(seed, width, height):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, 3, 128 // stride, 160 // stride, generator=generator) for stride in (4, 8, 16, 32)]
    middle = torch.rand(2, 2, 2, generator=generator) * torch.tensor([200.0, 170]) - 20
    half = torch.tensor([width, height]) / 2
    boxes = torch.cat((middle - half, middle + half), dim=-1)
    found = pool(pyramid(maps), boxes)
    for image in range(2):
        for index, box in enumerate(boxes[image]):
            level = int(box_levels(box))
            want = sampled(maps[level - 2][image], box, 2**level)
            torch.testing.assert_close(found[image, index].T.reshape(3, 7, 7), want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_graph_pools_other_boxes_too():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 3, 128 // stride, 160 // stride, generator=generator) for stride in (4, 8, 16, 32)]
    low = torch.rand(2, 1, 5, 2, generator=generator) * 100
    size = torch.rand(2, 1, 5, 2, generator=generator) * torch.tensor([30.0, 500])[:, None, None, None]
    few, wide = torch.cat((low, low + size), dim=-1)
    assert box_levels(few).max() < box_levels(wide).max()

    def pooled(boxes, *maps):
        return pool(pyramid(maps), boxes)

    traced = torch.jit.trace(pooled, (few, *maps))
    torch.testing.assert_close(traced(wide, *maps), pooled(wide, *maps))


def test_pooling_of_boxes_that_are_nowhere():
    maps = [torch.ones(1, 2, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)]
    boxes = torch.tensor([[[500.0, 500, 600, 600], [20, 20, 20, 20], [torch.nan] * 4, [-torch.inf, 0, torch.inf, 9]]])
    found = pool(pyramid(maps), boxes)
    assert (found[0, 0] == 0).all() and (found[0, 1] == 1).all() and (found[0, 2:] == 0).all()


# ---------------------------------------------------------------- pictures


def test_pictures_are_resized_and_padded(tmp_path):
    assert preprocess.official_size(480, 640) == (800, 1067)
    assert preprocess.official_size(400, 1000) == (533, 1333)
    assert "cannot be resized" in sentence_of(preprocess.official_size, 0, 10)
    picture = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert np.array_equal(preprocess.load_picture(tmp_path / "a.png"), picture)
    assert "does not exist" in sentence_of(preprocess.load_picture, tmp_path / "b.png")
    images = [torch.from_numpy(picture).permute(2, 0, 1), torch.full((3, 40, 20), 128.0)]
    batch, whwh = inputs.padded(images)
    assert batch.shape == (2, 3, 64, 64) and whwh.tolist() == [[50, 30, 50, 30], [20, 40, 20, 40]]
    assert (batch[1, :, 40:] == 0).all() and (batch[1, :, :, 20:] == 0).all()
    assert float(batch[1, 0, 0, 0]) == pytest.approx((128 - 123.675) / 58.395, rel=1e-5)
    assert "shape (3, height, width)" in sentence_of(inputs.padded, [torch.zeros(4, 8, 8)])
    assert "no images" in sentence_of(inputs.padded, [])
