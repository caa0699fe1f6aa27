"""QAT of both graphs together: its loss, its sizes, a loss that falls, and a kill in the middle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from training_toys import TINY, tiny  # noqa: F401 (tiny is a fixture)

from backends.base import QuantSpec, Source
from backends.exchange import export
from pqk.compress.qat import qat
from pqk.compress.train import fit as fit_module
from pqk.compress.train.data import VALIDATION_SEED, TrainingData
from pqk.compress.train.loop import Trainer
from pqk.data.render.stream import training_pairs
from pqk.data.render.synthetic import texture_bank
from pqk.families.dust3r import cutting
from pqk.families.dust3r.batches import PicturePairs
from pqk.families.dust3r.learning import as_exported, forward, parts
from pqk.families.dust3r.losses import NEAREST, imitation_loss
from pqk.families.dust3r.settings import load_workload
from pqk.families.registry import family
from pqk.models import build_model
from pqk.settings.quant import load_quant
from pqk.settings.seeds import split_seed
from pqk.settings.training import Rounded
from pqk.settings.yamlfile import SpecError

SIZE = 32
DATA = TrainingData(family("dust3r"))


@pytest.fixture(scope="module")
def teacher():
    model = build_model("dust3r", TINY, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():  # depths around e - 1, as of a trained model: their median must not be 0
        for head in (model.downstream_head1, model.downstream_head2):
            head.proj.bias[2 * 256 : 3 * 256] = 1.0
    return model


def small(batch: int = 2, **changes) -> Rounded:
    values = {
        "epochs": 2,
        "steps_per_epoch": 4,
        "stages": [{"size": SIZE, "batch": batch, "until": 1.0}],
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "warmup": 0.0,
        "task_weight": 0.0,
        "ema": 0.5,
        "validation": {"size": 48, "pairs": 2},
    }
    return Rounded.model_validate({**values, **changes})


def quantizer_of(tool: str) -> Any:
    """A quantizer that can train."""
    if tool == "nncf":
        pytest.importorskip("nncf")
        pytest.importorskip("openvino")
        from backends.openvino.nncf import NNCFQuantizer

        return NNCFQuantizer()
    for name in ("modelopt", "requests", "huggingface_hub"):
        pytest.importorskip(name)
    from backends.trt.modelopt_torch import ModelOptTorchQuantizer

    return ModelOptTorchQuantizer()


def prepared(tool: str, teacher, folder: Path) -> dict[str, Any]:
    """Both graphs with their quantizers, calibrated on rendered pairs."""
    return {asked[0].name: quantizer_of(tool).prepare(*asked) for asked in asked_of(teacher, folder)}


def asked_of(teacher, folder: Path) -> list[tuple[Source, QuantSpec, list[dict[str, Any]]]]:
    """Source, spec and calibration feeds of the encoder, then of the decoder."""
    images = training_pairs(2, SIZE, 7, texture_bank()).images.flatten(0, 1)
    with torch.no_grad():
        tokens = teacher.encode(images).numpy()
    feeds = {
        "encoder": [{"image": image[None].numpy()} for image in images],
        "decoder": [{"tokens_1": tokens[k : k + 1], "tokens_2": tokens[k + 1 : k + 2]} for k in (0, 2)],
    }
    asked = []
    for name, graph in teacher.graphs(SIZE, SIZE).items():
        items = feeds[name]
        onnx = export(graph.module, graph.inputs, graph.output_names, folder / f"{name}.onnx")
        source = Source(name, graph.module, graph.inputs, graph.output_names, onnx)
        spec = QuantSpec(calibration_samples=len(items), output_dir=folder, weight_range="half")
        asked.append((source, spec, items))
    return asked


@pytest.fixture(scope="module", params=["nncf", "modelopt-torch"])
def tool(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def ready(tool, teacher, tmp_path_factory):
    return prepared(tool, teacher, tmp_path_factory.mktemp("graphs"))


def outputs(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    points = {f"pts3d_{v}": torch.randn(2, 4, 4, 3, generator=generator) + 3 for v in (1, 2)}
    return points | {f"conf_{v}": 1 + torch.rand(2, 4, 4, generator=generator) for v in (1, 2)}


def test_imitation_loss_by_hand():
    aim = {k: v.double() for k, v in outputs(0).items()}
    assert float(imitation_loss(aim, aim, 0.2)) == 0
    got = dict(aim)
    got["pts3d_1"] = aim["pts3d_1"] * 1.1  # 10 % off everywhere, so the weights do not matter
    assert float(imitation_loss(got, aim, 0.2)) == pytest.approx(0.1, rel=1e-4)
    got["conf_2"] = aim["conf_2"] * 2
    assert float(imitation_loss(got, aim, 0.2)) == pytest.approx(0.1 + 0.2 * torch.tensor(2.0).log().item(), rel=1e-4)


def test_imitation_loss_trusts_the_confident_and_bounds_the_near():
    aim = {"pts3d_1": torch.zeros(1, 1, 2, 3), "conf_1": torch.tensor([[[1.0, 3.0]]])}
    aim["pts3d_1"][0, 0, 1, 2] = 2.0
    aim |= {"pts3d_2": aim["pts3d_1"], "conf_2": aim["conf_1"]}
    got = {k: v.clone() for k, v in aim.items()}
    got["pts3d_1"][..., 0] += 0.1
    want = (0.5 * 0.1 / NEAREST + 1.5 * 0.1 / 2.0) / 2
    assert float(imitation_loss(got, aim, 1.0)) == pytest.approx(want, rel=1e-5)


def answers(parts, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return forward(parts, PicturePairs(images))


def test_graphs_run_at_other_sizes_and_batches(teacher):
    """The two graphs are the model itself at 32 x 32, at 48 x 64, and at 32 x 32 again, and can be set back."""
    graphs = {name: graph.module for name, graph in teacher.graphs(SIZE, SIZE).items()}
    for found in (graphs, parts(teacher)):
        for height, width in ((SIZE, SIZE), (48, 64), (SIZE, SIZE), (48, 48)):
            pairs = PicturePairs(torch.rand(2, 2, 3, height, width) * 2 - 1)
            with torch.no_grad():
                want = cutting.finish(teacher, cutting.begin(teacher, pairs), pairs)
            got = answers(found, pairs.images)
            for name, value in want.items():
                torch.testing.assert_close(got[name], value, atol=0, rtol=0)
    as_exported(graphs, load_workload(overrides={"input.shape": [1, 3, SIZE, SIZE]}))
    for name, part in graphs.items():
        part(*teacher.graphs(SIZE, SIZE)[name].inputs.values())


def test_training_brings_the_rounded_model_nearer_to_the_teacher(teacher, ready, tmp_path):
    modules = copy.deepcopy(ready)
    images = training_pairs(16, SIZE, 5, texture_bank()).images
    held = training_pairs(2, 48, split_seed("validation", VALIDATION_SEED, 0), texture_bank()).images

    def distance(found, images: torch.Tensor = images) -> float:
        return float(imitation_loss(answers(found, images), answers(parts(teacher), images), 0.2))

    before = distance(modules)
    spec = small(8, steps_per_epoch=12, learning_rate=2e-5, task_weight=0.01)
    fitted = qat(modules, teacher, spec, DATA, seed=0, scratch=tmp_path)
    trained: Any = fitted.model
    assert (fitted.outcome, fitted.steps) == ("done", 24)
    assert [entry["step"] for entry in fitted.history] == [0, 12, 24]
    assert all({"absrel", "drop_pct"} <= entry.keys() for entry in fitted.history)
    assert min(entry["score"] for entry in fitted.history) == pytest.approx(distance(trained, held))
    assert distance(trained) < 0.98 * before
    assert list(trained) == ["encoder", "decoder"] and fitted.last.keys() == trained.state_dict().keys()
    assert not trained["encoder"].training and next(trained.parameters()).device.type == "cpu"


class Killed(Exception):
    pass


def test_a_killed_training_ends_as_an_undisturbed_one(tool, teacher, ready, tmp_path, monkeypatch):
    """Killed after step 3, with a checkpoint of step 2; the modules are prepared anew, as another process would."""
    whole = qat(copy.deepcopy(ready), teacher, small(), DATA, seed=3, scratch=tmp_path / "whole")

    class Careful(Trainer):
        def run(self, *args, **kwargs):
            return super().run(*args, **{**kwargs, "save_every_s": 0.0})

    monkeypatch.setattr(fit_module, "Trainer", Careful)

    def kill(progress) -> None:
        if progress.step == 3:
            raise Killed

    with pytest.raises(Killed):
        qat(copy.deepcopy(ready), teacher, small(), DATA, seed=3, scratch=tmp_path / "cut", report=kill)
    steps = []
    again = prepared(tool, teacher, tmp_path)
    resumed = qat(
        again, teacher, small(), DATA, seed=3, scratch=tmp_path / "cut", report=lambda p: steps.append(p.step)
    )
    assert steps[0] == 3
    want, got = whole.model.state_dict(), resumed.model.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_modelopts_graphs_compute_what_was_trained(teacher, tmp_path):
    """ONNX Runtime on the Q/DQ graphs against the trained modules, at the size of the graphs.

    Stated tolerance: 2 % of the mean magnitude of each output, and nearer than the float model is.
    """
    from backends.reference import OnnxRuntimeEngine

    asked, quantizer = asked_of(teacher, tmp_path), quantizer_of("modelopt-torch")
    modules = {each[0].name: quantizer.prepare(*each) for each in asked}
    graphs: Any = qat(modules, teacher, small(learning_rate=2e-5), DATA, seed=1, scratch=tmp_path).model
    as_exported(graphs, load_workload(overrides={"input.shape": [1, 3, SIZE, SIZE]}))
    for (source, spec, items), module in zip(asked, graphs.values(), strict=True):
        feeds = items[0]
        with OnnxRuntimeEngine(quantizer.finish(module, source, spec), {"fuse_qdq": False}) as engine:
            got = engine.infer(feeds)
        with torch.no_grad():
            tensors = [torch.from_numpy(array) for array in feeds.values()]
            want, plain = module(*tensors), source.module(*tensors)
        pairs = zip(want, plain, strict=True) if isinstance(want, tuple) else [(want, plain)]
        for name, (a, b) in zip(source.output_names, pairs, strict=True):
            size = float(a.abs().mean())
            apart = float((torch.from_numpy(got[name]) - a).abs().mean()) / size
            assert apart < min(0.02, float((b - a).abs().mean()) / size), name


def test_the_section_of_quant_yaml_is_a_training():
    spec = load_quant().qat
    assert spec.steps == spec.epochs * spec.steps_per_epoch
    assert spec.learning_rate <= 1e-5 and spec.final_rate == spec.learning_rate / 10
    assert spec.warmup == 1 / spec.epochs and spec.stage_at(0.5).size == 256


OLD = {
    "epochs": 12,
    "steps_per_epoch": 18,
    "lr": 2e-6,
    "weight_decay": 0.01,
    "warmup_epochs": 1,
    "size": 256,
    "batch": 1,
}
OLD |= {"task_weight": 0.1, "ema": 0.95, "validation": {"size": 512, "pairs": 8}}


def test_old_words_mean_what_they_did():
    """A section as it was written before quant.yaml 1.1 is the shipped one, and one word at a time changes it."""
    shipped = load_quant().qat
    assert Rounded.model_validate(OLD) == shipped
    for old, new in (
        ({"lr": 1e-4}, {"learning_rate": 1e-4}),
        ({"warmup_epochs": 3}, {"warmup": 0.25}),
        ({"size": 64}, {"stages": [{"size": 64, "batch": 1, "until": 1.0}]}),
        ({"batch": 4}, {"stages": [{"size": 256, "batch": 4, "until": 1.0}]}),
    ):
        wanted = load_quant(overrides={"qat": new})
        assert load_quant(overrides={"qat": old}) == wanted
        for word in (old, new):  # over a file of the old words
            laid = Rounded.laid_over({"qat": OLD}, {"qat": word}, "qat")
            assert Rounded.model_validate(laid["qat"]) == wanted.qat
    with pytest.raises(SpecError, match="fewer warmup_epochs than epochs, and has 12 of 12"):
        load_quant(overrides={"qat.warmup_epochs": 12})
    with pytest.raises(SpecError, match="has both learning_rate and lr, its former name; leave lr out"):
        load_quant(overrides={"qat.lr": 1e-6, "qat.learning_rate": 1e-6})
