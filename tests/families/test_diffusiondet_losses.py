"""DiffusionDet's training: noisy truths, the matcher, losses, distillation."""

import pytest
import torch
from diffusiondet_toys import TINY, WHOLE, made, sentence_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk.families.diffusiondet.network.boxes import to_centres
from pqk.families.diffusiondet.sampling import schedule
from pqk.families.diffusiondet.training import distill
from pqk.families.diffusiondet.training.losses import LossOptions, focal, iou_weights, quality_focal, set_losses
from pqk.families.diffusiondet.training.matcher import match
from pqk.families.diffusiondet.training.targets import draw, noisy_boxes, start_boxes

WHWH = torch.tensor([200.0, 160, 200, 160])


def boxes_of(generator, count):
    low = torch.rand(count, 2, generator=generator) * 120
    return torch.cat((low, low + 8 + torch.rand(count, 2, generator=generator) * 60), dim=1)


# ---------------------------------------------------------------- noisy truths


@pytest.mark.parametrize("truths", [0, 1, 5, 8, 13])
def test_what_the_head_begins_with(truths):
    generator = torch.Generator().manual_seed(truths)
    centres = to_centres(boxes_of(generator, truths) / WHWH)
    draws = draw(8, truths, generator)
    found = noisy_boxes(centres, draws, 2.0)
    assert found.x0.shape == found.x.shape == (8, 4)
    kept = found.chosen[found.chosen >= 0]
    assert len(kept) == min(truths, 8) and torch.equal(kept, kept.sort().values)
    torch.testing.assert_close(found.x0[: len(kept)], (centres[kept] * 2 - 1) * 2)
    if not truths:
        torch.testing.assert_close(found.x0[0], torch.tensor([0.0, 0, 2, 2]))
    clean = noisy_boxes(centres, draws._replace(t=torch.tensor(0), noise=torch.zeros(8, 4)), 2.0)
    torch.testing.assert_close(
        start_boxes(clean, WHWH, 2.0)[: len(kept)],
        boxes_of(torch.Generator().manual_seed(truths), truths)[kept],
        rtol=1e-3,
        atol=0.1,
    )
    wide = noisy_boxes(centres, draws, 2.0, (1.0, 1.0, 3.0, 1.0))
    scale = (wide.x - clean.x0 * schedule.at("sqrt_alphas_cumprod", draws.t))[:, 2]
    want = 3 * draws.noise[:, 2].double() * schedule.at("sqrt_one_minus_alphas_cumprod", draws.t)
    torch.testing.assert_close(scale, want)


# ---------------------------------------------------------------- the matcher


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 12), st.booleans())
def test_every_truth_is_served_where_there_are_proposals_enough(seed, truths, proposals, twins):
    generator = torch.Generator().manual_seed(seed)
    boxes, wanted = boxes_of(generator, proposals), boxes_of(generator, truths)
    if twins and truths > 1:
        wanted[1] = wanted[0]
    labels = torch.randint(0, 3, (truths,), generator=generator)
    found = match(torch.randn(proposals, 3, generator=generator), boxes, labels, wanted, WHWH)
    assert found.truth.shape == (proposals,) and int(found.truth.max()) < truths and int(found.truth.min()) >= -1
    assert found.best.shape == (truths,) and found.cost.shape == (proposals, truths)
    if truths:
        served = found.truth[found.truth >= 0].unique()
        assert 1 <= len(served) <= min(truths, proposals)
        many = found.iou.topk(min(5, proposals), dim=0).values.sum(dim=0).int().clamp(min=1)
        assert int((found.truth >= 0).sum()) <= int(many.sum()) + truths  # one may lose its own and take another
    else:
        assert (found.truth == -1).all()


