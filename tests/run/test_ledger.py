"""`pqk ledger` from a checkpoint to a verified deliverable, on a tiny model with one small scene per eval seed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preloaded
import pytest
import torch
from run_toys import TINY, kill, make_project, start

from pqk.cli import legacy_scripts as doors
from pqk.cli.app import app
from pqk.data.render.generate import ScenePlan, make_scenes
from pqk.errors import PqkError, told
from pqk.families.dust3r.settings import METRICS as KNOWN
from pqk.files import sha256_file
from pqk.models import load_model
from pqk.recipe.columns import described_metrics
from pqk.recipe.request import Request, load_teacher
from pqk.record.ledger import read_rows
from pqk.study.checkpoints import finalize, open_checkpoint
from pqk.study.ledger_eval import Asked, Bench

pytestmark = pytest.mark.usefixtures("forked_workers")

ABOUT = described_metrics(KNOWN)
METRICS = (*ABOUT, "absrel_p95")
Pqk = Callable[..., tuple[int, str, str]]
LASTING = (*METRICS, "pairs", "scenes", "scenes_sha256", "checkpoint_sha256", "workload_sha256", "config_sha256")


def one_scene(root: Path) -> Path:
    """A project with one test scene per eval seed: rendered in this process, in about a second."""
    make_project(root)
    path = root / "configs" / "workload.yaml"
    old, new = (f"  test: {{source: synthetic, count: {count}" for count in (2, 1))
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return root


@pytest.fixture
def pqk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pqk:
    """`pqk ...` in a project, in this process: exit code, stdout, stderr."""

    def call(root: Path, *words: str | Path) -> tuple[int, str, str]:
        monkeypatch.chdir(root)
        monkeypatch.setenv("COLUMNS", "400")
        capsys.readouterr()
        code = told(lambda: app([str(word) for word in words], standalone_mode=False) or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A project with a finalized checkpoint, and two eval seeds of it in results/a.tsv. Copy it to change it."""
    root = one_scene(tmp_path_factory.mktemp("ledger") / "project")
    kept, new = finalize(tiny_model, root, "tiny", train_seed=4, task_card="A1")
    assert new and kept.name == "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        words = ["tiny", "--eval-seeds", "0..1", "--backend", "reference", "-o", "results/a.tsv"]
        assert doors.eval_multiseed(words) == 0
    return root


@pytest.fixture
def project_copy(evaluated: Path, tmp_path: Path) -> Path:
    return shutil.copytree(evaluated, tmp_path / "copy")


# Checkpoints


def test_a_checkpoint_is_kept_with_all_that_is_known_of_it(evaluated: Path, tiny_model: Path) -> None:
    folder = evaluated / "outputs" / "checkpoints" / "tiny"
    about = json.loads((folder / "model_card.json").read_text())["finalized"]
    assert about["checkpoint_sha256"] == load_teacher(str(tiny_model), evaluated)[0].sha256  # as records tell it
    assert about["files"]["model.safetensors"]["sha256"] == sha256_file(tiny_model / "model.safetensors")
    assert (about["train_seed"], about["card"], about["source"]) == (4, "A1", str(tiny_model))
    assert about["params"] == sum(p.numel() for p in load_model(folder).parameters())
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tiny"]


def test_names_are_derived_and_never_overwritten(tmp_path: Path, tiny_model: Path) -> None:
    first, new = finalize(tiny_model, tmp_path, train_seed=0)
    assert new and re.fullmatch(r"tiny-[0-9a-f]{8}", first.name) and first.name.endswith(first.sha256[:8])
    assert finalize(tiny_model, tmp_path, train_seed=0) == (first, False)
    assert finalize(first.path, tmp_path) == (first, False)
    with pytest.raises(PqkError, match=r"holds another checkpoint already \(train seed 0, this one has 1\)"):
        finalize(tiny_model, tmp_path, first.name, train_seed=1)
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config, indent=7))
    with pytest.raises(PqkError, match=r"holds another checkpoint already \(sha256 "):
        finalize(other, tmp_path, first.name, train_seed=0)
    for name in ("../x", "a/b", "..", ".hidden", ""):
        with pytest.raises(PqkError, match="a name is a letter or digit"):
            finalize(tiny_model, tmp_path, name, train_seed=0)
    assert [p.name for p in (tmp_path / "outputs" / "checkpoints").iterdir()] == [first.name]


