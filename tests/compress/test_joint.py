"""The joint recipe: gates and what they cost, the price that shuts them, the cut, and a kill while they close."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from backends.base import QuantSpec, Source
from backends.exchange import export
from pqk.compress.cut.cost import Costs
from pqk.compress.cut.gates import Gate, Gated, Price, fold, kept_units, owners, shut, starting_logits
from pqk.compress.cut.units import cut
from pqk.compress.joint import GatePlan, Whole, close_gates, cut_gates, float_weights, names_in, phases
from pqk.compress.train import fit as fit_module
from pqk.compress.train.data import TrainingData
from pqk.compress.train.loop import Progress, Trainer
from pqk.errors import PqkError
from pqk.families.dust3r import cutting
from pqk.families.dust3r.batches import PicturePairs
from pqk.families.dust3r.learning import forward
from pqk.families.registry import family
from pqk.models import build_model
from pqk.recipe.request import count_parameters
from pqk.settings.joint import Joint, load_joint

SIZE = 32
DATA = TrainingData(family("dust3r"))
TINY = {
    "head_type": "linear",
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 2,
    "dec_embed_dim": 32,
    "dec_depth": 1,
    "dec_num_heads": 2,
}
SMALL = {
    "samples": {"pairs": 1, "size": SIZE},
    "round_to": 16,
    "flops_cut": 0.1,
    "refit": False,
    "gates.epochs": 2,
    "train.epochs": 3,
    "train.steps_per_epoch": 3,
    "train.stages": [{"size": SIZE, "batch": 1, "until": 1.0}],
    "train.ema": 0.5,
    "train.validation": {"size": SIZE, "pairs": 1},
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher():
    model = build_model("dust3r", TINY, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():  # depths around e - 1, as of a trained model: their median must not be 0
        for head in (model.downstream_head1, model.downstream_head2):
            head.proj.bias[2 * 256 : 3 * 256] = 1.0
    return model


def small(**changes) -> Joint:
    return load_joint(overrides={**SMALL, **changes})


@pytest.fixture(scope="module")
def plan(teacher):
    """Gates of units in a random order of importance: everything but the training itself needs no gradients."""
    return planned(teacher, small())


def planned(teacher, spec: Joint) -> GatePlan:
    return GatePlan(teacher, spec, DATA, seed=0, importance=_Random(5))


class _Random(dict):
    """Importances drawn when they are asked for."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __missing__(self, name: str) -> torch.Tensor:
        self[name] = torch.rand(2 if name.endswith("attn") else 128, generator=self.generator)
        return self[name]


def modules(teacher) -> nn.ModuleDict:
    return nn.ModuleDict({name: graph.module for name, graph in copy.deepcopy(teacher).graphs(SIZE, SIZE).items()})


def names_of(teacher) -> dict[str, dict[str, str]]:
    return names_in(teacher, {name: graph.module for name, graph in teacher.graphs(SIZE, SIZE).items()})


def plain(model, pairs: PicturePairs) -> dict[str, torch.Tensor]:
    """Both orders through the model itself instead of its graphs."""
    return cutting.finish(model, cutting.begin(model, pairs), pairs)


