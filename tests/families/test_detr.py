"""DETR as the library `transformers` has it: weights, folders of the library, graph, detections and training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rectangle_toys import asked, drawn, shapes_batch

from pqk.errors import NotBuilt, PqkError
from pqk.families.build import build_model
from pqk.families.checkpoint import load_model, save_model
from pqk.families.detection import scoring
from pqk.families.detection.data import example
from pqk.families.detr.settings import Workload
from pqk.families.registry import family
from pqk.recipe.experiment import config_file, config_loaders

REPOSITORY = Path(__file__).parents[2]
TINY: dict[str, Any] = {
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
    "dropout": 0.0,
}


def sentence_of(call, *arguments) -> str:
    with pytest.raises(PqkError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_imports_the_library_before_a_network_is_built():
    code = (
        "import sys, pqk.families.detr.model, pqk.families.detr.learning;"
        "from pqk.families.registry import families; [of.settings_part() for of in families()];"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NotBuilt) as caught:
        load_model("random:detr-tiny")
    assert "pip install 'pqk[detr]'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("transformers", reason="DETR needs the library transformers")


def made(seed: int = 0) -> Any:
    """A tiny network whose norms and biases are not all alike."""
    random = torch.Generator().manual_seed(seed)
    model = build_model("detr", TINY, generator=random).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
    return model


def workload(**changes: Any) -> Workload:
    of = family("detr")
    found: Workload = config_loaders(of)["workload"](
        config_file(REPOSITORY, of, "workload"), {"input.shape": [1, 3, 64, 96], **changes}
    )
    return found


def picture(seed: int = 0) -> torch.Tensor:
    return torch.randn((1, 3, 64, 96), generator=torch.Generator().manual_seed(seed))


def test_random_weights_follow_from_the_seed_and_every_value_is_set(library):
    one, again, other = (
        build_model("detr", TINY, generator=torch.Generator().manual_seed(seed)).eval() for seed in (0, 0, 1)
    )
    states = [model.state_dict() for model in (one, again, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])
    norms = {key: value for key, value in states[0].items() if "running" in key or ".normalization." in key}
    assert norms
    for key, value in norms.items():
        assert value.eq(0.0 if key.endswith(("bias", "running_mean")) else 1.0).all(), key
    with torch.no_grad():
        (a, _), (b, _) = one(picture()), one(picture(1))
    assert torch.isfinite(a).all() and not torch.equal(a, b)


def test_weights_come_back(library, tmp_path):
    model = made()
    save_model(model, tmp_path / "mine")
    back = load_model(tmp_path / "mine")
    assert back.config == model.config and json.loads((tmp_path / "mine/config.json").read_text())["family"] == "detr"
    with torch.no_grad():
        for x, y in zip(model(picture()), back(picture()), strict=True):
            assert torch.equal(x, y)


def test_a_folder_of_the_library_gives_what_the_library_does(library, tmp_path):
    config = library.DetrConfig.from_dict({**TINY, "use_timm_backbone": False, "backbone": None})
    torch.manual_seed(0)
    theirs = library.DetrForObjectDetection(config).eval()
    with torch.no_grad():  # norms that change nothing would hide one too many
        for name, value in theirs.state_dict().items():
            if "running_var" in name or "norm" in name:
                value.uniform_(0.5, 2)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "detr"
    mine = load_model(tmp_path)
    assert mine.family == "detr"
    with torch.no_grad():
        want = theirs(picture())
        (logits, boxes), (layers, _) = mine(picture()), mine(picture(), every=True)
    torch.testing.assert_close(logits, want.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(boxes, want.pred_boxes, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layers[-1], logits, rtol=1e-5, atol=1e-6)
    assert len(layers) == 2 and not torch.allclose(layers[0], logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_timm_backbone": True},
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50"}},
        {"backbone_config": None, "backbone": "resnet50"},
    ],
)
def test_backbones_of_timm_are_refused(library, changes):
    assert "timm is not used" in sentence_of(build_model, "detr", {**TINY, **changes})


@pytest.mark.parametrize("changes", [{"d_model": "wide"}, {"backbone_config": {"model_type": "resnett"}}])
def test_what_the_library_refuses_is_one_sentence(library, changes):
    assert sentence_of(build_model, "detr", {**TINY, **changes}).startswith("detr configuration: ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_querys": 5}, "num_querys is unknown (did you mean 'num_queries'?)"),
        ({"backbone_norms": "batch"}, "backbone_norms is unknown (did you mean 'backbone_norm'?)"),
        (
            {"backbone_config": {**TINY["backbone_config"], "depth": [1]}},
            "backbone_config.depth is unknown (did you mean 'depths'?)",
        ),
        ({"backbone_norm": "group"}, "backbone_norm must be frozen or batch, not 'group'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(library, tmp_path, changes, said):
    assert sentence_of(build_model, "detr", {**TINY, **changes}) == f"detr configuration: {said}"
    save_model(made(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"family": "detr", **TINY, **changes}))
    assert sentence_of(load_model, tmp_path) == f"{tmp_path}: detr configuration: {said}"


def test_keys_of_old_files_are_known(library):
    """Those of published checkpoints, and of a ResNet that a version 4 of the library wrote in full."""
    old = {
        "classifier_dropout": 0.0,
        "max_position_embeddings": 1024,
        "scale_embedding": False,
        "torch_dtype": "float32",
    }
    resnet = {**TINY["backbone_config"], "top_k": 50, "torchscript": False, "out_indices": [4]}
    build_model("detr", {**TINY, **old, "num_hidden_layers": 1, "backbone_config": resnet})


LEARNING: dict[str, Any] = {
    **TINY,
    "backbone_norm": "batch",
    "backbone_config": {
        **TINY["backbone_config"],
        "hidden_sizes": [8, 16, 32],
        "depths": [1, 1, 1],
        "out_features": ["stage3"],
    },
}
"""With norms that learn, and a stride of 16."""


def test_every_query_begins_with_a_box_of_its_own(library):
    """With weights as small as the library fills them all boxes were one, up to 2e-5 of the image."""
    model = build_model("detr", LEARNING, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        _, boxes = model(picture())
    assert float(boxes.std(1).min()) > 5e-4


def test_a_batch_is_learned_by_heart(library):
    """Four pictures in 200 steps. With heads as the library fills them the loss is above 4, and AP below 40."""
    learning, batch, steps = family("detr").learning_part(), shapes_batch(4), 200
    model = build_model("detr", LEARNING, generator=torch.Generator().manual_seed(0)).train()
    parts, optimizer = learning.parts(model), torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.zero_grad()
        loss = learning.losses(learning.forward(parts, batch), batch, None, ("task",), {})["task"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        rows = learning.score(learning.forward(parts, batch), batch)
    done = learning.complete([row for of_image in rows for row in of_image])
    assert float(loss.detach()) < 1 and scoring.summarise(done)["ap"] > 90


def test_norms_that_learn_do_and_come_back(library, tmp_path):
    learning, batch = family("detr").learning_part(), shapes_batch(2)
    model = build_model("detr", LEARNING, generator=torch.Generator().manual_seed(0)).train()
    before = {name: value.clone() for name, value in model.state_dict().items() if ".normalization." in name}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    learning.losses(learning.forward(learning.parts(model), batch), batch, None, ("task",), {})["task"].backward()
    optimizer.step()
    after = model.state_dict()
    assert before and not any(torch.equal(value, after[name]) for name, value in before.items())
    save_model(model, tmp_path / "mine")
    with torch.no_grad():
        for x, y in zip(model.eval()(picture()), load_model(tmp_path / "mine")(picture()), strict=True):
            assert torch.equal(x, y)


def test_a_training_begins_with_the_resnet_of_the_shipped_detector(library, tmp_path):
    from pqk.compress.train.teacher import train_teacher
    from pqk.families.detection.inputs import padded

    detector = load_model(REPOSITORY / "models/diffusiondet-tiny")
    rates = {r"\.backbone\.": 0}
    spec = asked(pairs=1, size=64, steps=1, model="detr-tiny", rates=rates)
    train_teacher(spec, tmp_path, device="cpu", init=str(REPOSITORY / "models/diffusiondet-tiny"))
    card = json.loads((tmp_path / "model_card.json").read_text())
    assert card["init"]["card"]["name"] == "diffusiondet-tiny"
    found = load_model(tmp_path)
    mine, theirs = dict(found.named_parameters()), dict(detector.named_parameters())
    first = "net.model.backbone.model.encoder.stages.2.layers.1.layer.2.convolution.weight"
    assert torch.equal(mine[first], theirs["backbone.bottom_up.res4.1.conv3.weight"])
    from pqk.families.detr.model import resnet_of

    state = found.state_dict()
    taken = resnet_of(detector.state_dict())
    assert set(taken) == {name for name in state if ".backbone." in name}
    found.load_state_dict({**state, **taken})
    images, _ = padded(shapes_batch(2).images())
    with torch.no_grad():
        (one,) = found.net.model.backbone.model(images).feature_maps
        torch.testing.assert_close(one, detector.backbone.bottom_up(images)[2], rtol=1e-4, atol=1e-4)


def test_the_exported_graph_gives_what_the_network_gives(library, tmp_path):
    from backends.exchange import export
    from backends.reference import OnnxRuntimeEngine

    model = made()
    spec = family("detr").model_part().graphs(model, workload())["detector"]
    graph = export(spec.module, spec.inputs, spec.output_names, tmp_path / "detector.onnx")
    assert [info.name for info in graph.outputs] == ["logits", "refined"]
    with OnnxRuntimeEngine(graph) as engine, torch.no_grad():
        found, (logits, boxes) = engine.infer({"image": picture().numpy()}), model(picture())
    np.testing.assert_allclose(found["logits"], logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(found["refined"], boxes.numpy(), atol=1e-4)


def test_detections_lie_in_the_picture_and_the_best_comes_first(library):
    from pqk.engines.calls import in_torch

    of, asked_for = family("detr"), workload()
    with in_torch(of.model_part().graphs(made(), asked_for)) as call:
        found = of.predict_part().predict(call, example(asked_for), asked_for, 0)
    boxes, scores = found["boxes"], found["scores"]
    assert 0 < len(boxes) <= 36 and found["labels"].dtype == np.int64 and set(found["labels"]) <= {0, 1, 2}
    assert (np.diff(scores) <= 0).all() and (boxes >= 0).all() and (boxes <= [96, 64, 96, 64]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_boxes_are_in_pixels_of_the_annotated_picture(library):
    """A picture that fills half of the input's height, and was twice as large before."""
    from pqk.families.detr.predict import boxes_of

    logits = np.array([[9.0, 0, 0, 0], [0, 0, 9, 0]], np.float32)
    refined = np.array([[0.5, 0.25, 0.5, 0.25], [0.5, 0.9, 0.1, 0.1]], np.float32)
    found = boxes_of(logits, refined, (64, 96), (32, 96), (64, 192))
    best = [k for k in range(len(found["labels"])) if found["scores"][k] > 0.9]
    assert found["labels"][best].tolist() == [0]  # the other one lies in what was padded
    np.testing.assert_allclose(found["boxes"][best], [[48, 16, 144, 48]], atol=1e-4)


