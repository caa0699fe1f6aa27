"""The page of a campaign out of a frozen deliverable: every planned run is on it, all numbers of records and rows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from pqk.errors import CheckFailed, PqkError
from pqk.families.dust3r.settings import METRICS as KNOWN
from pqk.families.dust3r.settings import load_evaluation
from pqk.recipe.columns import described_metrics
from pqk.recipe.verdict import Measured, judge_float, judge_quantized
from pqk.record import deliverable as freeze
from pqk.record.ledger import COLUMNS, write_rows
from pqk.record.log import record_filename
from pqk.record.schema import empty_record
from pqk.record.tsv import Row
from pqk.report.page.page import write_page
from pqk.report.runs import draw_runs
from pqk.stats.intervals import Interval, drop_interval

ABOUT = described_metrics(KNOWN)
METRICS = (*ABOUT, "absrel_p95")
ROOT = Path(__file__).resolve().parents[2]

Write = Callable[..., Path]


def digest(*words: object) -> str:
    from pqk.files import sha256_json

    return sha256_json(list(map(str, words)))


def record(card: str, role: str, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A record of a run of `card`; its workload's digest follows from the train seed."""
    hashes = {"model": digest(card if role == "candidate" else "teacher", seed if role == "candidate" else "")}
    hashes |= {"workload": digest("w", seed), "eval": digest("e"), "engine": digest(card, seed, "engine")}
    known = {
        "exp_id": card,
        "role": role,
        "combo": "K→Q",
        "model": "tiny",
        "backend": "openvino",
        "device": "a CPU",
        "precision": "f32",
        "status": "ok",
        "train_seed": seed,
        "absrel": 0.1,
        "main_metric": "absrel",
        "quality_drop_pct": 0.5,
        "verdict": "pass" if role == "candidate" else None,
        "verdict_reasons": ["ok: quality drop 0.5 % (at most 1 %)"] if role == "candidate" else None,
        "t_pair_p50_ms": 100.0 if role == "teacher" else 80.0,
        "speedup_vs_own_f32": 1.25,
        "speedup_vs_best_float": 1.25,
        "executed_precision": {"f32": 1.0},
        "params_M": 12.0 if role == "teacher" else 9.0,
        "params": 9_000_000,
        "flops_G": 80.0 if role == "teacher" else 60.0,
        "size_MB": 48.0 if role == "teacher" else 36.0,
        "gpu_hours": None if role == "teacher" else 0.25 + seed,
        "datetime": f"2026-01-0{seed + 1}T00:00:00Z",
        "versions": {"openvino": "2026.4.1"},
        "hashes": hashes,
    }
    return empty_record() | known | more


def int8(card: str, seed: int = 0, **more: Any) -> dict[str, Any]:
    lowered = {
        "precision": "int8",
        "quantizer": "nncf",
        "executed_precision": {"f32": 0.17, "int8": 0.83},
        "t_pair_p50_ms": 40.0,
        "size_MB": 12.0,
        "speedup_vs_own_f32": 2.0,
        "speedup_vs_best_float": 1.6,
    }
    return record(card, "candidate", seed, **lowered | more)


def row(found: dict[str, Any], seed: int, **more: Any) -> Row:
    """An evaluation of a record's candidate, or of the Teacher."""
    own = found["role"] == "candidate"
    lowered = found["quantizer"] is not None
    train = found["train_seed"]
    base: Row = dict.fromkeys(COLUMNS) | dict.fromkeys(METRICS, 0.1 + 0.01 * seed) | {
        "metrics": json.dumps(ABOUT),
        "card": found["exp_id"],
        "train_seed": train,
        "eval_seed": seed,
        "main_metric": "absrel",
        "drop_pct": 0.2 + 0.1 * seed + train if own else None,
        "pairs": 72,
        "scenes": "8",
        "scenes_sha256": digest("scenes", seed),
        "checkpoint": "tiny",
        "checkpoint_sha256": found["hashes"]["engine" if lowered else "model"],
        "float_sha256": found["hashes"]["model"] if lowered else None,
        "teacher_sha256": digest("teacher", "") if own else None,
        "params": 9,
        "backend": "openvino",
        "quantizer": found["quantizer"],
        "device": "a CPU",
        "isa": "avx2",
        "cores": 2,
        "precision": found["precision"],
        "lowered": "PTQ" if lowered else None,
        "measured": "engine",
        "workload_sha256": "w",
        "eval_sha256": "e",
        "config_sha256": digest(found["precision"]),
        "code_sha256": "k",
        "settings": None,
        "commit": "abc",
        "datetime": "2026-01-05T00:00:00Z",
        "output": "o",
    }  # fmt: skip
    return base | more


