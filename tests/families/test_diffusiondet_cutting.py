"""What can be cut from a detector: the smaller network computes what the whole one does without these units."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusiondet_toys import TINY, WHOLE, made, sentence_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pqk.compress.cut.cost import Costs
from pqk.compress.cut.gates import Gated, fold, kept_units, layouts_of, shut, starting_logits
from pqk.compress.cut.importance import norms
from pqk.compress.cut.sensitivity import kept
from pqk.compress.cut.student import make_student
from pqk.compress.cut.units import Slot, cut, groups_of, silenced, slots_of, weights_of
from pqk.compress.joint import GatePlan, close_gates, cut_gates, names_in
from pqk.compress.train.data import TrainingData
from pqk.families.diffusiondet import cutting
from pqk.families.diffusiondet.checkpoint import official
from pqk.families.diffusiondet.network.backbone import Norm
from pqk.families.diffusiondet.network.configs import NAMED, read_config
from pqk.families.registry import family
from pqk.models import build_model
from pqk.settings.distill import Distill, load_distill
from pqk.settings.joint import load_joint
from pqk.settings.prune import load_prune

pytest.importorskip("torch_pruning")

CONFIG = {**TINY, "num_heads": 3, "width_per_group": 8, "norm": "batch"}
FROZEN = {**CONFIG, "norm": "frozen"}
WIDTHS = ("ffn", "inner")
CONFIGS = Path(__file__).parents[2] / "configs" / "diffusiondet"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(config: dict[str, Any]) -> Any:
    """Random weights, norms and statistics, so that what a cut unit leaves behind would show."""
    model, generator = made(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in weights_of(model).items():
            if name.startswith(("backbone.", "head.")):
                weight.add_(torch.rand(weight.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return network(CONFIG)


@pytest.fixture(scope="module")
def slots(model) -> list[Slot]:
    return slots_of(model, {*WIDTHS, "block"}, 4, cutting)


@pytest.fixture(scope="module")
def costs(model, slots) -> Costs:
    return Costs(model, slots, cutting)


def outputs(model: Any) -> dict[str, Tensor]:
    """Classes, and corners in images, of the last stage."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(2, 3, 64, 96, generator=generator)
    boxes = torch.rand(2, 9, 4, generator=generator) * 40
    boxes[..., 2:] += boxes[..., :2] + 4
    with torch.no_grad():
        logits, refined, *_ = model(images, boxes, 500, whwh=torch.tensor([[96.0, 64, 96, 64]] * 2))
    return {"logits": logits[-1], "boxes": refined[-1] / 96}


def difference(one: Any, other: dict[str, Tensor]) -> float:
    found = outputs(one)
    return max(float((found[name] - value).abs().max()) for name, value in other.items())


def half(slots: list[Slot], seed: int = 0) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Half of the units of each width, drawn."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [slot for slot in slots if slot.kind in WIDTHS]
    plan = {slot.name: slot.sizes([0.5])[0] for slot in chosen}
    drawn = {group.name: torch.rand(group.units, generator=generator) for group in groups_of(chosen)}
    return plan, {name: units for slot in chosen for name, units in kept(slot, drawn, plan[slot.name]).items()}


# ---------------------------------------------------------------- configurations


def test_widths_of_stages_and_bottlenecks_can_differ() -> None:
    inner = [[3], [5, 2], [7], [4]]
    model = made({**TINY, "dim_feedforward": [24, 8], "dim_dynamic": [2, 4], "inner": inner})
    stages, bottom = model.head.head_series, model.backbone.bottom_up
    assert [stage.linear1.out_features for stage in stages] == [24, 8]
    assert [stage.inst_interact.inner for stage in stages] == [2, 4]
    assert bottom.res3[1].conv1.weight.shape[:2] == (2, 16) and bottom.res3[1].conv3.weight.shape[:2] == (16, 2)
    assert all(torch.isfinite(value).all() for value in outputs(model).values())
    plain = read_config(TINY)
    assert plain == read_config({**TINY, "inner": [[2], [4, 4], [8], [16]], "dim_dynamic": [4, 4]})
    assert made().state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dim_feedforward": [24]}, "dim_feedforward must be a whole number from 1 to 262144, or a list of 2"),
        ({"dim_dynamic": [4, 0]}, "dim_dynamic must be a whole number from 1 to 262144, or a list of 2 (num_heads)"),
        ({"dim_dynamic": "4"}, "dim_dynamic must be a whole number from 1 to 262144, got '4'"),
        ({"inner": [[2], [4], [8], [16]]}, "inner must be 4 lists of 1, 2, 1, 1 (blocks) whole numbers from 1 to"),
        ({"inner": 8}, "or null, got 8"),
        ({"inner": [[2], [4, 4], [8], ["16"]]}, "inner must be 4 lists"),
    ],
)
def test_a_wrong_width_names_the_key(change, sentence) -> None:
    assert sentence in sentence_of(read_config, {**TINY, **change})


