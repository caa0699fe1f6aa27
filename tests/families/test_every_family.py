"""One suite for every built-in family: graphs, glue, data, scoring, learning and cutting fit together."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backends.base import Precision, QuantSpec, Source
from backends.exchange import export
from backends.onnx_graph import OnnxGraph
from backends.reference import OnnxRuntimeEngine
from pqk.bench.whole import export_whole, images_of
from pqk.compress.cut.cost import Costs
from pqk.compress.cut.units import cut, groups_of, slots_of
from pqk.compress.joint import float_weights, names_in
from pqk.compress.train.judge import forward_of
from pqk.engines.calls import in_torch
from pqk.errors import PqkError
from pqk.families.contract import Family, Sample, completed
from pqk.families.registry import BUILT_IN, family
from pqk.models import build_model
from pqk.settings.training import TrainSpec

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Toy:
    """A small network of a family, the changes of its workload that fit it, and a size that it can be trained at.

    outputs: names in `LearningPart.forward` of what `predict` calls otherwise. still: weights that one forward of a
    fresh network cannot teach. keep: what NNCF must keep in float to train the graphs.
    """

    config: dict[str, Any]
    workload: dict[str, Any]
    size: int
    outputs: dict[str, str] = field(default_factory=dict)
    still: str = r"^$"
    keep: tuple[str, ...] = ()


TOYS = {
    "dust3r": Toy(
        {
            "head_type": "dpt",
            "landscape_only": False,
            "enc_embed_dim": 32,
            "enc_depth": 2,
            "enc_num_heads": 2,
            "dec_embed_dim": 32,
            "dec_depth": 4,
            "dec_num_heads": 2,
            "dpt": {"feature_dim": 16, "last_dim": 8, "layer_dims": [8, 12, 16, 24]},
        },
        {"input.shape": [1, 3, 64, 48]},
        64,
    ),
    "vggt": Toy(
        {
            "img_size": 56,
            "embed_dim": 32,
            "depth": 5,
            "num_heads": 2,
            "init_values": 0.5,
            "dino": {"depth": 2},
            "camera": {"trunk_depth": 2},
            "dpt": {"features": 16, "out_channels": [8, 12, 16, 16]},
        },
        {"input.shape": [1, 3, 70, 56], "input.frames": 3},
        56,
    ),
    "diffusiondet": Toy(
        {
            "hidden_dim": 16,
            "nheads": 4,
            "dim_feedforward": 24,
            "dim_dynamic": 8,
            "num_heads": 2,
            "num_classes": 3,
            "num_proposals": 12,
            "blocks": [1, 2, 1, 1],
            "stem_out": 8,
            "res2_out": 16,
            "width_per_group": 8,
            "norm": "batch",
        },
        {"input.shape": [1, 3, 64, 96], "sampler.boxes": 12, "sampler.steps": 1},
        64,
        {"refined": "boxes"},
        r"fpn_output[345]\.",  # small images hold no object that is looked for in coarse maps
        keep=("AttentionScales", "/pooler/MatMul$"),
    ),
    "detr": Toy(
        {
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 8, 16, 32],
                "depths": [1, 1, 1, 1],
                "layer_type": "basic",
                "out_features": ["stage4"],
            },
            "num_labels": 3,
            "num_queries": 12,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
        },
        {"input.shape": [1, 3, 64, 96]},
        64,
        {"refined": "boxes"},
        r"decoder\.layers\.0\.self_attn\.[qkv]_proj\.(weight|bias)$",  # what it attends to is 0 everywhere
    ),
}


@pytest.fixture(params=sorted(BUILT_IN))
def of(request: pytest.FixtureRequest) -> Family:
    if request.param == "detr":
        pytest.importorskip("transformers", reason="DETR needs the library transformers")
    return family(request.param)


@pytest.fixture
def cuttable(of: Family) -> Family:
    if of.cutting is None:
        pytest.skip(f"nothing is cut from {of.name}")
    return of


def toy(of: Family, seed: int = 0) -> nn.Module:
    model: nn.Module = build_model(of.name, TOYS[of.name].config, generator=torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():  # fresh norms and biases are all alike, which would hide a mistake
        generator = torch.Generator().manual_seed(seed + 1)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith("dpt.head.4.bias"):
                parameter[2] += 2  # DUSt3R's points lie in front of the camera
    return model


def workload(of: Family) -> Any:
    from pqk.recipe.experiment import config_file, config_loaders

    return config_loaders(of)["workload"](config_file(REPOSITORY, of, "workload"), TOYS[of.name].workload)


def asked(of: Family) -> Any:
    """The settings of a short training."""
    size = TOYS[of.name].size
    return TrainSpec.model_validate(
        {
            "model": "toy",
            "steps": 2,
            "stages": [{"size": size, "batch": 2, "until": 1.0}],
            "learning_rate": 1e-3,
            "final_rate": 1e-4,
            "warmup": 0.0,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "ema": 0.9,
            "alpha": 0.2,
            "validation": {"size": size, "pairs": 3, "every": 1},
        }
    )


def images_in(batch: Any) -> list[Tensor]:
    """The images of a batch, which families of detectors keep as pictures of any size."""
    return list(batch.images() if callable(batch.images) else batch.images)


def batches(of: Family) -> Any:
    return of.learning_part().batches(asked(of), torch.device("cpu"), seed=0, held_seed=0)


def test_the_table_of_toys_is_complete() -> None:
    assert set(TOYS) == set(BUILT_IN)


def test_settings_fit_each_other(of: Family) -> None:
    part = of.settings_part()
    assert part.METRICS and len({metric.name for metric in part.METRICS}) == len(part.METRICS)
    assert set(of.scoring_part().OUTPUTS.values()) <= {"points", "values"}
    assert [use.name for use in part.GRAPHS] == list(of.model_part().graphs(toy(of), workload(of)))
    names = {use.name for use in part.GRAPHS}
    assert all(set(use.after) <= names for use in part.GRAPHS) and not part.GRAPHS[0].after


def test_graphs_exported_alone_give_what_the_network_gives(of: Family, tmp_path: Path) -> None:
    model, asked_for = toy(of), workload(of)
    for name, spec in of.model_part().graphs(model, asked_for).items():
        graph = export(spec.module, spec.inputs, spec.output_names, tmp_path / f"{name}.onnx")  # compares the two
        assert tuple(t.name for t in graph.inputs) == spec.input_names
        assert tuple(t.name for t in graph.outputs) == spec.output_names
        assert all(of.settings_part().part_of(f"/{key}/MatMul") is not None for key in _blocks(spec.module))


@pytest.mark.parametrize("spared", [False, True])
def test_graphs_in_bf16_compute_what_they_do_in_f32(of: Family, spared: bool, tmp_path: Path) -> None:
    """A runtime may fuse wrongly in one precision alone; rounding changes these graphs by less than a hundredth."""
    pytest.importorskip("openvino")
    from backends.openvino.engine import OpenVINOEngine, best_float

    if best_float() is not Precision.BF16:
        pytest.skip("this CPU has no bf16 arithmetic")
    model = toy(of)
    if spared:
        if of.reducing is None:
            pytest.skip(f"{of.name} has no letter T")
        kind: Any = model
        config, weights = of.reducing_part().reduced(kind.config, model.state_dict(), "quarter", 0.5)
        model = build_model(of.name, config, weights).eval()
    for name, spec in of.model_part().graphs(model, workload(of)).items():
        graph = export(spec.module, spec.inputs, spec.output_names, tmp_path / f"{name}.onnx")
        feeds = {key: np.asarray(value) for key, value in spec.inputs.items()}
        with OpenVINOEngine(graph, Precision.F32) as engine:
            want = engine.infer(feeds)
        with OpenVINOEngine(graph, Precision.BF16) as engine:
            found = engine.infer(feeds)
        for output, value in want.items():
            assert np.abs(found[output] - value).mean() < 0.05 * np.abs(value).mean(), (name, output)


@pytest.mark.slow
def test_every_graph_can_be_trained_in_int8(of: Family, tmp_path: Path) -> None:
    """NNCF traces the modules; the engine of what it prepared computes what the prepared module does."""
    pytest.importorskip("nncf")
    pytest.importorskip("openvino")
    from backends.openvino.engine import OpenVINOEngine
    from backends.openvino.nncf import NNCFQuantizer

    parts = {}
    for name, spec in of.model_part().graphs(toy(of), workload(of)).items():
        graph = export(spec.module, spec.inputs, spec.output_names, tmp_path / f"{name}.onnx")
        source = Source(name, spec.module, spec.inputs, tuple(spec.output_names), graph)
        asked_for = QuantSpec(
            keep=("LayerNorm", "Softmax", *(TOYS[of.name].keep if name == "head" else ())),
            calibration_samples=2,
            output_dir=tmp_path / "int8",
            smooth_quant_alpha=None,
            bias_correction="none",
        )
        feeds = {key: np.asarray(value) for key, value in spec.inputs.items()}
        quantizer = NNCFQuantizer()
        prepared = parts[name] = quantizer.prepare(source, asked_for, [feeds, feeds])
        with torch.no_grad():
            want = prepared(*(torch.from_numpy(value) for value in feeds.values()))
        with OpenVINOEngine(quantizer.finish(prepared, source, asked_for), Precision.INT8, {"rest": "f32"}) as engine:
            found = engine.infer(feeds)
        for output, value in zip(spec.output_names, _tensors(want), strict=True):
            array = value.numpy()
            assert np.abs(found[output] - array).mean() < 0.05 * np.abs(array).mean(), (name, output)
    learning, batch = of.learning_part(), batches(of).train(0, 2, TOYS[of.name].size)
    loss = learning.losses(learning.forward(parts, batch), batch, None, ("task",), {"alpha": 0.2})["task"]
    loss.backward()
    for name, module in parts.items():
        assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in module.parameters()), name


def test_the_graphs_joined_to_one_give_what_the_glue_gives(of: Family, tmp_path: Path) -> None:
    fed = workload(of)
    specs, sample = of.model_part().graphs(toy(of).eval(), fed), of.data_part().example(fed)
    if not isinstance(sample.inputs, Sequence):
        with pytest.raises(PqkError, match="not images alone"):
            export_whole(of, specs, sample, fed, tmp_path / "whole.onnx")
        return
    graph = export_whole(of, specs, sample, fed, tmp_path / "whole.onnx")
    want = of.predict_part().predict(in_torch(specs), sample, fed, 0)
    with OnnxRuntimeEngine(graph) as engine:
        found = engine.infer(images_of(sample))
    assert [info.name for info in graph.outputs] == list(want) and len(graph.inputs) == len(sample.inputs)
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4 * np.abs(value).max(), err_msg=name)


def outputs_of(of: Family) -> list[str]:
    """What a training calls the outputs that runtimes are compared by."""
    return [TOYS[of.name].outputs.get(name, name) for name in of.scoring_part().OUTPUTS]


def _blocks(module: nn.Module) -> list[str]:
    return [name.replace(".attn", "/attn") for name, _ in module.named_modules() if name.endswith(".attn")]


def test_the_glue_over_the_graphs_is_the_network(of: Family) -> None:
    model, asked_for = toy(of), workload(of)
    sample = of.data_part().example(asked_for)
    found = of.predict_part().predict(in_torch(of.model_part().graphs(model, asked_for)), sample, asked_for, 0)
    assert set(found) >= set(of.scoring_part().OUTPUTS)
    with torch.inference_mode():
        wanted = WHOLE[of.name](model, sample)
    for name in of.scoring_part().OUTPUTS:
        np.testing.assert_allclose(found[name], wanted[name].numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def _pair(model: Any, sample: Sample) -> dict[str, Tensor]:
    first, second = (torch.from_numpy(frame.image)[None] for frame in sample.inputs)
    return {name: value[0] for name, value in model(first, second).items()}


def _frames(model: Any, sample: Sample) -> dict[str, Tensor]:
    out = {
        name: value[0] for name, value in model(torch.from_numpy(np.stack([f.image for f in sample.inputs]))).items()
    }
    return {**out, "depth": out["depth"][..., 0]}


def _boxes(model: Any, sample: Sample) -> dict[str, Tensor]:
    """One step from the noise of the image."""
    from pqk.families.diffusiondet.network.boxes import from_signal
    from pqk.families.diffusiondet.sampling.noise import DrawnNoise

    fed = sample.inputs
    whwh = torch.from_numpy(fed.whwh)
    boxes = from_signal(DrawnNoise(12, 0, fed.number).start().double(), whwh.double(), 2.0).float()
    logits, refined, *_ = model(torch.from_numpy(fed.image), boxes[None], 999, whwh=whwh[None])
    return {"logits": logits[-1, 0], "refined": refined[-1, 0]}


def _queries(model: Any, sample: Sample) -> dict[str, Tensor]:
    out = model.net(torch.from_numpy(sample.inputs.image))
    return {"logits": out.logits[0], "refined": out.pred_boxes[0]}


WHOLE: dict[str, Callable[[Any, Sample], dict[str, Tensor]]] = {
    "dust3r": _pair,
    "vggt": _frames,
    "diffusiondet": _boxes,
    "detr": _queries,
}


def test_a_prediction_against_itself_is_perfect(of: Family) -> None:
    """Where the Teacher plays the truth, it has no drop."""
    model, asked_for, scoring = toy(of), workload(of), of.scoring_part()
    sample = of.data_part().example(asked_for)
    found = of.predict_part().predict(in_torch(of.model_part().graphs(model, asked_for)), sample, asked_for, 0)
    options = {"scale_alignment": "median", "chamfer_points": 64, "min_valid_pixels": 1}
    evidence = scoring.score(found, scoring.as_truth(found, sample, model.config), options, 0)  # type: ignore[arg-type]
    assert evidence is not None
    summary = scoring.summarise(completed(scoring, [evidence]))
    for metric in of.settings_part().METRICS:
        value = summary.get(metric.name)
        if value is not None and (metric.drops or metric.better == "higher"):
            assert value == pytest.approx(metric.perfect, abs=1e-4), metric.name


def test_one_forward_teaches_every_weight(of: Family) -> None:
    model, learning = toy(of), of.learning_part()
    batch = batches(of).train(0, 2, TOYS[of.name].size)
    out = learning.forward(learning.parts(model), batch)
    loss = learning.losses(out, batch, None, ("task",), {"alpha": 0.2})["task"]
    loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert all(of.model_part().may_lack(name) or re.search(TOYS[of.name].still, name) for name in still), still
    assert torch.isfinite(loss)


@pytest.mark.slow
def test_a_step_under_torch_compile_is_the_plain_step(of: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced gives the same loss and gradients; how the compiler writes its kernels is torch's own affair."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model, learning = toy(of), of.learning_part()  # as in evaluation: dropout draws other numbers
    batch = batches(of).train(0, 2, TOYS[of.name].size)

    def stepped(compiled: bool) -> tuple[float, dict[str, Tensor]]:
        out = forward_of(learning, learning.parts(model), compiled=compiled)(batch)
        loss = learning.losses(out, batch, None, ("task",), {"alpha": 0.2})["task"]
        names, weights = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return float(loss.detach()), {
            name: value for name, value in zip(names, found, strict=True) if value is not None
        }

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (wanted, gradients), (loss, found) = stepped(False), stepped(True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    assert loss == pytest.approx(wanted, rel=1e-4) and found.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3 * float(value.abs().max()) + 1e-6)


def test_losses_against_the_own_outputs_are_nothing(of: Family) -> None:
    model, learning = toy(of), of.learning_part()
    batch = batches(of).train(1, 2, TOYS[of.name].size)
    terms = {"kl", "features", "imitation"} & set(learning.TERMS)
    watch, other, bridges = learning.features(model, model, 0) if "features" in terms else (None, None, nn.ModuleDict())
    with torch.no_grad():
        out = learning.forward(learning.parts(model), batch, watch)
        options = {"alpha": 0.2, "temperature": 3.0, "bridges": bridges}
        found = learning.losses(out, batch, out, terms, options)
    assert watch in (None, True) or list(watch) == list(other)
    assert not len(bridges) and {"kl", "imitation"} <= terms
    least = learning.losses(out, batch, out, ("imitation",), options)["imitation"]
    for name, value in found.items():
        aim = float(least) if LEAST.get(of.name) == name else 0
        assert float(value) == pytest.approx(aim, abs=1e-5), name
    if of.name not in LEAST:
        distances = learning.distance(out, out, {"alpha": 0.2})
        assert distances == pytest.approx([0.0] * len(images_in(batch)), abs=1e-5)
    assert learning.shift(out, out, batch) == pytest.approx(0, abs=1e-5)
    assert learning.same_network(model.config, dict(model.config))  # type: ignore[arg-type]


LEAST = {"diffusiondet": "imitation"}
"""The distance of a family that holds the entropy of the Teacher's classes, which is not 0 for the Teacher itself."""


