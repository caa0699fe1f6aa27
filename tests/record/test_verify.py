"""`pqk verify`: what stands in the repository passes, and one fault of each kind is found in a copy of it."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pqk import errors
from pqk.cli.app import app
from pqk.errors import told
from pqk.files import sha256_file
from pqk.record.deliverable import MANIFEST, MANIFEST_COLUMNS
from pqk.record.log import read_records
from pqk.record.tsv import read_table, write_table
from pqk.record.verify import RULES, verify
from pqk.stats.latency import speedup

ROOT = Path(__file__).resolve().parents[2]
FROZEN = sorted(path for path in (ROOT / "deliverables").iterdir() if path.is_dir())
CODES = {"record": 13, "seed": 12, "number": 11, "file": 10}
A1 = "records/A1-candidate-openvino-f32-11f290e8.json"
D1 = "records/D1-candidate-openvino-nncf-int8-11b79a28.json"

Edit = Callable[[str], str]


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(ROOT / "deliverables" / name, tmp_path / name)


def edit(folder: Path, name: str, change: Edit) -> None:
    path = folder / name
    old = path.read_text("utf-8")
    new = change(old)
    assert new != old
    path.write_text(new, "utf-8")


def freeze_again(folder: Path) -> None:
    """Writes the sha256 of every file anew, as someone does who hides an edit."""
    rows = read_table(folder / MANIFEST, MANIFEST_COLUMNS)
    files = [row for row in rows if row["kind"] == "file" and (folder / row["path"]).is_file()]
    for row in files:
        row |= {"bytes": (folder / row["path"]).stat().st_size, "sha256": sha256_file(folder / row["path"])}
    write_table(folder / MANIFEST, MANIFEST_COLUMNS, [*files, *(row for row in rows if row["kind"] != "file")])


def replaced(pattern: str, new: str) -> Edit:
    return lambda text: re.sub(pattern, new, text, count=1)


def cell(row: int, column: str, value: str) -> Edit:
    """Puts a value into a table; row 1 is the first below the head."""

    def change(text: str) -> str:
        lines = [line.split("\t") for line in text.splitlines()]
        lines[row][lines[0].index(column)] = value
        return "\n".join("\t".join(line) for line in lines) + "\n"

    return change


def field(name: str, value: Any) -> Edit:
    return lambda text: json.dumps({**json.loads(text), name: value})


def without_lines(*starts: str) -> Edit:
    return lambda text: "".join(line for line in text.splitlines(True) if not line.startswith(starts))


def test_the_codes_are_those_of_no_other_end() -> None:
    assert RULES == CODES
    ends = {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert len(set(ends.values())) == len(ends)


@pytest.mark.parametrize("folder", FROZEN, ids=lambda path: path.name)
def test_what_was_frozen_passes_in_a_minute(folder: Path) -> None:
    began = time.monotonic()
    found = verify(folder)
    assert (found.faults, found.exit_code) == ([], 0)
    assert found.runs > 0
    assert time.monotonic() - began < 60


def test_it_says_how_much_it_could_check() -> None:
    found = verify(ROOT / "deliverables" / "results-3")
    assert (found.runs, found.scored, found.records) == (65, 0, 32)
    found = verify(ROOT / "deliverables" / "detection")
    assert (found.runs, found.scored, found.records) == (55, 55, 0)


# A flipped byte


@pytest.mark.parametrize(
    "name", ["figures/absrel.png", "ablation/loss.png", "figures/fps.png"], ids=lambda name: Path(name).name
)
def test_a_flipped_byte_is_a_changed_file(copy: Callable[[str], Path], name: str) -> None:
    folder = copy("results-3")
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    found = verify(folder)
    assert found.exit_code == 10
    (fault,) = found.faults
    assert re.fullmatch(rf"{re.escape(name)} was changed: its sha256 is \w{{64}}, frozen was \w{{64}}", fault.sentence)


@pytest.mark.slow
def test_any_flipped_byte_is_found(copy: Callable[[str], Path]) -> None:
    folder = copy("detection")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    chance = random.Random(0)
    for path in [folder / MANIFEST] * 30 + chance.sample(files, 30):
        data = path.read_bytes()
        at = chance.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :])
        found = verify(folder)
        assert found.faults, f"byte {at} of {path.name}"
        assert any(fault.rule == "file" for fault in found.faults), f"byte {at} of {path.name}: {found.faults[0]}"
        path.write_bytes(data)
    assert verify(folder).exit_code == 0


def test_files_that_came_or_went_are_changed_files(copy: Callable[[str], Path]) -> None:
    folder = copy("detection")
    (folder / "figures" / "ap.png").unlink()
    (folder / "more.txt").write_text("x")
    found = verify(folder)
    assert [fault.sentence for fault in found.faults] == [
        "figures/ap.png is missing",
        "more.txt is not in the manifest",
    ]
    assert found.exit_code == 10


# An edited number


@pytest.mark.parametrize("hidden", [True, False], ids=["manifest written anew", "manifest as it was"])
@pytest.mark.parametrize(
    ("deliverable", "name", "change", "said"),
    [
        ("detection", "runs.tsv", cell(3, "ap", "55.5"), r"runs.tsv, row 3 .*: ap is 55.5, the mean of its"),
        ("detection", "runs.tsv", cell(9, "ap75", "1.0"), r"runs.tsv, row 9 .*: ap75 is 1, the mean of its scores"),
        ("detection", "runs.tsv", cell(41, "drop_pct", "-9.0"), r"row 41 .*: drop_pct is -9, that of the Teacher"),
        ("detection", "scores/0725edf13fce00ec.tsv", cell(5, "ap", "99.0"), r"the mean of its scores is"),
        ("detection", "scores/0725edf13fce00ec.tsv", cell(5, "ap50", ""), r"199 of 200 samples have a score"),
        ("detection", "summary.tsv", cell(1, "ap_mean", "54.0"), r"summary.tsv, .*: ap_mean is 54, that of its"),
        ("detection", "README.md", replaced(r"\| 5 \| [\d.]+ ±", "| 5 | 61.1 ±"), r"README.md, .* is 61.1 ± .*gives"),
        ("results-3", "runs.tsv", cell(6, "absrel", "0.1"), r"A1-.*: absrel is 0.11.*, that of its run in A1.op"),
        ("results-3", "summary.tsv", cell(2, "absrel_std", "0.1"), r"absrel_std is 0.1, that of its runs is"),
        ("results-3", "README.md", replaced(r"0\.11851 ", "0.11151 "), r"README.md, .*absrel.* is 0.11151 ± 0.016"),
        ("results-3", A1, field("absrel", 0.1), r"absrel is 0.1, that of its run in A1.openvino.tsv is 0.116"),
        ("results-3", A1, field("quality_drop_pct", 0.1), r"drop_pct is 0.1, that of the Teacher's record is 0.9"),
        ("results-3", A1, field("t_pair_p50_ms", 300.0), r"t_pair_p50_ms is 300, its raw samples give 405.6"),
        ("results-3", A1, field("pairs_per_sec", 3.0), r"pairs_per_sec is 3, its raw samples give 2.452"),
        ("results-3", D1, field("speedup_vs_best_float", 1.5), r"vs_best_float is 1.5, its raw samples give 1.1"),
        ("results-3", A1, field("size_ratio", 0.5), r"size_ratio is 0.5, size_MB by the Teacher's is 0.635"),
        ("results-3", A1, field("params_M", 7.0), r"params_M is 7, params in millions is 7.699"),
        ("results-3", "ablation/loss.md", replaced(r"\+1\.12", "+1.02"), r"ablation/loss.md, KL and features: \+1.0"),
        ("results-3", "ablation/loss.csv", replaced(r"1\.9106", "0.9106"), r"ablation/loss.md, features only: \+1.9"),
    ],
)  # fmt: skip
def test_an_edited_number_is_found(
    copy: Callable[[str], Path], deliverable: str, name: str, change: Edit, said: str, hidden: bool
) -> None:
    folder = copy(deliverable)
    edit(folder, name, change)
    if hidden:
        freeze_again(folder)
    found = verify(folder)
    assert found.exit_code == 11, found.faults[:3]
    numbers = [fault.sentence for fault in found.faults if fault.rule == "number"]
    assert any(re.search(said, sentence) for sentence in numbers), numbers
    assert any(fault.rule == "file" for fault in found.faults) == (not hidden)


def test_an_edited_metric_of_a_new_record_is_found(copy: Callable[[str], Path]) -> None:
    """From schema 2 on a record has its metrics twice, and its speeds are medians of ratios."""
    folder = copy("results-3")
    record = read_records(folder / A1)[0].record
    (folder / A1).write_text(json.dumps(record))
    freeze_again(folder)
    assert [fault.sentence for fault in verify(folder).faults] == [
        f"{A1}: speedup_vs_teacher_f32 is 1.290384, its raw samples give 1.2920686"
    ]
    teacher = read_records(folder / "records" / "A1-teacher-openvino-f32-bbb2c9b2.json")[0].record
    found = speedup(teacher["samples"]["pair"], record["samples"]["pair"])
    record["speedup_vs_teacher_f32"] = found.value
    record["intervals"] = {"speedup_vs_teacher_f32": found.ends()}
    (folder / A1).write_text(json.dumps(record))
    freeze_again(folder)
    assert verify(folder).faults == []
    record["metrics"]["absrel"]["value"] = 0.1
    (folder / A1).write_text(json.dumps(record))
    freeze_again(folder)
    (fault,) = [fault for fault in verify(folder).faults if fault.rule == "number"]
    assert "absrel is 0.116" in fault.sentence and "must be as in metrics, 0.1" in fault.sentence
    record["absrel"] = 0.1
    record["intervals"]["speedup_vs_teacher_f32"][0] = 1.0
    (folder / A1).write_text(json.dumps(record))
    freeze_again(folder)
    said = [fault.sentence for fault in verify(folder).faults if fault.rule == "number"]
    assert any("absrel is 0.1, that of its run in A1.openvino.tsv is 0.116" in sentence for sentence in said)
    assert any("the lower end of speedup_vs_teacher_f32 is 1, its raw" in sentence for sentence in said)


# A missing seed


@pytest.mark.parametrize("hidden", [True, False], ids=["manifest written anew", "manifest as it was"])
def test_a_missing_evaluation_is_found(copy: Callable[[str], Path], hidden: bool) -> None:
    folder = copy("detection")
    edit(folder, "runs.tsv", without_lines("detector-S4.tsv\tS4\t1\t3\t"))
    if hidden:
        freeze_again(folder)
    found = verify(folder)
    assert found.exit_code == 12
    assert found.faults[0].sentence == (
        "runs.tsv lacks train seed 1, eval seed 3 of detector-S4.tsv, which other train seeds of it have"
    )
    assert [fault.rule for fault in found.faults[1:]] == ([] if hidden else ["file"])


def test_a_train_seed_that_is_gone_as_a_whole_is_found_by_the_summary(copy: Callable[[str], Path]) -> None:
    folder = copy("detection")
    edit(folder, "runs.tsv", without_lines("detector-S4.tsv\tS4\t2\t"))
    freeze_again(folder)
    found = verify(folder)
    assert found.exit_code == 12
    said = [fault.sentence for fault in found.faults if fault.rule == "seed"]
    assert len(said) == 5
    assert all(sentence.endswith("of detector-S4.tsv, which summary.tsv counts") for sentence in said)
    assert all(fault.rule != "number" for fault in found.faults)


def test_a_seed_that_the_summary_hides_too_is_found_by_the_plan(copy: Callable[[str], Path]) -> None:
    folder = copy("results-3")
    edit(folder, "runs.tsv", without_lines(*(f"A1.openvino.tsv\tA1\t{seed}\t4\t" for seed in (0, 1, 2))))
    edit(folder, "summary.tsv", lambda text: text.replace("0..4", "0..3"))
    freeze_again(folder)
    found = verify(folder)
    assert found.exit_code == 12
    assert found.faults[0].sentence == (
        "runs.tsv lacks train seed 0, eval seed 4 of A1.openvino.tsv, which plan.json has as run"
    )


def test_a_planned_run_without_its_record_is_found(copy: Callable[[str], Path]) -> None:
    folder = copy("results-3")
    (folder / A1).unlink()
    freeze_again(folder)
    found = verify(folder)
    assert found.exit_code == 12
    assert found.faults[0].sentence == f"{A1} is missing, which plan.json names as the result of A1-s0"


# What no schema allows


@pytest.mark.parametrize("hidden", [True, False], ids=["manifest written anew", "manifest as it was"])
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (A1, field("absrell", 0.1), r"A1-cand.*: unknown field \"absrell\" \(did you mean 'absrel'\?\)"),
        (A1, field("absrel", -1.0), r"absrel must be a number of at least 0, or null, got -1.0"),
        (A1, field("role", "boss"), r"role must be one of teacher, baseline, candidate, got \"boss\""),
        (A1, field("schema_version", "9.0.0"), r"schema_version 9.0.0 is newer"),
        ("runs.tsv", replaced("reproj_px", "Reproj"), r"runs.tsv:1: unknown column 'Reproj'"),
        ("runs.tsv", cell(2, "eval_seed", "one"), r"runs.tsv:3: eval_seed: 'one' is not a whole number"),
        ("plan.json", replaced('"rows"', '"lines"'), r"plan.json is no plan of a campaign"),
    ],
)  # fmt: skip
def test_what_no_schema_allows_is_found(
    copy: Callable[[str], Path], name: str, change: Edit, said: str, hidden: bool
) -> None:
    folder = copy("results-3")
    edit(folder, name, change)
    if hidden:
        freeze_again(folder)
    found = verify(folder)
    if name == "runs.tsv" and not hidden:  # a table that cannot be read is explained by its sha256
        assert found.exit_code >= 10
        assert any(fault.rule == "file" for fault in found.faults)
        return
    assert found.exit_code == 13
    assert re.search(said, found.faults[0].sentence)


def test_tables_beside_the_runs_must_be_readable_too(copy: Callable[[str], Path]) -> None:
    folder = copy("detection")
    edit(folder, "summary.tsv", cell(1, "eval_seeds", "4..x"))
    edit(folder, "scores/0725edf13fce00ec.tsv", cell(5, "ap", "high"))
    found = verify(folder)
    assert found.exit_code == 10  # a damaged table is explained by its sha256
    freeze_again(folder)
    said = [fault.sentence for fault in verify(folder).faults if fault.rule == "record"]
    assert len(said) == 2
    assert any("scores/0725edf13fce00ec.tsv:6: ap: 'high' is not a number" in sentence for sentence in said)


def test_a_file_of_several_records_is_read_whole(copy: Callable[[str], Path]) -> None:
    folder = copy("results-3")
    record = json.loads((folder / A1).read_text())
    other = json.loads((folder / D1).read_text())
    (folder / D1).write_text(json.dumps([other, {**record, "params_M": 7.0}]))
    freeze_again(folder)
    found = verify(folder)
    assert (found.exit_code, found.records) == (11, 33)
    assert any(fault.sentence.startswith(f"{D1}, record 2: params_M is 7") for fault in found.faults)
    (folder / D1).write_text("[]")
    freeze_again(folder)
    assert verify(folder).exit_code == 13


# The command


def test_the_command_tells_each_fault_in_a_line(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = told(lambda: app(["verify", *words], standalone_mode=False) or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    assert call("results-3")[0] == 0
    folder = copy("detection")
    code, out, _ = call(str(folder))
    assert code == 0 and out.endswith("nothing differs\n")
    edit(folder, "runs.tsv", cell(3, "ap", "55.5"))
    code, out, err = call(str(folder))
    assert (code, err) == (11, "")
    assert out.startswith("number: runs.tsv, row 3") and out.splitlines()[-1].startswith("file: runs.tsv was changed")
    code, out, _ = call(str(folder), "--json")
    data = json.loads(out)
    assert (code, data["exit_code"], data["faults"][0]["rule"]) == (11, 11, "number")
    for name in (str(tmp_path), "nope", "../results-3"):
        code, out, err = call(name)
        assert (code, out) == (2, "") and err.count("\n") == 1 and "is not a deliverable" in err


def test_the_codes_are_documented() -> None:
    page = (ROOT / "docs" / "howto-evidence.md").read_text("utf-8")
    for rule, code in CODES.items():
        assert re.search(rf"^\| {code} \| {rule} \|", page, re.MULTILINE)
