"""Official files, hub folders and our own folders: the same network comes back, and bad files give one sentence."""

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pqk.errors import PqkError
from pqk.families.dust3r.build import parse_constructor
from pqk.families.identify import model_name
from pqk.models import build_model, load_model, save_model
from pqk.recipe.request import load_teacher
from pqk.study.checkpoints import open_checkpoint

NAMES = {"pts3d_1": "pts3d_1", "conf_1": "conf_1", "pts3d_2": "pts3d_in_other_view_2", "conf_2": "conf_2"}


@pytest.fixture
def case(golden):
    return golden("dust3r_checkpoint")


@pytest.fixture
def official(case):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(case.path / "checkpoint.pth", weights_only=True)


def run(model, case):
    with torch.no_grad():
        return model(*(torch.from_numpy(case[f"in_img{view}"]) for view in (1, 2)))


def test_hub_folder(case, official, tmp_path):
    """config.json with bare Infinity, weights of the same network as checkpoint.pth."""
    shutil.copyfile(case.path / "hub_config.json", tmp_path / "config.json")
    save_file(official["model"], tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert not model.training
    assert model.config["landscape_only"] is False and model.config["patch_embed_cls"] == "PatchEmbedDust3R"
    out = run(model, case)
    for ours, theirs in NAMES.items():
        assert case.check(f"out_{theirs}@checkpoint.pth", out[ours][:, ::3, ::3]).passes


@pytest.mark.parametrize("dropped", [".scratch.layer_rn.", ("layer1_rn", "layer2_rn", "layer3_rn", "layer4_rn")])
def test_either_spelling_of_tied_weights(small_config, dropped):
    model = build_model("dust3r", small_config)
    parts = (dropped,) if isinstance(dropped, str) else dropped
    kept = {k: v for k, v in model.state_dict().items() if not any(part in k for part in parts)}
    kept = {k: v for k, v in kept.items() if "refinenet4.resConfUnit1" not in k and k != "mask_token"}
    again = build_model("dust3r", small_config, kept)
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(image, image)["pts3d_1"], again(image, image)["pts3d_1"])
    scratch = again.downstream_head1.dpt.scratch
    assert scratch.layer_rn[0].weight is scratch.layer1_rn.weight


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_own_folder_of_a_pruned_network(small_config, tmp_path, dtype):
    torch.manual_seed(3)
    config = {
        **small_config,
        "conf_mode": ("exp", 1, float("inf")),
        "enc_head_dim": 8,
        "enc_blocks": [{"heads": 1, "ffn": 10}, {"heads": 3, "ffn": 3}],
        "dec_blocks2": [{"heads": 2, "ffn": 2}, {"heads": 1, "ffn": 7}, {"heads": 4, "ffn": 5}],
    }
    model = build_model("dust3r", config)
    folder = save_model(model, tmp_path / "deep" / "net", dtype, card={"note": "pruned"})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "model_card.json"]
    assert json.loads((folder / "model_card.json").read_text()) == {"note": "pruned"}
    assert "Infinity" not in (folder / "config.json").read_text()
    stored = load_file(folder / "model.safetensors")
    assert {str(value.dtype) for value in stored.values()} == {f"torch.{dtype}"}
    again = load_model(folder)
    rounded = {k: v.to(getattr(torch, dtype)).float() for k, v in model.state_dict().items()}
    assert all(torch.equal(value, rounded[key]) for key, value in again.state_dict().items())
    assert set(again.state_dict()) == set(rounded)
    second = load_model(save_model(again, tmp_path / "second"))
    assert second.config == again.config


def test_the_given_weights_are_copied(small_config):
    source = build_model("dust3r", small_config).state_dict()
    before = source["enc_norm.weight"].clone()
    model = build_model("dust3r", small_config, source)
    with torch.no_grad():
        model.enc_norm.weight.add_(1)
    assert torch.equal(source["enc_norm.weight"], before)
    assert model.enc_norm.weight.requires_grad


def test_random_models_are_always_the_same():
    first = load_model("random:dust3r-tiny")
    torch.manual_seed(99)
    second = load_model("random:dust3r-tiny")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(PqkError, match=r"unknown random model 'dust3r-tini'.*did you mean 'dust3r-tiny'"):
        load_model("random:dust3r-tini")


class Harmful:
    def __reduce__(self):
        return (os.system, ("exit 1",))


