"""What DiffusionDet learns: the task, distances from a Teacher, fewer steps of the sampler, extensions of a network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusiondet_toys import TINY, WHOLE, made, sentence_of
from rectangle_toys import asked, drawn, shapes_batch

from pqk.compress.distill import weighed
from pqk.compress.train import teacher as training
from pqk.compress.train.loop import Schedule, Trainer, parameter_groups
from pqk.errors import PqkError
from pqk.families.checkpoint import load_model, save_model
from pqk.families.detection import scoring
from pqk.families.diffusiondet import learning
from pqk.families.diffusiondet.build import build
from pqk.families.registry import family
from pqk.settings.distill import Watched

BATCHED = {**TINY, "norm": "batch"}
OPTIONS = {"temperature": 2.0, "sampler": {"best": 8, "classes": 1.0, "boxes": 1.0}}


def shaken(config=None, seed=0):
    """A network none of whose outputs are all alike."""
    model = made(config, seed)
    random = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
        for stage in model.head.head_series:
            stage.class_logits.bias.zero_()  # as likely as not, or nothing would be sure
    return model


def ran(model, batch, watched=None):
    with torch.no_grad():
        return learning.forward(learning.parts(model), batch, watched)


def task(model, batch):
    return learning.losses(learning.forward(learning.parts(model), batch), batch, None, ("task",), {})["task"]


def stepped(model, loss_of, steps=30, rate=3e-3):
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# ---------------------------------------------------------------- the task


@pytest.mark.parametrize("config", [TINY, BATCHED], ids=["frozen", "batch"])
def test_the_task_falls_on_one_batch(config):
    batch = shapes_batch(2)
    losses = stepped(made(config).train(), lambda model: task(model, batch), steps=20, rate=5e-3)
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < 0.8 * losses[0], losses


def test_norms_that_learned_give_the_same_when_they_are_frozen(tmp_path):
    batch, model = shapes_batch(2), made(BATCHED).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stepped(model, lambda model: task(model, batch), steps=4)
    moved = [name for name, value in model.state_dict().items() if "norm" in name and not value.equal(before[name])]
    assert {name.rpartition(".")[2] for name in moved} >= {"weight", "bias", "running_mean", "running_var"}
    model.eval()
    want = ran(model, batch)
    save_model(model, tmp_path)
    back = load_model(tmp_path)
    assert back.config["norm"] == "frozen" and learning.same_network(back.config, model.config)
    found = ran(back, batch)
    for name in ("logits", "boxes"):
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-4)
    frozen = [name for name, _ in model.named_parameters() if name not in dict(back.named_parameters())]
    assert frozen and all(".norm." in name for name in frozen)


@pytest.mark.parametrize("state", ["dist", "sample"])
def test_networks_with_extensions_learn(state):
    batch, model = shapes_batch(2), shaken({**WHOLE, "label_state": state, "label_diffusion": "d3pm_mask"}).train()
    before = copy.deepcopy(model.state_dict())
    losses = stepped(model, lambda model: task(model, batch), steps=3)
    assert np.isfinite(losses).all()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    for part in ("quality_logit", "label_embed", "geo_feat", "geo_bias"):
        assert any(part in name for name in changed), part


def test_images_without_objects_teach_too():
    batch = shapes_batch(2)
    for one in batch.pictures:
        one.counted[:] = False
    model = shaken().train()
    loss = task(model, batch)
    loss.backward()
    assert torch.isfinite(loss) and model.head.head_series[-1].class_logits.weight.grad.abs().sum() > 0


def test_a_set_of_more_classes_is_refused():
    said = sentence_of(learning.forward, learning.parts(made()), shapes_batch(1, classes=("a", "b", "c", "d")))
    assert "4 classes" in said and "tells 3 apart" in said


def test_the_exported_graphs_can_be_trained():
    """As quantizers prepare them: the head gives its last stage alone."""
    from pqk.families.diffusiondet.graphs import parts_of

    batch, model = shapes_batch(2), shaken(WHOLE)
    aim, out = ran(model, batch), learning.forward(parts_of(model), batch)
    assert out["logits"].shape[0] == 1 < aim["logits"].shape[0]
    torch.testing.assert_close(out["logits"][-1], aim["logits"][-1], rtol=1e-3, atol=1e-4)  # sums in another order
    found = learning.losses(out, batch, aim, ("task", "imitation"), {})
    same = learning.losses(aim, batch, aim, ("imitation",), {})["imitation"]
    torch.testing.assert_close(found["imitation"].detach(), same, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(found["task"])
    weighed(found, {"task": 1.0, "imitation": 1.0}).backward()
    assert model.head.head_series[0].linear1.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- distances from a Teacher


def test_what_a_network_is_from_itself_and_from_another():
    batch, models = shapes_batch(2), [shaken(seed=seed) for seed in (0, 1)]
    one, other = (ran(model, batch, True) for model in models)
    options = {**OPTIONS, "bridges": learning.features(*models, 0)[2]}
    terms = ("kl", "imitation", "features")
    same, apart = (learning.losses(one, batch, aim, terms, options) for aim in (one, other))
    assert float(same["kl"]) == pytest.approx(0, abs=1e-6) and float(same["features"]) == 0
    assert all(float(apart[name]) > float(same[name]) + 1e-4 for name in terms)
    assert learning.shift(one, one, batch) == 0 < learning.shift(one, other, batch)
    each = learning.distance(one, other, {})
    assert np.mean(each) == pytest.approx(float(apart["imitation"]), rel=1e-5) and len(each) == 2
    assert learning.same_network(models[0].config, {**models[1].config, "norm": "batch"})
    assert not learning.same_network(models[0].config, {**models[1].config, "nheads": 2})


@pytest.mark.parametrize("term", ["kl", "imitation", "features", "probe"])
def test_gradients_reach_the_student_alone(term):
    batch, student, teacher = shapes_batch(1), shaken(seed=1), shaken(seed=0)
    watched = True if term == "features" else None
    aim = learning.forward(learning.parts(teacher), batch, watched)
    out = learning.forward(learning.parts(student), batch, watched)
    options = {**OPTIONS, "bridges": learning.features(teacher, student, 0)[2]}
    learning.losses(out, batch, None if term == "probe" else aim, (term,), options)[term].backward()
    assert student.backbone.fpn_lateral5.weight.grad.abs().sum() > 0
    if term in ("kl", "imitation"):
        assert all(p.grad is None for p in teacher.parameters())


def test_a_student_nears_its_teacher():
    batch, teacher, student = shapes_batch(2), shaken(seed=0), shaken(seed=1)
    aim = ran(teacher, batch)

    def loss(model):
        return learning.losses(learning.forward(learning.parts(model), batch), batch, aim, ("imitation",), {})[
            "imitation"
        ]

    losses = stepped(student, loss, steps=12, rate=5e-3)
    assert losses[-1] < 0.9 * losses[0]


def test_maps_of_other_widths_are_compared_through_bridges():
    batch, teacher, student = shapes_batch(1), shaken(), shaken({**TINY, "hidden_dim": 8, "nheads": 2})
    *watched, bridges = learning.features(teacher, student, 3)
    assert sorted(bridges) == ["p2", "p3", "p4", "p5"] and learning.features(teacher, teacher, 3)[2].keys() == set()
    again = learning.features(teacher, student, 3)[2]
    assert all(torch.equal(x, y) for x, y in zip(bridges.parameters(), again.parameters(), strict=True))
    aim = ran(teacher, batch, watched[0])
    out = learning.forward(learning.parts(student), batch, watched[1])
    learning.losses(out, batch, aim, ("features",), {"bridges": bridges})["features"].backward()
    assert all(bridge.weight.grad.abs().sum() > 0 for bridge in bridges.values())


# ---------------------------------------------------------------- fewer steps


def sampled(student, teacher, batch, steps=(1, 4), **weights):
    options = {"sampler": {**OPTIONS["sampler"], **weights}}
    aim = ran(teacher, batch, Watched("steps", steps[1]))
    out = learning.forward(learning.parts(student), batch, Watched("steps", steps[0]))
    return learning.losses(out, batch, aim, ("sampler",), options)["sampler"]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("state", [None, "dist", "sample"])
def test_equal_samplers_are_nothing_apart(steps, state):
    extra = {"label_state": state, "label_diffusion": "d3pm_mask"} if state else {}
    model, batch = shaken({**TINY, **extra}), shapes_batch(1)
    boxes = sampled(model, model, batch, (steps, steps), classes=0.0).detach()
    assert float(boxes) == pytest.approx(0, abs=1e-5)


def test_classes_of_equal_samplers_are_at_their_least():
    """The cross-entropy of a network with itself is the entropy of its scores: no other network is nearer."""
    model, other, batch = shaken(), shaken(seed=1), shapes_batch(1)
    logits = ran(model, batch, Watched("steps", 1))["sampler"][0][-1].logits
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none")
    own, apart = (sampled(student, model, batch, (1, 1), boxes=0.0, best=100).detach() for student in (model, other))
    assert float(own) == pytest.approx(float(entropy.sum(1).mean()), rel=0.05) and float(apart) > float(own) + 0.01


def test_the_teacher_gives_its_steps_alone_and_each_image_its_own():
    model, batch = shaken(), shapes_batch(2)
    found = ran(model, batch, Watched("steps", 4))
    assert set(found) == {"sampler", "whwh"} and [len(steps) for steps in found["sampler"]] == [4, 4]
    first, second = (steps[0].boxes for steps in found["sampler"])
    assert not torch.equal(first, second)
    again = ran(model, batch, Watched("steps", 2))["sampler"]
    assert torch.equal(again[0][0].boxes, first)  # the same noise, however many steps


def test_steps_that_are_no_multiple_are_refused():
    assert "no multiple" in sentence_of(sampled, shaken(), shaken(), shapes_batch(1), (2, 3))


def test_a_sampler_of_one_step_learns():
    batch, teacher, student = shapes_batch(1), shaken(seed=0), shaken(seed=0)
    losses = stepped(student, lambda model: sampled(model, teacher, batch, (1, 4)), steps=8, rate=1e-3)
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in teacher.parameters())
    assert student.backbone.fpn_lateral5.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("steps", [0, 1])
def test_a_task_may_begin_where_a_sampler_does(steps):
    model, batch = shaken(), shapes_batch(2)
    out = learning.forward(learning.parts(model), batch, Watched("steps", steps, "noise"))
    batch.held = True
    held = learning.forward(learning.parts(model), batch)
    assert torch.equal(out["boxes"], held["boxes"]) and ("sampler" in out) == bool(steps)
    batch.held = False
    assert not torch.equal(out["boxes"], learning.forward(learning.parts(model), batch)["boxes"])
    assert float(learning.losses(out, batch, None, ("task",), OPTIONS)["task"].detach()) > 0


def inconsistent(student, teacher, batch, **options):
    aim = ran(teacher, batch, Watched("consistency", 5))
    out = learning.forward(learning.parts(student), batch, Watched("consistency", 1))
    asked = {"kind": "consistency", "teacher_steps": 5, **OPTIONS["sampler"], **options}
    return learning.losses(out, batch, aim, ("sampler",), {"sampler": asked})["sampler"]


@pytest.mark.parametrize("state", [None, "dist", "sample"])
def test_consistency_is_learned_by_the_student_alone(state):
    extra = {"label_state": state, "label_diffusion": "d3pm_mask"} if state else {}
    batch, teacher, student = shapes_batch(2), shaken({**TINY, **extra}), shaken({**TINY, **extra})
    losses = stepped(student, lambda model: inconsistent(model, teacher, batch), steps=8, rate=1e-3)
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in teacher.parameters())
    assert student.backbone.fpn_lateral5.weight.grad.abs().sum() > 0


def test_what_always_finds_the_same_is_consistent(monkeypatch):
    """Boxes of a network that finds the same at every time and from every start are nothing apart."""
    batch, model = shapes_batch(2), shaken()
    logits, corners = torch.randn(model.sizes.proposals, 3), torch.tensor([1.0, 2.0, 9.0, 12.0])
    boxes = corners.repeat(model.sizes.proposals, 1)
    monkeypatch.setattr(learning, "_heads", lambda head, maps, whwh: [lambda *given: (logits, boxes)] * len(whwh))
    assert float(inconsistent(model, model, batch, classes=0.0).detach()) == pytest.approx(0, abs=1e-5)


def test_consistency_can_do_without_the_truth():
    batch = shapes_batch(2, classes=())
    batch.truthful = False
    assert float(inconsistent(shaken(), shaken(seed=1), batch).detach()) > 0


# ---------------------------------------------------------------- scores


def test_held_out_images_are_scored_as_a_set_whatever_the_batches():
    model, batches = shaken(), drawn(asked(pairs=5))
    found = []
    for size in (2, 5):
        rows = [
            row
            for b in batches.held_out(batch=size)
            for of_image in learning.score(ran(model, b), b)
            for row in of_image
        ]
        assert len(rows) == 5 and len({row["matches"]["image"] for row in rows}) == 5
        found.append(learning.complete(rows))
    assert [row["ap"] for row in found[0]] == pytest.approx([row["ap"] for row in found[1]], abs=1e-3)
    floor = [row for b in batches.held_out() for of_image in learning.floor(b) for row in of_image]
    assert len(floor) == 5 and all(row["ap"] is not None for row in learning.complete(floor))


def test_photographs_take_the_teachers_detections_as_their_truth():
    model, batch = shaken(), shapes_batch(2, classes=(), held=True)
    batch.truthful = False
    assert "no ground truth" in sentence_of(batch.targets)
    out = ran(model, batch)
    taught = learning.as_truth(batch, out, model.config)
    counts = [len(one.boxes) for one in taught.pictures]
    assert (
        sum(counts) and taught.truthful and not batch.truthful and taught.classes == ("class 0", "class 1", "class 2")
    )
    rows = [row for of_image in learning.score(out, taught) for row in of_image]
    assert scoring.summarise(rows)["ap"] == pytest.approx(100)
    assert all(learning.floor(taught))


def test_no_more_detections_than_coco_counts():
    model, batch = shaken({**TINY, "num_proposals": 150}), shapes_batch(1)
    assert max(len(found.scores) for found in learning.detections(ran(model, batch), batch)) <= 100


# ---------------------------------------------------------------- train_teacher: network, rates, init


def trainer_of(model, rates, weight_decay=0.0):
    schedule = Schedule(1, 1e-3, 1e-3, 0.0)
    return Trainer(
        model, schedule, device=torch.device("cpu"), weight_decay=weight_decay, clip_norm=1.0, ema=0.9, autocast=False,
        factors=rates,
    )  # fmt: skip


def test_rates_freeze_and_scale():
    start, moved = {}, {}
    for factor in (1.0, 25.0):
        model = shaken(WHOLE)
        start = {name: value.detach().clone() for name, value in model.named_parameters()}
        trainer = trainer_of(model, {"^backbone": 0.0, "quality|geo_feat": factor})
        trainer.run(lambda module, step, share: task(module, shapes_batch(1)))
        moved[factor] = {name: (value.detach() - start[name]).abs() for name, value in model.named_parameters()}
    for name in start:
        slow, fast = moved[1.0][name], moved[25.0][name]
        if name.startswith("backbone"):
            assert not slow.any() and not fast.any(), name
        elif "quality" in name or "geo_feat" in name:
            step = slow > 1e-4  # of AdamW's first step, which is the rate for every weight with a gradient
            assert not step.any() or torch.allclose(fast[step], 25 * slow[step], rtol=0.02), name
        else:
            torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-6)
    assert any(moved[25.0][name].max() > 0.02 for name in start if "quality" in name)


def test_the_first_pattern_counts():
    model = made()
    groups = parameter_groups(model, 0.1, {"class_logits": 3.0, "head": 0.0})
    factors = {group["factor"] for group in groups if group["params"]}
    assert factors == {1.0, 3.0}
    learned = {name for name, p in model.named_parameters() if p.requires_grad and "head" in name}
    assert learned and all("class_logits" in name for name in learned)


def spec_of(monkeypatch, **changes):
    settings = family("diffusiondet").settings_part()
    monkeypatch.setattr(settings, "NAMED", {**settings.NAMED, "toy-detector": BATCHED})
    return asked(
        pairs=2, size=64, steps=1, model="toy-detector", learning_rate=1e-4, final_rate=1e-6, warmup=0.0, **changes
    )


def test_a_quality_head_is_added_to_a_trained_network(monkeypatch, tmp_path):
    first = shaken()
    save_model(first, tmp_path / "first")
    network = {"norm": "frozen", "quality_head": True, "label_state": "dist", "label_diffusion": "d3pm_mask"}
    spec = spec_of(monkeypatch, network=network, rates={"^backbone": 0.0, "quality": 25.0})
    outcome, _ = training.train_teacher(spec, tmp_path / "out", device="cpu", init=str(tmp_path / "first"))
    found = load_model(tmp_path / "out")
    assert outcome == "done" and found.sizes.stage.quality and found.config["label_state"] == "dist"
    was, now = first.state_dict(), found.state_dict()
    for name, value in was.items():
        if name.startswith("backbone"):
            torch.testing.assert_close(now[name], value.half().float(), rtol=0, atol=0)
        else:
            torch.testing.assert_close(now[name], value, rtol=2e-3, atol=2e-3)
    assert {name for name in now if name not in was}  # what was added


def test_another_network_is_no_beginning(monkeypatch, tmp_path):
    """Also where every weight would fit."""
    save_model(made({**TINY, "nheads": 2}), tmp_path / "heads")
    spec = spec_of(monkeypatch, network={"norm": "frozen", "quality_head": True})
    said = sentence_of(
        lambda: training.train_teacher(spec, tmp_path / "out", device="cpu", init=str(tmp_path / "heads"))
    )
    assert "another configuration" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rates": {"^bakbone": 0.0}}, "'^bakbone'"),
        ({"rates": {"": 0.0}}, "nothing to train"),
        ({"network": {"nheds": 2}}, "nheds"),
        ({"network": {"nheads": 3}}, "nheads"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(monkeypatch, tmp_path, changes, said):
    spec = spec_of(monkeypatch, **changes)
    assert said in sentence_of(lambda: training.train_teacher(spec, tmp_path / "out", device="cpu"))
    assert not (tmp_path / "out").exists()


def test_patterns_must_be_regular_expressions():
    with pytest.raises(ValueError, match="regular expressions"):
        asked(rates={"(": 1.0})


def test_settings_without_the_new_keys_keep_their_hash():
    assert not {"network", "rates"} & set(asked().model_dump(mode="json"))
    assert asked(rates={"head": 2.0}).model_dump(mode="json")["rates"] == {"head": 2.0}


def test_batch_norms_need_no_network_of_their_own():
    assert [name for name, _ in build(BATCHED).named_parameters() if ".norm." in name]
    with pytest.raises(PqkError, match="norm"):
        build({**TINY, "norm": "group"})
