"""Scores of every pair behind a ledger: found in the store or a deliverable, frozen, and compared over scenes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pqk.errors import PqkError
from pqk.families.dust3r.settings import METRICS as KNOWN
from pqk.recipe.columns import described_metrics
from pqk.record import deliverable as freeze
from pqk.record.comparison import compare
from pqk.record.ledger import COLUMNS, write_rows
from pqk.record.pair_scores import files_of, paired, scores_here, scores_in
from pqk.record.tsv import Row
from pqk.report.runs import draw_runs

ABOUT = described_metrics(KNOWN)
METRICS = (*ABOUT, "absrel_p95")
SCENES, PAIRS = 6, 4
A, B = Path("a.tsv"), Path("b.tsv")


def evaluation(card: str, seed: int, shift: float, noise: float, train: int = 0) -> tuple[Row, list[dict[str, Any]]]:
    """A row and the scores of its pairs: as hard as their scene is, plus `shift` and some noise of their own."""
    hard = np.random.default_rng(seed)
    own = np.random.default_rng([seed, train, len(card), ord(card[0])])
    pairs = []
    for scene in range(SCENES):
        level = 0.1 + 0.04 * hard.random()
        for pair in range(PAIRS):
            value = level * (1 + 0.1 * hard.random()) * (1 + shift) + noise * own.normal()
            names = {"scene": scene, "first": f"{pair}.jpg", "second": f"{pair + 1}.jpg"}
            pairs.append({**names, "absrel": value, "delta1": 1 - value, "reproj_px": None})
    means = {name: math.fsum(pair[name] for pair in pairs) / len(pairs) for name in ("absrel", "delta1")}
    row: Row = {
        "card": card,
        "train_seed": train,
        "eval_seed": seed,
        "main_metric": "absrel",
        "metrics": json.dumps(ABOUT),
        **dict.fromkeys(METRICS, 0.5),
        **means,
        "drop_pct": 100 * shift,
        "pairs": len(pairs),
        "scenes": f"{SCENES} generated, base seed {seed}",
        "scenes_sha256": f"scenes{seed}",
        "checkpoint": card,
        "checkpoint_sha256": f"sha-{card}-{train}",
        "backend": "openvino",
        "device": "a CPU",
        "precision": "f32",
        "params": 1,
        "measured": "engine",
        "workload_sha256": "w",
        "eval_sha256": "e",
        "config_sha256": "c",
        "code_sha256": "k",
        "datetime": "2026-01-01T00:00:00Z",
        "output": f"outputs/store/quality/{card}{train}{seed:012d}",
    }
    return dict.fromkeys(COLUMNS) | row, pairs


def as_sample(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair as a sample of its group."""
    place = {"group": pair["scene"], "sample": f"{pair['first']}, {pair['second']}"}
    return {**place, **{name: value for name, value in pair.items() if name not in ("scene", "first", "second")}}


