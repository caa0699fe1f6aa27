"""Distillation: the KL of point densities, derived and integrated; the loss, the features, and a run that is killed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import dblquad, quad
from torch import nn

from pqk.compress.cut.student import evenly, make_student
from pqk.compress.distill import distill
from pqk.compress.train.data import TrainingData
from pqk.compress.train.fit import Fitted
from pqk.errors import PqkError
from pqk.families.dust3r import cutting
from pqk.families.dust3r.batches import PicturePairs
from pqk.families.dust3r.learning import features, forward, parts
from pqk.families.dust3r.losses import confidence_loss, softened_kl
from pqk.families.losses import feature_loss, laplace_kl
from pqk.families.registry import family
from pqk.models import build_model
from pqk.settings.distill import Distill, load_distill
from pqk.settings.yamlfile import SpecError

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = TrainingData(family("dust3r"))
CONFIG = REPOSITORY / "configs" / "distill.yaml"
TINY = {
    "head_type": "linear",
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 2,
    "dec_embed_dim": 32,
    "dec_depth": 2,
    "dec_num_heads": 2,
}
QUICK = {
    "train.stages": [{"size": 32, "batch": 3, "until": 0.5}, {"size": 48, "batch": 2, "until": 1.0}],
    "train.epochs": 3,
    "train.steps_per_epoch": 4,
    "train.learning_rate": 2e-3,
    "train.ema": 0.9,
    "train.min_covisible": 0.0,
    "train.validation": {"size": 32, "pairs": 2},
    "student": {"depth": 0.5, "heads": 0.5, "ffn": 0.5, "dpt": 0.0, "fold_pairs": 2, "fold_size": 32},
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for operations this small, threads cost more than they do
    yield
    torch.set_num_threads(threads)


def quick(**changes: Any) -> Distill:
    return load_distill(CONFIG, {**QUICK, **changes})


def double(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def integrated(distance: float, rate_p: float, rate_q: float) -> float:
    """KL(p || q) as it is defined, over all of space, in spherical coordinates around p's centre."""

    def log_density(rate: float, r: float) -> float:
        return 3 * math.log(rate) - math.log(8 * math.pi) - rate * r

    def integrand(cosine: float, r: float) -> float:
        other = math.sqrt(max(0.0, r * r + distance * distance - 2 * r * distance * cosine))
        p = log_density(rate_p, r)
        return 2 * math.pi * r * r * math.exp(p) * (p - log_density(rate_q, other))

    return dblquad(integrand, 0, 50 / rate_p, -1, 1, epsabs=1e-9, epsrel=1e-9)[0]