def test_an_official_file_is_kept_as_it_is(tmp_path: Path, tiny_model: Path) -> None:
    from argparse import Namespace

    config = {name: value for name, value in TINY.items() if name not in ("enc_blocks", "enc_head_dim")}
    from pqk.models import build_model

    model = build_model("dust3r", config, generator=torch.Generator().manual_seed(0))
    called = ", ".join(f"{name}={value!r}" for name, value in {**config, "img_size": (64, 64)}.items())
    official = tmp_path / "My weights.pth"
    torch.save({"args": Namespace(model=f"AsymmetricCroCo3DStereo({called})"), "model": model.state_dict()}, official)
    kept, new = finalize(official, tmp_path, train_seed=7)
    assert new and kept.name == f"My-weights-{kept.sha256[:8]}"
    assert kept.path.name == "My weights.pth" and sha256_file(kept.path) == sha256_file(official)
    assert kept.sha256 == load_teacher(str(official), tmp_path)[0].sha256
    assert open_checkpoint(kept.name, tmp_path).train_seed == 7


def test_what_is_no_checkpoint(tmp_path: Path, tiny_model: Path) -> None:
    def refused(path: Path, sentence: str, **more: Any) -> None:
        with pytest.raises(PqkError, match=sentence):
            finalize(path, tmp_path, **({"train_seed": 0} | more))
        assert not (tmp_path / "outputs").exists()

    refused(tmp_path / "none", "no checkpoint")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"is not a checkpoint: it has no config\.json")
    refused(tiny_model, "has no train seed; give it with --train-seed", train_seed=None)
    damaged = shutil.copytree(tiny_model, tmp_path / "damaged")
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(damaged, "damaged or no safetensors file")
    carded = shutil.copytree(tiny_model, tmp_path / "carded")
    for card, sentence in (
        ("[]", "must hold one JSON object"),
        ("{", "is not valid JSON"),
        ('{"sha256": "0"}', "describes other weights"),
        ('{"seed": 3}', "--train-seed 0: the model card of carded has train seed 3"),
    ):
        (carded / "model_card.json").write_text(card)
        refused(carded, sentence)


def test_a_kept_checkpoint_that_changes_is_noticed(project_copy: Path) -> None:
    weights = project_copy / "outputs" / "checkpoints" / "tiny" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(PqkError, match="was changed after it was finalized"):
        open_checkpoint("tiny", project_copy)


# Evaluation


def test_eval_seeds_draw_other_scenes(evaluated: Path) -> None:
    rows = read_rows(evaluated / "results" / "a.tsv")
    assert [(row["train_seed"], row["eval_seed"], row["card"]) for row in rows] == [(4, s, "A1") for s in range(2)]
    assert [row["scenes"] for row in rows] == [f"1 generated, base seed {s}" for s in range(2)]
    for name in (*METRICS, "scenes_sha256", "output"):
        assert len({row[name] for row in rows}) == 2, name
    for name in ("workload_sha256", "eval_sha256", "config_sha256", "code_sha256", "checkpoint_sha256", "params"):
        assert len({row[name] for row in rows}) == 1, name
    for row in rows:
        assert row["fps"] > 0 and row["measured"] == "engine" and row["pairs"] > 0
        scored = json.loads((evaluated / row["output"] / "quality.json").read_text())
        assert scored["summary"]["absrel"] == row["absrel"] and len(scored["samples"]) == row["pairs"]
        assert {sample["group"] for sample in scored["samples"]} == {0}  # by number: names are no part of an artifact


