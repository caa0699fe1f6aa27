"""Students made of a Teacher's layers: what is kept, that units without effect are the ones that go, and sizes."""

from __future__ import annotations

import copy
import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pqk.compress.cut import student as cutter
from pqk.compress.cut.refit import moments, refit
from pqk.compress.cut.student import evenly, remaining
from pqk.compress.cut.units import Group, Part
from pqk.compress.train.data import TrainingData
from pqk.families.contract import LearningPart
from pqk.families.dust3r.configs import NAMED
from pqk.families.registry import family
from pqk.models import build_model, load_model, save_model
from pqk.settings.distill import StudentCut, load_distill

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = TrainingData(family("dust3r"))
SHIPPED = load_distill(REPOSITORY / "configs" / "distill.yaml")
SMALL = {
    "head_type": "dpt",
    "enc_embed_dim": 32,
    "enc_depth": 4,
    "enc_num_heads": 4,
    "dec_embed_dim": 16,
    "dec_depth": 5,
    "dec_num_heads": 4,
    "dpt": {"feature_dim": 32, "last_dim": 16, "layer_dims": [16, 24, 32, 16]},
}
HEADS = ("downstream_head1.dpt.", "downstream_head2.dpt.")


def cut(**shares: float) -> StudentCut:
    return StudentCut.model_validate({"depth": 0.0, "heads": 0.0, "ffn": 0.0, "dpt": 0.0, **shares})


def make_student(teacher: nn.Module, shares: StudentCut) -> nn.Module:
    return cutter.make_student(teacher, SHIPPED.model_copy(update={"student": shares}), DATA)


def teacher_of(config: dict = SMALL, seed: int = 0) -> nn.Module:
    """Random weights, biases too."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model("dust3r", config, generator=generator).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return model


def images(size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.rand(2, 3, size, 32, generator=generator) * 2 - 1, torch.rand(
        2, 3, size, 32, generator=generator
    ) - 0.5


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of any output, relative to that output's largest value."""
    one, two = a(*images()), b(*images())
    return max(float((one[k] - two[k]).abs().max() / one[k].abs().max()) for k in one)


def test_nothing_cut_is_a_copy():
    teacher = teacher_of()
    student = make_student(teacher, cut())
    assert difference(teacher, student) == 0
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


LINEAR = {
    "head_type": "linear",
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 2,
    "dec_embed_dim": 32,
    "dec_depth": 1,
    "dec_num_heads": 2,
}
DPT = {
    "head_type": "dpt",
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 4,
    "dec_embed_dim": 16,
    "dec_depth": 3,
    "dec_num_heads": 2,
    "dpt": {"feature_dim": 16, "last_dim": 8, "layer_dims": [8, 12, 16, 24]},
}
ALL = {"depth": 0.3, "heads": 0.5, "ffn": 0.4, "dpt": 0.25}


@pytest.mark.parametrize(
    ("config", "shares", "sha256"),
    [
        (LINEAR, {"ffn": 0.4}, "6da7f7b03ed11754"),
        (LINEAR, {"heads": 0.5}, "21f1cbed505ffff5"),
        (LINEAR, {"dpt": 0.25}, "85bd873ab57d3290"),
        (LINEAR, {"depth": 0.5}, "d8cc0ffe79a164c1"),
        (LINEAR, ALL, "927c584ca92ecc88"),
        (DPT, {"ffn": 0.4}, "b053f86e60f08882"),
        (DPT, {"heads": 0.5}, "3d96e07a5d9e3d34"),
        (DPT, {"dpt": 0.25}, "aec5d7316c375cd3"),
        (DPT, {"depth": 0.5}, "aa5d579cb5776f23"),
        (DPT, ALL, "f54ae2d7b763168b"),
    ],
)
def test_golden_students(config: dict, shares: dict[str, float], sha256: str):
    """Sizes and weights of a cutter that had a hand-written map of every layer instead of a traced network."""
    student = make_student(teacher_of(config), cut(**shares))
    found = hashlib.sha256(json.dumps(student.config, sort_keys=True).encode())
    for name, weight in sorted(student.state_dict().items()):
        if "refinenet4.resConfUnit1" not in name:  # no output depends on it
            found.update(name.encode() + weight.numpy().tobytes())
    assert found.hexdigest()[:16] == sha256


