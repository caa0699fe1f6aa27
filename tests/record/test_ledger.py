"""Ledgers, their statistics, manifests, comparisons and deliverables, without any model."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pqk.errors import PqkError
from pqk.families.dust3r.settings import METRICS as KNOWN
from pqk.files import whole_folder
from pqk.recipe.columns import described_metrics
from pqk.record import deliverable as freeze
from pqk.record.comparison import Comparison, compare, halves_interval, t_interval
from pqk.record.ledger import (
    RESULT,
    about,
    add_row,
    headline,
    measured_in,
    read_results,
    read_rows,
    summarise_files,
    telling,
    write_rows,
)
from pqk.record.tsv import Row, read_table
from pqk.report.runs import draw_runs

REPOSITORY = Path(__file__).resolve().parents[2]
ABOUT = described_metrics(KNOWN)
METRICS = (*ABOUT, "absrel_p95")


def row(train: int = 0, seed: int = 0, **changes: Any) -> Row:
    """A plausible row; its checkpoint follows from card and train seed."""
    card = changes.get("card", "A1")
    base: Row = {
        "card": card,
        "train_seed": train,
        "eval_seed": seed,
        "main_metric": "absrel",
        "metrics": json.dumps(ABOUT),
        **dict.fromkeys(METRICS, 0.1 + 0.01 * train + 0.001 * seed),
        "drop_pct": None,
        "fps": 8.0 + seed,
        "pairs": 72,
        "scenes": f"8 generated, base seed {seed}",
        "scenes_sha256": f"scenes{seed}",
        "checkpoint": f"{card}-s{train}",
        "checkpoint_sha256": f"sha-{card}-{train}",
        "float_sha256": None,
        "teacher_sha256": None,
        "params": 1000,
        "backend": "openvino",
        "quantizer": None,
        "device": "a CPU",
        "isa": "avx2",
        "cores": 2,
        "precision": "f32",
        "lowered": None,
        "measured": "engine",
        "workload_sha256": "w1",
        "eval_sha256": "e1",
        "config_sha256": "c1",
        "code_sha256": "k1",
        "settings": None,
        "commit": "abc",
        "datetime": "2026-01-01T00:00:00Z",
        "output": "outputs/store/quality/1",
    }
    return base | changes


def grid(trains: int = 3, seeds: int = 5, **changes: Any) -> list[Row]:
    return [row(t, s, **changes) for t in range(trains) for s in range(seeds)]


Results = Callable[..., Path]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Writes ledgers into a folder and returns it."""

    def write(**files: list[Row]) -> Path:
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        for name, rows in files.items():
            write_rows(folder / f"{name}.tsv", rows)
        return folder

    return write


def test_rows_come_back_in_order(results: Results) -> None:
    rows = grid()
    mixed = random.Random(0).sample(rows, len(rows))
    assert read_rows(results(a=mixed) / "a.tsv") == rows


def test_adding_replaces_the_same_run_and_keeps_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.tsv"
    for one in (row(0, 0), row(0, 1), row(0, 0, absrel=0.5)):
        add_row(path, one)
    assert [(r["eval_seed"], r["absrel"]) for r in read_rows(path)] == [(0, 0.5), (1, 0.101)]
    add_row(path, row(0, 0, precision="bf16"))
    assert len(read_rows(path)) == 3
    before = path.read_bytes()
    for name in ("workload_sha256", "eval_sha256"):
        with pytest.raises(PqkError, match=f"must not be mixed: {name} is .1 in the one and other in the other"):
            add_row(path, row(0, 2, **{name: "other"}))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.tsv"]  # neither a lock nor a temporary file


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    script = (
        "import json, sys; from pathlib import Path; from pqk.record.ledger import add_row\n"
        "for seed in range(int(sys.argv[3]), 20, 2):\n"
        "    add_row(Path(sys.argv[1]), json.loads(sys.argv[2]) | {'eval_seed': seed})"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script, str(path), json.dumps(row())]
    both = [subprocess.Popen([*command, start], env=env) for start in ("0", "1")]
    assert [process.wait(60) for process in both] == [0, 0]
    assert [r["eval_seed"] for r in read_rows(path)] == list(range(20))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([row(), row()], r"a\.tsv:3: the same run is already in line 2"),
        ([row(main_metric="speed")], r"a\.tsv:2: main_metric is 'speed'"),
        ([row(absrel=None)], r"a\.tsv:2: main_metric is 'absrel', and the row has no value"),
    ],
)
def test_wrong_ledgers(results: Results, rows: list[Row], sentence: str) -> None:
    with pytest.raises(PqkError, match=sentence):
        read_rows(results(a=rows) / "a.tsv")