@pytest.mark.parametrize(
    ("distance", "rate_p", "rate_q"), [(0.5, 1, 2), (2, 3, 0.5), (0.02, 5, 5), (0.0, 4, 1), (1, 15, 10)]
)
def test_the_closed_form_is_the_integral(distance, rate_p, rate_q):
    assert float(laplace_kl(*double(distance, rate_p, rate_q))) == pytest.approx(
        integrated(distance, rate_p, rate_q), rel=1e-7, abs=1e-8
    )


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_density_is_the_one_of_the_confidence_loss(alpha):
    """exp(-rate r) rate^3 / (8 pi) is a density, and its negative logarithm is the confidence loss of one pixel."""
    for conf in (1.0, 2.5, 40.0):
        rate = 3 * conf / alpha
        density = rate**3 / (8 * math.pi)
        assert quad(lambda r, a=density, b=rate: 4 * math.pi * r * r * a * math.exp(-b * r), 0, 60 / rate)[0] == (
            pytest.approx(1, abs=1e-9)
        )
        mask = torch.ones(1, 1, 2, dtype=torch.bool)
        truth = torch.tensor([[[[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]]])
        there = torch.tensor([[[[0.3, 0.0, 1.0], [0.0, 0.0, 1.0]]]])
        pred = {
            "pts3d_1": there,
            "pts3d_2": truth,
            "conf_1": torch.full((1, 1, 2), conf),
            "conf_2": torch.ones(1, 1, 2),
        }
        loss, details = confidence_loss(pred, truth, truth, mask, mask, alpha)
        # view 1's two pixels, whose errors follow from the joint factor; view 2 has confidence 1 and so no logarithm
        nll = rate * details["regr_1"] - 3 * math.log(rate) + math.log(8 * math.pi)
        constant = 3 * math.log(3 / alpha) - math.log(8 * math.pi)
        assert float(loss - details["conf_loss_2"]) == pytest.approx(float(alpha / 3 * (nll + constant)), abs=1e-5)


rates = st.floats(-3, 5).map(lambda x: 10.0**x)
distances = st.floats(0, 1e3) | st.floats(-9, 0).map(lambda x: 10.0**x)


@given(distances, rates, rates)
def test_never_negative_and_zero_only_for_equals(distance, rate_p, rate_q):
    value = float(laplace_kl(*double(distance, rate_p, rate_q)))
    assert value >= -1e-12
    assert float(laplace_kl(*double(0.0, rate_p, rate_p))) == 0
    if abs(math.log(rate_q / rate_p)) > 1e-3 or rate_p * distance > 1e-3:
        assert value > 1e-8


@given(distances, distances, rates, rates)
def test_farther_is_worse(one, other, rate_p, rate_q):
    near, far = sorted((one, other))
    close, wide = (float(laplace_kl(*double(d, rate_p, rate_q))) for d in (near, far))
    assert wide >= close * (1 - 1e-12)
    if rate_p * far > 1.01 * rate_p * near + 1e-3:
        assert wide > close


@given(distances, rates, rates, st.floats(1, 10))
def test_a_temperature_only_softens_the_distance(distance, rate_p, rate_q, temperature):
    """Both rates divided by T: the ratio stays, so equal centres cost the same, and a distance costs less."""
    sharp = float(laplace_kl(*double(distance, rate_p, rate_q)))
    soft = float(laplace_kl(*double(distance, rate_p / temperature, rate_q / temperature)))
    assert soft <= sharp * (1 + 1e-9) + 1e-12
    assert float(laplace_kl(*double(0.0, rate_p / temperature, rate_q / temperature))) == pytest.approx(
        float(laplace_kl(*double(0.0, rate_p, rate_q))), rel=1e-9, abs=1e-12
    )


def test_gradients_agree_with_differences():
    """On both sides of the border between series and closed form, and across it."""
    distance = torch.tensor([1e-3, 0.04, 0.0499999, 0.05, 0.3, 4.0], dtype=torch.float64, requires_grad=True)
    rate_p = torch.full((6,), 10.0, dtype=torch.float64, requires_grad=True)
    rate_q = torch.tensor([10.0, 4.0, 10.0, 10.0, 300.0, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(laplace_kl, (distance, rate_p, rate_q), eps=1e-7, atol=1e-5, rtol=1e-4)


def prediction(seed: int, requires_grad: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for view in (1, 2):
        out[f"pts3d_{view}"] = torch.randn(2, 3, 4, 3, generator=generator) + torch.tensor([0.0, 0.0, 3.0])
        out[f"conf_{view}"] = 1 + torch.rand(2, 3, 4, generator=generator) * 5
    return {k: v.requires_grad_(requires_grad) for k, v in out.items()}


@pytest.fixture
def masks() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(2, 3, 4, generator=generator) > 0.3, torch.rand(2, 3, 4, generator=generator) > 0.3


def test_the_loss_by_hand(masks):
    teacher, student = prediction(0), prediction(1)
    expected = 0.0
    for view, mask in ((1, masks[0]), (2, masks[1])):
        pixels = []
        for sample, row, column in mask.nonzero().tolist():
            points, rates = [], []
            for out in (teacher, student):
                sizes = [
                    out[f"pts3d_{v}"][sample][m[sample]].double().norm(dim=-1)
                    for v, m in ((1, masks[0]), (2, masks[1]))
                ]
                points.append(out[f"pts3d_{view}"][sample, row, column].double() / torch.cat(sizes).mean())
                rates.append(3 * out[f"conf_{view}"][sample, row, column].double() / 0.2 / 4.0)
            pixels.append(float(laplace_kl((points[0] - points[1]).norm(), *rates)))
        expected += 0.2 / 3 * float(np.mean(pixels))
    assert float(softened_kl(teacher, student, *masks, 0.2, 4.0)) == pytest.approx(expected, rel=1e-4)


def test_scale_and_what_is_invalid_do_not_count(masks):
    teacher, student = prediction(0), prediction(1)
    before = float(softened_kl(teacher, student, *masks, 0.2, 3.0))
    assert before > 0.01
    assert float(softened_kl(teacher, teacher, *masks, 0.2, 3.0)) == pytest.approx(0, abs=1e-6)
    scaled = {k: v * 7 if k.startswith("pts") else v for k, v in student.items()}
    assert float(softened_kl(teacher, scaled, *masks, 0.2, 3.0)) == pytest.approx(before, rel=1e-4)
    for out in (teacher, student):
        for view, mask in ((1, masks[0]), (2, masks[1])):
            out[f"pts3d_{view}"][~mask] = float("nan")
            out[f"conf_{view}"][~mask] = float("inf")
    assert float(softened_kl(teacher, student, *masks, 0.2, 3.0)) == pytest.approx(before, rel=1e-4)


def test_gradients_of_a_few_pixels(masks):
    """Against central differences, for a point, a confidence, and none for the invalid."""
    teacher, student = prediction(0), prediction(1, requires_grad=True)
    softened_kl(teacher, student, *masks, 0.2, 3.0).backward()
    for key, mask in (("pts3d_1", masks[0]), ("conf_1", masks[0]), ("pts3d_2", masks[1]), ("conf_2", masks[1])):
        gradient = student[key].grad
        assert float(gradient[~mask].abs().max()) == 0
        for sample, row, column in mask.nonzero()[:3].tolist():
            place = (sample, row, column, 1) if key.startswith("pts") else (sample, row, column)
            values = []
            for step in (1e-2, -1e-2):
                moved = {k: v.detach().clone() for k, v in student.items()}
                moved[key][place] += step
                values.append(float(softened_kl(teacher, moved, *masks, 0.2, 3.0)))
            assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.03, abs=2e-5)


@pytest.mark.parametrize(("high", "low"), [(1e20, 1.0), (1.0, 1e20), (1e20, 1e20), (1.0 + 1e-7, 1.0)])
def test_extreme_confidences_stay_finite(masks, high, low):
    teacher, student = prediction(0), prediction(1, requires_grad=True)
    for view in (1, 2):
        teacher[f"conf_{view}"] = torch.full_like(teacher[f"conf_{view}"], high)
        student[f"conf_{view}"] = torch.full_like(student[f"conf_{view}"], low).requires_grad_()
    value = softened_kl(teacher, student, *masks, 0.2, 3.0)
    value.backward()
    assert torch.isfinite(value) and all(torch.isfinite(v.grad).all() for v in student.values())
    same = {k: v.detach().clone().requires_grad_() for k, v in teacher.items()}
    softened_kl(teacher, same, *masks, 0.2, 3.0).backward()  # a distance of exactly 0 has no direction
    assert all(torch.isfinite(v.grad).all() for v in same.values())


def test_beta_over_the_run():
    loss = quick(**{"loss.beta_start": 0.5, "loss.beta_end": 0.7, "loss.task_share": 0.7}).loss
    assert [loss.beta_at(share) for share in (0, 0.3, 0.7, 0.85, 1)] == pytest.approx([0.5, 0.5, 0.5, 0.6, 0.7])
    assert quick(**{"loss.task_share": 1.0}).loss.beta_at(1.0) == 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"student.ffn": 0.7}, "distill.student.ffn is 0.7 but must be from 0 to 0.6"),
        ({"loss.temperature": 0.5}, "distill.loss.temperature is 0.5 but must be from 1 to 100"),
        ({"loss.alpha": 0, "loss.beta_start": 0}, "must have alpha, beta_start or gamma above 0"),
        ({"train.alpha": 0.0}, "must have train.alpha above 0 where the KL has a weight"),
        ({"train.epoch": 3}, r"unknown key 'distill.train.epoch' \(did you mean 'epochs'\?\)"),
    ],
)
def test_refused(overrides, message):
    with pytest.raises(SpecError, match=message):
        load_distill(CONFIG, overrides)