def test_ap_of_true_boxes_is_100(library):
    """The way from relative boxes over detections to AP, for a batch of padded pictures."""
    learning, batch = family("detr").learning_part(), shapes_batch(3)
    height, width = 64, 96
    logits, boxes = torch.full((1, 3, 12, 4), -9.0), torch.rand(1, 3, 12, 4) * 0.1
    logits[..., 3] = 9
    for image, one in enumerate(batch.targets()):
        corners = one["boxes"] / torch.tensor([width, height, width, height])
        count = len(corners)
        boxes[0, image, :count] = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), 1)
        logits[0, image, torch.arange(count), one["labels"]] = 20
    rows = learning.score({"logits": logits, "boxes": boxes, "shape": (height, width)}, batch)
    assert scoring.summarise([row for of_image in rows for row in of_image])["ap"] == pytest.approx(100)
    taught = learning.as_truth(batch, {"logits": logits, "boxes": boxes, "shape": (height, width)}, TINY)
    assert taught.classes == ("class 0", "class 1", "class 2")
    for one, other in zip(taught.pictures, batch.pictures, strict=True):
        assert sorted(one.labels) == sorted(other.labels) and len(one.boxes) == len(other.boxes)
        order, like = np.lexsort(one.boxes.T.round(2)), np.lexsort(other.boxes.T.round(2))
        np.testing.assert_allclose(one.boxes[order], other.boxes[like], atol=0.01)