@pytest.mark.parametrize(("seed", "folder"), [(0, False), (3, True)])
def test_an_eval_seed_draws_the_scenes_of_a_run(
    project_copy: Path, pqk: Pqk, tiny_model: Path, seed: int, folder: bool
) -> None:
    """`pqk run --seed s` and `pqk ledger eval --eval-seeds s`: the same numbers, and the very artifact."""
    pytest.importorskip("openvino")
    from pqk.recipe.runner import run

    events: list[tuple[str, str]] = []
    mine, words = None, ["--no-timing", "-o", "b.tsv", "--backend", "openvino", "--eval-seeds", str(seed)]
    if folder:
        mine = project_copy / "mine"
        make_scenes(mine, [ScenePlan("train", 9, index, 3, 64) for index in range(3)], jobs=1)
        for name, value in (("source", "mine"), ("count", "null"), ("views", "null")):
            words += ["--set", f"workload.scenes.test.{name}={value}"]
    settings = {"eval.efficiency.min_rounds": 1}
    request = Request("A1", "openvino", model=str(tiny_model), scenes=mine, seed=seed, recipe=False, settings=settings)
    outcome = run(request, project_copy, lambda kind, stage, *_: events.append((kind, stage)), lambda text: None)
    known = {("reuse", "graphs")} | ({("reuse", "scenes test")} if seed == 0 else set())
    assert known <= set(events)
    code, _, err = pqk(project_copy, "ledger", "eval", "tiny", *words)
    assert code == 0 and "… quality" not in err and "quality, fp32 on test samples  kept from before" in err
    (row,) = read_rows(project_copy / "b.tsv")
    record = outcome.records[0]
    assert all(row[name] == record[name] for name in ("chamfer", "absrel", "rmse", "delta1", "reproj_px", "pairs"))
    assert row["checkpoint_sha256"] == record["hashes"]["model"] and row["params"] == record["params"]
    assert row["scenes_sha256"] == record["hashes"]["scenes"]
    assert row["scenes"] == ("half: 1 of 3 of the list" if folder else f"1 generated, base seed {seed}")
    assert row["fps"] is None  # not asked for


def test_rows_that_are_there_are_kept_and_what_is_stale_is_not(project_copy: Path, pqk: Pqk) -> None:
    path = project_copy / "results" / "a.tsv"
    before = path.read_bytes()
    command = ("ledger", "eval", "tiny", "--backend", "reference", "-o", "results/a.tsv", "--eval-seeds")
    code, out, err = pqk(project_copy, *command, "0..1")
    assert (code, out, path.read_bytes()) == (0, "results/a.tsv\n", before)
    assert err.count("(there already)") == 2 and "…" not in err
    assert "absrel" in err and "n = 2)" in err
    lines = before.decode().split("\n")
    names = lines[0].split("\t")
    for line, name, value in ((1, "code_sha256", "old"), (2, "fps", "")):
        cells = lines[line].split("\t")
        cells[names.index(name)] = value
        lines[line] = "\t".join(cells)
    path.write_text("\n".join(lines))
    code, _, err = pqk(project_copy, *command, "0..1")
    assert code == 0 and "(there already)" not in err
    assert "the code that scores has changed" in err and "as it was not timed" in err
    assert [row["absrel"] for row in read_rows(path)] == [
        float(line.split("\t")[names.index("absrel")]) for line in before.decode().split("\n")[1:3]
    ]