def drops_of(text: str) -> list[str]:
    """The lines of the table of drops."""
    part = text.split("## Drops")[1].split("##")[0]
    return [line for line in part.splitlines() if line.startswith("|")]


def planned(name: str, card: str | None, seed: int | None = 0, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "card": card,
        "combo": "K→Q" if card else None,
        "what": "a",
        "matrix": False,
        "train_seed": seed,
        "eval_seeds": [0, 1],
        "drop_limit_pct": 1.0,
        "status": "done",
        "detail": None,
        "candidate": None,
        "teachers": [],
    } | more


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Freezes records and rows as a deliverable of a plan, and writes its page."""

    def call(
        rows: list[Row],
        records: list[dict[str, Any]],
        runs: list[dict[str, Any]],
        files: Mapping[str, bytes] | None = None,
        targets: list[dict[str, Any]] | None = None,
    ) -> Path:
        ledger = tmp_path / "results" / "all.openvino.tsv"
        write_rows(ledger, rows)
        named = {f"records/{record_filename(r)}": r for r in records}
        for run in runs:
            own = {p: r for p, r in named.items() if (r["exp_id"], r["train_seed"]) == (run["card"], run["train_seed"])}
            run["candidate"] = next((path for path, r in own.items() if r["role"] == "candidate"), None)
            run["teachers"] = [path for path, r in own.items() if r["role"] == "teacher"]
        plan = {"plan": "results", "title": "Everything", "goal": "Rows.", "backend": "openvino", "rows": runs}
        plan["targets"] = targets or []
        more = {path: json.dumps(r).encode() for path, r in named.items()} | {"plan.json": json.dumps(plan).encode()}
        folder = tmp_path / "deliverables" / "demo"
        freeze.freeze(folder, [(ledger, freeze.tables_of([ledger])[0][1])], "abc", draw_runs, {**more, **(files or {})})
        assert freeze.check_files(folder)[0] == []
        page = tmp_path / "docs" / "results.md"
        assert write_page(folder, page)[-1] == page
        return page

    return call


def test_every_planned_run_is_on_the_page(write: Write) -> None:
    teachers = [record(card, "teacher", seed) for card in ("A1", "D1") for seed in (0, 1)]
    students = [record("A1", "candidate", seed) for seed in (0, 1)]
    slow = "FAILED: t_pair p50 13.1 % below fp32 (at least 50 % below)"
    failed = int8("D1", 1, verdict="fail", verdict_reasons=["ok: a", slow], t_pair_p50_ms=50.0)
    small = [int8("D1"), failed]
    rows = [row(r, seed) for r in [*students, *small, teachers[0]] for seed in (0, 1)]
    rows = [r for r in rows if (r["card"], r["train_seed"], r["eval_seed"]) != ("D1", 1, 1)]
    rows = [r | ({"card": "B1"} if r["teacher_sha256"] is None else {}) for r in rows]
    runs = [planned("Baseline", None, None)]
    runs += [planned(f"{card}-s{seed}", card, seed) for card in ("A1", "D1") for seed in (0, 1)]
    runs += [
        planned("E1", "E1", status="waiting"),
        planned("G1", "G1", status="unavailable", detail="not | offered"),
        planned("H1", "H1", matrix=True, eval_seeds=[]),
    ]
    more = {"ablation/loss.md": b"# H1 loss\n\n| point | drop % |\n| --- | --- |\n| KL only | +0.31 |\n"}
    page = write(rows, [*teachers, *students, *small], runs, more)
    text = page.read_text()
    cells = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in text.splitlines() if " | " in line
    }

    # Two draws, of drops 0.2 and 1.2, and 0.3 and 1.3: their means 0.7 and 0.8 are what the interval is over.
    half = stats.t.ppf(0.975, 1) * 0.05
    a1 = cells["A1 K→Q, f32"]
    assert a1[:2] == ["2 train x 2 eval", f"+0.75 [{0.75 - half:+.2f}, {0.75 + half:+.2f}]"]
    assert a1[3:6] == ["9.00 (-25 %)", "60.0 (-25 %)", "36.0 (-25 %)"]
    assert a1[7:10] == ["–", "–", "1.25"] and a1[12].startswith("0.75 ± 0.71")
    assert a1[11].startswith(
        "pass (seed 0); undecided (seed 1): drop +1.25 %, 95 % interval +0.61 .. +1.89 over 2 draws"
    )
    d1 = cells["D1 K→Q, int8 (PTQ)"]
    assert d1[0] == "2 train x 2 eval, 3 runs" and d1[5] == "12.0 (-75 %)"
    assert d1[7:9] == ["2.00", "1.60"] and d1[9].startswith("2.25 ± 0.35") and d1[10] == "83%"
    assert d1[11] == "pass (seed 0); fail (seed 1): t\\_pair p50 13.1 % below fp32 (at least 50 % below)"
    assert "drop +1.20 %" not in text  # one draw tells nothing: there the record speaks
    judged = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in drops_of(text)[2:]}
    assert judged["A1-s0"] == ["+0.25 [-0.39, +0.89]", "2 draws", "1", "pass", "+0.50: pass |"]
    assert judged["A1-s1"] == ["+1.25 [+0.61, +1.89]", "2 draws", "1", "undecided", "+0.50: pass |"]
    assert judged["D1-s1"] == ["+1.20", "1 draw", "1", "–", "+0.50: pass |"]
    assert "Their drop leaves undecided: A1-s1 (pass). In brackets" in text
    assert "The deliverable does not hold the scores of single pairs" in text
    assert cells["Teacher tiny, f32"][0] == "2 eval" and cells["Teacher tiny, f32"][3] == "12.00"

    missing = text.split("## Not run yet")[1].split("##")[0].strip().splitlines()
    assert missing == [
        "- D1-s1: not evaluated with eval seeds 1",
        "- E1: not run yet, not evaluated with eval seeds 0..1",
        "- G1: not run yet, not evaluated with eval seeds 0..1 (unavailable: not \\| offered)",
    ]
    assert "avx2, 2 cores" in text and "openvino 2026.4.1" in text and "| KL only | +0.31 |" in text
    assert "pqk plan results --run --backend openvino" in text and "pqk ledger freeze demo --plan results" in text
    linked = re.findall(r"\]\(([^)]+)\)", text)
    assert "../deliverables/demo" in linked and {"results/tradeoff.png", "results/drop.png"} <= set(linked)
    for target in linked:
        path = page.parent / target
        assert path.exists() and (path.is_dir() or 2000 < path.stat().st_size < 100_000)


def test_targets_reached_missed_and_not_measured(write: Write) -> None:
    teachers = [record("A1", "teacher"), record("D1", "teacher")]
    found = [record("A1", "candidate"), int8("D1")]
    rows = [row(found[0], 0), row(found[0], 1), row(found[1], 0, drop_pct=1.0), row(found[1], 1, drop_pct=2.0)]

    def target(card: str, measure: str, **more: Any) -> dict[str, Any]:
        return {
            "card": card,
            "measure": measure,
            "least": None,
            "most": None,
            "against": None,
            "if_missed": None,
        } | more

    targets = [
        target("A1", "drop_pct", most=0.25),
        target("A1", "drop_pct", most=0.9),
        target("A1", "drop_pct", least=1.0),
        target("A1", "params_cut_pct", least=25.0),
        target("A1", "x_own_f32", least=1.26, if_missed="no | int8"),
        target("D1", "file_cut_pct", least=75.01),
        target("D1", "drop_pct", most=1.3, against="A1"),
        target("D1", "hours", most=0.99, against="A1", if_missed="no | int8"),
        target("D1", "flops_G", most=1.0, against="G1"),
        target("G1", "hours", most=1.0),
    ]
    text = write(rows, [*teachers, *found], [planned("A1", "A1"), planned("D1", "D1")], targets=targets).read_text()
    lines = text.split("## Targets")[1].split("## Not run yet")[0].strip().splitlines()
    assert [line.strip("| ").split(" | ") for line in lines[2:12]] == [
        ["A1, f32", "drop %", "at most 0.25", "+0.25 [-0.39, +0.89]", "undecided"],
        ["A1, f32", "drop %", "at most 0.9", "+0.25 [-0.39, +0.89]", "yes"],
        ["A1, f32", "drop %", "at least 1", "+0.25 [-0.39, +0.89]", "**no**"],
        ["A1, f32", "parameters cut, %", "at least 25", "25.00", "yes"],
        ["A1, f32", "speed, x own f32", "at least 1.26", "1.25", "**no**"],
        ["D1, int8", "files smaller by, %", "at least 75.01", "75.00", "**no**"],
        ["D1, int8", "drop %, beyond that of A1", "at most 1.3", "+1.25 [-4.47, +6.97]", "undecided"],
        ["D1, int8", "device hours, over that of A1", "at most 0.99", "1.00", "**no**"],
        ["D1, int8", "GFLOPs, over that of G1", "at most 1", "–", "–"],
        ["G1", "device hours", "at most 1", "–", "–"],
    ]
    assert lines[13:] == ["- A1, f32: speed, x own f32; D1, int8: device hours, over that of A1: no \\| int8"]


def test_what_is_not_in_the_ledger_is_of_its_record(write: Write) -> None:
    teacher, found = record("C1", "teacher"), record("C1", "candidate", quality_drop_pct=2.25, status="stopped")
    found |= {"verdict": "fail", "verdict_reasons": ["FAILED: stop-loss: it diverged"]}
    page = write([row(teacher, 0, card="B1")], [teacher, found], [planned("C1", "C1")])
    text = page.read_text()
    assert "| C1 K→Q, f32 | 1 train, record only | +2.25 | 0.1000 |" in text
    assert "stopped: stop-loss: it diverged" in text and "- C1: not evaluated with eval seeds 0..1" in text

    # A Teacher that was timed with another run is no measure of speed.
    later = teacher | {"datetime": "2026-01-02T00:00:00Z"}
    (page.parent.parent / "deliverables" / "demo").rename(page.parent.parent / "deliverables" / "old")
    text = write([row(teacher, 0, card="B1")], [later, found], [planned("C1", "C1")]).read_text()
    assert "| 9.00 | 60.0 | 36.0 | 80.0 | – | – | – |" in text


@pytest.mark.parametrize(("teacher_run", "ratio"), [("r1", "(-25 %)"), ("r2", ""), (None, "")])
def test_rows_of_one_run_belong_together_whatever_their_dates(
    write: Write, teacher_run: str | None, ratio: str
) -> None:
    """A Teacher of the same minute, and of another run, is not the candidate's; one of its run is, a day later too."""
    day = "2026-01-02T00:00:00Z" if ratio else "2026-01-01T00:00:00Z"
    teacher = record("A1", "teacher", run_id=teacher_run, datetime=day)
    found = record("A1", "candidate", run_id="r1")
    text = write([row(found, 0), row(found, 1)], [teacher, found], [planned("A1", "A1")]).read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| A1 K"))
    assert line.split(" | ")[4] == f"9.00 {ratio}".strip()
    assert "by their dates" not in text


