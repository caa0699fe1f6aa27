"""`pqk run` from end to end in real processes, on a tiny workload and a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from run_toys import REPOSITORY, Outcome, environment, pqk, script, times_as_fast, written

from pqk.data.scenes.open import open_scene
from pqk.files import sha256_json
from pqk.record.log import read_records
from pqk.record.schema import validate

Finished = tuple[Path, Outcome]
Copy = Callable[[], Path]
RUN = ("run", "B1", "--backend", "openvino", "--json")


def stage_folder(root: Path, stage: str) -> Path:
    """The only artifact of a stage; of the scenes, those of the test split."""
    every = [p for p in (root / "outputs" / "store" / stage).iterdir() if not p.name.startswith(".")]
    (found,) = (p for p in every if stage != "scenes" or (p / "test-0-0000").is_dir())
    return found


def same(a: dict[str, Any], b: dict[str, Any], *but: str) -> None:
    left, right = ({k: v for k, v in record.items() if k not in but} for record in (a, b))
    assert left == right


def kept(outcome: Outcome) -> int:
    return outcome.err.count("kept from before")


def test_the_last_line_is_the_candidates_record(finished: Finished) -> None:
    root, outcome = finished
    record = outcome.record
    validate(record)
    assert (record["role"], record["precision"], record["quantizer"]) == ("candidate", "int8", "nncf")
    assert record["quality_reference"] == "ground_truth"
    assert record["scenes"] == ["test-0-0000", "test-0-0001"]
    assert record["images_calibration"] == 8
    assert outcome.code == {"fail": 1, "undecided": 4, "pass": 0}[record["verdict"]]
    assert len(record["verdict_reasons"]) == 6
    assert record["executed_precision"]["int8"] > 0.5
    assert sum(record["executed_precision"].values()) == pytest.approx(1)
    # The columns follow from the raw samples and the files that the record was made from.
    pairs = sorted(record["samples"]["pair"])
    assert record["t_pair_p50_ms"] == pytest.approx((pairs[1] + pairs[2]) / 2, abs=1e-3)
    assert len(record["samples"]["pair"]) == 4
    assert len(record["samples"]["encoder"]) == 8
    size = sum(p.stat().st_size for p in stage_folder(root, "quantized").iterdir() if p.suffix in (".xml", ".bin"))
    assert record["size_MB"] == size / 1e6
    assert record["params"] == record["params_M"] * 1e6 > 1e5
    for line in outcome.out.splitlines():  # nothing but the record goes to stdout
        assert line == outcome.out.splitlines()[-1]


def test_three_records_teacher_first(finished: Finished) -> None:
    root, outcome = finished
    records = {record["precision"]: record for record in written(root)}
    float_rows = [p for p in records if p != "int8"]
    assert records["int8"] == outcome.record
    assert len({record["run_id"] for record in records.values()}) == 1 and outcome.record["run_id"]
    assert "f32" in float_rows
    for precision in float_rows:
        assert records[precision]["role"] == "teacher"
        assert records[precision]["quantizer"] is records[precision]["verdict"] is None
        assert records[precision]["executed_precision"] == pytest.approx({precision: 1.0})
    teacher = records["f32"]
    assert (teacher["quality_drop_pct"], teacher["speedup_vs_own_f32"], teacher["size_ratio"]) == (0, 1, 1)
    candidate = records["int8"]
    assert candidate["size_ratio"] == pytest.approx(candidate["size_MB"] / teacher["size_MB"])
    assert candidate["size_ratio"] < 0.6
    expected = 100 * (candidate["absrel"] - teacher["absrel"]) / teacher["absrel"]
    assert candidate["quality_drop_pct"] == pytest.approx(expected)
    assert candidate["speedup_vs_own_f32"] == pytest.approx(times_as_fast(candidate, teacher), rel=1e-3)
    assert candidate["speedup_vs_teacher_f32"] == candidate["speedup_vs_own_f32"]  # its f32 is the Teacher's
    fastest = max((records[p] for p in float_rows), key=lambda r: times_as_fast(r, teacher))
    assert candidate["best_float"] == fastest["precision"]
    assert candidate["speedup_vs_best_float"] == pytest.approx(times_as_fast(candidate, fastest), rel=1e-3)
    assert (candidate["timing"]["rounds"], candidate["timing"]["ended_by"]) == (4, "minimum")
    assert candidate["timing"] == teacher["timing"]
    assert (candidate["disturbed"], candidate["t_pair_p95_ms"]) == (False, None)  # of 4 rounds, whatever else ran here
    assert candidate["peak_memory_GB"] == max(candidate["ram_GB"], candidate["ram_compile_GB"]) > 0.05
    assert candidate["flops_G"] == pytest.approx(teacher["flops_G"], rel=0.05)


def test_again_reuses_every_stage(finished: Finished, copy_of: Copy, tiny_model: Path) -> None:
    root = copy_of()
    began = time.monotonic()
    again = pqk(root, *RUN, "--model", tiny_model)
    seconds = time.monotonic() - began
    assert again.code == finished[1].code
    assert kept(again) == again.err.count("✓") - 1  # the last one says where the records are
    assert "…" not in again.err
    same(again.record, finished[1].record, "datetime", "wall_s", "run_id")
    # the row is of now and of another run, its timing is not
    assert again.record["run_id"] > finished[1].record["run_id"]
    assert again.record["datetime"] > again.record["measured_at"]
    timing = json.loads((stage_folder(root, "timing") / "manifest.json").read_text())
    assert (again.record["measured_at"], again.record["measured_commit"]) == (timing["created"], timing["commit"])
    assert again.record["wall_s"] < 0.5 * finished[1].record["wall_s"], seconds


def test_retime_measures_time_and_memory_anew(finished: Finished, copy_of: Copy, tiny_model: Path) -> None:
    """... and nothing else; where a second process uses a core, one line warns and the rows are marked."""
    root = copy_of()
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        again = pqk(root, *RUN, "--model", tiny_model, "--retime", "--set", "eval.efficiency.max_load=0.1")
    finally:
        burner.kill()
        burner.wait()
    made = [line.split()[1] for line in again.err.splitlines() if line.strip().startswith("…")]
    assert made == ["timing,", *["peak"] * (len(made) - 1)] and len(made) > 2, again.err
    assert again.record["samples"] != finished[1].record["samples"]
    assert again.record["absrel"] == finished[1].record["absrel"]
    warned = [line for line in again.err.splitlines() if "warning: the timing was disturbed" in line]
    assert len(warned) == 1 and "other processes used " in warned[0] and "(at most 0.1)" in warned[0]
    assert again.record["disturbed"] is True
    assert all(r["disturbed"] is False for r in written(root) if r["hashes"]["eval"] != again.record["hashes"]["eval"])


@pytest.mark.slow
def test_fresh_makes_everything_anew(finished: Finished, copy_of: Copy, tiny_model: Path) -> None:
    root = copy_of()
    before = {p: p.stat().st_mtime_ns for p in (root / "outputs" / "store").glob("*/*/manifest.json")}
    outcome = pqk(root, *RUN, "--model", tiny_model, "--fresh")
    assert kept(outcome) == 0
    after = {p: p.stat().st_mtime_ns for p in (root / "outputs" / "store").glob("*/*/manifest.json")}
    assert after.keys() == before.keys()
    assert all(after[p] > before[p] for p in before)
    same_quality(outcome.record, finished[1].record)
    assert outcome.record["hashes"] == finished[1].record["hashes"]


def same_quality(a: dict[str, Any], b: dict[str, Any]) -> None:
    columns = ("chamfer", "absrel", "rmse", "delta1", "reproj_px", "quality_drop_pct", "executed_precision")
    assert {c: a[c] for c in columns} == {c: b[c] for c in columns}


def test_a_folder_of_scenes(finished: Finished, copy_of: Copy, tiny_model: Path, tmp_path: Path) -> None:
    """The generator's own output, read as a user's folder, scores exactly as the generated scenes do."""
    root = copy_of()
    folder = tmp_path / "scenes"
    for scene in stage_folder(root, "scenes").iterdir():
        if scene.is_dir():
            shutil.copytree(scene, folder / scene.name)
    (folder / "test-0-0001" / "notes.txt").write_text("a file that belongs to no scene")
    outcome = pqk(root, *RUN, "--model", tiny_model, "--scenes", folder)
    assert outcome.code in (0, 1, 4)
    same_quality(outcome.record, finished[1].record)
    assert outcome.record["hashes"]["scenes"] != finished[1].record["hashes"]["scenes"]
    made = {line.split()[1] for line in outcome.err.splitlines() if line.strip().startswith("…")}
    assert made == {"quality,", "predictions,"}  # on these scenes; decisions, time and memory are as they were
    assert "calibration images  kept from before" in outcome.err


def test_a_folder_of_photographs(copy_of: Copy, tiny_model: Path, tmp_path: Path) -> None:
    """Pictures without cameras, in several sizes and formats: quality is the agreement with the Teacher."""
    root = copy_of()
    scene = open_scene(stage_folder(root, "scenes") / "test-0-0000")
    photos = tmp_path / "holiday"
    photos.mkdir()
    for number, (view, name) in enumerate(zip(scene.views, ("a.jpg", "b.png", "c.webp"), strict=True)):
        picture = Image.fromarray(view.load_image()).resize((90 + 20 * number, 80))
        picture.save(photos / name)
    outcome = pqk(root, *RUN, "--model", tiny_model, "--images", photos)
    assert outcome.code in (0, 1, 4)
    record = outcome.record
    assert record["quality_reference"] == "teacher"
    assert record["scenes"] == ["holiday"]
    assert record["pairs"] == 3
    assert record["reproj_px"] is None
    assert record["quality_drop_pct"] == pytest.approx(100 * record["absrel"])
    assert 0 < record["quality_drop_pct"] < 50
    (teacher,) = (r for r in written(root) if r["precision"] == "f32" and r["quality_reference"] == "teacher")
    assert (teacher["absrel"], teacher["quality_drop_pct"], teacher["delta1"]) == (0, 0, 1)
    # The same pictures under another name and behind a link: nothing is measured again, and the record says the name.
    (tmp_path / "trip").mkdir()
    (tmp_path / "trip" / "images").symlink_to(photos)
    again = pqk(root, *RUN, "--model", tiny_model, "--images", tmp_path / "trip")
    assert "…" not in again.err and again.record["scenes"] == ["trip"]
    assert again.record["hashes"]["scenes"] == record["hashes"]["scenes"]
    same_quality(again.record, record)


def test_seed_and_settings_reach_the_record(copy_of: Copy, tiny_model: Path) -> None:
    root = copy_of()
    outcome = pqk(
        root, *RUN, "--model", tiny_model, "--seed", "7",
        "--set", "eval.quality.chamfer_points=64", "--set", "eval.efficiency={min_rounds: 3, warmup: 0}",
    )  # fmt: skip
    assert outcome.code in (0, 1, 4), outcome.err
    record = outcome.record
    assert (record["seed"], record["train_seed"], record["eval_seed"]) == (7, 7, 7)
    assert len(record["samples"]["pair"]) == 3
    plain = next(r for r in written(root) if r["seed"] == 0 and r["precision"] == "int8")
    assert record["scenes"] == [
        "test-7-0000",
        "test-7-0001",
    ]  # other scenes of the same split, as the ledger draws them
    assert record["absrel"] != plain["absrel"] and record["chamfer"] != plain["chamfer"]
    assert record["hashes"]["card"] == plain["hashes"]["card"]
    assert record["hashes"]["eval"] != plain["hashes"]["eval"]
    precisions = [r["precision"] for r in written(root)]
    assert precisions.count("int8") == precisions.count("f32") == 2  # both runs keep their records


def test_a_setting_replaces_that_of_a_matrix(copy_of: Copy, tiny_model: Path) -> None:
    """The points of H1's axis set quant.ptq.calibration_images themselves; the command line has the last word."""
    root = copy_of()
    command = ("run", "H1", "--backend", "openvino", "--model", tiny_model, "--json", "--axis", "calibration")
    outcome = pqk(root, *command, "--set", "quant.ptq.calibration_images=8")
    assert outcome.code == 0, outcome.err
    points = outcome.record["axes"]["calibration"]
    assert {name: (r["exp_id"], r["images_calibration"]) for name, r in points.items()} == {
        f"{n} images": (f"H1 calibration: {n} images", 8) for n in (128, 256, 512)
    }
    folder = root / "reports" / "ablation" / "H1"
    assert sorted(path.name for path in folder.iterdir()) == [f"calibration.{end}" for end in ("csv", "md", "png")]
    rows = (folder / "calibration.csv").read_text().splitlines()
    assert float(rows[1].split(",")[1]) == points["128 images"]["quality_drop_pct"]
    # The same work as B1, three times: nothing but the records and the three files is made.
    assert "…" not in outcome.err