def test_a_row_without_its_checkpoint(results: Results) -> None:
    path = results(a=[row()]) / "a.tsv"
    path.write_text(path.read_text().replace(row()["checkpoint_sha256"], ""))
    with pytest.raises(PqkError, match=r"a\.tsv:2: checkpoint_sha256 is empty"):
        read_rows(path)
    with pytest.raises(PqkError, match="checkpoint_sha256 is empty, so the row is not written"):
        results(b=[row(checkpoint_sha256=None)])


def test_a_ledger_of_an_older_version(results: Results) -> None:
    """It has no ause, and what was called chamfer drew both clouds at the same pixels."""
    path = results(a=[row(main_metric="chamfer", chamfer=0.2)]) / "a.tsv"
    names, cells = (line.split("\t") for line in path.read_text().splitlines())
    keep = [place for place, name in enumerate(names) if name not in ("ause", "chamfer_paired", "metrics")]
    path.write_text("".join("\t".join(line[place] for place in keep) + "\n" for line in (names, cells)))
    (old,) = read_rows(path)
    assert (old["chamfer_paired"], old["chamfer"], old["chamfer_accuracy"]) == (0.2, None, None) and "ause" not in old
    assert [about(old, name)["better"] for name in ("absrel", "absrel_p95", "delta1")] == ["lower", "lower", "higher"]
    assert old["main_metric"] == "chamfer_paired" and old["absrel"] == 0.1
    frozen = REPOSITORY / "deliverables" / "results-3"
    said, runs = freeze.check_files(frozen)
    assert said == [] and len(runs) == 65 and all(run["chamfer_paired"] > 0 for run in runs)


def toy_rows(better: str, *values: float) -> list[Row]:
    """Rows of a family whose only metric is `iou`, with a statistic of it."""
    known = {name: value for name, value in row().items() if name not in METRICS}
    known |= {"main_metric": "iou", "metrics": json.dumps({"iou": {"unit": "px", "better": better}})}
    seeds = enumerate(values)
    return [{**known, "eval_seed": n, "scenes_sha256": f"s{n}", "iou": v, "iou_p5": v / 2} for n, v in seeds]


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_a_family_brings_its_own_metrics(results: Results, tmp_path: Path, better: str) -> None:
    """Name, unit and direction are in the file; figures, summary and comparison follow them."""
    folder = results(a=toy_rows(better, 0.1, 0.2, 0.31), b=toy_rows(better, 0.2, 0.3, 0.4))
    rows = read_rows(folder / "a.tsv")
    assert measured_in(rows) == ["iou", "iou_p5", "drop_pct", "fps"] and headline(rows) == ["iou", "fps"]
    assert about(rows[0], "iou_p5") == {"unit": "px", "better": better}
    for metric in ("iou", "iou_p5"):
        found = compare((folder / "a.tsv", rows), (folder / "b.tsv", read_rows(folder / "b.tsv")), metric)
        assert f"{metric}: B is {'better' if better == 'higher' else 'worse'}" in found.sentence
    frozen = tmp_path / "deliverables" / "toy"
    freeze.freeze(frozen, read_results(folder), None, draw_runs)
    assert {path.stem for path in (frozen / "figures").iterdir()} == {"iou", "iou_p5", "fps"}
    assert "| runs | n | iou, mean ± std | fps, mean ± std |" in (frozen / "README.md").read_text("utf-8")
    said, runs = freeze.check_files(frozen)
    assert said == [] and [run["iou"] for run in runs] == [0.1, 0.2, 0.31, 0.2, 0.3, 0.4]
    assert freeze.differences(runs[0], {**runs[0], "iou": 0.2}, 1e-3) == [
        "iou is 0.2 now, frozen was 0.1 (off by 1 of it, allowed 0.001)"
    ]


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        ("absrel", "a.tsv:2: metrics must be JSON like"),
        ('{"absrel": {"unit": "", "better": "more"}}', "a.tsv:2: metrics must be JSON like"),
        (
            '{"rmse": {"unit": "m", "better": "lower"}}',
            "main_metric is 'absrel', and the row has no value of that name",
        ),
    ],
)
def test_what_the_metrics_are_is_checked(results: Results, metrics: str, sentence: str) -> None:
    with pytest.raises(PqkError, match=re.escape(sentence)):
        read_rows(results(a=[row(metrics=metrics)]) / "a.tsv")


