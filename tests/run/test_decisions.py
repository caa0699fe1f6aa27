"""Decisions are taken on validation samples: nothing but the final scoring opens a test picture."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preloaded
import pytest
from run_toys import Outcome, environment, pqk, written

from pqk.errors import PqkError
from pqk.recipe import recover
from pqk.recipe.candidate import Choice
from pqk.recipe.request import Request

pytestmark = pytest.mark.usefixtures("forked_workers")

WATCH = """
import os, sys

def watch(event, arguments):
    if event != "open" or not isinstance(arguments[0], (str, bytes)):
        return
    path = os.fsdecode(arguments[0])
    if "/test-0-" not in path or not path.endswith((".png", ".jpg", ".JPG")):
        return
    worker = os.path.basename(sys.argv[0] if sys.argv else "") == "worker.py"
    frame, by = sys._getframe(1), set()
    while frame is not None:
        by.add(os.path.basename(frame.f_code.co_filename))
        frame = frame.f_back
    made = by & {"store.py", "generate.py"}  # written, or hashed where it lies
    who = sys.argv[1] if worker else "store" if made else "scores" if "scoring.py" in by else "pqk"
    handle = os.open(os.environ["PQK_TEST_WATCH"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{who}\\t{path}\\n".encode())
    os.close(handle)

sys.addaudithook(watch)
"""
SCORING = {"predictions", "scores", "quality"}
Watched = Callable[..., tuple[Outcome, set[str]]]


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    """Runs `pqk` and tells who opened a picture or depth map of a test scene: worker tasks by name, 'pqk', 'store'."""
    site, log = tmp_path / "site", tmp_path / "opened.tsv"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WATCH)

    def run(root: Path, *words: str | Path) -> tuple[Outcome, set[str]]:
        log.unlink(missing_ok=True)
        known = environment()
        known |= {"PYTHONPATH": f"{site}{os.pathsep}{known['PYTHONPATH']}", "PQK_TEST_WATCH": str(log)}
        command = [preloaded.python(), "-m", "pqk.cli", *map(str, words)]
        done = subprocess.run(command, cwd=root, env=known, capture_output=True, text=True)
        lines = log.read_text().splitlines() if log.exists() else []
        return Outcome(done.returncode, done.stdout, done.stderr), {line.split("\t")[0] for line in lines}

    return run


def test_nothing_but_the_final_scoring_opens_a_test_scene(
    watched: Watched, copy_of: Callable[[], Path], tiny_model: Path
) -> None:
    """PTQ or QAT is decided on validation samples; timing, memory and export need no test sample either."""
    root = copy_of()
    words = ("B1", "--backend", "openvino", "--model", tiny_model, "--no-rollback")
    words = (*words, "--set", "eval.quality.main_metric=delta1", "--set", "eval.thresholds.quality_drop_q_only_pct=0")
    made, opened = watched(root, "export", *words, "-o", "candidate")
    assert made.code == 0 and "… quantization-aware training" in made.err, made.err
    assert opened <= {"store"}

    ran, opened = watched(root, "run", *words, "--json")
    assert ran.code in (0, 1, 4) and "… quantization-aware training" not in ran.err, ran.err
    assert opened - {"store"} and opened - {"store"} <= SCORING
    assert "on validation samples" in ran.err
    rows = [r for r in written(root) if r["precision"] == "int8" and r["main_metric"] == "delta1"]
    (candidate,) = (r for r in rows if r["role"] == "candidate")
    assert candidate == ran.record and candidate["validation_drop_pct"] is not None
    assert candidate["hashes"]["validation"] != candidate["hashes"]["scenes"]
    manifest = json.loads((root / "candidate" / "manifest.json").read_text())  # what ships is what was measured
    assert manifest["hashes"]["engine"] == candidate["hashes"]["engine"]
    assert {name: manifest[name] for name in ("role", "model", "precision", "keep_list")} == {
        name: candidate[name] for name in ("role", "model", "precision", "keep_list")
    }


def test_tuning_and_ranking_open_no_test_scene(watched: Watched, copy_of: Callable[[], Path], tiny_model: Path) -> None:
    root = copy_of()
    words = ("B1", "--backend", "openvino", "--model", tiny_model, "--max-drop=-90", "--max-evaluations", "2")
    tuned, opened = watched(
        root, "tune", *words
    )  # nothing is within the limit, so there is nothing to score at the end
    assert tuned.code == 1 and "ranking" in tuned.err, tuned.err
    assert opened <= {"store"}


def test_a_drop_is_decided_with_more_scenes(copy_of: Callable[[], Path], tiny_model: Path) -> None:
    """Looks at 2, 4 and 5 scenes are planned, each at 1 - 0.05 / 3; the first one that decides is the last."""
    root = copy_of()
    words = ("run", "B1", "--backend", "openvino", "--model", tiny_model, "--no-rollback", "--json")
    looked = pqk(root, *words, "--decide", "--max-scenes", "5")
    assert looked.code in (1, 4), looked.err
    record = looked.record
    count = len(record["scenes"])
    assert record["scenes"] == [f"test-0-{n:04d}" for n in range(count)] and count in (2, 4, 5)
    look = (2, 4, 5).index(count) + 1
    assert f"look {look} of at most 3 at the test scenes, each judged at 98.33 %" in record["notes"]
    low, high = record["intervals"]["quality_drop_pct"]
    assert low < record["quality_drop_pct"] < high
    assert count == 5 or high <= 1 or low > 1  # only what is decided ends it early
    mark = "ok" if high <= 1 else "FAILED" if low > 1 else "undecided"
    assert record["verdict_reasons"][0].startswith(f"{mark}: ")
    rows = {r["role"]: r for r in written(root) if r["scenes"] == record["scenes"]}
    assert rows["teacher"]["hashes"]["scenes"] == record["hashes"]["scenes"]  # all rows on the same samples
    assert rows["teacher"]["intervals"]["quality_drop_pct"] == [0, 0]

    refused = pqk(root, *words, "--decide", "--max-scenes", "1")
    assert refused.code == 2
    refused = pqk(root, *words, "--decide", "--set", "workload.scenes.test={source: rooms}")
    assert refused.code == 2 and "--decide adds generated test scenes" in refused.sentence
    single = pqk(root, *words, "--decide", "--max-scenes", "2").record
    assert (
        len(single["scenes"]) == 2 and "look 1 of at most 1 at the test scenes, each judged at 95 %" in single["notes"]
    )


def test_the_worst_ranked_nodes_stay_in_float_first(
    copy_of: Callable[[], Path], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rung for a quantization that drops too much asks for a ranking, on validation samples."""
    root, asked, real = copy_of(), [], recover.make
    monkeypatch.chdir(root)

    def make(request: Request, *rest: Any) -> Choice:
        asked.append(request)
        if len(asked) == 2:
            raise PqkError("enough")
        return real(request, *rest)

    monkeypatch.setattr(recover, "make", make)
    settings = {"eval.quality.main_metric": "delta1", "eval.thresholds.quality_drop_q_only_pct": 0.0}
    said: list[str] = []
    request = Request("B1", "openvino", model=str(tiny_model), settings=settings)
    with pytest.raises(PqkError, match="enough"):
        recover.choose(request, root, lambda *_: None, said.append)
    assert "ranking the nodes of the quantized model on validation samples" in said
    first, second = asked
    (move,) = second.moves
    assert move.startswith("rollback keep-worst-nodes: Q ended with a drop of ") and "on validation samples" in move
    listed = second.settings["quant.ptq.keep_list"]
    added = listed[3:]
    assert listed[:3] == ["LayerNorm", "Softmax", "AttentionScales"] and 1 <= len(added) <= 4
    assert all(re.match(r"(encoder|decoder):\^", entry) for entry in added) and first.moves == ()