@torch.no_grad()
def kill_heads(model: nn.Module, share: float, generator: torch.Generator) -> None:
    """In every attention, make some heads, other ones each time, count for nothing."""
    for module in model.modules():
        if hasattr(module, "heads") and hasattr(module, "proj"):
            dead = torch.randperm(module.heads, generator=generator)[: int(share * module.heads)]
            columns = module.proj.weight.view(-1, module.heads, module.head_dim)
            columns[:, dead] = 0


@torch.no_grad()
def kill_channels(writers: list[nn.Module], share: float, generator: torch.Generator) -> None:
    """Make some outputs, the same ones of all these layers, zero."""
    transposed = isinstance(writers[0], nn.ConvTranspose2d)
    count = writers[0].weight.shape[1 if transposed else 0]
    dead = torch.randperm(count, generator=generator)[: int(share * count)]
    for layer in writers:
        layer.weight[(slice(None), dead) if transposed else dead] = 0
        if layer.bias is not None:
            layer.bias[dead] = 0


@pytest.mark.parametrize("kind", ["heads", "ffn", "dpt", "all"])
def test_units_without_effect_are_the_ones_that_go(kind: str):
    """Half of the units of each layer do nothing; cutting half then leaves the very same function.

    A wrong slice of the fused q | k | v, of one of the two decoders, or of a level of the DPT head would change it.
    """
    teacher, generator = teacher_of(), torch.Generator().manual_seed(3)
    if kind in ("heads", "all"):
        kill_heads(teacher, 0.5, generator)
    if kind in ("ffn", "all"):
        for block in (*teacher.enc_blocks, *teacher.dec_blocks, *teacher.dec_blocks2):
            kill_channels([block.mlp.fc1], 0.5, generator)
    if kind in ("dpt", "all"):
        for head in (teacher.downstream_head1.dpt, teacher.downstream_head2.dpt):
            for level in (0, 1, 2, 3):
                for layer in head.act_postprocess[level]:
                    kill_channels([layer], 0.5, generator)
            nets = [getattr(head.scratch, f"refinenet{n}") for n in (1, 2, 3, 4)]
            units = [unit for net in nets for unit in (net.resConfUnit1, net.resConfUnit2)]
            kill_channels(
                [*head.scratch.layer_rn, *(unit.conv2 for unit in units), *(net.out_conv for net in nets)],
                0.5,
                generator,
            )
            for unit in units:
                kill_channels([unit.conv1], 0.5, generator)
            for layer in (head.head["0"], head.head["2"]):
                kill_channels([layer], 0.5, generator)
    shares = {k: 0.5 for k in ("heads", "ffn", "dpt") if kind in (k, "all")}
    student = make_student(teacher, cut(**shares))
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    assert difference(teacher, student) < 1e-4
    whole = teacher_of()  # ... and where all work, half of them are missed
    assert difference(whole, make_student(whole, cut(**shares))) > 1e-3
    sizes = student.sizes
    if "heads" in shares:
        assert {b.heads for b in (*sizes.enc_blocks, *sizes.dec_blocks, *sizes.dec_blocks2)} == {2}
    if "ffn" in shares:
        assert [b.ffn for b in sizes.enc_blocks] == [64] * 4 and [b.ffn for b in sizes.dec_blocks2] == [32] * 5
    if "dpt" in shares:
        assert (sizes.dpt.feature_dim, sizes.dpt.last_dim, sizes.dpt.layer_dims) == (16, 8, (8, 16, 16, 8))