def test_a_column_that_is_no_metric_is_refused(results: Results) -> None:
    path = results(a=[row()]) / "a.tsv"
    path.write_text(path.read_text().replace("\tabsrel\t", "\tAbsRel\t"))
    with pytest.raises(PqkError, match=r"a\.tsv:1: unknown column 'AbsRel'"):
        read_rows(path)


# Manifest


def test_summary_per_train_seed_per_file_and_pooled(results: Results) -> None:
    folder = results(a=grid(2), b=[row(2, s) for s in range(3)])
    summary, notes = summarise_files(read_results(folder))
    assert [(line["scope"], line["file"], line["train_seed"], line["n"]) for line in summary] == [
        ("train_seed", "a.tsv", 0, 5),
        ("train_seed", "a.tsv", 1, 5),
        ("file", "a.tsv", None, 10),
        ("train_seed", "b.tsv", 2, 3),
        ("file", "b.tsv", None, 3),
        ("pooled", None, None, 13),
    ]
    assert notes == []
    values = [r["absrel"] for r in grid(2)]
    assert summary[2]["absrel_mean"] == pytest.approx(np.mean(values))
    assert summary[2]["absrel_std"] == pytest.approx(np.std(values, ddof=1))
    assert summary[3]["eval_seeds"] == "0..2" and summary[5]["checkpoints"] == 3
    assert [line["scope"] for line in telling(summary)].count("file") == 1  # b has one train seed


def test_precisions_are_never_averaged(results: Results) -> None:
    folder = results(a=[*grid(1), *grid(1, precision="int8", quantizer="nncf", config_sha256="c2", absrel=0.9)])
    summary, _ = summarise_files(read_results(folder))
    assert {(line["precision"], line["n"]) for line in summary} == {("f32", 5), ("int8", 5)}


def test_emulated_runs_say_so(results: Results) -> None:
    emulated = grid(1, backend="trt", measured="emulated", fps=None)
    summary, _ = summarise_files(read_results(results(a=[*emulated, *grid(1, backend="trt", device="a GPU")])))
    assert [(freeze.label(line).count("trt emulated"), line["n"]) for line in telling(summary)] == [(1, 5), (0, 5)]
    assert "B was emulated" in compare((A, grid()), (B, emulated)).notes[-1]


def test_a_metric_that_some_runs_lack_has_no_mean(results: Results) -> None:
    summary, _ = summarise_files(read_results(results(a=[row(0, 0), row(0, 1, fps=None)])))
    assert summary[0]["fps_mean"] is None and summary[0]["absrel_mean"] is not None


