"""Every wrong input that a user can give `pqk run`: its exit code, and one sentence that says what is wrong where."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from run_toys import Outcome, environment, pqk, small_experiment

from backends import registry
from pqk.cli import main
from pqk.cli.run_output import settings_of
from pqk.errors import PqkError
from pqk.families.scenes.frames import CalibrationImages
from pqk.files import write_text
from pqk.recipe import stages
from pqk.store.store import Store

pytestmark = pytest.mark.usefixtures("forked_workers")

Copy = Callable[[], Path]
Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs `pqk run ...` in `root` through the real command line, and returns the sentence with which it ended."""

    def run(root: Path, *arguments: str | Path, card: str = "B1", backend: str = "openvino", code: int = 2) -> str:
        monkeypatch.chdir(root)
        monkeypatch.setenv("COLUMNS", "500")
        given = ["run", card, "--backend", backend, *arguments]
        monkeypatch.setattr(sys, "argv", ["pqk", *map(str, given)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        outcome = Outcome(int(str(ended.value.code or 0)), said.out, said.err)
        assert outcome.code == code, said.err
        assert said.out == ""
        assert not list((root / "logs").glob("*.tmp"))
        return outcome.sentence

    return run


@pytest.fixture
def edit(project: Path) -> Callable[[str, str, str], None]:
    """Replaces a text in one of the project's configs."""

    def replace(name: str, old: str, new: str) -> None:
        path = project / "configs" / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1
        path.write_text(text.replace(old, new), encoding="utf-8")

    return replace


# ---------------------------------------------------------------- configs, cards, settings


def test_unknown_key_in_yaml(project: Path, refused: Refused, edit: Callable[..., None]) -> None:
    edit("quant.yaml", "  bias_correction: none", "  bias_corection: none")
    sentence = refused(project)
    assert re.match(
        r"configs/quant\.yaml:\d+: unknown key 'ptq\.bias_corection' \(did you mean 'bias_correction'\?\)", sentence
    )


def test_shape_that_is_no_multiple_of_16(project: Path, refused: Refused, edit: Callable[..., None]) -> None:
    edit("workload.yaml", "shape: [1, 3, 64, 64]", "shape: [1, 3, 70, 64]")
    sentence = refused(project)
    assert re.match(r"configs/workload\.yaml:\d+: input\.shape is .*70.* must be .* multiples of 16", sentence)
    assert "70" in refused(project, "--set", "workload.input.shape=[1, 3, 70, 64]")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("qant.ptq.calibration_images=8", "qant.ptq.calibration_images must start with .* 'quant'"),
        ("quant.ptq.calibration_image=8", "line: unknown key 'quant.ptq.calibration_image' .*'calibration_images'"),
        ("quant.ptq.bits_w=4", "command line: quant.ptq must hold bits_w 8 with bits_a 8"),
        ("quant.ptq.calibration_images", "write it as KEY=VALUE"),
        ("quant=8", "quant must start with workload., eval., .*, prune., joint. or reduce. and name a value"),
        ("quant.ptq.calibration_images=2020-13-45", "not plain YAML"),
        ("quant.ptq.keep_list=[LayerNorm", "not plain YAML"),
        ("quant.ptq.keep_list=[LayerNrom]", "'LayerNrom' is neither .*'LayerNorm'"),
        ("quant.ptq.calibration_images=9", "line: quant.ptq.calibration_images is 9 but workload.calib.* is 8"),
        ("eval.thresholds.size_ratio_min=1.0", "looser than in eval.yaml; only a task card may do that"),
        ("workload.input.shape=[1, 3, 64]", "must be \\[1, 3, H, W\\]"),
    ],
)  # fmt: skip
def test_settings(setting: str, words: str, project: Path, refused: Refused) -> None:
    assert re.search(words, refused(project, "--set", setting))


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["a.b=1\nother: 2"], "give one key at a time"),
        (["a.b={c: 1}\nother: 2\nthird: 3"], "give one key at a time"),
        (["a.b=1", "a.c=2", "a.b=3"], "--set a.b is given twice"),
        (["a.b=1", " a.b =1"], "--set a.b is given twice"),
        ([" =1"], "write it as KEY=VALUE"),
        (["a.b=!!bool x"], "not plain YAML"),
        (['a.b=!!int ""'], "not plain YAML"),
        (["a.b=064"], "--set a.b=064: the value is 064, which YAML may read in base 8: write the number without lead"),
        (["a.b=[1, 010]"], "is 010, which YAML may read in base 8"),
        (["a.b={c: -0777}"], "is -0777, which YAML may read in base 8"),
        (["a.b=1:30"], "the value is read as a number in base 60; put text in quotes"),
    ],
)
def test_settings_that_would_be_dropped(items: list[str], words: str) -> None:
    with pytest.raises(PqkError, match=words):
        settings_of(items)