def test_pairs_by_date_are_labelled(write: Write) -> None:
    """Records of schema 1.0, which do not name their run."""
    teacher, found = record("A1", "teacher"), record("A1", "candidate")
    text = write([row(found, 0)], [teacher, found], [planned("A1", "A1")]).read_text()
    assert "Teacher and candidate of one run were found by their dates, at most 5 minutes apart" in text
    assert "| 9.00 (-25 %) |" in text


def test_speed_against_the_teacher_is_that_of_the_record(write: Write) -> None:
    """Of paired rounds: 1.30, where the two medians would give 1.25."""
    teacher, found = (record("A1", role, run_id="r1", speedup_vs_teacher_f32=1.3) for role in ("teacher", "candidate"))
    text = write([row(found, 0)], [teacher, found], [planned("A1", "A1")]).read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| A1 K"))
    assert line.split(" | ")[10] == "1.30"


def test_nothing_lacks(write: Write) -> None:
    teacher, found = record("A1", "teacher"), record("A1", "candidate")
    rows = [row(found, 0), row(found, 1)]
    text = write(rows, [teacher, found], [planned("A1", "A1")]).read_text()
    assert "Nothing: every planned run was measured and evaluated." in text and "## Ablations" not in text


def test_rows_of_another_checkpoint_are_told(write: Write) -> None:
    teacher, found = record("A1", "teacher"), record("A1", "candidate")
    rows = [row(found, seed, checkpoint_sha256="other") for seed in (0, 1)]
    text = write(rows, [teacher, found], [planned("A1", "A1")]).read_text()
    assert "A1: its evaluations are of another checkpoint than its record" in text