def test_another_workload_goes_into_another_file(project_copy: Path, pqk: Pqk) -> None:
    before = (project_copy / "results" / "a.tsv").read_bytes()
    command = (
        "ledger",
        "eval",
        "tiny",
        "--backend",
        "reference",
        "--set",
        "workload.min_covisibility=0.2",
        "--no-timing",
    )
    code, _, err = pqk(project_copy, *command, "-o", "results/a.tsv")
    assert code == 2 and "must not be mixed: workload_sha256" in err and "…" not in err
    assert (project_copy / "results" / "a.tsv").read_bytes() == before
    assert pqk(project_copy, *command, "--eval-seeds", "0")[:2] == (0, "results/tiny.A1.reference-f32.tsv\n")
    code, _, err = pqk(project_copy, "ledger", "manifest")
    assert code == 2 and "results/a.tsv and results/tiny.A1.reference-f32.tsv must not be mixed" in err
    code, _, err = pqk(project_copy, "ledger", "compare", "results/a.tsv", "results/tiny.A1.reference-f32.tsv")
    assert code == 2 and "must not be mixed" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("none",), "no checkpoint 'none'"),
        (("tiny", "--eval-seeds", "4..1"), "write them as 0..4"),
        (("tiny", "--precision", "bf16"), "backend reference has f32 here"),
        (("tiny", "--precision", "int8"), "backend reference has f32 here"),
        (("tiny", "--quantizer", "nncf"), "--precision f32 takes no quantizer"),
        (("tiny", "--train-seed", "5"), "the model card of tiny has train seed 4"),
        (("tiny", "--card", "Z9"), "there is no card 'Z9'"),
        (("tiny", "-o", "a.csv"), "ends in .tsv"),
        (("tiny", "--set", "workload.scenes.test.seed=1020", "--eval-seeds", "5"), "would be 1025, above 1023"),
    ],
)
def test_wrong_words_are_told_before_anything_is_made(
    evaluated: Path, pqk: Pqk, words: tuple[str, ...], sentence: str
) -> None:
    code, _, err = pqk(evaluated, "ledger", "eval", *words, "--backend", "reference")
    assert code == 2 and sentence in err and "…" not in err and len(err.splitlines()) == 1


def test_scenes_of_a_folder_are_drawn_by_halves(project_copy: Path, pqk: Pqk) -> None:
    make_scenes(project_copy / "mine", [ScenePlan("train", 9, index, 3, 64) for index in range(3)], jobs=1)
    command = [
        "ledger",
        "eval",
        "tiny",
        "--backend",
        "reference",
        "--no-timing",
        "-o",
        "mine.tsv",
        "--eval-seeds",
        "0..2",
    ]
    for name, value in (("source", "mine"), ("count", "null"), ("views", "null")):
        command += ["--set", f"workload.scenes.test.{name}={value}"]
    assert pqk(project_copy, *command)[0] == 0
    rows = read_rows(project_copy / "mine.tsv")
    assert [row["scenes"] for row in rows] == ["all 3 of the list"] + ["half: 1 of 3 of the list"] * 2
    assert len({row["scenes_sha256"] for row in rows[1:]}) > 1 and len({row["workload_sha256"] for row in rows}) == 1
    drawn = json.loads((project_copy / rows[1]["output"] / "quality.json").read_text())["samples"]
    assert {sample["group"] for sample in drawn} == {0}
    digest = rows[0]["workload_sha256"]
    cameras = next((project_copy / "mine" / "train-9-0000").glob("*/cameras.txt"))
    cameras.write_text(cameras.read_text() + "# a comment\n")  # the bytes of a scene count
    assert pqk(project_copy, *command)[0] == 2
    (project_copy / "mine.tsv").unlink()
    shutil.rmtree(project_copy / "mine" / "train-9-0001")
    shutil.rmtree(project_copy / "mine" / "train-9-0002")
    code, _, err = pqk(project_copy, *command)
    assert code == 2 and "draws half of the scenes, and there is one" in err
    (row,) = read_rows(project_copy / "mine.tsv")  # eval seed 0 was measured before
    assert row["workload_sha256"] != digest