def test_without_a_confidence_term_there_is_no_density():
    assert load_distill(CONFIG, {"train.alpha": 0.0, "loss.beta_start": 0, "loss.beta_end": 0}).train.alpha == 0


def tiny(seed: int = 0, config: dict[str, Any] = TINY) -> nn.Module:
    return build_model("dust3r", config, generator=torch.Generator().manual_seed(seed)).eval()


def test_features_are_seen_and_leave_no_hook():
    model, images = tiny(), torch.rand(1, 2, 3, 32, 32)
    pairs = PicturePairs(images)
    with torch.no_grad():
        out = forward(parts(model), pairs, [1])
        plain = cutting.finish(model, cutting.begin(model, pairs), pairs)
    assert all(torch.equal(out[k], plain[k]) for k in plain)
    assert {k: tuple(v.shape) for k, v in out["features"].items()} == {
        "tokens": (2, 4, 32), "first_0": (2, 4, 32), "second_0": (2, 4, 32),
    }  # fmt: skip
    assert torch.equal(out["features"]["tokens"], model.encode(images.flatten(0, 1)))
    assert not any(module._forward_hooks for module in model.modules())
    assert float(feature_loss(out["features"], out["features"], nn.ModuleDict())) == 0
    none = {k: torch.zeros_like(v) for k, v in out["features"].items()}
    assert float(feature_loss(out["features"], none, nn.ModuleDict())) == pytest.approx(1)


@given(st.integers(1, 24), st.integers(1, 24))
def test_features_are_compared_block_by_block(depth, left):
    """As many of the Teacher's blocks as the student has, spread as `make_student` keeps them."""
    sizes = Sizes(8, 8)
    teacher, student = (Layered(sizes, [None] * n) for n in (max(depth, left), min(depth, left)))
    layers, own, bridges = features(teacher, student, 0)
    assert layers == evenly(len(teacher.dec_blocks), len(student.dec_blocks)) and not len(bridges)
    assert list(own) == list(range(len(student.dec_blocks)))