def test_a_network_that_loses_nothing_is_the_same() -> None:
    for config in (*NAMED.values(), CONFIG, WHOLE):
        assert read_config(cutting.smaller(config, {})) == read_config(config)


def test_the_shapes_of_a_file_tell_its_widths(model, slots) -> None:
    plan, keep = half([slot for slot in slots if not slot.name.endswith("res4.0.inner")])
    small = cut(model, slots, plan, keep, cutting)
    found = official({"model": small.state_dict()})
    assert found is not None
    config = {**found[0], **{key: CONFIG[key] for key in ("nheads", "num_proposals", "norm")}}
    assert read_config(config) == small.sizes and config["inner"] == [[4], [8, 8], [32], [32]]
    assert config["dim_feedforward"] == 12  # all alike: no list


# ---------------------------------------------------------------- cuts


def test_every_width_is_found(slots) -> None:
    by_name = {slot.name: slot for slot in slots}
    assert {slot.kind for slot in slots} == {"ffn", "inner", "block"}
    stages = [f"head.head_series.{index}" for index in range(3)]
    groups = ["res2.0", "res3.0", "res3.1", "res4.0", "res5.0"]
    assert set(by_name) == {*stages, *(f"{s}.ffn" for s in stages), *(f"backbone.bottom_up.{g}.inner" for g in groups)}
    first, second = by_name["backbone.bottom_up.res3.1.inner"].groups
    parts = {(part.key.split("res3.1.")[1], part.axis, part.reads) for part in first.parts}
    own = {(f"conv1.norm.{name}", 0, False) for name in ("weight", "bias", "running_mean", "running_var")}
    assert parts == {("conv1.weight", 0, False), ("conv2.weight", 1, True), *own}
    assert {part.key.split("res3.1.")[1] for part in second.parts if part.reads} == {"conv3.weight"}
    assert by_name["backbone.bottom_up.res3.1.inner"].units == 16 and first.units == second.units == 16
    assert all(cutting.begins(name) == name.startswith("backbone") for name in by_name)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_the_smaller_network_computes_what_the_silenced_one_does(model, slots, costs, data) -> None:
    plan: dict[str, int] = {}
    keep: dict[str, Tensor] = {}
    for slot in slots:
        if slot.kind != "block":
            plan[slot.name] = data.draw(st.sampled_from(range(slot.step, slot.units + 1, slot.step)), label=slot.name)
            random = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
            for group in slot.groups:
                keep[group.name] = torch.randperm(group.units, generator=random)[: plan[slot.name]].sort().values
    small = cut(model, slots, plan, keep, cutting).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with contextlib.ExitStack() as stack:
        for slot in slots:
            if slot.name in plan:
                stack.enter_context(silenced(model, slot, keep))
        expected = outputs(model)
    assert difference(small, expected) < 1e-3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "weights come back"
    assert small.config == cutting.smaller(model.config, plan)
    assert costs(plan).params == sum(p.numel() for p in small.parameters())


def test_each_kind_alone_shows_and_saves_what_was_said_before(model, slots, costs) -> None:
    for kind in WIDTHS:
        chosen = [slot for slot in slots if slot.kind == kind]
        plan, keep = half(chosen)
        small = cut(model, slots, plan, keep, cutting).eval()
        assert difference(small, outputs(model)) > 1e-2, kind
        assert Costs(small, [], cutting)({}) == costs(plan) and costs(plan).flops < costs({}).flops
        assert costs.side == 512


