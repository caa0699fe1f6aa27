"""Files of a second family: bare weights, hub folders that say little, settings laid over; none of it is trusted."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diffusiondet_toys import TINY
from safetensors.torch import load_file, save_file

from pqk.errors import PqkError
from pqk.families.header import LONGEST, weight_shapes
from pqk.families.identify import family_of
from pqk.families.registry import families
from pqk.families.vectors import Case
from pqk.models import build_model, load_model, save_model

GOLDEN = Path(__file__).parents[1] / "golden"
OFFICIAL = GOLDEN / "vggt_checkpoint" / "model.pt"
TRACKS = GOLDEN / "vggt_track_s3_56x56"
SIGN = "aggregator.camera_token"


@pytest.fixture
def weights():
    return torch.load(OFFICIAL, weights_only=True)


@pytest.fixture
def hub(tmp_path, weights):
    """A folder as the hub has it: config.json with keywords of the constructor, and the weights."""
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"img_size": 56, "patch_size": 14, "embed_dim": 24}))
    return folder


def agrees(path, **settings):
    """Whether the network of a file gives the official outputs, and its family is told from the file."""
    case, net = Case(OFFICIAL.parent), load_model(path, **settings)
    with torch.no_grad():
        out = net(torch.from_numpy(case["in_images"]))
    assert all(case.check(f"out_{name}", value).passes for name, value in out.items())
    assert family_of(path) == net.family == "vggt" and not net.training
    return net


def sentence_of(path, **settings):
    with pytest.raises(PqkError) as caught:
        load_model(path, **settings)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and text.startswith(str(path))
    return text


# ---------------------------------------------------------------- what is read


def test_bare_weights_in_a_pickle(tmp_path, weights):
    assert agrees(OFFICIAL).config["depth"] == 4
    for zipped in (True, False):
        torch.save(weights, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        agrees(tmp_path / "a.pth")
    torch.save({key: value.half() for key, value in weights.items()}, tmp_path / "half.pt")
    assert next(load_model(tmp_path / "half.pt").parameters()).dtype == torch.float32


@pytest.mark.parametrize("beside", [{}, {"epoch": 3, "optimizer": {"lr": 0.1}}, {"args": {"model": "VGGT()"}}])
def test_weights_of_a_training_under_another_key(tmp_path, weights, beside):
    torch.save({"model": weights, **beside}, tmp_path / "checkpoint.pt")
    agrees(tmp_path / "checkpoint.pt")


def test_a_bare_safetensors_file(hub, tmp_path):
    shutil.copy(hub / "model.safetensors", tmp_path / "vggt.safetensors")
    agrees(tmp_path / "vggt.safetensors")
    agrees(hub / "model.safetensors")


@pytest.mark.parametrize("config", [{}, {"img_size": 56}, {"patch_embed": "dinov2_vitl14_reg", "enable_track": False}])
def test_a_hub_folder_is_filled_in_from_its_weights(hub, config):
    (hub / "config.json").write_text(json.dumps(config))
    net = agrees(hub)
    assert config.items() <= net.config.items() and net.config["num_heads"] == 2


def test_what_config_json_says_wins(hub):
    (hub / "config.json").write_text(json.dumps({"dpt": {"layers": [0, 0, 1, 3]}, "enable_point": False}))
    net = load_model(hub)
    assert net.sizes.dpt.layers == (0, 0, 1, 3) and net.sizes.dpt.features == 16
    assert not hasattr(net, "point_head")
    (hub / "config.json").write_text(json.dumps({"depth": 5}))
    assert "lacks" in sentence_of(hub / "model.safetensors", depth=5)
    with pytest.raises(
        PqkError, match=r"model.safetensors does not fit this model: it lacks .* \(aggregator.frame_blo"
    ):
        load_model(hub)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_own_folder(tmp_path, dtype):
    net = load_model(OFFICIAL)
    folder = save_model(net, tmp_path / "own", dtype)
    again = load_model(folder)
    assert again.config == net.config | {"family": "vggt"} and again.sizes == net.sizes
    assert family_of(folder) == "vggt"
    rounded = {key: value.to(getattr(torch, dtype)).float() for key, value in net.state_dict().items()}
    assert all(torch.equal(value, rounded[key]) for key, value in again.state_dict().items())


def test_the_configuration_of_an_own_folder_is_whole(tmp_path):
    """Nothing is read off the shapes where a family is named: a pruned network has blocks of their own sizes."""
    config = Case(OFFICIAL.parent).need("config") | {"frame_blocks": [{"heads": 1, "ffn": 7}] * 4}
    folder = save_model(build_model("vggt", config), tmp_path / "pruned")
    assert load_model(folder).sizes.frame_blocks[0].ffn == 7


# ---------------------------------------------------------------- settings laid over


def test_the_track_head_is_asked_for(tmp_path):
    case = Case(TRACKS)
    torch.save(case.weights(), tmp_path / "tracks.pt")
    images, points = (torch.from_numpy(case[f"in_{name}"]) for name in ("images", "query_points"))
    plain = load_model(tmp_path / "tracks.pt")
    with pytest.raises(PqkError, match="load it with enable_track=True"):
        plain(images, points)
    assert not hasattr(plain, "track_head")
    unread = {key: case.need("config")["track"][key] for key in ("iters", "corr_levels", "corr_radius")}
    net = load_model(tmp_path / "tracks.pt", enable_track=True, track=unread)  # sizes that no shape tells
    with torch.no_grad():
        out = net(images, points)
    assert case.check("out_track", out["track"], 1e-4).passes and case.check("out_depth", out["depth"]).passes


def test_settings_are_checked(hub):
    for path in (OFFICIAL, hub, hub / "model.safetensors"):
        assert "unknown key 'enable_trak' in the vggt configuration (did you mean" in sentence_of(
            path, enable_trak=True
        )
        assert "enable_track must be true or false, got 1" in sentence_of(path, enable_track=1)
    assert "keys (track_head." in sentence_of(OFFICIAL, enable_track=True)
    assert not hasattr(load_model(hub, enable_depth=False), "depth_head")


def test_settings_of_other_models(small_config, tmp_path):
    assert load_model("random:vggt-tiny", depth=5, dpt={"features": 32}).sizes.dpt.out_channels == (48, 64, 96, 96)
    folder = save_model(build_model("dust3r", small_config), tmp_path / "net")
    assert load_model(folder, conf_mode=["exp", 1, 5]).sizes.conf_mode.high == 5
    with pytest.raises(PqkError, match=r"net: unknown key 'img_sise'.*did you mean 'img_size'"):
        load_model(folder, img_sise=3)


# ---------------------------------------------------------------- which family


def test_every_family_has_a_sign_of_its_own(weights, small_config):
    signs = {of.name: of.settings_part().SIGN for of in families()}
    held = {"vggt": set(weights), "dust3r": set(build_model("dust3r", small_config).state_dict())}
    held["diffusiondet"] = set(build_model("diffusiondet", TINY).state_dict())
    assert {*held, "detr"} == set(signs)
    assert signs["detr"] not in set().union(*held.values())  # its own weights: test_detr.py
    for name, keys in held.items():
        assert [family for family, sign in signs.items() if sign in keys] == [name]


def test_a_folder_without_a_family_is_told_by_its_weights(hub, small_config, tmp_path):
    assert family_of(hub) == "vggt"
    folder = save_model(build_model("dust3r", small_config), tmp_path / "net")
    (folder / "config.json").write_text(json.dumps(small_config))
    assert family_of(folder) == load_model(folder).family == "dust3r"
    save_file({"something": torch.zeros(3)}, hub / "model.safetensors")
    assert family_of(hub) == "dust3r"  # the first one, as for any folder of before
    assert "unknown key 'embed_dim'" in sentence_of(hub)


def test_weights_that_do_not_tell_their_sizes(small_config, tmp_path):
    folder = save_model(build_model("dust3r", small_config), tmp_path / "net")
    save_file({"something": torch.zeros(3)}, tmp_path / "other.safetensors")
    for path in (folder / "model.safetensors", tmp_path / "other.safetensors"):
        assert "give the folder that holds config.json and model.safetensors" in sentence_of(path)
        with pytest.raises(PqkError, match="give the folder"):
            family_of(path)


# ---------------------------------------------------------------- files that are not to be trusted


def header(content, length=None):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it has no header"),
        (b"\0" * 8, "it has no header"),
        (b"\xff" * 64, "it has no header"),
        (header(b"{}", 3), "it has no header"),
        (header(b"{} "), "give the folder"),
        (header(b"\xff\xfe{}"), "its header is no JSON"),
        (header(b"[" * 100_000), "its header is no JSON"),
        (header(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}"), "its header is no JSON"),
        (header([1]), "its header is no JSON object"),
        (header({SIGN: 3}), f"'{SIGN}' has no shape"),
        (header({SIGN: {"shape": [1.5]}}), "has no shape"),
        (header({SIGN: {"shape": [True]}}), "has no shape"),
        (header({SIGN: {"shape": [-1]}}), "has no shape"),
        (header({SIGN: {"shape": [2**70]}}), "has no shape"),
        (header({SIGN: {"shape": [300] * 6}}), "has more values than the file"),
        (header({SIGN: {"shape": [1] * 65}}), "has more values than the file"),
        (header({SIGN + "\n" * 500: {"shape": ""}}), "has no shape"),
        (header({SIGN: {"shape": []}}), "its weights have impossible shapes"),
        (
            header({SIGN: {"shape": [1, 2, 1, 8]}}),
            "it is no complete VGGT checkpoint: it lacks aggregator.frame_blocks",
        ),
    ],
)
def test_a_hostile_header(tmp_path, content, sentence):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert sentence in sentence_of(path)
    with pytest.raises(PqkError):
        family_of(path)
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    path.rename(folder / "model.safetensors")
    sentence_of(folder)


def test_a_header_that_is_too_long_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", LONGEST + 1))
        stream.truncate(LONGEST + 100)
    assert f"its header has {LONGEST + 1} bytes; at most {LONGEST} are read" in sentence_of(path)


def test_the_header_tells_what_the_library_reads(hub, weights):
    shapes = weight_shapes(hub / "model.safetensors")
    assert shapes == {key: tuple(value.shape) for key, value in load_file(hub / "model.safetensors").items()}
    assert set(shapes) == set(weights)


@pytest.mark.parametrize("kept", [0, 4, 100, 50_000, -10])
def test_truncated_files(hub, tmp_path, kept):
    path = hub / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    for name in (path, hub):
        with pytest.raises(PqkError, match="is damaged or no safetensors file"):
            load_model(name)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(OFFICIAL.read_bytes()[:kept])
    assert "is damaged or no PyTorch file" in sentence_of(cut)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({SIGN: torch.zeros(())}, "its weights have impossible shapes"),
        ({SIGN: torch.zeros(1, 2, 1, 0)}, "its weights have impossible shapes"),
        ({"aggregator.patch_embed.pos_embed": torch.zeros(1, 0, 24)}, "its weights have impossible shapes"),
        ({"aggregator.frame_blocks.0.attn.q_norm.weight": torch.zeros(0)}, "its weights have impossible shapes"),
        ({f"aggregator.frame_blocks.{'9' * 5000}.x": torch.zeros(1)}, "its weights have impossible shapes"),
        ({SIGN: torch.zeros(1, 2, 1, 20)}, "weights of another shape, first aggregator."),
        (
            {"depth_head.projects.1.bias": torch.zeros(5)},
            "1 weights of another shape, first depth_head.projects.1.bias",
        ),
        ({"stray": torch.zeros(5)}, "has the unknown 1 key (stray)"),
        ({"camera_head.token_norm.bias": torch.full((48,), torch.nan)}, "48 of the 48 values"),
        ({"stray": 3}, "'stray' is no tensor"),
        ({5: torch.zeros(1)}, "5 is no tensor"),
    ],
)
def test_weights_of_no_network(tmp_path, weights, change, sentence):
    torch.save({**weights, **change}, tmp_path / "a.pt")
    found = sentence_of(tmp_path / "a.pt")
    assert sentence in found


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_a_shape(tmp_path, weights):
    ragged = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    torch.save({**weights, SIGN: ragged}, tmp_path / "a.pt")
    assert "its weights have impossible shapes" in sentence_of(tmp_path / "a.pt")


def test_a_missing_weight_is_named(tmp_path, weights):
    for key, sentence in (
        ("aggregator.frame_blocks.0.attn.qkv.weight", "it lacks aggregator.frame_blocks.0.attn.qkv.weight"),
        ("depth_head.projects.2.weight", "it lacks depth_head.projects.2.weight"),
        ("point_head.projects.2.weight", "lacks 1 key (point_head.projects.2.weight)"),
        (SIGN, "is no official checkpoint: "),
    ):
        torch.save({name: value for name, value in weights.items() if name != key}, tmp_path / "a.pt")
        assert sentence in sentence_of(tmp_path / "a.pt")
    kept = {name: value for name, value in weights.items() if not name.endswith("mask_token")}
    torch.save(kept, tmp_path / "a.pt")
    agrees(tmp_path / "a.pt")


def test_other_contents(tmp_path):
    for content in ([1], {"model": "x"}, {"model": {}}, {SIGN: "x"}, {"model": {SIGN: None}}, {}):
        torch.save(content, tmp_path / "a.pt")
        sentence_of(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"embed_dimm": 24}, "unknown key 'embed_dimm' in the vggt configuration (did you mean 'embed_dim'?)"),
        ({"embed_dim": "24"}, "embed_dim must be a whole number"),
        ({"depth": 10**9}, "depth must be"),
        ({"dpt": [1]}, "dpt of the vggt configuration must be a mapping"),
        ({"camera": None}, "camera of the vggt configuration must be a mapping"),
        ({"family": "vgt"}, "unknown model family 'vgt' (did you mean 'vggt'?)"),
        ({"family": 3}, "unknown model family '3'"),
    ],
)
def test_bad_config_json(hub, config, sentence):
    (hub / "config.json").write_text(json.dumps(config))
    with pytest.raises(PqkError) as caught:
        load_model(hub)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