def put(gated: Gated, logits: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for gate, wanted in zip(gated.gates, logits, strict=True):
            gate.moved.copy_((wanted - gate.start) / gate.pace)


def masks(plan: GatePlan, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layout in plan.layouts:
        drawn = torch.rand(len(layout.flops), generator=generator) < 0.5
        found[layout.slot.name] = torch.cat([torch.ones(1, dtype=torch.bool), drawn])
    return found


def test_every_unit_has_one_factor_and_the_most_important_ones_none(plan):
    assert {layout.slot.kind for layout in plan.layouts} == {"heads", "ffn"}
    for layout in plan.layouts:
        for group in layout.slot.groups:
            units = torch.cat(layout.units[group.name])
            assert sorted(units.tolist()) == list(range(group.units))
            importance = plan.importance[group.name][units]
            assert torch.equal(importance, importance.sort(descending=True).values)
        for owner in owners(layout).values():
            assert sorted(set(owner.tolist())) == list(range(1 + len(layout.flops)))
    both = next(layout for layout in plan.layouts if layout.slot.name == "dec_blocks.0.heads")
    assert set(both.units) == {"dec_blocks.0.attn", "dec_blocks.0.cross_attn"}  # they lose as many heads


@given(seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gates_of_0_and_1_cost_what_the_cut_network_costs(teacher, plan, seed):
    stays = masks(plan, seed)
    gated = plan.into(modules(teacher), names_of(teacher))
    put(gated, [torch.where(stays[layout.slot.name][1:], 60.0, -60.0) for layout in plan.layouts])
    units, keep = kept_units(plan.layouts, stays)
    after = Costs(teacher, plan.slots, cutting)(units)
    assert float(gated.cut().detach()) == pytest.approx(1 - after.flops / plan.total, abs=1e-6)
    assert count_parameters(cut(teacher, plan.slots, units, keep, cutting)) == after.params


def test_shut_gates_compute_what_the_cut_network_does(teacher, plan):
    """Gates of 0, 1 and between, in the prepared modules, folded into the weights, and cut out."""
    stays = masks(plan, 3)
    parts = modules(teacher)
    gated = plan.into(parts, names_of(teacher))
    generator = torch.Generator().manual_seed(1)
    part = [torch.randn(len(layout.flops), generator=generator) for layout in plan.layouts]
    put(
        gated,
        [torch.where(stays[lay.slot.name][1:], open_, -90.0) for lay, open_ in zip(plan.layouts, part, strict=True)],
    )
    folded = build_model(teacher.family, teacher.config, float_weights(parts, names_of(teacher), teacher)).eval()
    fold(folded, plan.layouts, gated.factors())
    pairs = PicturePairs(torch.rand(1, 2, 3, SIZE, SIZE) * 2 - 1)
    with torch.no_grad():
        want = forward(parts, pairs)
        whole = plain(teacher, pairs)
        for network in (folded, cut(folded, plan.slots, *kept_units(plan.layouts, stays), cutting).eval()):
            got = plain(network, pairs)
            for name, value in want.items():
                torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(want["pts3d_1"], whole["pts3d_1"], rtol=1e-3)


def test_a_copy_has_gates_of_its_own(teacher, plan):
    parts = modules(teacher)
    gated, encoder = plan.into(parts, names_of(teacher)), parts["encoder"]
    image = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        before = encoder(image)
        twin = copy.deepcopy(encoder)
        put(gated, [torch.full_like(gate.start, -50.0) for gate in gated.gates])
        assert torch.equal(twin(image), before)
        assert not torch.allclose(encoder(image), before)


def test_open_gates_leave_a_prepared_module_as_it_is(teacher, plan, tmp_path):
    pytest.importorskip("nncf")
    pytest.importorskip("openvino")
    from backends.openvino.nncf import NNCFQuantizer

    graph = teacher.graphs(SIZE, SIZE)["encoder"]
    onnx = export(graph.module, graph.inputs, graph.output_names, tmp_path / "encoder.onnx")
    source = Source("encoder", graph.module, graph.inputs, graph.output_names, onnx)
    images = [{"image": torch.rand(1, 3, SIZE, SIZE).numpy()} for _ in range(2)]
    spec = QuantSpec(calibration_samples=2, output_dir=tmp_path, weight_range="half")
    prepared = NNCFQuantizer().prepare(source, spec, images)
    image = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        before = prepared(image)
        parts = nn.ModuleDict({**modules(teacher), "encoder": prepared})
        gated = plan.into(parts, names_of(teacher))
        put(gated, [torch.full_like(gate.start, 50.0) for gate in gated.gates])
        assert torch.equal(prepared(image), before)
        put(gated, [torch.full_like(gate.start, -50.0) for gate in gated.gates])
        assert not torch.allclose(prepared(image), before)
    names = float_weights(parts, names_of(teacher), teacher)
    assert names.keys() == teacher.state_dict().keys()


@given(share=st.floats(0.001, 0.2), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_lowest_gates_go_until_the_share_is_reached(plan, share, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(len(layout.flops), generator=generator) for layout in plan.layouts]
    stays = shut(plan.layouts, logits, plan.total, share)
    gone: list[float] = []
    for layout, found in zip(plan.layouts, logits, strict=True):
        mask = stays[layout.slot.name]
        assert bool(mask[0])
        kept, shut_ = found[mask[1:]], found[~mask[1:]]  # units of one layer cost the same
        assert not len(kept) or not len(shut_) or float(shut_.max()) <= float(kept.min())
        gone += layout.flops[~mask[1:]].tolist()
    assert sum(gone) >= share * plan.total
    assert all(sum(gone) - flops < share * plan.total for flops in gone)  # none of them went in vain


def test_a_cut_that_cannot_be_reached_is_told_before_training(teacher):
    with pytest.raises(PqkError, match=r"^joint.flops_cut 0.8 cannot be reached: all units with gates together are \d"):
        planned(teacher, small(flops_cut=0.8))


def test_the_price_holds_the_share_and_gates_separate():
    """Noisy losses sum(h (1 - z)^2) / 2, h over decades: the cheap ones are shut, whatever the loss is counted in."""
    generator = torch.Generator().manual_seed(0)
    flops = torch.full((300,), 1 / 600)
    pull = torch.exp(2 * torch.randn(300, generator=generator))
    spec = load_joint().gates
    for unit in (1e-5, 1e-3):
        gate = Gate(torch.full((300,), math.log(spec.start / (1 - spec.start))), spec.rate / 1e-4)
        price, aim = Price(spec.penalty, spec.dual_rate), 0.15
        optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(150):
            gate.slope.fill_(spec.slope ** (step / 150))
            z = gate()[1:]
            cut_share = ((1 - z) * flops).sum()
            target = 0.05 + (aim - 0.05) * min(1.0, step / 150 / spec.ramp)
            noise = 0.3 * torch.randn(300, generator=generator) * pull.sqrt()
            loss = unit * (0.5 * pull * (1 - z).square() + noise * z).sum() + price(cut_share, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        z = gate()[1:].detach()
        assert float(((1 - z) * flops).sum()) == pytest.approx(aim, abs=0.015)
        assert float(((z > 0.05) & (z < 0.95)).float().mean()) < 0.1
        chosen, best = pull[z < 0.5], pull.sort().values[: int((z < 0.5).sum())]
        assert float(chosen.sum()) < 1.5 * float(best.sum())


def test_gates_start_by_their_worth(plan):
    logits = starting_logits(plan.layouts, 0.9, 2.0)
    every, worth = torch.cat(logits), torch.cat([layout.worth for layout in plan.layouts])
    assert torch.equal(every.argsort(), worth.argsort())
    assert float(every.max() - every.min()) == pytest.approx(2.0, abs=1e-5)
    assert float(torch.sigmoid(every.mean())) == pytest.approx(0.9, abs=1e-6)


class Killed(Exception):
    pass


def closed(teacher, folder, **more):
    plan = planned(teacher, small())
    fitted, gated, weights = close_gates(
        modules(teacher), names_of(teacher), plan, teacher, DATA, scratch=folder, **more
    )
    return fitted, gated, weights, plan


def test_gates_close_and_a_killed_run_ends_as_an_undisturbed_one(teacher, tmp_path, monkeypatch):
    fitted, gated, weights, plan = closed(teacher, tmp_path / "whole")
    assert (fitted.steps, len(fitted.history)) == (6, 3)
    moved = [gate.moved.detach().abs().max() for gate in gated.gates]
    assert all(float(value) > 0 for value in moved)
    assert any(not torch.equal(weights[name], value) for name, value in teacher.state_dict().items())
    network, report = cut_gates(teacher, weights, plan, gated)
    assert report.share >= 0.1 and count_parameters(network) == report.params_after < report.params_before
    assert report.gates == sum(len(layout.flops) for layout in plan.layouts)
    assert {entry.name for entry in report.removed} <= {slot.name for slot in plan.slots}

    class Careful(Trainer):
        def run(self, *args, **kwargs):
            return super().run(*args, **{**kwargs, "save_every_s": 0.0})

    monkeypatch.setattr(fit_module, "Trainer", Careful)

    def kill(progress) -> None:
        if progress.step == 5:
            raise Killed

    with pytest.raises(Killed):
        closed(teacher, tmp_path / "cut", report=kill)
    steps = []
    _, again, same, _ = closed(teacher, tmp_path / "cut", report=lambda p: steps.append(p.step))
    assert steps[0] == 5
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert all(torch.equal(a, b) for a, b in zip(gated.logits(), again.logits(), strict=True))


def test_two_phases_are_one_run():
    spec = load_joint()
    first, rest = phases(spec)
    assert first.steps + rest.epochs * rest.steps_per_epoch == spec.train.epochs * spec.train.steps_per_epoch
    assert first.final_rate == first.learning_rate == rest.learning_rate
    assert first.warmup * first.epochs == spec.train.warmup * spec.train.epochs and rest.warmup == 0
    steps, spent = spec.train.steps_per_epoch, 100.0
    history = [{"step": 0, "score": 1.0}, {"step": 10, "score": 3.0}]
    gates = Whole(spec, gates=True)(Progress(step=10, seconds=5.0, history=history))
    assert (gates.step, gates.history) == (10, history[-1:])  # worse and worse is what closing gates are
    late = Whole(spec, gates=False, seconds=spent)(Progress(step=10, seconds=5.0, history=history))
    assert (late.step, late.seconds) == (spec.gates.epochs * steps + 10, 105.0)
    assert late.share == pytest.approx(late.step / (spec.train.epochs * steps))
    assert [entry["step"] for entry in late.history] == [spec.gates.epochs * steps, late.step]


def test_wrong_settings_are_refused():
    values = load_joint().model_dump(mode="json")
    for section, name, value, message in (
        ("gates", "epochs", 10, "fewer gates.epochs than train.epochs"),
        ("train", "warmup", 0.4, "must end train.warmup, 0.4 of 10 epochs, before the 4 of gates.epochs do"),
        ("units", None, {"heads": False, "ffn": False}, "at least one of heads, ffn and inner"),
        ("flops_cut", None, 0.95, "less than 0.9"),
    ):
        changed = {**values, section: value if name is None else {**values[section], name: value}}
        with pytest.raises(ValidationError, match=message):
            Joint.model_validate(changed)