def test_two_checkpoints_for_one_seed(results: Results) -> None:
    clash = row(0, 0, checkpoint="other", checkpoint_sha256="other")
    with pytest.raises(PqkError, match=r"a\.tsv: train seed 0, eval seed 0 has two checkpoints: .*give each recipe a"):
        summarise_files(read_results(results(a=[row(), clash])))
    summary, notes = summarise_files(read_results(results(a=[row()], b=[clash])))
    assert [line["scope"] for line in summary] == ["train_seed", "file"] * 2
    assert len(notes) == 1 and notes[0].startswith("not pooled: a.tsv, b.tsv: train seed 0, eval seed 0")


@pytest.mark.parametrize("name", ["workload_sha256", "eval_sha256"])
def test_digests_are_not_mixed(results: Results, name: str) -> None:
    folder = results(a=grid(1), b=grid(1, **{name: "another"}))
    with pytest.raises(PqkError, match=rf"a\.tsv and .*b\.tsv must not be mixed: {name} is .1 in the one and another"):
        read_results(folder)


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(PqkError, match="no folder"):
        read_results(tmp_path / "none")
    with pytest.raises(PqkError, match="holds no results"):
        read_results(tmp_path)


# Comparison

A, B = Path("a.tsv"), Path("b.tsv")


def test_a_clear_difference_is_told_with_its_direction() -> None:
    noise = random.Random(1)
    better = [r | {"absrel": r["absrel"] - 0.01 + noise.uniform(-1e-4, 1e-4)} for r in grid(card="D1")]
    found = compare((A, grid()), (B, better))
    assert found.distinguishable and found.sentence.startswith("absrel: B is better (B - A = -0.0")
    assert [(i.unit, i.n) for i in found.intervals] == [("runs", 15), ("train seeds", 3), ("eval seeds", 5)]
    assert found.interval.high - found.interval.low == max(i.high - i.low for i in found.intervals)
    higher = [r | {"delta1": r["delta1"] + 0.01} for r in grid()]
    assert compare((A, grid()), (B, higher), "delta1").sentence.startswith("delta1: B is better")


def test_what_holds_zero_is_not_distinguishable() -> None:
    same = compare((A, grid()), (B, grid()))
    assert not same.distinguishable and "not distinguishable" in same.sentence and same.interval.mean == 0
    noise = random.Random(2)
    noisy = [r | {"absrel": r["absrel"] + noise.uniform(-0.01, 0.01)} for r in grid()]
    assert "not distinguishable" in compare((A, grid()), (B, noisy)).sentence


def test_runs_of_one_training_do_not_pass_for_many() -> None:
    """Train seeds that differ by more than their runs: 15 runs would claim what 3 trainings do not."""
    shift = {0: 0.002, 1: 0.010, 2: 0.018}
    other = [r | {"absrel": r["absrel"] + shift[r["train_seed"]]} for r in grid()]
    found = compare((A, grid()), (B, other))
    assert found.intervals[0].low > 0  # over runs
    assert found.interval.unit == "train seeds" and not found.distinguishable


def test_what_is_left_out_is_told() -> None:
    found = compare((A, grid(1, 5)), (B, grid(1, 3)))
    assert found.intervals[0].n == 3
    assert "runs of A without a partner, left out: 2" in found.notes
    assert any("one train seed (0)" in note for note in found.notes)
    halves = [grid(1, 3, scenes="half: 2 of 4 of the list")] * 2
    assert any("halves of one list" in note for note in compare((A, halves[0]), (B, halves[1])).notes)


def over_halves(draws: int, whole: bool = False) -> Comparison:
    """A comparison of rows that differ by draws of 4 of 8 scenes, whose differences are 1 to 8 thousandths."""
    random_state = np.random.default_rng(5)
    scenes = np.arange(1, 9) / 1000
    rows = []
    for seed in range(1, draws + 1):
        value = float(random_state.choice(scenes, 4, replace=False).mean())
        rows.append((row(0, seed, scenes="half: 4 of 8 of the list"), value))
    if whole:
        rows.append((row(0, 0, scenes="all 8 of the list"), float(scenes.mean())))
    return compare((A, [r for r, _ in rows]), (B, [r | {"absrel": r["absrel"] + value} for r, value in rows]))


