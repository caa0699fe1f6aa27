"""DiffusionDet's sampler: schedule, noise, renewal, ensemble, suppression, prediction through the public class."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusiondet_toys import TINY, WHOLE, made, sentence_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk.families.diffusiondet.network.boxes import as_signal, iou_and_union
from pqk.families.diffusiondet.sampling import labels as states
from pqk.families.diffusiondet.sampling import schedule, selection
from pqk.families.diffusiondet.sampling.noise import DrawnNoise, GivenNoise
from pqk.families.diffusiondet.sampling.sampler import Sampling, detect, sample
from pqk.families.diffusiondet.sampling.selection import Detections, rescale, select, suppress

WHWH = torch.tensor([100.0, 80, 100, 80])


# ---------------------------------------------------------------- schedule and states


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 50, 999, 1000])
def test_times_go_down_to_the_end(steps):
    pairs = schedule.time_pairs(steps)
    assert len(pairs) == steps and pairs[0][0] == 999 and pairs[-1][1] == -1
    assert all(t > after for t, after in pairs)
    assert all(left[1] == right[0] for left, right in pairwise(pairs))
    assert [t for t, _ in pairs] == [int(-1 + 1000 * k / steps + 1e-4) for k in range(steps, 0, -1)]


@settings(max_examples=15)
@given(st.integers(0, 999), st.integers(0, 2**31))
def test_the_noise_in_a_signal_is_found(t, seed):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x = schedule.diffuse(x0, t, noise)
    torch.testing.assert_close(schedule.noise_in(x, x0, t), noise, rtol=0, atol=1e-9)
    if t:
        clean, add, fresh = schedule.ddim_coefficients(t, t - 1, 0.0)
        assert fresh == 0
        torch.testing.assert_close(clean * x0 + add * noise, schedule.diffuse(x0, t - 1, noise), rtol=0, atol=1e-9)
        _, some, sigma = schedule.ddim_coefficients(t, t - 1, 1.0)
        assert some**2 + sigma**2 == pytest.approx(add**2)


def test_class_states_are_forgotten_step_by_step():
    """a_t is the chance to be known after t + 1 steps of the transition matrix; a step back follows Bayes' rule."""
    beta = [1 / (1000 - u + 1) for u in range(1, 1001)]
    torch.testing.assert_close(
        states.known_share("linear"), torch.tensor(np.cumprod([1 - b for b in beta])), rtol=1e-9, atol=1e-12
    )
    clean = torch.tensor([[0.5, 0.25, 0.25]])  # two classes and the mask
    t, after = 700, 300
    now, then = (float(states.share_at("linear", at)) for at in (t, after))
    chance = [0.5 * (then - now) / (1 - now), 0.25 * (then - now) / (1 - now)]
    many = 20_000
    uniform = (torch.arange(many) + 0.5) / many
    y = states.previous(torch.full((many,), 2), clean.expand(many, 3), t, after, uniform, "linear")
    found = torch.bincount(y, minlength=3) / many
    torch.testing.assert_close(found, torch.tensor([*chance, 1 - sum(chance)]), rtol=0, atol=1e-3)
    known = states.previous(torch.tensor([0, 1]), clean.expand(2, 3), t, after, torch.zeros(2), "linear")
    assert known.tolist() == [0, 1]


# ---------------------------------------------------------------- suppression


def greedy(found, most=0.5):
    """Plain suppression, box by box."""
    kept = []
    for i in sorted(range(len(found.scores)), key=lambda i: (-float(found.scores[i]), i)):
        same = [j for j in kept if found.labels[j] == found.labels[i]]
        if all(float(iou_and_union(found.boxes[i], found.boxes[j])[0]) <= most for j in same):
            kept.append(i)
    return kept


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(0, 25), st.sampled_from([1, 3, 1024]))
def test_suppression_is_the_greedy_one_in_blocks_of_any_size(seed, count, block):
    generator = torch.Generator().manual_seed(seed)
    low, size = (torch.randint(0, most, (count, 2), generator=generator) for most in (8, 12))
    scores, labels = (torch.randint(0, most, (count,), generator=generator) for most in (5, 3))
    found = Detections(torch.cat((low, low + size), dim=1).float(), scores / 4, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "BLOCK", block)
        kept = suppress(found)
    want = found.of(torch.tensor(greedy(found), dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(kept, want, strict=True))
    again = suppress(kept)
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "BLOCK", block)
        first = suppress(found, enough=lambda best: len(best.scores) >= 3)
    assert len(first.scores) >= min(3, len(kept.scores))
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(first, kept, strict=True))