def test_only_what_was_frozen_is_shown(write: Write, tmp_path: Path) -> None:
    teacher, found = record("A1", "teacher"), record("A1", "candidate")
    page = write([row(found, 0)], [teacher, found], [planned("A1", "A1")])
    folder = tmp_path / "deliverables" / "demo"
    before = page.read_bytes()
    write_page(folder, page)
    assert page.read_bytes() == before  # the same deliverable, the same page
    (path,) = (folder / "records").glob("A1-candidate-*")
    path.write_text(path.read_text().replace("9.0", "8.0"))
    with pytest.raises(CheckFailed, match="is not as it was frozen: records/A1-candidate"):
        write_page(folder, page)
    plain = tmp_path / "deliverables" / "plain"
    ledger = tmp_path / "results" / "all.openvino.tsv"
    freeze.freeze(plain, freeze.tables_of([ledger]), None, draw_runs)
    with pytest.raises(PqkError, match="was frozen without a plan"):
        write_page(plain, page)
    with pytest.raises(PqkError, match=r"ends in \.md"):
        write_page(folder, tmp_path / "page.txt")


def scored(found: Row, values: list[float], scene: str) -> tuple[Row, dict[str, bytes]]:
    """A row whose pairs have these values, and the file of its scores; a scene for every two of them."""
    name = digest(found["checkpoint_sha256"], found["eval_seed"])[:16]
    lines = ["scene\tfirst\tsecond\tabsrel"]
    lines += [f"{scene}{place // 2}\t{place}\tb\t{value!r}" for place, value in enumerate(values)]
    changed = {"absrel": sum(values) / len(values), "pairs": len(values), "output": f"outputs/store/quality/{name}"}
    return found | changed, {f"scores/{name}.tsv": ("\n".join(lines) + "\n").encode()}