@dataclass
class Sizes:
    enc_dim: int
    dec_dim: int


@dataclass
class Layered:
    sizes: Sizes
    dec_blocks: list[None]


def test_a_student_of_other_widths_learns_features(tmp_path):
    """Asked for the Teacher's features alone: through learned bridges the loss falls, and the student alone is left."""
    teacher = tiny()
    student = tiny(1, {**TINY, "enc_embed_dim": 16, "dec_embed_dim": 16, "dec_depth": 1})
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    losses: list[float] = []
    spec = quick(
        **{"loss.alpha": 0, "loss.beta_start": 0, "loss.beta_end": 0, "loss.gamma": 1.0},
        **{"train.steps_per_epoch": 10, "train.learning_rate": 5e-3},
    )
    done = distill(
        teacher, student, spec, DATA, seed=0, scratch=tmp_path, device="cpu", report=lambda p: losses.append(p.loss)
    )
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert done.outcome == "done" and {k.split("_")[0] for k in done.model.state_dict()} == {
        k.split("_")[0] for k in teacher.state_dict()
    }
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_a_student_comes_closer_to_its_teacher(tmp_path):
    """Asked for the Teacher alone, not for the truth, the KL falls, and the history tells the drop."""
    teacher = tiny()
    student = make_student(teacher, quick(), DATA)
    losses: list[float] = []
    spec = quick(**{"loss.alpha": 0, "train.steps_per_epoch": 15})
    done = distill(
        teacher, student, spec, DATA, seed=1, scratch=tmp_path, device="cpu", report=lambda p: losses.append(p.loss)
    )
    assert np.mean(losses[-6:]) < 0.5 * np.mean(losses[:6])
    assert [h["step"] for h in done.history] == [0, 15, 30, 45]
    assert all({"absrel", "delta1", "drop_pct"} <= h.keys() for h in done.history)


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from pqk.compress.cut.student import make_student
from pqk.compress.distill import distill
from pqk.compress.train.data import TrainingData
from pqk.compress.train.loop import Trainer
from pqk.families.losses import feature_loss, laplace_kl
from pqk.families.registry import family
from pqk.models import build_model
from pqk.settings.distill import load_distill

Trainer.run.__kwdefaults__["save_every_s"] = 0.0  # as if every step took minutes
asked = json.loads(sys.argv[1])
teacher = build_model("dust3r", asked["config"], generator=torch.Generator().manual_seed(0)).eval()
spec = load_distill(asked["file"], asked["overrides"])

def report(p):
    if p.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

data = TrainingData(family("dust3r"))
student = make_student(teacher, spec, data)
distill(teacher, student, spec, data, seed=3, scratch=Path("killed"), device="cpu", report=report)
"""


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(tmp_path):
    """SIGKILL in the seventh of twelve steps; the same call then ends with the very weights of an undisturbed run."""
    overrides = {**QUICK, "loss.gamma": 0.1}
    (tmp_path / "killed").mkdir()
    asked = json.dumps({"config": TINY, "file": str(CONFIG), "overrides": overrides})
    dead = subprocess.run(
        [sys.executable, "-c", SCRIPT, asked], cwd=tmp_path, env=environment(), text=True, capture_output=True
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["progress"]["step"] == 6

    def run(name: str) -> tuple[Fitted, list[int]]:
        teacher, spec, steps = tiny(), quick(**overrides), []
        student = make_student(teacher, spec, DATA)
        (tmp_path / name).mkdir(exist_ok=True)
        done = distill(
            teacher,
            student,
            spec,
            DATA,
            seed=3,
            scratch=tmp_path / name,
            device="cpu",
            report=lambda p: steps.append(p.step),
        )
        return done, steps

    (again, steps), (whole, _) = run("killed"), run("whole")
    assert steps[0] == 7 and again.steps == whole.steps == 12  # it went on where the last checkpoint was
    weights, expected = again.model.state_dict(), whole.model.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in weights.items())
    assert [h["absrel"] for h in again.history] == [h["absrel"] for h in whole.history]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(REPOSITORY)}


def test_a_stopped_run_says_why(tmp_path):
    teacher = tiny()
    student = make_student(teacher, quick(), DATA)
    began = time.monotonic()
    done = distill(
        teacher, student, quick(), DATA, seed=0, scratch=tmp_path, device="cpu",
        stop=lambda p: "enough" if p.step == 5 else None,
    )  # fmt: skip
    assert (done.outcome, done.reason, done.steps) == ("stopped", "enough", 5)
    assert done.seconds <= time.monotonic() - began


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(PqkError, match="unknown device 'gpu'"):
        distill(tiny(), tiny(), quick(), DATA, seed=0, scratch=tmp_path, device="gpu")
