"""Pruning: small weights compute what the silenced network computes, budgets are met, and bad requests are refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pqk.compress.cut.cost import Costs
from pqk.compress.cut.importance import loss_of, most_important, norms, taylor
from pqk.compress.cut.prune import REFITTED, PruneReport, prune
from pqk.compress.cut.refit import moments, refit
from pqk.compress.cut.sensitivity import Probe, Score, Step, even_steps, kept, scan, spend, steps_by_scan, taken_over
from pqk.compress.cut.units import Slot, cut, groups_of, silenced, slots_of
from pqk.compress.finetune import finetune
from pqk.compress.train.data import TrainingData
from pqk.data.render.stream import training_pairs
from pqk.data.render.synthetic import texture_bank
from pqk.errors import PqkError
from pqk.families.dust3r import cutting
from pqk.families.dust3r.batches import PicturePairs, scenery
from pqk.families.dust3r.losses import confidence_loss
from pqk.families.dust3r.model import OUTPUTS, Dust3r
from pqk.families.registry import family
from pqk.models import build_model, load_model, save_model
from pqk.settings.prune import Prune, load_prune
from pqk.settings.seeds import split_seed
from pqk.settings.yamlfile import expand, merge

torch_pruning = pytest.importorskip("torch_pruning")

CONFIG = {
    "head_type": "dpt",
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 4,
    "dec_embed_dim": 16,
    "dec_depth": 3,
    "dec_num_heads": 2,
    "dpt": {"feature_dim": 16, "last_dim": 8, "layer_dims": [8, 12, 16, 24]},
}
ALL = ("heads", "ffn", "dpt", "block")
REPOSITORY = Path(__file__).resolve().parents[2]
DATA = TrainingData(family("dust3r"))
SHIPPED = REPOSITORY / "configs" / "prune.yaml"


def spec_with(**changes) -> Prune:
    values = {
        "rho": 0.3,
        "importance": "l2",
        "round_to": 4,
        "samples": {"pairs": 2, "size": 32},
        "sensitivity": {"pairs": 1, "size": 32, "levels": [0.6]},
        "train": {
            "epochs": 2,
            "steps_per_epoch": 3,
            "stages": [{"size": 32, "batch": 2, "until": 1.0}],
            "validation": {"size": 32, "pairs": 2},
            "min_covisible": 0.0,
        },
        **changes,
    }
    dotted = {key: value for key, value in changes.items() if "." in key}
    plain = load_prune(SHIPPED, {key: value for key, value in values.items() if key not in dotted})
    return plain if not dotted else Prune.model_validate(merge(plain.model_dump(), expand(dotted, "test")))


def pruned(model: Dust3r, spec: Prune, *, seed: int, device: str = "cpu") -> tuple[Dust3r, PruneReport]:
    return prune(model, spec, DATA, seed=seed, device=device)


def samples(spec: Prune, seed: int):
    drawn = DATA.batches(spec.train, torch.device("cpu"), seed)
    return (drawn.train(index, 1, spec.samples.size) for index in range(spec.samples.pairs))


def by_gradients(model: Dust3r, slots: list[Slot], spec: Prune, seed: int) -> dict[str, torch.Tensor]:
    return taylor(model, groups_of(slots), samples(spec, seed), loss_of(model, DATA, spec.train.alpha))


def seen(model: Dust3r, slots: list[Slot], spec: Prune) -> dict[str, torch.Tensor]:
    return moments(model, groups_of(slots), samples(spec, 0), spec.samples.pairs, DATA.learning)


def network(config=CONFIG, seed: int = 0) -> Dust3r:
    """Random weights with biases too, so that what a cut unit leaves behind would show."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model("dust3r", config, generator=generator).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    return model


@pytest.fixture(scope="module")
def model() -> Dust3r:
    return network()


@pytest.fixture(scope="module")
def slots(model) -> list[Slot]:
    return slots_of(model, ALL, 4, cutting)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outputs(model: Dust3r) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 1, 3, 48, 80, generator=generator) * 2 - 1  # an odd grid: the DPT head crops
    with torch.no_grad():
        return model(*images)