def test_several_settings() -> None:
    assert settings_of(["a.b=1", "a.c=[x, y]", "a.d=null"]) == {"a.b": 1, "a.c": ["x", "y"], "a.d": None}
    numbers = ["a.b=0", "a.c=0.5", "a.d=-0", "a.e=0.0e-3", "a.f=0x10", "a.g='064'", "a.h=10"]
    assert list(settings_of(numbers).values()) == [0, 0.5, 0, 0.0, 16, "064", 10]


def test_a_card_is_blamed_for_its_own_mistake(project: Path, refused: Refused) -> None:
    card = project / "schedule" / "TaskCards" / "B1.md"
    card.write_text(card.read_text().replace("overrides: {}", "overrides: {quant: {ptq.bits: 8}}"))
    sentence = refused(project, "--set", "quant.ptq.calibration_images=4")
    assert sentence.startswith("schedule/TaskCards/B1.md: unknown key 'quant.ptq.bits'")


def test_unknown_card_backend_quantizer(project: Path, refused: Refused) -> None:
    assert re.match("there is no card 'B2' in schedule/TaskCards.* cards: A1, AUTO, B1", refused(project, card="B2"))
    assert "unknown backend 'openvin' (did you mean 'openvino'?)" in refused(project, backend="openvin")
    sentence = refused(project, "--quantizer", "nncff")
    assert sentence == "unknown quantizer 'nncff' (did you mean 'nncf'?); backend openvino has nncf, inc"


def test_what_this_version_or_machine_lacks(project: Path, refused: Refused) -> None:
    sentence = refused(project, "--quantizer", "inc", card="G1", code=3)
    assert "'inc' of backend openvino cannot be trained; use --backend openvino --quantizer nncf" in sentence
    if not registry.get("trt").availability().available:
        sentence = refused(project, backend="trt", code=3)
        assert "backend 'trt' cannot run: " in sentence
        assert "use --backend openvino" in sentence
    sentence = refused(project, backend="reference")
    assert sentence == "backend 'reference' has no quantizer, so it cannot run stage Q"


def test_seed_out_of_range(project: Path, refused: Refused) -> None:
    assert "workload.seeds.train is 99999999999 but must be" in refused(project, "--seed", "99999999999")


# ---------------------------------------------------------------- models