def test_more_halves_of_one_list_do_not_narrow_the_interval() -> None:
    """Their mean comes close to the list's, not to that of other scenes: the interval stays about that of 8 scenes."""
    of_eight = t_interval(list(np.arange(1, 9) / 1000))
    wide = of_eight.high - of_eight.low
    for found in (over_halves(20), over_halves(200), over_halves(200, whole=True)):
        assert [(i.unit, i.n) for i in found.intervals] == [("scenes", 8)]
        assert 0.7 * wide < found.interval.high - found.interval.low < 1.5 * wide
    assert over_halves(200, whole=True).interval.mean == pytest.approx(0.0045)
    assert "over 8 scenes, 201 paired runs" in over_halves(200, whole=True).sentence


@pytest.mark.parametrize(("count", "kept", "draws", "whole"), [(10, 5, 4, False), (9, 4, 4, False), (20, 10, 19, True)])
def test_the_interval_over_halves_covers_as_often_as_it_says(count: int, kept: int, draws: int, whole: bool) -> None:
    """Of 2000 lists of scenes around 1, about 95 % of the intervals hold 1; of those over draws as runs far fewer."""
    random_state = np.random.default_rng(0)
    right = naive = 0
    for _ in range(2000):
        scenes = random_state.normal(1.0, 3.0, count)
        halves = [float(random_state.choice(scenes, kept, replace=False).mean()) for _ in range(draws)]
        found = halves_interval(halves, kept, count, float(scenes.mean()) if whole else None)
        right += found.low <= 1.0 <= found.high
        as_runs = t_interval(halves)
        naive += as_runs.low <= 1.0 <= as_runs.high
    assert 0.94 < right / 2000 < 0.98
    assert naive / 2000 < 0.85


def test_one_draw_of_a_half_has_no_spread() -> None:
    with pytest.raises(PqkError, match="at least 2 draws of halves"):
        halves_interval([1.0], 2, 4)
    assert halves_interval([1.0], 2, 4, whole=1.5).mean == 1.5


@pytest.mark.parametrize(
    ("a", "b", "metric", "sentence"),
    [
        (
            grid(1, 1),
            grid(1, 1),
            None,
            r"at least 2 equal pairs .* there are 1: a\.tsv has train seed 0 with eval seeds 0",
        ),
        ([row(0, s) for s in range(3)], [row(1, s) for s in range(3)], None, "there are 0"),
        ([], grid(1), None, r"a\.tsv has no rows"),
        (grid(1), grid(1, workload_sha256="w2"), None, r"a\.tsv and b\.tsv must not be mixed: workload_sha256"),
        (grid(1), [r | {"scenes_sha256": "x"} for r in grid(1)], None, "used different pictures"),
        (grid(1), grid(1), "psnr", "unknown metric 'psnr'"),
        (grid(1), grid(1, main_metric="rmse"), None, r"different main metrics \(absrel, rmse\)"),
        (grid(1), grid(1, rmse=None), "rmse", r"b\.tsv: train seed 0, eval seed 0 has no rmse"),
        (grid(1), grid(1), "fps", "fps is not compared: no two rows are timed together"),
        (grid(1, 2, scenes="half of it"), grid(1, 2, scenes="half of it"), None, "cannot read what an eval seed drew"),
        ([*grid(1), row(precision="bf16")], grid(1), None, r"a\.tsv has two rows of train seed 0, eval seed 0: f32 of"),
    ],
)
def test_comparisons_that_are_refused(a: list[Row], b: list[Row], metric: str | None, sentence: str) -> None:
    with pytest.raises(PqkError, match=sentence):
        compare((A, a), (B, b), metric)