Make = Callable[..., list[Row]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a recipe's evaluations, with their scores in the project's store; returns its rows."""

    def call(card: str, shift: float = 0.0, noise: float = 0.0, draws: int = 2, trains: int = 1) -> list[Row]:
        rows = []
        for train in range(trains):
            for seed in range(draws):
                row, pairs = evaluation(card, seed, shift, noise, train)
                folder = tmp_path / row["output"]
                folder.mkdir(parents=True)
                # As they were kept before samples had one name, and as they are kept now.
                stored = {"pairs": pairs} if card == "A1" else {"samples": [as_sample(pair) for pair in pairs]}
                (folder / "quality.json").write_text(json.dumps({**stored, "summary": {}}))
                rows.append(row)
        return rows

    return call


def test_two_recipes_are_compared_over_scenes(tmp_path: Path, make: Make) -> None:
    """12 scenes tell apart what 2 draws do not: what pairs have in common cancels."""
    a, b = make("A1"), make("D1", shift=0.02, noise=1e-4)
    by_runs = compare((A, a), (B, b))
    found = compare((A, a), (B, b), scores=scores_here(tmp_path))
    (interval,) = found.intervals
    assert (interval.unit, interval.n, found.runs) == ("scenes", 2 * SCENES, 2)
    assert interval.mean == pytest.approx(by_runs.interval.mean)
    assert found.distinguishable and found.sentence.startswith("absrel: B is worse (B - A = +0.00")
    assert f"over {2 * SCENES} scenes, 2 paired runs" in found.sentence
    assert interval.high - interval.low < (by_runs.interval.high - by_runs.interval.low) / 2

    # the same as Student's t over the means of each scene, since all scenes have equally many pairs
    scores = scores_here(tmp_path)
    (left, right), scenes = paired(list(zip(a, b, strict=True)), "absrel", scores) or ([[], []], [])
    differences = np.subtract(right, left).reshape(2 * SCENES, PAIRS).mean(axis=1)
    assert len(set(scenes)) == 2 * SCENES
    want = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx(tuple(want))


def test_a_difference_of_drops_is_in_points(tmp_path: Path, make: Make) -> None:
    """Exact shifts: drops of 1 and 3 % differ by 2 points, in every scene."""
    found = compare((A, make("A1", 0.01)), (B, make("D1", 0.03)), "drop_pct", scores_here(tmp_path))
    interval = found.interval
    assert interval.unit == "scenes" and (interval.mean, interval.low, interval.high) == pytest.approx((2, 2, 2))
    better = compare((A, make("B1", 0.03)), (B, make("C1", 0.01)), "delta1", scores_here(tmp_path))
    assert better.sentence.startswith("delta1: B is better") and better.interval.unit == "scenes"


def test_halves_of_a_list_are_not_counted_beside_it(tmp_path: Path, make: Make) -> None:
    """Eval seed 0 has all scenes of the list; more halves of it must not pass for more scenes."""
    a, b = make("A1", draws=3), make("D1", 0.02, 1e-3, draws=3)
    for rows in (a, b):
        rows[0]["scenes"] = f"all {SCENES} of the list"
        for row in rows[1:]:
            row["scenes"] = f"half: {SCENES} of {2 * SCENES} of the list"
    found = compare((A, a), (B, b), scores=scores_here(tmp_path))
    assert [(i.unit, i.n) for i in found.intervals] == [("scenes", SCENES)]
    assert found.interval.mean == pytest.approx(b[0]["absrel"] - a[0]["absrel"])
    halves = compare((A, a[1:]), (B, b[1:]), scores=scores_here(tmp_path))
    assert halves.interval == compare((A, a[1:]), (B, b[1:])).interval
    assert not any("scores per sample" in note for note in halves.notes)


def test_trainings_are_no_scenes(tmp_path: Path, make: Make) -> None:
    """Several train seeds: a scene of all of them is one group, and there is an interval over trainings beside it."""
    found = compare((A, make("A1", trains=3)), (B, make("D1", 0.02, 1e-3, trains=3)), scores=scores_here(tmp_path))
    assert [(i.unit, i.n) for i in found.intervals] == [("scenes", 2 * SCENES), ("train seeds", 3)]
    assert found.interval == max(found.intervals, key=lambda i: i.high - i.low)


def test_without_scores_the_interval_is_over_runs_and_says_so(tmp_path: Path, make: Make) -> None:
    a, b = make("A1"), make("D1", 0.02, 1e-3)
    shutil.rmtree(tmp_path / b[1]["output"])
    found = compare((A, a), (B, b), scores=scores_here(tmp_path))
    said = "the scores per sample of these runs are missing: the interval is over runs, and wider than over scenes"
    assert found.interval.unit == "runs" and said in found.notes


def test_a_deliverable_holds_the_scores_of_every_run(tmp_path: Path, make: Make) -> None:
    tables = [(tmp_path / "a.tsv", make("A1", 0.01, 1e-3)), (tmp_path / "b.tsv", make("D1", 0.03, 1e-3))]
    rows = [row for path, own in tables for row in own]
    for path, own in tables:
        write_rows(path, own)
    files, gone = files_of(rows, tmp_path)
    assert gone == [] and len(files) == len(rows)
    folder = tmp_path / "deliverables" / "demo"
    freeze.freeze(folder, tables, "abc", draw_runs, files)
    said, runs = freeze.check_files(folder)
    assert said == [] and len(runs) == len(rows)
    readme = (folder / "README.md").read_text()
    assert readme.count("scores") == 2 and "scores/NAME.tsv" in readme  # one line for all of them
    before = compare(tables[0], tables[1], scores=scores_here(tmp_path))

    shutil.rmtree(tmp_path / "outputs")  # the store is gone; the deliverable gives the same numbers, bit for bit
    for row in runs:
        assert len(scores_in(folder)(row) or []) == SCENES * PAIRS
    assert compare(tables[0], tables[1], scores=scores_here(tmp_path)) == before

    scores = next((folder / "scores").iterdir())
    scores.write_text(scores.read_text().replace("0.jpg", "9.jpg", 1))
    assert freeze.check_files(folder)[0][0].startswith(f"scores/{scores.name} was changed")


def test_scores_that_are_gone_are_told(tmp_path: Path, make: Make) -> None:
    rows = make("A1")
    shutil.rmtree(tmp_path / rows[0]["output"])
    files, gone = files_of(rows, tmp_path)
    assert len(files) == 1 and len(gone) == 1 and gone[0].startswith("scores per sample of 1 of 2 runs are not in")


@pytest.mark.parametrize("output", ["", None, "../secret", "/etc", "outputs/store/../../secret", "a\0b", "outputs/x\n"])
def test_only_the_store_is_read(tmp_path: Path, make: Make, output: str | None) -> None:
    (row,) = make("A1", draws=1)
    secret = tmp_path / "secret"
    shutil.move(tmp_path / row["output"], secret)
    (tmp_path / "outputs" / "store" / "quality").mkdir(parents=True, exist_ok=True)
    named = row | {"output": output}
    assert scores_here(tmp_path)(named) is None and files_of([named], tmp_path)[0] == {}


def test_a_row_with_another_number_has_no_scores(tmp_path: Path, make: Make) -> None:
    """A changed row is not given the interval of what was measured."""
    rows = make("A1")
    forged = [rows[0] | {"absrel": rows[0]["absrel"] * 1.001}, rows[1]]
    files, said = files_of(forged, tmp_path)
    assert len(files) == 1 and "have another mean than the row" in said[0]
    assert compare((A, rows), (B, forged), scores=scores_here(tmp_path)).interval.unit == "runs"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"pairs": [7]}', "holds no scores of samples"),
        ("{", "holds no scores of samples"),
        ("[]", "holds no scores of samples"),
        ('{"pairs": [{"scene": "a"}]}', "holds no scores of samples"),
        ('{"pairs": []}', "not every sample has a absrel"),
    ],
)
def test_what_holds_no_scores_is_refused(tmp_path: Path, make: Make, content: str, sentence: str) -> None:
    rows = make("A1", draws=1)
    (tmp_path / rows[0]["output"] / "quality.json").write_text(content)
    with pytest.raises(PqkError, match=sentence):
        files_of(rows, tmp_path)