def test_eval_seeds_draw_the_crop(project_copy: Path, pqk: Pqk) -> None:
    make_scenes(project_copy / "mine", [ScenePlan("train", 9, index, 3, 64) for index in range(2)], jobs=1)
    command = ["ledger", "eval", "tiny", "--backend", "reference", "--no-timing", "--eval-seeds", "0..4"]
    for name, value in (("source", "mine"), ("count", "null"), ("views", "null")):
        command += ["--set", f"workload.scenes.test.{name}={value}"]

    def scores(*words: str) -> dict[str, set[float]]:
        assert pqk(project_copy, *command, "-o", "mine.tsv", *words)[0] == 0
        rows = read_rows(project_copy / "mine.tsv")[1:]
        (project_copy / "mine.tsv").unlink()
        by_scene: dict[str, list[float]] = {}
        for row in rows:
            by_scene.setdefault(row["scenes_sha256"], []).append(row["absrel"])
        assert max(len(found) for found in by_scene.values()) > 1  # four draws of two scenes
        return {scene: set(found) for scene, found in by_scene.items()}

    assert all(len(found) == 1 for found in scores().values())  # square pictures leave no room
    cropped = scores("--set", "workload.input.shape=[1, 3, 32, 64]")
    assert any(len(found) > 1 for found in cropped.values())


def test_killed_in_the_middle_it_goes_on(evaluated: Path, tmp_path: Path, pqk: Pqk) -> None:
    """SIGKILL after the first row: no half file, the row is kept, the others are as those of an unbroken run."""
    root = shutil.copytree(evaluated, tmp_path / "project")
    shutil.rmtree(root / "outputs" / "store" / "scores")
    command = ("ledger", "eval", "tiny", "--eval-seeds", "0..1", "--backend", "reference", "--no-timing", "-o", "k.tsv")
    process = start(command, root, preloaded.python())
    assert process.stderr is not None
    for line in iter(process.stderr.readline, ""):
        if line.startswith("eval seed 0:"):
            break
    kill(process, root)
    (first,) = read_rows(root / "k.tsv")
    code, _, err = pqk(root, *command)
    assert code == 0 and err.count("(there already)") == 1
    rows = read_rows(root / "k.tsv")
    assert rows[0] == first
    unbroken = read_rows(evaluated / "results" / "a.tsv")
    assert [[row[name] for name in LASTING] for row in rows] == [[row[name] for name in LASTING] for row in unbroken]
    assert not list(root.glob(".k.tsv*"))


# From results to a verified deliverable