@torch.no_grad()
def mimic(model: nn.Module, generator: torch.Generator) -> None:
    """Make half of all heads, MLP channels and fused DPT channels copies of the others, that are little listened to."""

    def halves(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(count, generator=generator)
        return order[: count // 2], order[count // 2 :]

    for module in model.modules():
        if hasattr(module, "heads") and hasattr(module, "proj"):
            first, second = halves(module.heads)
            for name in ("qkv",) if hasattr(module, "qkv") else ("projq", "projk", "projv"):
                for parameter in getattr(module, name).parameters():
                    units = parameter.view(-1, module.heads, module.head_dim, *parameter.shape[1:])
                    units[:, second] = units[:, first]
            module.proj.weight.view(-1, module.heads, module.head_dim)[:, second] *= 0.3
        if hasattr(module, "fc1"):
            first, second = halves(module.fc1.out_features)
            for parameter in module.fc1.parameters():
                parameter[second] = parameter[first]
            module.fc2.weight[:, second] *= 0.3
    for head in (model.downstream_head1.dpt, model.downstream_head2.dpt):
        for writer, reader in (
            (head.head["0"], head.head["2"]),
            (head.head["2"], head.head["4"]),
        ):
            first, second = halves(writer.out_channels)
            for parameter in writer.parameters():
                parameter[second] = parameter[first]
            reader.weight[:, second] *= 0.3


def test_readers_make_up_for_what_was_cut(monkeypatch):
    """Where the units that go are copies of those that stay, least squares finds that, up to its ridge."""
    teacher = teacher_of()
    mimic(teacher, torch.Generator().manual_seed(2))
    shares = {"heads": 0.5, "ffn": 0.5}
    before = copy.deepcopy(teacher.state_dict())
    plain = difference(teacher, make_student(teacher, cut(**shares)))
    folded = make_student(teacher, cut(**shares, fold_pairs=4, fold_size=96))
    assert difference(teacher, folded) < 0.25 * plain
    monkeypatch.setattr("pqk.compress.cut.refit.RIDGE", 1e-6)
    assert difference(teacher, make_student(teacher, cut(**shares, fold_pairs=4, fold_size=96))) < 0.05 * plain
    monkeypatch.undo()
    again = make_student(teacher, cut(**shares, fold_pairs=4, fold_size=96))
    assert difference(folded, again) == 0
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(module._forward_pre_hooks for module in (*teacher.modules(), *folded.modules()))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_that_lost_inputs(transposed: bool):
    """Channel 2 is 3 times channel 0 minus 0.5: a convolution does without it, its bias takes the constant."""
    generator = torch.Generator().manual_seed(0)
    kind, axis = (nn.ConvTranspose2d, 0) if transposed else (nn.Conv2d, 1)
    constant = 0.0 if transposed else -0.5  # which no bias can take over where a stride leaves holes
    x = torch.randn(1, 3, 40, 40, generator=generator)
    x[:, 2] = 3 * x[:, 0] + constant
    flat = torch.cat([x.flatten(2)[0].T, torch.ones(1600, 1)], dim=1).double()
    network = nn.Sequential(kind(3, 4, 2, stride=2))
    with torch.no_grad():
        expected = network(x)
        alone = network(x * torch.tensor([1.0, 1.0, 0.0])[None, :, None, None])
        group = Group("channels", (Part("0.weight", axis, torch.arange(3)[:, None], True),))
        refit(network, group, torch.tensor([0, 1]), {"0": flat.T @ flat / len(flat)})
        changed = network(x * torch.tensor([1.0, 1.0, 0.0])[None, :, None, None])
    assert (changed - expected).abs().max() < 0.02 * (alone - expected).abs().max()


def test_moments_of_a_map_are_those_of_its_places():
    """Places are skipped by an odd step, so that every column of a map of even width is seen."""

    class Learning:
        def parts(self, model: nn.Module) -> dict[str, nn.Module]:
            return {"all": model}

        def forward(self, parts: nn.ModuleDict, batch: torch.Tensor, watched: None) -> dict[str, torch.Tensor]:
            return {"out": parts["all"](batch)}

    group = Group("channels", (Part("0.weight", 1, torch.arange(3)[:, None], True),))
    batches = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batches[..., 1::2] += 1.0  # of every row the odd columns
    learning = cast(LearningPart, Learning())
    found = moments(nn.Sequential(nn.Conv2d(3, 2, 1)), [group], batches, len(batches), learning)["0"]
    places = batches.movedim(3, -1).reshape(-1, 3)
    places = torch.cat([places, torch.ones(len(places), 1)], dim=1)
    torch.testing.assert_close(found, places.T @ places / len(places), atol=0.03, rtol=0)


def test_depth_keeps_evenly_spaced_blocks_of_both_decoders():
    teacher = teacher_of()
    student = make_student(teacher, cut(depth=0.3))  # 4 -> 3 and 5 -> 4 (3.5 is rounded up)
    ours, theirs = student.state_dict(), teacher.state_dict()
    for stack, kept in (("enc_blocks", [0, 2, 3]), ("dec_blocks", [0, 1, 3, 4]), ("dec_blocks2", [0, 1, 3, 4])):
        assert len(getattr(student, stack)) == len(kept)
        for new, old in enumerate(kept):
            for key in (key for key in ours if key.startswith(f"{stack}.{new}.")):
                assert torch.equal(ours[key], theirs[key.replace(f"{stack}.{new}.", f"{stack}.{old}.", 1)]), key
    deep = make_student(teacher, cut(depth=0.6))
    assert (len(deep.enc_blocks), len(deep.dec_blocks)) == (2, 3)  # a DPT head reads three decoder blocks
    linear = teacher_of({**SMALL, "head_type": "linear"})
    assert len(make_student(linear, cut(depth=0.6, dpt=0.5)).dec_blocks) == 2


@given(st.integers(1, 60), st.floats(0, 0.6), st.sampled_from([1, 8, 16]))
def test_what_remains(count: int, share: float, step: int):
    left = remaining(count, share, step)
    assert 1 <= left <= count
    unit = step if count % step == 0 else 1
    assert left % unit == 0 and (left == unit or abs(left - count * (1 - share)) <= unit / 2 + 1e-6)
    assert remaining(count, 0.0, step) == count
    kept = evenly(count, left)
    assert len(kept) == left and kept == sorted(set(kept)) and kept[-1] == count - 1
    if left > 1:
        gaps = [b - a for a, b in pairwise(kept)]
        assert kept[0] == 0 and max(gaps) - min(gaps) <= 1


def test_a_student_saves_and_loads(tmp_path: Path):
    student = make_student(teacher_of(), cut(depth=0.3, heads=0.5, ffn=0.4, dpt=0.25))
    assert difference(student, load_model(save_model(student, tmp_path / "student"))) == 0


def gflops(model: nn.Module) -> float:
    """Multiply-adds of a pair at 512 pixels, two encodings and one decoding, times two; in 10^9."""
    total = 0.0
    for name, graph in model.graphs(512, 512).items():
        # tensors with shapes and no values: nothing is computed; attention is only counted as its two matmuls
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
            feeds = [torch.empty(value.shape) for value in graph.inputs.values()]
            with FlopCounterMode(display=False) as counter:
                graph.module(*feeds)
        total += (2 if name == "encoder" else 1) * counter.get_total_flops() / 1e9
    return total


def test_the_shipped_cut_takes_a_quarter_of_the_embedded_model():
    teacher = build_model("dust3r", NAMED["dust3r-tiny"])
    student = make_student(teacher, SHIPPED.student.model_copy(update={"fold_pairs": 0}))  # which changes no size
    params = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    assert params[1] <= 0.75 * params[0]
    flops = [gflops(model) for model in (teacher, student)]
    assert flops[0] == pytest.approx(78.7, abs=0.1)
    assert flops[1] <= 0.75 * flops[0]