def test_norms_that_are_not_trained_are_cut_along() -> None:
    model = network(FROZEN)
    slots = slots_of(model, WIDTHS, 4, cutting)
    plan, keep = half(slots)
    small = cut(model, slots, plan, keep, cutting).eval()
    assert isinstance(small.backbone.bottom_up.res2[0].conv1.norm, Norm)
    kept_there = keep["backbone.bottom_up.res2.0.conv1"]
    for name, value in small.backbone.bottom_up.res2[0].conv1.norm.named_buffers():
        assert torch.equal(value, getattr(model.backbone.bottom_up.res2[0].conv1.norm, name)[kept_there])
    with contextlib.ExitStack() as stack:
        for slot in slots:
            stack.enter_context(silenced(model, slot, keep))
        expected = outputs(model)
    assert difference(small, expected) < 1e-3


def test_statistics_do_not_make_a_unit_important(model, slots) -> None:
    groups = groups_of(slots)
    before = norms(model, groups, "l2_product")
    with torch.no_grad():
        buffers = [buffer for module in model.modules() if isinstance(module, Norm) for buffer in module.buffers()]
        old = [buffer.clone() for buffer in buffers]
        for buffer in buffers:
            buffer += 100
        after = norms(model, groups, "l2_product")
        for buffer, value in zip(buffers, old, strict=True):
            buffer.copy_(value)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_goes_as_a_whole(model, slots, stage) -> None:
    block = next(slot for slot in slots if slot.name == f"head.head_series.{stage}")
    small = cut(model, slots, {block.name: 0}, {}, cutting).eval()
    whole = outputs(model)
    with silenced(model, block, kept(block, {}, 0)):
        silent = outputs(model)
    assert difference(small, silent) < 1e-5 < 1e-3 < difference(small, whole)
    with silenced(model, block, kept(block, {}, 1)):
        assert difference(model, whole) == 0  # of a block that stays nothing is left out
    assert difference(model, whole) == 0
    assert len(small.head.head_series) == 2 and small.sizes.stages == 2
    assert torch.equal(small.head.head_series[-1].linear1.weight, model.head.head_series[2].linear1.weight)


def test_the_stage_that_gives_the_result_stays_unless_it_is_retrained() -> None:
    stages = [f"head.head_series.{index}" for index in range(3)]
    assert cutting.may_drop(CONFIG, stages[:2]) and not cutting.may_drop(CONFIG, stages[2:])
    assert cutting.may_drop(CONFIG, stages[1:], retrained=True)
    assert not cutting.may_drop(CONFIG, stages) and not cutting.may_drop(CONFIG, stages, retrained=True)


# ---------------------------------------------------------------- students and gates


def asked(**shares: Any) -> Distill:
    names = ("depth", "heads", "ffn", "dpt", "inner")
    return load_distill(CONFIGS / "distill.yaml", {"student": {**dict.fromkeys(names, 0.0), "fold_pairs": 0, **shares}})


def test_a_student_of_half_the_widths_and_fewer_stages(model) -> None:
    data = TrainingData(family("diffusiondet"))
    student: Any = make_student(model, asked(ffn=0.5, inner=0.5, depth=0.34), data)
    assert student.sizes.stages == 2 and [size.ffn for size in student.sizes.head] == [12, 12]
    assert student.sizes.backbone.inner == ((8,), (8, 8), (16,), (32,))  # at least 8
    assert all(torch.isfinite(value).all() for value in outputs(student).values())
    assert torch.equal(student.head.time_mlp[1].weight, model.head.time_mlp[1].weight)
    same: Any = make_student(model, asked(), data)
    assert same.sizes == model.sizes and difference(same, outputs(model)) == 0