def difference(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((got[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in OUTPUTS)


def draw_cut(data: st.DataObject, slots: list[Slot]) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Any size of any slot, any units of each of its groups."""
    plan: dict[str, int] = {}
    keep: dict[str, torch.Tensor] = {}
    for slot in slots:
        if slot.kind == "block":
            continue
        sizes = range(slot.step, slot.units + 1, slot.step)
        plan[slot.name] = data.draw(st.sampled_from(sizes), label=slot.name)
        for group in slot.groups:
            order = data.draw(st.permutations(range(group.units)))
            keep[group.name] = torch.tensor(sorted(order[: slot.keeps(group, plan[slot.name])]))
    return plan, keep


def test_every_width_of_the_network_is_found(slots) -> None:
    by_name = {slot.name: slot for slot in slots}
    assert len(by_name) == len(slots)
    stacks = [f"enc_blocks.{i}" for i in range(2)] + [f"dec_blocks{two}.{i}" for two in ("", "2") for i in range(3)]
    expected = {f"{block}.{kind}" for block in stacks for kind in ("heads", "ffn")}
    expected |= {"enc_blocks.0", "enc_blocks.1", "dec_blocks.0", "dec_blocks.1", "dec_blocks.2"}
    expected |= {"dpt.feature_dim", "dpt.last_dim", *(f"dpt.layer_dims.{i}" for i in range(4))}
    assert set(by_name) == expected
    assert [group.name for group in by_name["dec_blocks2.1.heads"].groups] == [
        "dec_blocks2.1.attn",
        "dec_blocks2.1.cross_attn",
    ]
    self_attention, cross_attention = by_name["dec_blocks2.1.heads"].groups
    found = {(part.key.split("dec_blocks2.1.")[1], part.axis, part.reads) for part in self_attention.parts}
    assert found == {
        ("attn.qkv.weight", 0, False),
        ("attn.qkv.bias", 0, False),
        ("attn.proj.weight", 1, True),
    }
    qkv = next(part for part in self_attention.parts if part.key.endswith("qkv.weight"))
    assert qkv.rows[1].tolist() == [*range(8, 16), *range(24, 32), *range(40, 48)]  # head 1 of q | k | v, 8 wide
    assert {part.key.split(".")[-2] for part in cross_attention.parts} == {"projq", "projk", "projv", "proj"}
    assert by_name["dpt.feature_dim"].units == 16 and by_name["dpt.feature_dim"].step == 4
    halves = [group.name for group in by_name["dpt.feature_dim"].groups if group.units == 8]
    assert halves == ["downstream_head1.dpt.head.0", "downstream_head2.dpt.head.0"]
    seen = [(part.key, part.axis) for slot in slots if slot.kind != "block" for g in slot.groups for part in g.parts]
    assert len(seen) == len(set(seen)), "one axis of a weight follows one group"


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_small_weights_compute_what_the_silenced_network_computes(model, slots, data) -> None:
    plan, keep = draw_cut(data, slots)
    small = cut(model, slots, plan, keep, cutting)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with contextlib.ExitStack() as stack:
        for slot in slots:
            if slot.name in plan:
                stack.enter_context(silenced(model, slot, keep))
        expected = outputs(model)
    assert difference(outputs(small), expected) < 1e-4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "weights come back"
    assert sum(p.numel() for p in small.parameters()) == Costs(model, slots, cutting)(plan).params
    assert small.config == cutting.smaller(model.config, plan)
    for name in plan:
        if name.endswith(".ffn"):
            assert small.get_submodule(name.replace(".ffn", ".mlp.fc1")).out_features == plan[name]


@pytest.mark.parametrize("kind", ["heads", "ffn", "dpt"])
def test_each_kind_alone_shows_in_the_output(model, slots, kind) -> None:
    """The equality above would hold for units that do nothing; these do something."""
    chosen = [slot for slot in slots if slot.kind == kind]
    plan = {slot.name: slot.sizes([0.5])[0] for slot in chosen}
    keep = {k: v for slot in chosen for k, v in kept(slot, _random(slot), plan[slot.name]).items()}
    assert difference(outputs(cut(model, slots, plan, keep, cutting)), outputs(model)) > 1e-2


def _random(slot: Slot) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(slot.name))
    return {group.name: torch.rand(group.units, generator=generator) for group in slot.groups}


def test_a_block_goes_as_a_whole(model, slots) -> None:
    block = next(slot for slot in slots if slot.name == "enc_blocks.0")
    small = cut(model, slots, {block.name: 0}, {}, cutting)
    with silenced(model, block, kept(block, {}, 0)):
        assert difference(outputs(small), outputs(model)) < 1e-4
    assert len(small.enc_blocks) == 1 and len(small.dec_blocks) == 3
    assert torch.equal(small.enc_blocks[0].mlp.fc1.weight, model.enc_blocks[1].mlp.fc1.weight)


def test_twin_blocks_of_both_decoders_go_together_where_the_head_allows_it() -> None:
    deep = {**CONFIG, "dec_depth": 5, "head_type": "linear"}
    del deep["dpt"]
    model = network(deep)
    slots = slots_of(model, ALL, 4, cutting)
    block = next(slot for slot in slots if slot.name == "dec_blocks.1")
    small = cut(
        model, slots, {"dec_blocks.1": 0, "dec_blocks2.2.ffn": 64}, {"dec_blocks2.2.mlp.fc1": torch.arange(64)}, cutting
    )
    assert len(small.dec_blocks) == len(small.dec_blocks2) == 4
    with silenced(model, block, kept(block, {}, 0)):
        assert difference(outputs(small), outputs(model)) < 1e-4
    full = {**CONFIG, "dec_depth": 12}  # a DPT head reads the layers 6, 9 and 12
    assert cutting.may_drop(full, ["dec_blocks.0"]) and cutting.may_drop(full, ["dec_blocks.4"])
    assert not cutting.may_drop(full, ["dec_blocks.5"]) and not cutting.may_drop(full, ["dec_blocks.8"])
    assert not cutting.may_drop(full, ["dec_blocks.11"])
    assert cutting.may_drop(full, ["dec_blocks.1", "dec_blocks.6"]) and not cutting.may_drop(
        full, ["dec_blocks.1", "dec_blocks.2"]
    )
    assert cutting.may_drop({**full, "head_type": "linear"}, ["dec_blocks.11"])
    assert not cutting.may_drop(CONFIG, ["dec_blocks.0"]) and not cutting.may_drop(
        CONFIG, ["enc_blocks.0", "enc_blocks.1"]
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pruned_network_saves_loads_and_exports(model, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    small, _ = pruned(model, spec_with(), seed=0, device="cpu")
    back = load_model(save_model(small, tmp_path / "small"))
    assert back.sizes == small.sizes
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in small.state_dict().items())
    sizes = [path.stat().st_size for path in (tmp_path / "small" / "model.safetensors",)]
    save_model(model, tmp_path / "whole")
    assert sizes[0] < 0.75 * (tmp_path / "whole" / "model.safetensors").stat().st_size
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 1, 3, 48, 80, generator=generator) * 2 - 1
    with torch.no_grad():
        expected = back(*images)
    sessions = {}
    for name, graph in back.graphs(48, 80).items():
        torch.onnx.export(
            graph.module,
            tuple(graph.inputs[i] for i in graph.input_names),
            tmp_path / f"{name}.onnx",
            input_names=list(graph.input_names),
            output_names=list(graph.output_names),
            opset_version=18,
            dynamo=False,
        )
        sessions[name] = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx")
    tokens = [sessions["encoder"].run(["tokens"], {"image": image.numpy()})[0] for image in images]
    got = sessions["decoder"].run(list(OUTPUTS), {"tokens_1": tokens[0], "tokens_2": tokens[1]})
    assert difference({n: torch.from_numpy(v) for n, v in zip(OUTPUTS, got, strict=True)}, expected) < 1e-4


@pytest.mark.parametrize("scanned", [True, False])
def test_the_budget_is_met_and_more_is_smaller(model, scanned) -> None:
    sizes, before = [], {key: value.clone() for key, value in model.state_dict().items()}
    for rho in (0.1, 0.25, 0.4):
        spec = spec_with(rho=rho, round_to=2, **{"sensitivity.enabled": scanned})
        small, report = pruned(model, spec, seed=0, device="cpu")
        assert report.params_after == sum(p.numel() for p in small.parameters())
        assert report.params_before == sum(p.numel() for p in model.parameters())
        assert rho <= report.share < rho + 0.12, "at most one step too much, and steps are large in a network like this"
        assert report.share == pytest.approx(1 - report.params_after / report.params_before)
        assert report.flops_after < report.flops_before
        assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
        assert (report.error_before is not None) == (report.error_after is not None) == scanned == bool(report.scan)
        for removed in report.removed:
            assert 0 < removed.units_after < removed.units_before and removed.params > 0
            assert removed.importance_kept is not None and 0 < removed.importance_kept < 1
        sizes.append(report.params_after)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("kind", "sha256"), [("l1", "3fbb3938b67f9852"), ("l2", "39981f2d1292c442")])
def test_golden_pruned_networks(kind: str, sha256: str) -> None:
    """Without a scan or a refit the weights are chosen, not computed: they are the same on every machine."""
    small, _ = pruned(network(), spec_with(importance=kind, refit=False, **{"sensitivity.enabled": False}), seed=0)
    found = hashlib.sha256(json.dumps(small.config, sort_keys=True).encode())
    for name, weight in sorted(small.state_dict().items()):
        if "refinenet4.resConfUnit1" not in name:  # no output depends on it
            found.update(name.encode() + weight.numpy().tobytes())
    assert found.hexdigest()[:16] == sha256


def test_a_pruned_network_can_be_pruned_again(model) -> None:
    spec = spec_with(rho=0.2, round_to=2, **{"sensitivity.enabled": False})
    once, _ = pruned(model, spec, seed=0, device="cpu")
    twice, report = pruned(once, spec, seed=0, device="cpu")
    assert report.params_before == sum(p.numel() for p in once.parameters())
    assert sum(p.numel() for p in twice.parameters()) <= 0.8 * report.params_before
    assert all(bool(torch.isfinite(value).all()) for value in outputs(twice).values())


def test_rho_can_be_a_share_of_the_flops(model) -> None:
    spec = spec_with(measure="flops", **{"sensitivity.enabled": False})
    small, report = pruned(model, spec, seed=0, device="cpu")
    assert report.share == pytest.approx(1 - Costs(small, [], cutting)({}).flops / Costs(model, [], cutting)({}).flops)
    assert report.share >= 0.3


def test_flops_are_those_that_torch_counts(model, slots) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    plan = {"enc_blocks.0": 0, "enc_blocks.1.heads": 3, "dec_blocks2.1.ffn": 20, "dpt.feature_dim": 12}
    small = cut(
        model,
        slots,
        plan,
        {k: v for s in slots if s.name in plan for k, v in kept(s, _random(s), plan[s.name]).items()},
        cutting,
    )
    image = torch.zeros(1, 3, 512, 512)
    # attention as plain products: the counter does not know the fused kernel of the CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        small(image, image)
    assert Costs(model, slots, cutting)(plan).flops == counter.get_total_flops()


@pytest.mark.parametrize("kind", ["l1", "l2", "taylor"])
def test_same_arguments_same_network(model, kind) -> None:
    spec = spec_with(importance=kind, **{"sensitivity.enabled": kind == "l2"})
    (first, told), (second, again) = (pruned(model, spec, seed=3, device="cpu") for _ in range(2))
    assert told == again and first.config == second.config
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


def test_norms_are_those_of_all_weights_of_a_unit(model, slots) -> None:
    mlp = model.enc_blocks[0].mlp
    weights = torch.cat([mlp.fc1.weight, mlp.fc1.bias[:, None], mlp.fc2.weight.T], dim=1).detach().double()
    l1 = norms(model, groups_of(slots), "l1")["enc_blocks.0.mlp.fc1"]
    l2 = norms(model, groups_of(slots), "l2")["enc_blocks.0.mlp.fc1"]
    torch.testing.assert_close(l1, weights.abs().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(l2, weights.norm(dim=1), rtol=1e-5, atol=0)
    attention = model.dec_blocks2[2].cross_attn
    l2_heads = norms(model, groups_of(slots), "l2")["dec_blocks2.2.cross_attn"]
    second = [getattr(attention, f"proj{x}").weight[8:] for x in "qkv"] + [attention.proj.weight[:, 8:]]
    second += [getattr(attention, f"proj{x}").bias[8:] for x in "qkv"]
    assert float(l2_heads[1]) == pytest.approx(float(sum(w.detach().double().square().sum() for w in second)) ** 0.5)


def test_taylor_is_the_squared_derivative_by_a_factor_on_the_unit(model, slots) -> None:
    """A head and an MLP unit, by finite differences of the loss in float64."""
    spec = spec_with(importance="taylor", **{"samples.pairs": 1})
    found = by_gradients(model, slots, spec, 7)
    pairs = training_pairs(1, 32, split_seed("train", 7, 0), texture_bank(), **scenery(spec.train))
    truth, doubled = pairs.ordered(), PicturePairs(pairs.images.double())

    def loss_with(layer: str, columns: slice, factor: float) -> float:
        changed = network().double()
        with torch.no_grad():
            changed.get_submodule(layer).weight[:, columns] *= factor
            out = cutting.finish(changed, cutting.begin(changed, doubled), doubled)
        # in float32 the loss of a millionth change would be lost
        return float(confidence_loss(out, *truth, spec.train.alpha)[0])

    for group, unit, layer, columns in (
        ("enc_blocks.1.mlp.fc1", 5, "enc_blocks.1.mlp.fc2", slice(5, 6)),
        ("dec_blocks.2.cross_attn", 1, "dec_blocks.2.cross_attn.proj", slice(8, 16)),
    ):
        step = 0.05
        slope = (loss_with(layer, columns, 1 + step) - loss_with(layer, columns, 1 - step)) / (2 * step)
        assert float(found[group][unit]) == pytest.approx(slope**2, rel=0.05), group


def test_taylor_sees_what_norms_do_not() -> None:
    """A unit with large weights whose output is read by nobody is the first to go."""
    model = network()
    with torch.no_grad():
        model.enc_blocks[0].mlp.fc1.weight[3] *= 100
        model.enc_blocks[0].mlp.fc2.weight[:, 3] = 0
    slots = slots_of(model, ["ffn"], 4, cutting)
    slopes = by_gradients(model, slots, spec_with(), 0)["enc_blocks.0.mlp.fc1"]
    norm = norms(model, groups_of(slots), "l2")["enc_blocks.0.mlp.fc1"]
    assert 3 not in most_important(slopes, 127) and 3 in most_important(norm, 1)


def test_taylor_needs_gradients(model, slots) -> None:
    frozen = network().requires_grad_(False)
    with pytest.raises(RuntimeError, match="grad"):
        by_gradients(frozen, slots, spec_with(), 0)
    spec = spec_with(importance="taylor", **{"sensitivity.enabled": False})
    small, _ = pruned(frozen, spec, seed=0, device="cpu")  # on a copy that has them
    assert small.config != frozen.config and not frozen.enc_blocks[0].mlp.fc1.weight.requires_grad


def test_most_important_prefers_the_first_of_equals() -> None:
    assert most_important(torch.tensor([1.0, 2.0, 1.0, 2.0]), 3).tolist() == [0, 1, 3]


def test_the_scan_measures_what_a_cut_does(model, slots) -> None:
    spec = spec_with()
    importance = norms(model, groups_of(slots), "l2")
    probe = Probe(model, spec, DATA)
    assert probe.score(model) == (probe.error, 0.0)
    scores = scan(model, slots, importance, spec.sensitivity.levels, probe, {})
    assert set(scores) == {slot.name for slot in slots}
    for name in ("enc_blocks.1.ffn", "dec_blocks2.0.heads", "dpt.feature_dim"):
        slot = next(slot for slot in slots if slot.name == name)
        units, score = list(scores[name].items())[-1]
        small = cut(model, slots, {name: units}, kept(slot, importance, units), cutting)
        assert probe.score(small) == pytest.approx(score, abs=1e-5) and score.shift > 0, name
    last = next(slot for slot in slots if slot.name == "dec_blocks2.2.ffn")  # feeds the points of view 2 alone
    error, shift = scores[last.name][last.sizes([0.6])[0]]
    assert abs(error - probe.error) > 1e-4 and shift > 1e-3  # both views count


def test_a_scan_without_ground_truth_says_what_helps(model) -> None:
    """No view sees more than the whole of the other."""
    with pytest.raises(
        PqkError, match="none of the pairs of the sensitivity scan has anything to score; lower min_cov"
    ):
        Probe(model, spec_with(**{"train.min_covisible": 1.0}), DATA)


def test_refit_hands_over_to_a_twin() -> None:
    """A unit that is 3 times another one plus nothing: once it goes, its twin and the bias can do all its work."""
    model = network()
    mlp = model.dec_blocks2[1].mlp
    with torch.no_grad():
        mlp.fc1.weight[9], mlp.fc1.bias[9] = mlp.fc1.weight[4], mlp.fc1.bias[4]
        mlp.fc1.weight[11], mlp.fc1.bias[11] = 0.0, 1.5  # always the same output: the bias can take it
    slots = slots_of(model, REFITTED, 4, cutting)
    known = seen(model, slots, spec_with(samples={"pairs": 4, "size": 96}))
    slot = next(slot for slot in slots if slot.name == "dec_blocks2.1.ffn")
    keep = {slot.groups[0].name: torch.tensor([i for i in range(64) if i not in (9, 11)])}
    expected, plain = outputs(model), outputs(cut(model, slots, {slot.name: 62}, keep, cutting))
    refit(model, slot.groups[0], keep[slot.groups[0].name], known)
    handed = difference(outputs(cut(model, slots, {slot.name: 62}, keep, cutting)), expected)
    assert handed < 0.05 * difference(plain, expected), (handed, difference(plain, expected))


def test_refit_lowers_the_error_of_the_layer_behind(model, slots) -> None:
    """On the samples themselves, for heads and MLP units of random networks; and the scan leaves no trace of it."""
    spec = spec_with()
    known = seen(model, slots, spec)
    weights = dict(model.named_parameters())
    origin = {key: weight.detach().clone() for key, weight in weights.items()}

    def error(reader: str, total: torch.Tensor) -> float:
        """Sum of squared changes of the layer's outputs over all tokens."""
        bias = reader.removesuffix("weight") + "bias"
        full, now = (torch.cat([w[reader].detach(), w[bias].detach()[:, None]], 1).double() for w in (origin, weights))
        return float(((now - full) @ total.double() @ (now - full).T).trace())

    for name in ("enc_blocks.0.ffn", "dec_blocks.1.heads"):
        slot = next(slot for slot in slots if slot.name == name)
        keep = kept(slot, _random(slot), slot.units // 2)
        readers = [(part.key, known[part.layer]) for group in slot.groups for part in group.parts if part.reads]
        with silenced(model, slot, keep):
            without = [error(*reader) for reader in readers]
        with taken_over(model, slot, keep, known):
            refitted = [error(*reader) for reader in readers]
        assert all(0 < new < 0.9 * old for new, old in zip(refitted, without, strict=True))
        assert all(torch.equal(weight, origin[key]) for key, weight in weights.items())


def toy(name: str, units: int = 16, step: int = 4) -> Slot:
    return Slot(name, "ffn", units, step, ())


def test_the_scan_decides_who_gives() -> None:
    """Two groups of equal cost: the one that nobody misses gives first; a floor keeps the levels."""
    slots = [toy("needed"), toy("idle")]
    scores = {
        "needed": {12: Score(0.0, 0.1), 8: Score(0.0, 0.3)},
        "idle": {12: Score(0.9, 0.001), 8: Score(0.9, 0.4)},
    }
    steps = steps_by_scan(slots, scores, lambda plan: 32 - sum(16 - units for units in plan.values()))
    assert [(step.slot, step.units) for step in steps] == [("idle", 12), ("needed", 12), ("needed", 8), ("idle", 8)]


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_a_slot_shrinks_step_by_step_at_rising_prices(one, two) -> None:
    slots = [toy("a"), toy("b", units=24)]
    scores = {
        "a": {units: Score(0.0, shift) for units, shift in zip((12, 8, 4), one, strict=True)},
        "b": {units: Score(0.0, shift) for units, shift in zip((16, 12, 8), two, strict=True)},
    }
    steps = steps_by_scan(slots, scores, lambda plan: 40 - sum({"a": 16, "b": 24}[n] - u for n, u in plan.items()))
    assert [step.price for step in steps] == sorted(step.price for step in steps)
    assert [step.units for step in steps if step.slot == "a"] == [12, 8, 4]
    assert [step.units for step in steps if step.slot == "b"] == [20, 16, 12, 8]
    assert all(step.price >= 0 for step in steps)


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(1, 16))
def test_without_a_scan_all_give_alike(widths, step) -> None:
    slots = [toy(str(i), width, step) for i, width in enumerate(widths)]
    left = {slot.name: slot.units for slot in slots}
    for taken in even_steps(slots):
        assert 0 < taken.units < left[taken.slot] and taken.units % step == 0
        left[taken.slot] = taken.units
        for slot in slots:  # nobody is more than a step ahead of what this step took
            assert 1 - left[slot.name] / slot.units <= taken.share + 1e-12


def test_what_cannot_be_reached_is_said(model) -> None:
    with pytest.raises(PqkError, match=r"rho 0\.8 cannot be reached: everything that may be cut is \d+\.\d % of the"):
        pruned(model, spec_with(rho=0.8, **{"units.ffn": False}), seed=0, device="cpu")
    blocks = [Slot("dec_blocks.11", "block", 1, 1, ())]
    with pytest.raises(PqkError, match="cannot be reached"):  # the family says that it must stay
        spend(blocks, [Step(0.0, 1.0, "dec_blocks.11", 0)], lambda plan: 10 - 5 * len(plan), 0.1, lambda names: False)


def test_blocks_go_when_they_are_cheapest(model) -> None:
    spec = spec_with(
        **{"units.heads": False, "units.ffn": False, "units.dpt": False, "units.blocks": True, "rho": 0.05}
    )
    small, report = pruned(model, spec, seed=0, device="cpu")
    assert len(small.enc_blocks) == 1 and len(report.removed) == 1
    assert report.removed[0].kind == "block" and report.removed[0].importance_kept is None


def test_a_network_without_finite_points_is_refused() -> None:
    broken = network()
    with torch.no_grad():
        broken.downstream_head1.dpt.head["4"].bias[:3] = 200.0  # the depth mode exp overflows
    with pytest.raises(PqkError, match="not finite"):
        pruned(broken, spec_with(), seed=0, device="cpu")


def test_device_and_missing_package_are_refused_in_a_sentence(model, monkeypatch) -> None:
    with pytest.raises(PqkError, match="unknown device 'gpu'"):
        pruned(model, spec_with(), seed=0, device="gpu")
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(PqkError, match="pip install torch-pruning"):
        pruned(model, spec_with(), seed=0, device="cpu")


def test_finetuning_brings_the_network_nearer_to_the_teacher(model, tmp_path) -> None:
    spec = spec_with(
        **{"train.epochs": 3, "train.steps_per_epoch": 8, "train.learning_rate": 2e-3, "sensitivity.enabled": False}
    )
    small, _ = pruned(model, spec, seed=0, device="cpu")
    losses: dict[int, float] = {}

    def report(p) -> None:
        losses[p.step] = p.loss

    done = finetune(small, model, spec, DATA, seed=0, scratch=tmp_path, device="cpu", report=report)
    assert done.outcome == "done" and done.steps == 24 and len(done.history) == 4
    assert all({"absrel", "delta1", "drop_pct"} <= set(entry) for entry in done.history)
    assert sum(losses[step] for step in range(17, 25)) < sum(losses[step] for step in range(1, 9))
    assert done.model.config == small.config and not done.model.training
    stopped = finetune(
        done.model,
        model,
        spec,
        DATA,
        seed=0,
        scratch=tmp_path / "other",
        device="cpu",
        stop=lambda progress: "enough" if progress.step == 3 else None,
    )
    assert (stopped.outcome, stopped.reason, stopped.steps) == ("stopped", "enough", 3)
