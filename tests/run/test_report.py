"""`pqk report` on a run: written by the run itself, with point maps on demand, and one sentence for what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from run_toys import Outcome, pqk

from pqk.report.html.scene import read_points


def test_a_run_ends_with_the_place_of_its_report(finished: tuple[Path, Outcome]) -> None:
    root, outcome = finished
    assert outcome.err.splitlines()[-1] == "report: reports/B1.html (open it in a browser)"
    text = (root / "reports" / "B1.html").read_text(encoding="utf-8")
    assert outcome.record["hashes"]["engine"] in text and "pqk report B1 --show 4" in text


def test_point_maps_are_those_of_the_recorded_candidate(copy_of: Callable[[], Path], tiny_model: Path) -> None:
    root = copy_of()
    made = pqk(root, "report", "B1", "--show", "2", "--model", tiny_model, "-o", "reports/shown.html")
    assert (made.code, made.out) == (0, "reports/shown.html\n"), made.err
    (kept,) = (root / "reports" / "show").glob("*.npz")
    maps = read_points(kept)
    assert maps is not None and maps.points.shape[0] == 2 and len(maps.images) == 2
    assert 0 < float(maps.error.mean()) < 1000 and maps.about["labels"] == ["Teacher f32", "B1 int8"]
    assert 'id="scene-0"' in (root / "reports" / "shown.html").read_text(encoding="utf-8")

    other = ("--set", "quant.ptq.calibration_images=4")
    refused = pqk(root, "report", "B1", "--show", "2", "--model", tiny_model, *other)
    assert refused.code == 2 and "give --model and --set as in the run" in refused.sentence


def test_refused_in_one_sentence(project: Path) -> None:
    for words, said in (
        (("B1",), "no record of B1 in logs; first: pqk run B1 --backend openvino"),
        ((), "no records in logs; first: pqk run B1 --backend openvino"),
        (("B1", "--lang", "fr"), "--lang fr: there are en, zh"),
        (("B1", "--model", "x"), "--model is given, but it goes with --show"),
        (("B0",), "'B0' is no card, plan or deliverable here (did you mean 'B1'?)"),
    ):
        outcome = pqk(project, "report", *words)
        assert outcome.code == 2 and outcome.sentence.startswith(said), outcome.err
    assert not (project / "reports").exists()