def test_models(project: Path, refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    """Absent, truncated, with wrong keys, of another shape, and no model at all."""
    from safetensors.torch import load_file, save_file

    assert "no such model" in refused(project, "--model", tmp_path / "nothing")
    sentence = refused(project, "--model", "random:dust3r-512-dbt")
    assert "unknown random model 'dust3r-512-dbt' (did you mean 'dust3r-512-dpt'?)" in sentence
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = broken / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert re.search("model.safetensors is damaged or no safetensors file", refused(project, "--model", broken))
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["enc_blocks.0.norm1.wieght"] = tensors.pop("enc_blocks.0.norm1.weight")
    save_file(tensors, weights)
    sentence = refused(project, "--model", broken)
    assert "lacks 1 key (enc_blocks.0.norm1.weight) and has the unknown 1 key (enc_blocks.0.norm1.wieght)" in sentence
    assert not (project / "outputs" / "store").exists()  # nothing was made for a model that cannot be read


def test_truncated_official_checkpoint(project: Path, refused: Refused, tmp_path: Path) -> None:
    golden = Path(__file__).resolve().parents[1] / "golden" / "dust3r_checkpoint" / "checkpoint.pth"
    half = tmp_path / "half.pth"
    half.write_bytes(golden.read_bytes()[:-3000])
    assert "half.pth is damaged or no PyTorch file" in refused(project, "--model", half)


# ---------------------------------------------------------------- scenes


@pytest.fixture
def scenes(finished: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A folder with the two generated test scenes."""
    (made,) = (p for p in (finished[0] / "outputs/store/scenes").iterdir() if (p / "test-0-0000").is_dir())
    folder = tmp_path / "scenes"
    for scene in made.iterdir():
        if scene.is_dir():
            shutil.copytree(scene, folder / scene.name)
    return folder


def images_of(scene: Path) -> list[Path]:
    return sorted((scene / "images").rglob("*.jpg"))


def depths_of(scene: Path) -> list[Path]:
    return sorted((scene / "ground_truth_depth").rglob("*.jpg"))


def set_depth(path: Path, values: np.ndarray | float) -> None:
    depth = np.fromfile(path, "<f4")
    depth[:] = values
    depth.astype("<f4").tofile(path)


def test_missing_scene(project: Path, refused: Refused, tiny_model: Path, tmp_path: Path, scenes: Path) -> None:
    model = ("--model", tiny_model)
    assert "scene folder" in (sentence := refused(project, *model, "--scenes", tmp_path / "gone"))
    assert "gone does not exist" in sentence
    (tmp_path / "empty").mkdir()
    assert "no scene here, and none in its subfolders" in refused(project, *model, "--scenes", tmp_path / "empty")
    listed = ("--set", f"workload.scenes.test={{source: {scenes}, names: [test-0-0000, test-0-0009]}}")
    workload = project / "configs" / "workload.yaml"
    workload.write_text(
        re.sub(r"  test: .*", f"  test: {{source: {scenes}, names: [test-0-0009]}}", workload.read_text())
    )
    assert "test-0-0009 does not exist" in refused(project, *model)
    assert "test-0-0009 does not exist" in refused(project, *model, *listed)
    sentence = refused(project, *model, "--scenes", scenes, "--images", scenes)
    assert "--scenes and --images exclude each other" in sentence


def test_corrupt_image(project: Path, refused: Refused, tiny_model: Path, scenes: Path) -> None:
    image = images_of(scenes / "test-0-0001")[1]
    image.write_bytes(image.read_bytes()[:300])
    sentence = refused(project, "--model", tiny_model, "--scenes", scenes)
    assert re.search(r"test-0-0001/images/\S+/001\.jpg: (the image is damaged|not an image)", sentence)
    photos = image.parent
    sentence = refused(project, "--model", tiny_model, "--images", photos)
    assert re.search(r"001\.jpg: (the image is damaged|not an image)", sentence)
    assert not (project / "outputs" / "store" / "graphs").exists()  # told before the long stages


def test_one_photograph_is_no_pair(
    project: Path, refused: Refused, tiny_model: Path, scenes: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(images_of(scenes / "test-0-0000")[0], photos)
    assert "a scene needs at least 2 images, found 1" in refused(project, "--model", tiny_model, "--images", photos)


def test_nan_depth(project: Path, refused: Refused, tiny_model: Path, scenes: Path) -> None:
    path = depths_of(scenes / "test-0-0000")[2]
    depth = np.fromfile(path, "<f4")
    depth[5] = np.nan
    depth.tofile(path)
    sentence = refused(project, "--model", tiny_model, "--scenes", scenes)
    assert re.search(r"002\.jpg: 1 of 4096 depth values are NaN; write 0 or inf instead", sentence)


def test_zero_valid_pixels(project: Path, refused: Refused, tiny_model: Path, scenes: Path) -> None:
    set_depth(depths_of(scenes / "test-0-0001")[0], 0.0)
    sentence = refused(project, "--model", tiny_model, "--scenes", scenes)
    assert sentence == "scene test-0-0001: the depth map of 000.jpg has no valid pixel (0 = no measurement)"


def test_too_few_valid_pixels_everywhere(copy_of: Copy, refused: Refused, tiny_model: Path, scenes: Path) -> None:
    """A few pixels are no bad input, but such pairs are not scored; when no other is left, that is said."""
    for scene in scenes.iterdir():
        for path in depths_of(scene):
            depth = np.fromfile(path, "<f4")
            depth[60:] = 0
            depth.tofile(path)
    loose = ("--set", "workload.min_covisibility=0.0")
    sentence = refused(copy_of(), "--model", tiny_model, "--scenes", scenes, *loose)
    assert (
        "no sample to evaluate: none of test-0-0000, test-0-0001 has two views with 100 valid depth pixels" in sentence
    )
    sentence = refused(copy_of(), "--model", tiny_model, "--scenes", scenes, "--set", "workload.min_covisibility=1.0")
    assert "no pair shares 100% of its view (min_covisibility)" in sentence


def test_model_whose_depths_cannot_be_aligned(
    copy_of: Copy, refused: Refused, tiny_model: Path, tmp_path: Path
) -> None:
    """All points behind the camera: the message names the pair, and no NaN reaches a record."""
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_model, tmp_path / "backwards")
    tensors = load_file(model / "model.safetensors")
    tensors["downstream_head1.proj.bias"] = -tensors["downstream_head1.proj.bias"]
    save_file(tensors, model / "model.safetensors")
    sentence = refused(copy_of(), "--model", model)
    assert re.match(r"int8 on validation-2-0000, 000\.jpg, 00[12]\.jpg: scale alignment \(median\) failed", sentence)


# ---------------------------------------------------------------- calibration


def test_calibration_sets(copy_of: Copy, refused: Refused, tiny_model: Path, scenes: Path, tmp_path: Path) -> None:
    root, model = copy_of(), ("--model", tiny_model)
    (tmp_path / "empty").mkdir()
    source = "workload.calibration.source="
    sentence = refused(root, *model, "--set", f"{source}{tmp_path / 'empty'}")
    assert "the calibration set (workload.calibration.source) is empty or unreadable: " in sentence
    assert "no scene here" in sentence
    sentence = refused(root, *model, "--set", f"{source}{tmp_path / 'gone'}")
    assert "gone does not exist" in sentence
    sentence = refused(root, *model, "--set", f"{source}{scenes}")
    assert "the calibration set has 4 images (in pairs), 8 were asked for" in sentence
    for scene in scenes.iterdir():  # scenes of one picture each hold no pair
        pictures = tmp_path / "single" / scene.name
        pictures.mkdir(parents=True)
        shutil.copy(images_of(scene)[0], pictures)
    assert "empty calibration set" in refused(root, *model, "--set", f"{source}{tmp_path / 'single'}")


def test_odd_views_still_give_enough_images(project: Path) -> None:
    """The odd view of a scene has no partner; another scene makes up for it."""
    calibration = {"workload.calibration.views_per_scene": 3, "workload.calibration.images": 4}
    experiment = small_experiment({**calibration, "quant.ptq.calibration_images": 4})
    ctx = stages.Context(Store(project / "store"), lambda *event: None, {})
    made = stages.open_split(ctx, experiment, "calibration", project)
    images = CalibrationImages([Path(folder) for folder in made.where["folders"]], 4, 64, 64)
    assert [frame.image.shape for frame in images] == [(3, 64, 64)] * 4
    assert [view.image_path.parents[2].name for view in images.views] == [
        "calibration-0-0000", "calibration-0-0000", "calibration-0-0001", "calibration-0-0001",
    ]  # fmt: skip


def test_keep_pattern_without_a_match(copy_of: Copy, refused: Refused, tiny_model: Path) -> None:
    sentence = refused(copy_of(), "--model", tiny_model, "--set", "quant.ptq.keep_list=['no.such.node']")
    assert "keep entry 'no.such.node' matches no node" in sentence


# ---------------------------------------------------------------- folders and disks


def test_names_that_are_too_long(project: Path, refused: Refused, tmp_path: Path, tiny_model: Path) -> None:
    """Of a card, scenes, a model, and a file to be written."""
    long = "n" * 300
    assert refused(project, card=f"{long}.md").endswith(f"{long}.md: the name is too long")
    assert refused(project, card=f"{'d/' * 2500}B1.md").endswith("B1.md: the name is too long")
    assert refused(project, "--model", long).endswith("n: the name is too long")
    assert refused(project, "--model", tiny_model, "--images", long).endswith("n: the name is too long")
    with pytest.raises(PqkError, match=r"^cannot write .*n: the name is too long$"):
        write_text(tmp_path / long, "text")


def mount(folder: Path, *arguments: str) -> None:
    """Mount something on a folder, or skip: only root may, and not in every container."""
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this user cannot mount a file system: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 40 MB."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a file system for this test")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "-t", "tmpfs", "-o", "size=40m", "tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_logs_is_a_file(project: Path, refused: Refused, tiny_model: Path) -> None:
    """Works for every user, root too: nothing can be written below a file."""
    shutil.rmtree(project / "logs")
    (project / "logs").write_text("")
    sentence = refused(project, "--model", tiny_model)
    assert sentence == f"cannot write {project}/logs: something else is there under this name"
    assert not (project / "outputs").exists()


def test_outputs_is_a_file(project: Path, refused: Refused, tiny_model: Path) -> None:
    (project / "outputs").write_text("")
    sentence = refused(project, "--model", tiny_model)
    assert re.match(r"cannot write \S+/outputs/store/\S+: a parent of it is a file, not a folder", sentence)


def test_read_only_folders(disk: Path, copy_of: Copy, refused: Refused, tiny_model: Path) -> None:
    root = shutil.copytree(copy_of(), disk / "project")
    shutil.rmtree(root / "outputs" / "store" / "timing")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    sentence = refused(root, "--model", tiny_model)
    assert sentence == f"cannot write {root}/logs: the file system is read-only"
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    outputs = root / "outputs"
    mount(outputs, "--bind", str(outputs))
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(outputs)], check=True)
        sentence = refused(root, "--model", tiny_model)
        assert re.match(r"cannot write \S+/outputs/store/\S+: the file system is read-only", sentence)
    finally:
        subprocess.run(["umount", "-l", str(outputs)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("removed", "free_kb"),
    [
        ("scenes", 60), ("graphs", 20), ("graphs", 1000), ("quantized", 0), ("quantized", 200),
        ("predictions", 200), ("scores", 0), ("timing", 0), ("timing", 8),
    ],
)  # fmt: skip
def test_full_disk(
    removed: str, free_kb: int, disk: Path, finished: tuple[Path, Outcome], refused: Refused, tiny_model: Path
) -> None:
    """A disk that fills up in the stage `removed`: one sentence, nothing half-written, and then it goes on."""
    root = shutil.copytree(finished[0], disk / "project")
    for stage in ("predictions", "scores") if removed == "predictions" else (removed,):
        shutil.rmtree(root / "outputs" / "store" / stage)
    for record in (root / "logs").glob("B1-*.json"):
        record.unlink()
    room = os.statvfs(disk)
    with (disk / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, room.f_bavail * room.f_bsize - 1024 * free_kb)
    sentence = refused(root, "--model", tiny_model)
    assert re.search("cannot write .*(the disk is full|No space left on device)", sentence), sentence
    assert not [p for p in root.rglob(".*.tmp") if p.parent.name != ".locks"]
    assert len(list((root / "logs").glob("B1-*.json"))) < 3
    if removed == "timing":
        (disk / "filler").unlink()
        assert pqk(root, "run", "B1", "--backend", "openvino", "--model", tiny_model).code in (0, 1, 4)


def test_full_disk_without_root(copy_of: Copy, tiny_model: Path) -> None:
    """A limit on the size of files stands in for a full disk where nobody may mount one (EFBIG instead of ENOSPC)."""
    root = copy_of()
    shutil.rmtree(root / "outputs" / "store" / "graphs")
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from pqk.cli import main\n"
        f"sys.argv = ['pqk', 'run', 'B1', '--backend', 'openvino', '--model', {str(tiny_model)!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in Outcome(done.returncode, done.stdout, done.stderr).sentence