def test_selection_and_the_way_to_the_picture():
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.2, 0.9]])
    boxes = torch.arange(12.0).reshape(3, 4)
    found = select(scores, boxes, 4)
    assert found.labels.tolist() == [1, 1, 0, 1] and torch.equal(found.boxes, boxes[[0, 2, 1, 1]])
    outside = Detections(torch.tensor([[-5.0, 2, 5, 8], [20, 2, 30, 4], [1, 1, 1, 3]]), torch.ones(3), torch.zeros(3))
    assert rescale(outside, (10, 10), (20, 30)).boxes.tolist() == [[0, 4, 15, 16]]


# ---------------------------------------------------------------- the sampler


class Scripted:
    """A head that always finds the same boxes, with scores of its own for each call."""

    def __init__(self, *scores):
        self.scores, self.seen = scores, []
        self.boxes = torch.tensor([[10.0, 10, 30, 40], [40, 10, 60, 30], [50, 50, 90, 70], [5, 60, 25, 75]])

    def __call__(self, boxes, t, labels):
        self.seen.append((boxes, t, labels))
        p = torch.tensor(self.scores[len(self.seen) - 1])
        return torch.stack((p.logit(), torch.full_like(p, -9)), dim=1), self.boxes


def ran(head, steps, **more):
    noise = DrawnNoise(4, 3, 0)
    how = Sampling(steps, 4, 2.0, **more)
    return list(sample(head, WHWH, noise, how)), how


def test_one_step_is_one_call_and_its_selection():
    head = Scripted([0.9, 0.2, 0.6, 0.1])
    steps, how = ran(head, 1)
    assert [t for _, t, _ in head.seen] == [999] and len(steps) == 1 and steps[0].x_next is None
    found = detect(iter(steps), how)
    assert found.labels.tolist() == [0, 0, 0, 0]
    assert torch.allclose(found.scores, torch.tensor([0.9, 0.6, 0.2, 0.1]))
    assert torch.equal(found.boxes, head.boxes[[0, 2, 1, 3]])
    torch.testing.assert_close(steps[0].x0, as_signal(head.boxes.double(), WHWH.double(), 2.0).clamp(-2, 2))


def test_unsure_boxes_are_replaced_behind_the_others():
    head = Scripted([0.9, 0.2, 0.6, 0.5], [0.1, 0.1, 0.1, 0.1], [0.9] * 4)
    steps, _ = ran(head, 3)
    assert steps[0].keep.tolist() == [True, False, True, False]  # 0.5 is not more than 0.5
    source = DrawnNoise(4, 3, 0)
    torch.testing.assert_close(steps[0].x, source.start().double())
    z, fresh = source.start().double(), source.start().double()
    clean, add, sigma = schedule.ddim_coefficients(999, 665, 1.0)
    want = clean * steps[0].x0[[0, 2]] + add * steps[0].noise[[0, 2]] + sigma * z[:2]
    torch.testing.assert_close(steps[1].x, torch.cat((want, fresh[:2])))
    assert not steps[1].keep.any() and steps[2].keep.all()
    source.start()  # for kept boxes, of which there are none
    torch.testing.assert_close(steps[2].x, source.start().double())


def test_all_steps_but_the_last_are_pooled():
    head = Scripted([0.9, 0.2, 0.6, 0.1], [0.8, 0.3, 0.7, 0.4], [0.99] * 4)
    steps, how = ran(head, 3)
    found = detect(iter(steps), how)
    assert torch.allclose(found.scores, torch.tensor([0.9, 0.7, 0.4, 0.3]))  # the best of each box, none of the last
    alone = detect(iter(steps), Sampling(3, 4, 2.0, ensemble=False))
    assert torch.allclose(alone.scores, torch.tensor([0.99] * 4))


def test_a_deterministic_sampler_keeps_every_box_in_its_place():
    head = Scripted([0.1] * 4, [0.1] * 4)
    steps, _ = ran(head, 2, eta=0.0, renewal=None)
    want = schedule.ddim_coefficients(999, 499, 0.0)
    torch.testing.assert_close(steps[1].x, want[0] * steps[0].x0 + want[1] * steps[0].noise)
    assert steps[0].keep.all()