def test_freeze_and_verify(project_copy: Path, pqk: Pqk, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = pqk(project_copy, "ledger", "manifest")
    assert code == 0 and out.splitlines()[-1] == "results_manifest.tsv", err
    assert "train seed 4" in out and (project_copy / "results_manifest.tsv").is_file()
    assert pqk(project_copy, "ledger", "manifest", "-o", "results/m.tsv")[0] == 2
    code, out, _ = pqk(project_copy, "ledger", "freeze", "demo")
    assert code == 0 and out.splitlines()[-1] == "deliverables/demo"
    assert pqk(project_copy, "ledger", "freeze", "demo")[0] == 2
    assert pqk(project_copy, "ledger", "freeze", "../demo")[0] == 2

    store = sorted((project_copy / "outputs" / "store").rglob("*"))
    code, out, err = pqk(project_copy, "ledger", "verify", "demo", "--row", "2", "--tolerance", "1e-6")
    assert code == 0, out + err
    assert "all files are as they were frozen; 2 runs" in out and "checkpoint tiny: as it was" in out
    assert "row 2: train seed 4, eval seed 1" in out and "kept from before" not in err
    assert sorted((project_copy / "outputs" / "store").rglob("*")) == store  # nothing was taken from there, nor put
    assert not list((project_copy / "outputs").glob(".verify-*"))

    code, _, err = pqk(project_copy, "ledger", "verify", "demo", "--row", "9")
    assert code == 2 and "demo has the rows 1 to 2" in err


def refreeze(root: Path, pqk: Pqk, change: Callable[[dict[str, str]], None]) -> None:
    """A deliverable of ledgers whose first row was changed before: its hashes are right, its numbers are not."""
    path = root / "results" / "a.tsv"
    lines = path.read_text().split("\n")
    names = lines[0].split("\t")
    cells = dict(zip(names, lines[1].split("\t"), strict=True))
    change(cells)
    path.write_text("\n".join([lines[0], "\t".join(cells.values()), *lines[2:]]))
    assert pqk(root, "ledger", "freeze", "forged")[0] == 0


def test_a_number_that_was_never_measured_is_noticed(project_copy: Path, pqk: Pqk) -> None:
    refreeze(project_copy, pqk, lambda cells: cells.update(absrel=str(0.99 * float(cells["absrel"]))))
    assert pqk(project_copy, "ledger", "verify", "forged", "--no-rerun")[0] == 0
    code, out, _ = pqk(project_copy, "ledger", "verify", "forged")
    assert code == 1 and re.search(r"differs: absrel is [0-9.]+ now, frozen was [0-9.]+ \(off by 0\.01", out)


def test_a_row_of_another_workload_cannot_be_repeated(project_copy: Path, pqk: Pqk) -> None:
    assert pqk(project_copy, "ledger", "freeze", "demo")[0] == 0
    path = project_copy / "configs" / "workload.yaml"
    path.write_text(path.read_text().replace("min_covisibility: 0.30", "min_covisibility: 0.25"))
    code, _, err = pqk(project_copy, "ledger", "verify", "demo")
    assert code == 1 and "the run cannot be repeated here: workload_sha256 is" in err
    shutil.rmtree(project_copy / "outputs" / "checkpoints")
    code, out, err = pqk(project_copy, "ledger", "verify", "demo")
    assert code == 2 and "keep it there with pqk ledger finalize" in err and "tiny: not here, not hashed" in out
    assert pqk(project_copy, "ledger", "verify", "demo", "--no-rerun")[0] == 0


def test_compare_says_it_in_one_sentence(project_copy: Path, pqk: Pqk) -> None:
    path = project_copy / "results" / "a.tsv"
    lines = path.read_text().split("\n")
    place = lines[0].split("\t").index("absrel")
    for name, factor in (("same", 1.0), ("worse", 3.0)):
        rows = [line.split("\t") for line in lines[1:3]]
        for cells in rows:
            cells[place] = repr(float(cells[place]) + (factor - 1) * 0.1)
        (project_copy / f"{name}.tsv").write_text("\n".join([lines[0], *("\t".join(cells) for cells in rows)]) + "\n")
    code, out, _ = pqk(project_copy, "ledger", "compare", path, "same.tsv")
    assert code == 0 and "absrel: not distinguishable (B - A = +0" in out
    code, out, _ = pqk(project_copy, "ledger", "compare", path, "worse.tsv")
    assert code == 0 and "absrel: B is worse (B - A = +0.2" in out and "one train seed (4)" in out


def test_the_doors(evaluated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(evaluated)
    assert doors.finalize_checkpoint(["--help"]) == 0 and "CKPT" in capsys.readouterr().out
    assert doors.finalize_checkpoint(["--bogus"]) == 2 and "--bogus" in capsys.readouterr().err
    assert doors.build_results_manifest(["--results", "none"]) == 2
    assert "no folder none" in capsys.readouterr().err


def test_what_quantization_is_made_of_is_in_the_digest(evaluated: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")

    def digests(precision: str, **settings: Any) -> tuple[str, str]:
        asked = Asked(
            "tiny", precision=precision, settings={name.replace("__", "."): v for name, v in settings.items()}
        )
        known = Bench(asked, evaluated, lambda *_: None).known
        return known["workload_sha256"], known["config_sha256"]

    plain = digests("int8")
    for settings in ({"quant__ptq__bias_correction": "fast"}, {"workload__calibration__seed": 3}):
        assert digests("int8", **settings)[0] == plain[0] and digests("int8", **settings)[1] != plain[1]
        assert digests("fp32", **settings) == digests("f32")
    for settings in ({"workload__scenes__test__views": 2}, {"workload__pair_graph__k": 2}):
        assert digests("int8", **settings)[0] != plain[0] and digests("int8", **settings)[1] == plain[1]
    assert digests(
        "f32", workload__seeds__eval=5, workload__seeds__train=5, workload__scenes__validation__seed=2
    ) == digests("f32")