def test_scores_of_pairs_give_intervals_over_scenes(write: Write) -> None:
    """The Teacher's and the recipes' scores of the same pairs: drops and their differences, scenes as clusters."""
    teacher, found, other = record("A1", "teacher"), record("A1", "candidate"), record("C1", "candidate")
    rows, files = [], {}
    taught = {0: [0.10, 0.11, 0.20, 0.21, 0.15, 0.15], 1: [0.12, 0.12, 0.30, 0.29, 0.22, 0.21]}
    mine = {
        "A1": lambda number, value: value * (1.006 + 0.004 * (number // 2)),
        "C1": lambda number, value: value * (1.026 + 0.004 * (number // 2)),
    }
    for seed, values in taught.items():
        made, more = scored(row(teacher, seed, card="B1"), values, f"s{seed}-")
        rows, files = [*rows, made], files | more
        for one in (found, other):
            own = [mine[one["exp_id"]](number, value) for number, value in enumerate(values)]
            drop = 100 * (sum(own) / sum(values) - 1)
            made, more = scored(row(one, seed, drop_pct=drop), own, f"s{seed}-")
            rows, files = [*rows, made], files | more
    runs = [planned("Baseline", None, None), planned("A1", "A1"), planned("C1", "C1")]
    text = write(rows, [teacher, found, other], runs, files).read_text()
    assert "does not hold the scores" not in text and "with scenes as clusters" in text
    judged = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in drops_of(text)[2:]}

    every = [value for values in taught.values() for value in values]
    a1 = [mine["A1"](number % 6, value) for number, value in enumerate(every)]
    scenes = [number // 2 for number in range(12)]
    want = drop_interval(a1, every, scenes)
    assert judged["A1"][:2] == [f"{want.value:+.2f} [{want.low:+.2f}, {want.high:+.2f}]", "6 scenes"]
    assert judged["A1"][3] == "undecided" and judged["C1"][3] == "fail"
    pairs = text.split("## Paired comparisons")[1].split("##")[0]
    assert "1 pair of recipes" in pairs and "| C1 K→Q, f32 | A1 K→Q, f32 | +2.00 [+2.00, +2.00] | 6 scenes |" in pairs


def test_the_drop_is_the_first_reason_of_a_verdict() -> None:
    """The page puts its own sentence in the place of the first one."""
    limits = load_evaluation(ROOT / "configs" / "eval.yaml").thresholds
    drop, speed = Interval(0.5, 0.2, 0.8, 8), Interval(2.0, 1.9, 2.1, 30)
    measured = Measured(drop, speed, speed, 0.25, 0.9)
    for verdict in (judge_quantized(measured, limits), judge_float(drop, 0.7, limits, ("P",))):
        assert "drop" in verdict[1][0] and not any("drop" in reason for reason in verdict[1][1:])


def test_the_page_of_the_last_campaign_is_made_by_the_command(tmp_path: Path) -> None:
    """docs/results.md and its figures follow from deliverables/results-3, whose five draws give the intervals."""
    folder = shutil.copytree(ROOT / "deliverables" / "results-3", tmp_path / "deliverables" / "results-3")
    page = tmp_path / "docs" / "results.md"
    write_page(folder, page)
    text = page.read_text()
    assert text == (ROOT / "docs" / "results.md").read_text()
    said, runs = freeze.check_files(folder)
    assert said == []  # no file of the deliverable was touched
    a1 = [r["drop_pct"] for r in runs if (r["card"], r["train_seed"]) == ("A1", 0)]
    low, high = stats.ttest_1samp(a1, 0.0).confidence_interval(0.95)
    assert len(a1) == 5
    assert f"| A1-s0 | {sum(a1) / 5:+.2f} [{low:+.2f}, {high:+.2f}] | 5 draws | 1 | undecided | +0.92: pass |" in text
    assert " of 3)" not in text