def test_class_states_move_with_their_boxes():
    head = Scripted([0.999, 0.2, 0.999, 0.1], [0.9] * 4)
    ran(head, 2, label_state="sample", label_diffusion=True)
    assert head.seen[0][2] is None
    labels = head.seen[1][2]
    assert labels.shape == (4,) and (labels[2:] == 2).all() and set(labels[:2].tolist()) <= {0, 1, 2}
    head = Scripted([0.9, 0.2, 0.7, 0.1], [0.9] * 4)
    ran(head, 2, label_state="dist", label_diffusion=True)
    given_ = head.seen[1][2]
    torch.testing.assert_close(given_.sum(dim=1), torch.ones(4))
    assert torch.equal(given_[2:], torch.tensor([[0.0, 0, 1]] * 2))
    assert float(given_[0, 0]) == pytest.approx(0.9 * (1 - 500 / 1000), rel=1e-3)


def test_given_noise_that_lacks_something():
    noise = GivenNoise(torch.zeros(4, 4))
    head, how = Scripted(*[[0.9] * 4] * 2), Sampling(2, 4, 2.0)
    assert "lacks 'step'" in sentence_of(lambda: list(sample(head, WHWH, noise, how)))


# ---------------------------------------------------------------- the public class


def test_predictions_follow_the_seed_and_the_image_and_not_the_batch():
    model = made()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    both = model.predict(images, steps=2, seed=5)
    alone = model.predict(images[1], steps=2, seed=5, image_ids=[1])
    assert len(both) == 2 and len(alone) == 1
    for name in ("boxes", "scores", "labels"):
        torch.testing.assert_close(both[1][name], alone[0][name], rtol=1e-4, atol=1e-3)
        assert torch.equal(model.predict(images, steps=2, seed=5)[0][name], both[0][name])
    assert not torch.equal(model.predict(images, steps=2, seed=6)[0]["boxes"][:5], both[0]["boxes"][:5])
    for found in both:
        assert found["boxes"].shape == (len(found["scores"]), 4) and found["labels"].dtype == torch.int64
        assert (found["scores"].diff() <= 0).all() and 0 <= int(found["labels"].min()) <= int(found["labels"].max()) < 3
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([96.0, 64, 96, 64])).all()


def test_boxes_and_output_sizes():
    model = made()
    image = torch.rand(3, 50, 70) * 255
    few, many = model.predict(image, boxes=3), model.predict(image, boxes=40)
    assert 0 < len(few[0]["scores"]) <= 3 < len(many[0]["scores"]) <= 40
    noise = torch.randn(1, 12, 4)
    (plain,), (twice,) = model.predict(image, noise=noise), model.predict(image, noise=noise, output_sizes=[(100, 140)])
    torch.testing.assert_close(plain["boxes"] * 2, twice["boxes"])


def test_extended_networks_predict():
    for more in (
        {"label_diffusion": "d3pm_mask", "quality_score_reweight": True, "quality_guidance_scale": 0.5},
        {"label_state": "sample", "label_diffusion": "d3pm_mask", "label_schedule": "cosine", "geo_bias_topk": 3},
    ):
        model = made({**WHOLE, **more})
        (found,) = model.predict(torch.rand(3, 64, 64) * 255, steps=3, seed=1)
        assert (
            len(found["scores"]) and torch.isfinite(found["boxes"]).all() and math.isfinite(float(found["scores"][0]))
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"boxes": 2.5}, "boxes must be a whole number from 1"),
        ({"seed": 1, "noise": torch.zeros(1, 12, 4)}, "give a seed or the noise, not both"),
        ({"noise": torch.zeros(1, 11, 4)}, "the start noise has the shape (1, 11, 4) instead of (1, 12, 4)"),
        ({"noise": {"start": torch.zeros(1, 12, 4)}}, "noise holds start; it must hold init"),
        ({"steps": 2, "noise": torch.zeros(1, 12, 4)}, "lacks 'step'"),
        ({"image_ids": [1, 2]}, "image_ids has 2 entries for 1 images"),
        ({"output_sizes": []}, "output_sizes has 0 entries for 1 images"),
    ],
)
def test_wrong_arguments(arguments, sentence):
    assert sentence in sentence_of(lambda: made().predict(torch.zeros(3, 32, 32), **arguments))


def test_wrong_images():
    model = made(TINY)
    assert "(3, H, W) or (B, 3, H, W)" in sentence_of(model.predict, torch.zeros(8, 8))
    assert "shape (3, height, width)" in sentence_of(model.predict, torch.zeros(8, 8, 3))
    assert "no images" in sentence_of(model.predict, [])