# Deliverables


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deliverable whose texts would like to break its tables. Read-only."""
    folder = tmp_path_factory.mktemp("drawn") / "demo"
    nasty = "x|y <b>\n=1"
    rows = [r | {"checkpoint": nasty, "device": nasty} for r in grid(2, 2)]
    tables = [(folder.parent / "a.tsv", rows), (folder.parent / "b.tsv", [row(2, 0, device=nasty)])]
    for path, own in tables:
        write_rows(path, own)
    assert freeze.freeze(folder, tables, "abc", draw_runs) == []
    return folder


@pytest.fixture
def frozen(drawn: Path, tmp_path: Path) -> Path:
    return shutil.copytree(drawn, tmp_path / "deliverables" / "demo")


def test_a_deliverable_holds_everything(frozen: Path) -> None:
    assert freeze.check_files(frozen)[0] == []
    said, runs = freeze.check_files(frozen)
    assert (said, len(runs)) == ([], 5) and [r["file"] for r in runs] == ["a.tsv"] * 4 + ["b.tsv"]
    listed = read_table(frozen / "manifest.tsv", freeze.MANIFEST_COLUMNS)
    names = {r["path"] for r in listed if r["kind"] == "file"}
    assert {"runs.tsv", "summary.tsv", "README.md", "figures/absrel.png", "figures/fps.png"} <= names
    assert [r["sha256"] for r in listed if r["kind"] == "checkpoint"] == ["sha-A1-0", "sha-A1-1", "sha-A1-2"]
    for picture in (frozen / "figures").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")
    readme = (frozen / "README.md").read_text("utf-8")
    table = [line for line in readme.splitlines() if line.startswith("| a:")]
    assert len(table) == 3 and {line.replace("\\|", "").count("|") for line in table} == {8}
    assert "<b>" not in readme.replace("\\<b\\>", "")
    assert "0.1055 ± 0.0058" in readme  # of 0.1, 0.101, 0.11, 0.111


def test_a_name_is_taken_once_and_is_safe(frozen: Path, results: Results) -> None:
    tables = read_results(results(a=grid(1)))
    before = freeze.check_files(frozen)
    with pytest.raises(PqkError, match="demo exists already"):
        freeze.freeze(frozen, tables, None, draw_runs)
    assert freeze.check_files(frozen) == before
    for name in ("", "..", ".x", "a/b", "a b", "-x", "ä", "x" * 81, "a\n"):
        with pytest.raises(PqkError, match="deliverable"):
            freeze.safe_name(name, "deliverable")


def test_nothing_is_left_of_a_freeze_that_fails(results: Results, tmp_path: Path) -> None:
    def broken(*_: object) -> list[str]:
        raise PqkError("the disk is full")

    with pytest.raises(PqkError, match="disk"):
        freeze.freeze(tmp_path / "deliverables" / "x", read_results(results(a=grid(1))), None, broken)
    assert list((tmp_path / "deliverables").iterdir()) == []


@pytest.mark.parametrize("name", ["runs.tsv", "summary.tsv", "README.md", "figures/absrel.png"])
def test_every_change_is_noticed(frozen: Path, name: str) -> None:
    content = (frozen / name).read_bytes()
    (frozen / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [s for s in freeze.check_files(frozen)[0] if s.startswith(f"{name} was changed: its sha256 is ")]
    (frozen / name).unlink()
    assert freeze.check_files(frozen)[0] == [f"{name} is missing"]
    (frozen / name).write_bytes(content)
    (frozen / "extra.txt").write_text("x")
    assert freeze.check_files(frozen)[0] == ["extra.txt is not in the manifest"]


def test_a_folder_that_is_no_deliverable(tmp_path: Path) -> None:
    with pytest.raises(PqkError, match=r"not a deliverable: it has no manifest\.tsv"):
        freeze.check_files(tmp_path)


def test_differences_of_a_repeated_run() -> None:
    old = row()
    assert freeze.differences(old, old | {"fps": 1.0, "absrel": old["absrel"] * 1.0009}, 1e-3) == []
    said = freeze.differences(old, old | {"absrel": 0.1002, "rmse": None}, 1e-3)
    assert said[0].startswith("absrel is 0.1002 now, frozen was 0.1 (off by 0.002 of it, allowed 0.001)")
    assert said[1].startswith("rmse is None now") and len(said) == 2


# Folders that are whole or absent


def test_whole_folder_after_a_kill(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from pqk.files import whole_folder\n"
        "with whole_folder(Path(sys.argv[1])) as new:\n"
        "    (new / 'a').write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    target = tmp_path / "out" / "x"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", script, str(target)], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.05)
    assert not target.exists() and len(list(target.parent.iterdir())) == 1
    with whole_folder(target) as new:
        (new / "sub").mkdir()
        (new / "sub" / "a").write_text("whole")
    assert [p.name for p in target.parent.iterdir()] == ["x"] and (target / "sub" / "a").read_text() == "whole"
    with pytest.raises(PqkError, match="exists already"), whole_folder(target):
        pass


def test_a_recipe_has_one_result(tmp_path: Path) -> None:
    """Whatever the recipe came to, the newer row of the same seeds replaces the older one; other settings do not."""
    path = tmp_path / "D1.tsv"
    add_row(path, row(card="D1"), RESULT)
    add_row(path, row(card="D1", checkpoint_sha256="another", precision="int8", lowered="QAT", drop_pct=0.5), RESULT)
    add_row(path, row(card="D1", settings='{"a": 1}', checkpoint_sha256="third"), RESULT)
    assert [r["checkpoint_sha256"] for r in read_rows(path)] == ["third", "another"]
    add_row(path, row(card="D1", settings='{"a": 2}', checkpoint_sha256="third"), RESULT)  # the same run all the same
    rows = read_rows(path)
    assert sorted((r["checkpoint_sha256"], r["settings"]) for r in rows) == [("another", None), ("third", '{"a": 2}')]
    add_row(path, row(card="D1", isa="amx", checkpoint_sha256="another", precision="int8", drop_pct=0.7), RESULT)
    assert len(read_rows(path)) == 3  # a CPU of the same name, and another one
    add_row(path, row(seed=1, card="D1", checkpoint_sha256="another", precision="int8", drop_pct=1.5), RESULT)
    summary, _ = summarise_files([(path, [r for r in read_rows(path) if r["precision"] == "int8"])])
    means = {line["isa"]: line["drop_pct_mean"] for line in summary if line["scope"] == "file"}
    assert means == {"amx": 0.7, "avx2": 1.0}


def test_two_quantizers_in_one_file_do_not_replace_each_other(tmp_path: Path) -> None:
    """Two eval seeds of nncf and of inc; a result in float, as a stop-loss leaves it, is that of both."""
    path = tmp_path / "D1.tsv"
    for quantizer in ("nncf", "inc", "nncf"):
        for seed in (0, 1):
            made = {"quantizer": quantizer, "precision": "int8", "checkpoint_sha256": f"{quantizer}-graphs"}
            add_row(path, row(seed=seed, card="D1", **made), RESULT)
    assert sorted((r["quantizer"], r["eval_seed"]) for r in read_rows(path)) == [
        ("inc", 0),
        ("inc", 1),
        ("nncf", 0),
        ("nncf", 1),
    ]
    again = {"quantizer": "inc", "precision": "int8", "checkpoint_sha256": "inc-other"}
    add_row(path, row(card="D1", **again), RESULT)
    assert [r["checkpoint_sha256"] for r in read_rows(path) if r["quantizer"] == "inc"] == ["inc-graphs", "inc-other"]
    add_row(path, row(seed=1, card="D1", checkpoint_sha256="stopped"), RESULT)
    assert sorted(r["checkpoint_sha256"] for r in read_rows(path)) == ["inc-other", "nncf-graphs", "stopped"]
