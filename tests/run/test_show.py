"""`pqk show` and scripts/visualize_results.py: from pictures to figures, with the network in a process of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_toys import REPOSITORY, pqk

from pqk.cli.show_output import visualize
from pqk.compress.weights.files import save_weights
from pqk.compress.weights.model import quantize_weights
from pqk.compress.weights.schemes import SCHEMES
from pqk.data.detection.generate import SetPlan, make_set
from pqk.errors import NotBuilt, PqkError
from pqk.families.metrics.detection_ap import overlaps
from pqk.families.registry import family
from pqk.measure.shown import predict
from pqk.models import build_model, load_model, save_model
from pqk.show import show as module
from pqk.show.show import show

FILES = {"depth.png", "cloud.png", "trajectory.png", "show.json", "cloud.ply"}
NETWORK = {
    "img_size": 56,
    "embed_dim": 32,
    "depth": 5,
    "num_heads": 2,
    "init_values": 0.5,
    "dino": {"depth": 2},
    "camera": {"trunk_depth": 2},
    "dpt": {"features": 16, "out_channels": [8, 12, 16, 16]},
}


def pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for place in range(count):
        Image.fromarray(random.integers(0, 255, (72, 96, 3), dtype=np.uint8)).save(folder / f"{place}.png")
    return folder


def test_a_model_in_a_process_of_its_own(project: Path, tmp_path: Path) -> None:
    """The shipped model on pictures of 64 pixels: points of random weights would fit no camera."""
    images = pictures(tmp_path / "a scene" / "images")
    shipped = REPOSITORY / "models" / "dust3r-tiny"
    done = pqk(project, "show", "--model", shipped, "--images", images, "-o", "seen", "--max-images", "3")
    assert done.code == 0, done.err
    assert {path.name for path in (project / "seen").iterdir()} == FILES
    about = json.loads((project / "seen" / "show.json").read_text())
    assert about["pictures"] == ["0.png", "1.png", "2.png"]
    assert (about["models"], about["comparison"]) == (["dust3r-tiny"], None)
    names = ("depth.png", "cloud.png", "trajectory.png", "show.json", "cloud.ply")
    assert done.out.splitlines() == [f"seen/{name}" for name in names]
    assert done.err == "predicting 2 samples with dust3r-tiny\n"


def test_the_script_and_a_model_beside_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here in this process: that of the network is in the test above."""
    monkeypatch.setattr(module, "call", lambda task, request: predict(request))
    model = build_model("vggt", NETWORK, generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "one" / "net")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.001
    save_model(model, tmp_path / "other" / "net")
    words = ["--model_name", str(tmp_path / "one" / "net"), "--image_folder", str(pictures(tmp_path / "scene"))]
    more = ["--against", str(tmp_path / "other" / "net"), "--max_images", "2", "--device", "cpu"]
    assert visualize([*words, *more, "--output_dir", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, "cloud-against.ply"}
    about = json.loads((tmp_path / "out" / "show.json").read_text())
    assert (about["pictures"], about["models"]) == (["0.png", "1.png"], ["one/net", "other/net"])
    found = about["comparison"]
    assert 0 < found["depth_mean_relative_difference"] < 0.5
    assert len(found["depth_relative_difference"]) == len(found["rotation_difference_deg"]) == 2
    expected = (
        f"depth differs by {100 * found['depth_mean_relative_difference']:.3g} % on average, lengths by the factor"
    )
    assert capsys.readouterr().out.startswith(expected)
    assert visualize([*words, "--max_images", "1"]) == 2
    assert capsys.readouterr().err.endswith("scene: a scene needs at least 2 images, 1 of its 3 asked for\n")
    assert visualize([*words, "--max_images", "0"]) == 2
    assert capsys.readouterr().err.endswith("pqk: --max_images 0: at least 1 picture is shown\n")


def test_quantized_weights_beside_the_float_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "call", lambda task, request: predict(request))
    model = build_model("vggt", NETWORK, generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "net")
    differences = {}
    for name in ("INT8_Per_Channel_Symmetric", "INT4_Group_32"):
        path = save_weights(quantize_weights(model, SCHEMES[name]), tmp_path / f"{name}.safetensors")
        drawn = show(str(tmp_path / "net"), str(path), pictures(tmp_path / name), 2, tmp_path / "out", REPOSITORY)
        assert drawn.comparison is not None
        differences[name] = drawn.comparison.mean
        assert json.loads((tmp_path / "out" / "show.json").read_text())["models"] == ["net", name]
    assert 0 < differences["INT8_Per_Channel_Symmetric"] < differences["INT4_Group_32"]
    other = build_model("vggt", {**NETWORK, "embed_dim": 64}, generator=torch.Generator().manual_seed(0))
    save_model(other, tmp_path / "wider")
    with pytest.raises(PqkError, match=r"INT4_Group_32.safetensors: .*shape"):
        show(str(tmp_path / "wider"), str(path), tmp_path / name, 2, tmp_path / "never", REPOSITORY)