def gated(model: Any, slots: list[Slot], seed: int) -> tuple[Any, list[Any], dict[str, Tensor]]:
    """Gates of a random order of importance before the layers of the model, and which of them stay open."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [slot for slot in slots if slot.kind in WIDTHS]
    drawn = {group.name: torch.rand(group.units, generator=generator) for group in groups_of(chosen)}
    layouts = layouts_of(model, chosen, drawn, cutting)
    starts = starting_logits(layouts, 0.9, 4.0)
    total = Costs(model, chosen, cutting)({}).flops
    made_of = Gated(layouts, lambda key: model.get_submodule(key.rpartition(".")[0]), total, starts, 1.0)
    masks = {}
    for layout in layouts:
        open_ = torch.rand(len(layout.flops), generator=generator) < 0.5
        masks[layout.slot.name] = torch.cat([torch.ones(1, dtype=torch.bool), open_])
    return made_of, layouts, masks


def test_shut_gates_compute_and_cost_what_the_cut_network_does(slots, costs) -> None:
    """Also of convolutions, and where a layer has gated units on both sides."""
    model = network(CONFIG)
    gates, layouts, masks = gated(model, slots, 0)
    assert any(layout.shared for layout in layouts) and not all(layout.shared for layout in layouts)
    generator = torch.Generator().manual_seed(3)
    for layout, gate in zip(layouts, gates.gates, strict=True):
        mask = masks[layout.slot.name][1:]
        with torch.no_grad():  # the open ones half open
            gate.moved.copy_(torch.where(mask, torch.randn(len(mask), generator=generator), -90.0) - gate.start)
    want = outputs(model)
    units, keep = kept_units(layouts, masks)
    folded = network(CONFIG)
    fold(folded, layouts, gates.factors())
    assert difference(folded, want) < 1e-4
    assert difference(cut(folded, slots, units, keep, cutting).eval(), want) < 1e-4
    assert difference(network(CONFIG), want) > 1e-2
    for layout, gate in zip(layouts, gates.gates, strict=True):
        with torch.no_grad():
            gate.moved.copy_(torch.where(masks[layout.slot.name][1:], 90.0, -90.0) - gate.start)
    saved = 1 - costs(units).flops / costs({}).flops
    assert float(gates.cut().detach()) == pytest.approx(saved, abs=1e-6)


def test_gates_are_shut_until_the_cut_network_is_small_enough(model, slots, costs) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = [slot for slot in slots if slot.kind in WIDTHS]
    drawn = {group.name: torch.rand(group.units, generator=generator) for group in groups_of(chosen)}
    layouts, full = layouts_of(model, chosen, drawn, cutting), costs({}).flops
    most = 1 - costs({slot.name: slot.step for slot in chosen}).flops / full
    for part in (0.2, 0.5, 0.9):
        logits = [torch.randn(len(layout.flops), generator=generator) for layout in layouts]
        aim = (1 - part * most) * full
        stays = shut(layouts, logits, full, part * most)
        assert costs(kept_units(layouts, stays)[0]).flops <= aim
        for name, mask in stays.items():  # none of them went in vain
            for index in (~mask).nonzero().flatten().tolist():
                one_more = {**stays, name: mask.clone().index_fill_(0, torch.tensor([index]), True)}
                assert costs(kept_units(layouts, one_more)[0]).flops > aim


# ---------------------------------------------------------------- trainings


@pytest.fixture
def data() -> TrainingData:
    pytest.importorskip("pqk.families.detection.inputs", reason="the detector's samples cannot be opened yet")
    return TrainingData(family("diffusiondet"))


TRAIN = {
    "epochs": 1,
    "steps_per_epoch": 2,
    "stages": [{"size": 64, "batch": 2, "until": 1.0}],
    "validation": {"size": 64, "pairs": 2},
}


def test_half_of_the_forward_is_the_whole(model, data) -> None:
    spec = load_prune(CONFIGS / "prune.yaml", {"train": TRAIN})
    made_of = data.batches(spec.train, torch.device("cpu"), 0)
    for batch in (made_of.train(0, 2, 64), next(iter(made_of.held_out()))):
        with torch.no_grad():
            whole = data.learning.forward(data.learning.parts(model), batch)
            halves = cutting.finish(model, cutting.begin(model, batch), batch)
        assert halves.keys() == whole.keys()
        assert torch.equal(halves["logits"], whole["logits"]) and torch.equal(halves["boxes"], whole["boxes"])


@pytest.mark.parametrize("scanned", [True, False])
def test_pruning_and_fine_tuning(model, data, scanned, tmp_path) -> None:
    from pqk.compress.cut.prune import prune
    from pqk.compress.finetune import finetune

    changes = {
        "rho": 0.1,
        "round_to": 4,
        "samples": {"pairs": 2, "size": 64},
        "units.blocks": scanned,
        "sensitivity": {"enabled": scanned, "pairs": 2, "size": 64, "levels": [0.5]},
        "train": TRAIN,
    }
    spec = load_prune(CONFIGS / "prune.yaml", changes)
    small, report = prune(model, spec, data, seed=0, device="cpu")
    assert report.share >= 0.1 and report.params_after == sum(p.numel() for p in small.parameters())
    assert report.shift_pct is None or report.shift_pct > 0
    assert ("head.head_series.0" in report.scan) == scanned and "head.head_series.2" not in report.scan
    before = {name: value.clone() for name, value in small.state_dict().items()}
    fitted = finetune(small, model, spec, data, seed=0, scratch=tmp_path, device="cpu")
    assert fitted.steps == 2
    changed = [name for name, value in fitted.last.items() if not torch.equal(value, _named(before, name, value))]
    assert any("conv2.weight" in name for name in changed) and any("linear1.weight" in name for name in changed)


def _named(before: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    """Returns the weight of the network that one of the trained modules calls so."""
    found = [old for key, old in before.items() if name.endswith(key) and old.shape == value.shape]
    return found[0] if found else value


def test_a_student_learns(model, data, tmp_path) -> None:
    from pqk.compress.distill import distill

    changes = {"student.fold_pairs": 2, "student.fold_size": 64, "loss.gamma": 0.1, "train": TRAIN}
    spec = load_distill(CONFIGS / "distill.yaml", changes)
    student: Any = make_student(model, spec, data)
    assert student.sizes.backbone.inner != model.sizes.backbone.inner
    fitted = distill(model, student, spec, data, seed=0, scratch=tmp_path, device="cpu")
    assert fitted.steps == 2 and np.isfinite(fitted.history[-1]["score"])


def test_gates_close_in_a_training_and_are_cut(model, data, tmp_path) -> None:
    changes = {
        "flops_cut": 0.05,
        "round_to": 4,
        "samples": {"pairs": 1, "size": 64},
        "gates.epochs": 1,
        "gates.ramp": 0.5,
        "train": {**TRAIN, "epochs": 2, "warmup": 0.1},
    }
    spec = load_joint(CONFIGS / "joint.yaml", changes)
    plan = GatePlan(model, spec, data, seed=0)
    names = names_in(model, data.learning.parts(model))
    parts = data.learning.parts(copy.deepcopy(model))
    fitted, gates, weights = close_gates(parts, names, plan, model, data, scratch=tmp_path)
    small, report = cut_gates(model, weights, plan, gates)
    assert fitted.steps == 2 and report.share >= 0.05
    assert {removed.kind for removed in report.removed} <= set(WIDTHS)
    assert report.params_after == sum(p.numel() for p in small.parameters()) < report.params_before


def test_shipped_settings_name_what_a_detector_has(slots) -> None:
    kinds = {slot.kind for slot in slots}
    spec = load_prune(CONFIGS / "prune.yaml")
    assert {name for name, allowed in spec.units if allowed} <= kinds
    assert {name for name, allowed in load_joint(CONFIGS / "joint.yaml").units if allowed} <= kinds
    student = load_distill(CONFIGS / "distill.yaml").student
    assert {name for name in ("heads", "ffn", "dpt", "inner") if getattr(student, name)} <= kinds
    tiny = build_model("diffusiondet", NAMED["diffusiondet-tiny"])
    found = slots_of(tiny, kinds - {"block"}, spec.round_to, cutting)
    costs = Costs(tiny, found, cutting)
    most = costs({slot.name: slot.sizes([spec.sensitivity.levels[-1]])[0] for slot in found})
    assert most.params < (1 - spec.rho) * costs({}).params  # rho can be reached
    assert most.flops < (1 - load_joint(CONFIGS / "joint.yaml").flops_cut) * costs({}).flops