def test_the_task_is_the_loss_of_the_library_over_all_layers(library):
    learning, model, batch = family("detr").learning_part(), made(), shapes_batch(2)
    out = learning.forward(learning.parts(model), batch)
    found = learning.losses(out, batch, None, ("task",), {})["task"]
    from pqk.families.detection.inputs import padded

    images, _ = padded(batch.images())
    scale = torch.tensor([96.0, 64, 96, 64])
    labels = []
    for one in batch.targets():
        low, high = one["boxes"][:, :2], one["boxes"][:, 2:]
        labels.append({"class_labels": one["labels"], "boxes": torch.cat(((low + high) / 2, high - low), 1) / scale})
    want = model.net(images, pixel_mask=torch.ones_like(images[:, 0], dtype=torch.int64), labels=labels).loss
    layers = [{**out, "logits": out["logits"][[k]], "boxes": out["boxes"][[k]]} for k in range(2)]
    first, last = (learning.losses(layer, batch, None, ("task",), {})["task"] for layer in layers)
    torch.testing.assert_close(last, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, first + last, rtol=1e-5, atol=1e-6)


def test_steps_lower_the_loss_and_every_frozen_norm_stays(library):
    learning, model, batch = family("detr").learning_part(), made().train(), shapes_batch(2)
    parts, losses = learning.parts(model), []
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = learning.losses(learning.forward(parts, batch), batch, None, ("task",), {})["task"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.9 * losses[0], losses
    assert all(torch.equal(buffer, frozen[name]) for name, buffer in model.named_buffers())


def test_the_exported_graph_can_be_trained(library):
    """As quantizers prepare it: an image alone, the last layer's outputs."""
    of, model, batch = family("detr"), made(), shapes_batch(2)
    learning = of.learning_part()
    spec = of.model_part().graphs(model, workload())["detector"]
    out = learning.forward({"detector": spec.module}, batch)
    with torch.no_grad():
        aim = learning.forward(learning.parts(model), batch)
    torch.testing.assert_close(out["logits"][-1], aim["logits"][-1])
    found = learning.losses(out, batch, aim, ("task", "imitation"), {})
    assert float(found["imitation"].detach()) == pytest.approx(0, abs=1e-5)
    found["task"].backward()
    assert model.net.class_labels_classifier.weight.grad.abs().sum() > 0


def test_distances_from_itself_are_nothing_and_from_another_not(library):
    learning, batch = family("detr").learning_part(), shapes_batch(2)
    with torch.no_grad():
        one, other = (learning.forward(learning.parts(made(seed)), batch) for seed in (0, 1))
    options = {"temperature": 2.0}
    same, apart = (learning.losses(one, batch, aim, ("kl", "imitation"), options) for aim in (one, other))
    for name in same:
        assert float(same[name]) == pytest.approx(0, abs=1e-6) and float(apart[name]) > 1e-4, name
    assert learning.shift(one, one, batch) == 0 < learning.shift(one, other, batch)
    assert learning.distance(one, other, {}) == pytest.approx([float(x) for x in learning.distance(one, other, {})])
    assert np.mean(learning.distance(one, other, {})) == pytest.approx(float(apart["imitation"]), rel=1e-5)
    assert "gamma" in sentence_of(learning.features, made(), made(), 0)
    assert "gamma" in sentence_of(learning.forward, learning.parts(made()), batch, True)


def test_a_set_of_more_classes_is_refused(library):
    learning, batch = family("detr").learning_part(), shapes_batch(1, classes=("a", "b", "c", "d"))
    said = sentence_of(learning.forward, learning.parts(made()), batch)
    assert "4 classes" in said and "tells 3 apart" in said


def test_held_out_images_are_scored(library):
    learning, batches = family("detr").learning_part(), drawn(asked(pairs=3, size=96), count=6)
    rows = []
    for batch in batches.held_out(batch=2):
        with torch.no_grad():
            rows += learning.score(learning.forward(learning.parts(made()), batch), batch)
    assert [len(of_image) for of_image in rows] == [1, 1, 1]
    done = learning.complete([row for of_image in rows for row in of_image])
    assert all(0 <= row["ap"] <= 100 for row in done)