def sentence_of(path):
    with pytest.raises(PqkError) as caught:
        load_model(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize("kept", [0, 100, 5000, -10])
def test_truncated_file(case, tmp_path, kept):
    path = tmp_path / "cut.pth"
    path.write_bytes((case.path / "checkpoint.pth").read_bytes()[:kept])
    assert f"{path} is damaged or no PyTorch file" in sentence_of(path)


def test_foreign_files(tmp_path):
    text, raw = tmp_path / "text.pth", tmp_path / "raw.pth"
    text.write_text("hello, these are not weights")
    raw.write_bytes(pickle.dumps(Harmful(), protocol=2))
    assert "damaged or no PyTorch file" in sentence_of(text)
    sentence_of(raw)
    assert "neither a file nor a folder" in sentence_of(tmp_path / "absent.pth")
    assert "it has no config.json" in sentence_of(tmp_path)


def test_pickles_that_are_not_on_the_list(official, tmp_path):
    path = tmp_path / "harmful.pth"
    torch.save({**official, "extra": Harmful()}, path)
    assert "not safe to read" in sentence_of(path)
    assert "system" in sentence_of(path)


def test_wrong_keys_and_shapes(official, tmp_path):
    path = tmp_path / "wrong.pth"
    weights = dict(official["model"])
    weights["stray"] = weights.pop("dec_norm.bias")
    torch.save({**official, "model": weights}, path)
    assert "lacks 1 key (dec_norm.bias) and has the unknown 1 key (stray)" in sentence_of(path)
    torch.save({**official, "model": {**official["model"], "enc_norm.weight": torch.zeros(7)}}, path)
    assert "enc_norm.weight: (7,) instead of (24,)" in sentence_of(path)
    torch.save({"model": official["model"]}, path)
    assert "holds 'args' and 'model'" in sentence_of(path)
    torch.save({**official, "model": {"enc_norm.weight": 3}}, path)
    assert "is no tensor" in sentence_of(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: torch.quantize_per_tensor(w, 0.01, 0, torch.qint8), "is a quantized tensor (torch.qint8)"),
        (lambda w: (w * 100).to(torch.int8), "is no floating-point tensor (torch.int8)"),
        (lambda w: w > 0, "is no floating-point tensor (torch.bool)"),
        (lambda w: w.to(torch.complex64), "is no floating-point tensor (torch.complex64)"),
        (lambda w: w.to("meta"), "is a tensor of the meta device"),
        (lambda w: w.to_sparse(), "is not a dense tensor (its layout is torch.sparse_coo)"),
        (lambda w: w.to_sparse_csr(), "is not a dense tensor (its layout is torch.sparse_csr)"),
        (lambda w: w.index_fill(0, torch.tensor([1]), torch.nan), "values of decoder_embed.weight are NaN or infinite"),
        (lambda w: w.double() * 1e300, "are NaN or infinite (in float32)"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_weights(official, tmp_path, change, sentence):
    """Each is named with file and key, whether it comes by a .pth file or, where that can hold it, by a folder."""
    weights = {**official["model"], "decoder_embed.weight": change(official["model"]["decoder_embed.weight"])}
    torch.save({**official, "model": weights}, tmp_path / "a.pth")
    found = sentence_of(tmp_path / "a.pth")
    assert found.startswith(f"{tmp_path / 'a.pth'}: ") and "decoder_embed.weight" in found and sentence in found


def test_a_nan_in_one_weight_of_a_folder(small_config, tmp_path):
    folder = save_model(build_model("dust3r", small_config), tmp_path / "net")
    weights = load_file(folder / "model.safetensors")
    weights["enc_norm.weight"][3] = torch.inf
    save_file(weights, folder / "model.safetensors")
    assert "model.safetensors: 1 of the 32 values of enc_norm.weight are NaN or infinite" in sentence_of(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_float_type_is_a_weight(official, tmp_path, dtype):
    torch.save({**official, "model": {k: v.to(dtype) for k, v in official["model"].items()}}, tmp_path / "a.pth")
    assert {parameter.dtype for parameter in load_model(tmp_path / "a.pth").parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("prefix", "wrapper"),
    [
        ("module.", "DataParallel or DistributedDataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("module._orig_mod.", "DataParallel"),
    ],
)
def test_keys_with_the_prefix_of_a_wrapper(official, tmp_path, prefix, wrapper):
    torch.save({**official, "model": {prefix + k: v for k, v in official["model"].items()}}, tmp_path / "a.pth")
    sentence = sentence_of(tmp_path / "a.pth")
    assert f"every key begins with '{prefix.split('.')[0]}.', as {wrapper}" in sentence and "state_dict" in sentence


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_and_paths_beside_the_weights(official, tmp_path, zipped):
    """As training scripts leave them: a best loss, an output folder, also one of Windows."""
    scalars = [kind(1) for kind in (np.float64, np.float32, np.float16, np.int64, np.uint8, np.bool_, np.longdouble)]
    beside = {"best": [*scalars, np.str_("x"), np.dtype("f4")], "out": Path("a/b"), "win": PureWindowsPath("c:/d")}
    content = {**official, **beside, "args": argparse.Namespace(model=official["args"].model, out=Path("x"))}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert load_model(tmp_path / "a.pth").enc_norm.weight.shape == (24,)
    foreign = (tmp_path / "a.pth").read_bytes().replace(b"cpathlib\nPureWindowsPath", b"cpathlib\nWindowsPath")
    if not zipped:
        (tmp_path / "b.pth").write_bytes(foreign)  # a path of Windows itself, which Linux cannot make
        load_model(tmp_path / "b.pth")


def test_the_name_of_a_model(case, tmp_path):
    """As it was given: a cache of the Hub links a file to a blob named by its hash, a folder to its revision."""
    snapshot = tmp_path / "models--naver--DUSt3R_ViT.1" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    shutil.copy(case.path / "checkpoint.pth", tmp_path / "blob")
    (snapshot / "DUSt3R.pth").symlink_to(tmp_path / "blob")
    (tmp_path / "latest").symlink_to(snapshot)
    assert load_teacher(str(snapshot / "DUSt3R.pth"), tmp_path)[0].name == "DUSt3R.pth"
    assert open_checkpoint(snapshot / "DUSt3R.pth", tmp_path).name == "DUSt3R"
    assert model_name(f"{snapshot}/") == model_name(snapshot / "x" / "..") == "models--naver--DUSt3R_ViT.1"
    assert model_name(tmp_path / "latest") == "latest"
    assert model_name(".") == Path.cwd().name


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("__import__('os').system('exit 1')", "must look like"),
        ("AsymmetricCroCo3DStereo(enc_depth=open('x'))", "no plain value"),
        ("AsymmetricCroCo3DStereo(enc_depth=1 + 1)", "no plain value"),
        ("AsymmetricCroCo3DStereo(3)", "must look like"),
        ("AsymmetricCroCo3DStereo(**x)", "plain keyword"),
        ("AsymmetricMASt3R(enc_depth=3)", "builds 'AsymmetricMASt3R'"),
        ("AsymmetricCroCo3DStereo(", "cannot be read"),
        ("(" * 5000, "cannot be read"),
        ("AsymmetricCroCo3DStereo(enc_deph=3)", "did you mean 'enc_depth'"),
    ],
)
def test_bad_constructor_text(official, tmp_path, text, sentence):
    path = tmp_path / "text.pth"
    torch.save({**official, "args": argparse.Namespace(model=text)}, path)
    assert sentence in sentence_of(path)


def test_constructor_text():
    text = " AsymmetricCroCo3DStereo(b = ('exp', -inf, inf), a=True, c=-2,d=[1.5], e='x') "
    assert parse_constructor(text) == {
        "b": ["exp", float("-inf"), float("inf")],
        "a": True,
        "c": -2,
        "d": [1.5],
        "e": "x",
    }


def test_damaged_own_folder(small_config, tmp_path):
    folder = save_model(build_model("dust3r", small_config), tmp_path / "net")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-50])
    assert "damaged or no safetensors file" in sentence_of(folder)
    assert "give the folder" in sentence_of(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text('{"enc_depth": ')
    assert "is not valid JSON" in sentence_of(folder)
    (folder / "config.json").write_text("[]")
    assert "one JSON object" in sentence_of(folder)


def test_saving_refuses_what_would_be_lost(small_config, tmp_path):
    model = build_model("dust3r", small_config)
    with pytest.raises(PqkError, match="float32 or float16, not 'int8'"):
        save_model(model, tmp_path / "net", "int8")
    with torch.no_grad():
        model.enc_norm.weight[0] = 1e6
    with pytest.raises(PqkError, match=r"enc_norm.weight has values beyond 65504"):
        save_model(model, tmp_path / "net", "float16")
    assert not (tmp_path / "net").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(PqkError, match="a parent of it is a file"):
        save_model(model, tmp_path / "file" / "net")