def test_held_out_batches_are_always_the_same_and_scored(of: Family) -> None:
    model, learning, made = toy(of), of.learning_part(), batches(of)
    first, again = (list(made.held_out()) for _ in range(2))
    assert sum(len(images_in(batch)) for batch in first) == 3
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(images_in(a), images_in(b), strict=True))
    main = of.settings_part().METRICS[0].name
    for batch in first:
        with torch.no_grad():
            out = learning.forward(learning.parts(model), batch)
        rows, floor = learning.score(out, batch), learning.floor(batch)
        assert len(rows) == len(floor) == len(images_in(batch))
        for evidence in (rows, floor):
            assert all(main in row for row in completed(learning, [row for of_sample in evidence for row in of_sample]))


def test_exported_shapes_come_back_after_a_training(of: Family) -> None:
    model, learning, asked_for = toy(of), of.learning_part(), workload(of)
    specs = of.model_part().graphs(model, asked_for)
    parts = {name: spec.module for name, spec in specs.items()}
    with torch.no_grad():
        before = {name: spec.module(*spec.inputs.values()) for name, spec in specs.items()}
        learning.forward(parts, batches(of).train(0, 2, TOYS[of.name].size))
        learning.as_exported(parts, asked_for)
        after = {name: spec.module(*spec.inputs.values()) for name, spec in specs.items()}
    for name, value in before.items():
        for x, y in zip(_tensors(value), _tensors(after[name]), strict=True):
            assert torch.equal(x, y), name


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_what_is_silent_can_be_cut_without_a_trace(cuttable: Family) -> None:
    """Units whose readers' weights are 0 change nothing; so what is cut is exactly what the tracer says."""
    of = cuttable
    model, cutting = toy(of), of.cutting_part()
    kinds = {size.kind for size in cutting.sizes(model.config, 4)} - {"block"}  # type: ignore[arg-type]
    slots = slots_of(model, kinds, 4, cutting)
    assert {slot.kind for slot in slots} == kinds
    keep, plan = {}, {}
    state = model.state_dict()
    for slot in slots:
        stays = slot.units - slot.step
        if stays < 1:
            continue
        plan[slot.name] = stays
        for group in slot.groups:
            chosen = torch.arange(group.units)[: slot.keeps(group, stays)]
            keep[group.name] = chosen
            for part in group.parts:
                if part.reads:
                    gone = part.rows[len(chosen) :].flatten()
                    state[part.key].index_fill_(part.axis, gone, 0.0)
    assert plan and groups_of(slots)
    small = cut(model, slots, plan, keep, cutting).eval()
    batch = next(iter(batches(of).held_out()))
    learning = of.learning_part()
    with torch.no_grad():
        whole, rest = (learning.forward(learning.parts(net), batch) for net in (model, small))
    for name in outputs_of(of):
        torch.testing.assert_close(rest[name], whole[name], rtol=1e-3, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert type(small)(small.config).state_dict().keys() == small.state_dict().keys()
    costs, own = Costs(model, slots, cutting), Costs(small, [], cutting)
    assert costs(plan) == own({}) and costs(plan).flops < costs({}).flops  # known before anything is cut
    assert 480 < costs.side == own.side <= 512


def test_what_the_graphs_learn_comes_back_under_the_names_of_the_network(of: Family) -> None:
    model = toy(of)
    modules = {name: spec.module for name, spec in of.model_part().graphs(model, workload(of)).items()}
    names = names_in(model, modules)
    held = [called for known in names.values() for called in known.values()]
    assert len(held) == len(set(held)) and set(held) >= {
        name for name, _ in model.named_parameters() if name.endswith(".weight")
    }
    parts = copy.deepcopy(modules)
    with torch.no_grad():
        for part in parts.values():
            for weight in part.parameters():
                weight += 1
    found, before = float_weights(parts, names, model), model.state_dict()
    assert found.keys() == before.keys()
    for name in held:
        assert torch.equal(found[name], before[name] + 1) or name not in dict(model.named_parameters())


def test_blocks_go_as_far_as_the_heads_allow(cuttable: Family) -> None:
    of = cuttable
    model, cutting = toy(of), of.cutting_part()
    config: Any = model.config
    blocks = [size.name for size in cutting.sizes(config, 4) if size.kind == "block"]
    assert blocks and not cutting.may_drop(config, blocks)
    for block in blocks:
        for retrained in (False, True):
            if cutting.may_drop(config, [block], retrained=retrained):
                smaller = cutting.smaller(config, {block: 0})
                net = build_model(of.name, smaller)
                assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in model.parameters())


def test_half_of_the_forward_is_the_whole(cuttable: Family) -> None:
    of = cuttable
    model, cutting, learning = toy(of), of.cutting_part(), of.learning_part()
    batch = batches(of).train(0, 2, TOYS[of.name].size)
    with torch.no_grad():
        whole = learning.forward(learning.parts(model), batch)
        halves = cutting.finish(model, cutting.begin(model, batch), batch)
    for name in outputs_of(of):
        torch.testing.assert_close(halves[name], whole[name])


def test_every_shape_in_an_export_is_known(of: Family, tmp_path: Path) -> None:
    """Toolchains that count FLOPs or build for static shapes read them from the file."""
    for name, spec in of.model_part().graphs(toy(of), workload(of)).items():
        graph = export(spec.module, spec.inputs, spec.output_names, tmp_path / f"{name}.onnx")
        read = OnnxGraph(graph.path)
        unknown = [output for node in read.work() for output in node.output if output not in read.shapes]
        assert read.work() and not unknown, (name, unknown[:3])
        assert sum(map(read.flops, read.work())) > 0