def test_clear_boxes_go_to_their_truths():
    wanted = torch.tensor([[0.0, 0, 40, 40], [100, 100, 150, 150]])
    boxes = torch.tensor([[101.0, 100, 150, 151], [290, 290, 299, 299], [1, 0, 40, 41], [0, 1, 40, 40]])
    logits = torch.tensor([[-4.0, 2], [0, 0], [2, -4], [1, -4]])
    found = match(logits, boxes, torch.tensor([0, 1]), wanted, WHWH)
    assert found.truth.tolist() == [1, -1, 0, -1]  # one each: the overlaps of the first add up to 1.9
    assert found.best.tolist() == [2, 0]
    assert float(found.cost[1].min()) > 10_000 and float(found.cost[2, 1]) > 100 > float(found.cost[2, 0])


# ---------------------------------------------------------------- losses


def example(classes=3, stages=2):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(stages, 2, 10, classes, generator=generator)
    boxes = torch.stack([torch.stack([boxes_of(generator, 10) for _ in range(2)]) for _ in range(stages)])
    targets = [
        {"labels": torch.tensor([0, 2]), "boxes": boxes_of(generator, 2), "whwh": WHWH},
        {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4), "whwh": WHWH},
    ]
    return logits.requires_grad_(), boxes.requires_grad_(), targets


def test_losses_of_every_stage_with_their_names():
    logits, boxes, targets = example()
    found = set_losses(logits, boxes, targets)
    assert set(found) == {"loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_bbox_0", "loss_giou_0"}
    last = set_losses(logits[1:], boxes[1:], targets)
    assert all(torch.equal(last[name], found[name]) for name in last)
    torch.stack(list(found.values())).sum().backward()
    assert (logits.grad != 0).all() and boxes.grad[:, 0].any() and not boxes.grad[:, 1].any()


def test_nothing_to_find_teaches_the_classes_alone():
    logits, boxes, targets = example()
    found = set_losses(logits, boxes, [targets[1], targets[1]])
    assert found["loss_bbox"].item() == found["loss_giou"].item() == 0
    want = 2 * focal(logits[-1], torch.zeros_like(logits[-1])).sum()
    torch.testing.assert_close(found["loss_ce"], want)
    torch.stack(list(found.values())).sum().backward()
    assert not boxes.grad.any() and logits.grad.any()


def test_a_perfect_set_costs_next_to_nothing():
    wanted = torch.tensor([[0.0, 0, 40, 40], [100, 100, 150, 150]])
    logits = torch.full((1, 1, 3, 3), -20.0)
    logits[0, 0, 0, 1] = logits[0, 0, 1, 2] = 20
    boxes = torch.cat((wanted, torch.tensor([[180.0, 0, 190, 10]])))[None, None]
    found = set_losses(logits, boxes, [{"labels": torch.tensor([1, 2]), "boxes": wanted, "whwh": WHWH}])
    assert all(float(value) == pytest.approx(0, abs=1e-6) for value in found.values())


def test_options_of_the_losses():
    logits, boxes, targets = example()
    quality = torch.zeros(2, 2, 10, requires_grad=True)
    found = set_losses(logits, boxes, targets, LossOptions(quality_weight=2.0), quality)
    plain = set_losses(logits, boxes, targets)
    assert set(found) == set(plain) | {"loss_quality", "loss_quality_0"}
    assert found["loss_quality"].item() == pytest.approx(2 * 0.6931, rel=1e-3)  # a chance of one half for any IoU
    other = set_losses(logits, boxes, targets, LossOptions(class_loss="qfl", iou_power=1.0))
    assert other["loss_ce"] != plain["loss_ce"] and other["loss_bbox"] != plain["loss_bbox"]


@settings(max_examples=15)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0, 3))
def test_weights_by_overlap_have_a_mean_of_one(ious, power):
    found = iou_weights(torch.tensor(ious, dtype=torch.float64), power)
    assert float(found.mean()) == pytest.approx(1)
    assert (iou_weights(torch.tensor(ious), 0.0) == 1).all()