def test_boxes_in_a_single_picture(project: Path, tmp_path: Path) -> None:
    """The shipped detector, in a process of its own, on a generated room."""
    make_set(tmp_path / "set", SetPlan("test", 0, 1))
    folder = tmp_path / "set" / "test-0" / "images"
    shipped = REPOSITORY / "models" / "diffusiondet-tiny"
    done = pqk(project, "show", "--model", shipped, "--images", folder, "-o", "seen", "--max-images", "1")
    assert (done.code, done.out.splitlines()) == (0, ["seen/boxes.png", "seen/show.json"]), done.err
    about = json.loads((project / "seen" / "show.json").read_text())
    assert (about["pictures"], about["sizes"]) == (["000000.jpg"], [[320, 240]])
    (found,) = about["found"][0]
    truth = json.loads((folder.parent / "annotations.json").read_text())["annotations"]
    true = np.array([[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in truth)])
    boxes = np.array([each["box"] for each in found])
    overlap = overlaps(boxes, true, np.zeros(len(true), bool)).max(axis=1)
    assert len(found) == len(true) == 3 and (np.sort(overlap) > [0.4, 0.9, 0.9]).all()  # one is half hidden


@pytest.mark.parametrize("name", ["diffusiondet-tiny", "random:detr-tiny"])
def test_quantized_boxes_beside_the_float_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Pictures of any size. A random DETR is hardly sure of anything, so less is asked of it."""
    monkeypatch.setattr(module, "call", lambda task, request: predict(request))
    monkeypatch.setattr("pqk.show.boxes.LEAST_SCORE", 0.1)
    path = name if name.startswith("random:") else str(REPOSITORY / "models" / name)
    images = pictures(tmp_path / "scene", 2)
    Image.new("RGB", (1200, 90), (200, 80, 10)).save(images / "wide.jpg")
    quantized = quantize_weights(load_model(path), SCHEMES["INT8_Per_Channel_Symmetric"])
    weights = save_weights(quantized, tmp_path / "int8.safetensors")
    drawn = show(path, str(weights), images, 3, tmp_path / "out", REPOSITORY)
    assert [file.name for file in drawn.files] == ["boxes.png", "show.json"]
    about = json.loads((tmp_path / "out" / "show.json").read_text())
    assert about["models"] == [Path(path).name, "int8"] and about["sizes"] == [[96, 72], [96, 72], [1200, 90]]
    if name == "diffusiondet-tiny":
        alone = show(path, None, images, 1, tmp_path / "more", REPOSITORY, settings={"workload.sampler.boxes": 30})
        (fewer,) = json.loads(alone.files[1].read_text())["found"]
        assert len(fewer[0]) < len(about["found"][0][0])
    agreed = about["comparison"]
    assert sum(first for first, _ in agreed["boxes"]) > 0
    assert agreed["share_of_first_in_second"] > 0.5 and 0.8 < agreed["mean_iou"] < 1
    for each in about["found"]:
        for (width, height), found in zip(about["sizes"], each, strict=True):
            boxes = np.array([one["box"] for one in found]).reshape(-1, 4)
            assert (boxes >= 0).all() and (boxes <= [width, height] * 2).all()


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [str(REPOSITORY / "models" / name) for name in ("dust3r-tiny", "vggt-tiny")]
    out = tmp_path / "out"
    images = pictures(tmp_path / "both" / "a")
    with pytest.raises(PqkError, match=r"of the family dust3r, and .* of vggt: compare two of one"):
        show(tiny[0], tiny[1], images, 3, out, REPOSITORY)
    pictures(tmp_path / "both" / "b")
    with pytest.raises(PqkError, match=r"both holds 2 scenes \(a, b\); name the folder of one of them"):
        show(tiny[0], None, tmp_path / "both", 3, out, REPOSITORY)
    with pytest.raises(PqkError, match=r"no such model: .*none is neither a file nor a folder"):
        show(tiny[0], str(tmp_path / "none"), images, 3, out, REPOSITORY)
    with pytest.raises(PqkError, match="needs at least 2 images, found 1"):
        show(tiny[1], None, pictures(tmp_path / "one", 1), 3, out, REPOSITORY)
    shipped = str(REPOSITORY / "models" / "diffusiondet-tiny")
    with pytest.raises(PqkError, match=r"of the family diffusiondet, and .* of vggt: compare two of one"):
        show(shipped, tiny[1], images, 3, out, REPOSITORY)
    for key, said in (("quant.seed", "keys begin with workload"), ("workload.sampler.step", "mean 'steps'")):
        with pytest.raises(PqkError, match=said):
            show(shipped, None, images, 3, out, REPOSITORY, settings={key: 4})
    (tmp_path / "empty").mkdir()
    with pytest.raises(PqkError, match="empty: no scene here"):
        show(shipped, None, tmp_path / "empty", 3, out, REPOSITORY)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("no picture")
    with pytest.raises(PqkError, match=r"a\.png: not an image"):
        show(shipped, None, tmp_path / "text", 3, out, REPOSITORY)
    monkeypatch.setattr(module, "family", lambda name: replace(family(name), view=None))
    with pytest.raises(NotBuilt, match="predictions of the family vggt cannot be drawn here"):
        show(tiny[1], None, images, 3, out, REPOSITORY)
    assert not out.exists()