def test_a_point_that_fails_leaves_the_others_alone(copy_of: Copy, tiny_model: Path) -> None:
    root = copy_of()
    card = root / "schedule" / "TaskCards" / "H1.md"
    text = card.read_text().replace("128 images: {quant.ptq.calibration_images: 128}", "plain: {}")
    text = text.replace("256 images: {quant.ptq.calibration_images: 256}", "bad: {quant.ptq.keep_list: ['no_such_.*']}")
    card.write_text(text)
    command = ("run", "H1", "--backend", "openvino", "--model", tiny_model, "--json", "--axis", "calibration")
    outcome = pqk(root, *command)
    assert outcome.code == 1
    points = outcome.record["axes"]["calibration"]
    assert points["bad"] is None
    assert points["plain"]["verdict"] is not None and points["512 images"]["verdict"] is not None
    assert "calibration: bad failed: " in outcome.err
    wrong = pqk(root, *command[:-1], "calibratoin")
    assert (wrong.code, "card H1 has no axis 'calibratoin' (did you mean 'calibration'?)" in wrong.sentence) == (
        2,
        True,
    )


@pytest.mark.parametrize("door", ["run_quant", "run_eval", "baseline_eval"])
def test_the_doors_of_the_lab(door: str, finished: Finished, copy_of: Copy, tiny_model: Path) -> None:
    root = copy_of()
    for old in (root / "logs").glob("B1-*.json"):
        old.unlink()
    log = root / "logs" / "B1_log.json"
    configs = ("--workload", "configs/workload.yaml", "--eval", "configs/eval.yaml", "--cfg", "configs/quant.yaml")
    done = script(root, door, *configs, "--ckpt", tiny_model, "--log", log)
    content = json.loads(log.read_text())
    if door == "run_quant":
        assert done.code == finished[1].code, done.err
        # the script decides nothing between PTQ and QAT
        same(content, finished[1].record, "datetime", "wall_s", "run_id", "validation_drop_pct", "command")
        assert content["command"].startswith("python scripts/run_quant.py --workload configs/workload.yaml")
    else:
        assert done.code == 0, done.err
        assert content[0]["precision"] == "f32"
        assert {r["role"] for r in content} == {"teacher" if door == "baseline_eval" else "baseline"}
        assert all(r["quantizer"] is None for r in content)
        report = root / "reports" / "baseline_report.md"
        assert report.is_file() == (door == "baseline_eval")  # the Teacher's alone
        if door == "baseline_eval":
            row = next(line for line in report.read_text("utf-8").splitlines() if line.startswith("| `absrel` "))
            assert f"{content[0]['absrel']:.4f}" in row
    from pqk.report.table import ordered

    # The same record in two logs is one row.
    rows = len(written(finished[0])) if door == "run_quant" else len(content)
    assert len(ordered(item.record for item in read_records(root / "logs"))) == rows


def test_a_door_refuses_before_it_works(project: Path, tiny_model: Path) -> None:
    command = [sys.executable, REPOSITORY / "scripts" / "run_quant.py", "--ckpt", tiny_model, "--log", "logs/B1.txt"]
    done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "pqk: --log logs/B1.txt: the name of a log ends in .json\n")
    assert not (project / "outputs").exists()


def test_large_card(project: Path) -> None:
    """B1-large asks for little work and loosens nothing."""
    from pqk.recipe.experiment import resolve
    from pqk.settings.card import load_card

    large, plain = (resolve(load_card(name, project), project) for name in ("B1-large", "B1"))
    workload: Any = large.workload
    assert (workload.scenes.test.count, workload.scenes.test.views) == (1, 2)
    assert large.quant.ptq.calibration_images == workload.calibration.images == 8
    assert workload.pair_graph.kind == "complete"
    assert large.evaluation.thresholds == plain.evaluation.thresholds
    assert sha256_json(large.quant.model_dump(mode="json")) == large.quant.sha256