def test_focal_losses_are_least_where_they_should_be():
    logits = torch.linspace(-8, 8, 1601)
    for y in (0.2, 0.7):
        best = quality_focal(logits, torch.full_like(logits, y), 2.0).argmin()
        assert float(logits[best].sigmoid()) == pytest.approx(y, abs=0.01)
    for y in (0.0, 1.0):
        found = focal(logits, torch.full_like(logits, y))
        assert (found.diff() < 0).all() if y else (found.diff() > 0).all()


# ---------------------------------------------------------------- a training step


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        {**WHOLE, "label_diffusion": "d3pm_mask", "cls_loss_type": "qfl", "box_loss_iou_weight_power": 0.5},
        {
            **WHOLE,
            "label_state": "sample",
            "label_diffusion": "d3pm_mask",
            "d3pm_vb_weight": 0.1,
            "geo_bias_type": "mlp",
        },
    ],
)
def test_one_step_teaches_every_weight_that_learns(config):
    model = made(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # last layers that begin with 0 hide those before them
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    images = [torch.randint(0, 256, (3, *size), generator=generator).float() for size in ((160, 200), (128, 150))]
    targets = [{"labels": torch.tensor([0, 1, 2]), "boxes": boxes_of(generator, 3)}]
    targets.append({"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)})
    found = model.training_losses(images, targets, generator=torch.Generator().manual_seed(1))
    assert all(torch.isfinite(value) for value in found.values())
    assert ("loss_label" in found) == (config.get("d3pm_vb_weight", 0) > 0)
    assert ("loss_quality_0" in found) == config.get("quality_head", False)
    torch.stack(list(found.values())).sum().backward()
    still = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert still - frozen <= {f"backbone.fpn_output{level}.{kind}" for level in (4, 5) for kind in ("weight", "bias")}
    again = model.training_losses(images, targets, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(again[name], value) for name, value in found.items())


# ---------------------------------------------------------------- fewer steps


def head_over(model, size=(64, 96)):
    maps = model.backbone(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(3)))
    whwh = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
    return model.head_call(maps, whwh), whwh


def test_a_teacher_has_nothing_to_teach_itself():
    call, whwh = head_over(made())
    start = torch.randn(12, 4, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        teacher = distill.trajectory(call, whwh, start, 4, 2.0)
    student = distill.trajectory(call, whwh, start, 2, 2.0)
    same = distill.distill_terms(teacher, teacher, whwh, 5)
    assert float(same.boxes) == pytest.approx(0, abs=1e-5)
    terms = distill.distill_terms(student, teacher, whwh, 5)
    assert terms.boxes.item() > 0 and [len(index) for index in terms.chosen] == [5, 5]
    assert float(distill.distill_terms(teacher[:2], student, whwh, 99).classes) > 0
    assert "no multiple" in sentence_of(distill.distill_terms, teacher, teacher[:3], whwh, 5)
    assert all(not step.x.requires_grad for step in student)


def test_only_boxes_with_an_area_are_chosen():
    boxes = torch.tensor([[0.0, 0, 0, 9], [1, 1, 5, 5], [2, 2, 4, 4], [3, 3, 9, 3]])
    logits = torch.tensor([[9.0], [1], [2], [8]])
    assert distill.chosen_boxes(logits, boxes, 1).tolist() == [2]
    assert distill.chosen_boxes(logits, boxes, 5).tolist() == [1, 2]


def test_a_straight_path_has_its_own_target():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    ends = [schedule.diffuse(x0, t, noise) for t in (900, 400)]
    torch.testing.assert_close(distill.progressive_target(ends[0], 900, ends[1], 400), x0)


def test_a_network_is_consistent_with_itself_at_one_time():
    call, whwh = head_over(made())
    generator = torch.Generator().manual_seed(5)
    x0, noise = (torch.randn(12, 4, generator=generator) for _ in range(2))
    terms, after = distill.consistency_terms(call, call, call, x0.clamp(-2, 2), noise, (649, 599), whwh, 2.0, 6)
    assert terms.boxes.requires_grad and terms.boxes.item() > 0 and after.shape == (12, 4)
