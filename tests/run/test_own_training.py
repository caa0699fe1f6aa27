"""Whole runs that learn from the user's own data: scenes with depth, plain photographs; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from run_toys import Outcome, pqk

from pqk.data.render.generate import ScenePlan, make_scenes
from pqk.data.scenes.open import open_scenes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes of three views of 64 x 64, in COLMAP's layout with depth."""
    folder = tmp_path_factory.mktemp("own") / "scenes"
    folder.mkdir()
    plan = {"split": "train", "seed": 7, "views": 3, "size": 64, "k": 2, "min_covisibility": 0.3, "depth": True}
    make_scenes(folder, [ScenePlan(index=i, **plan) for i in range(3)], jobs=1)
    return folder


@pytest.fixture(scope="module")
def photos(scenes: Path) -> Path:
    """Their nine pictures in one folder."""
    folder = scenes.parent / "photos"
    folder.mkdir()
    for k, view in enumerate(view for scene in open_scenes(scenes) for view in scene.views):
        shutil.copy(view.image_path, folder / f"{k:02d}{view.image_path.suffix}")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, begun: Callable[[Path], Path]) -> Path:
    return begun(tmp_path_factory.mktemp("own-project") / "project")


def run(root: Path, card: str, model: Path, *more: str | Path) -> Outcome:
    return pqk(root, "run", card, "--backend", "openvino", "--model", model, "--json", "--no-rollback", *more)


def steps(root: Path, stage: str) -> dict[str, object]:
    (found,) = (root / "outputs" / "store" / stage).glob("*/trained.json")
    result: dict[str, object] = json.loads(found.read_text())
    return result


def test_a_student_learns_from_scenes_and_is_quantized(root: Path, tiny_model: Path, scenes: Path) -> None:
    pytest.importorskip("nncf")
    outcome = run(root, "D1", tiny_model, "--train-scenes", scenes)
    assert outcome.code in (0, 1, 4), outcome.err
    record = outcome.record
    assert "trained on 2 scenes with depth, judged on 1 other" in record["notes"]
    assert "no task loss" not in record["notes"] and len(record["hashes"]["train"]) == 64
    assert (record["precision"], steps(root, "distilled")["steps"]) == ("int8", 6)


def test_pruning_learns_from_photographs(root: Path, tiny_model: Path, photos: Path) -> None:
    outcome = run(root, "C1", tiny_model, "--train-images", photos)
    assert outcome.code in (0, 1, 4), outcome.err
    notes = outcome.record["notes"]
    assert "trained on 7 photographs, judged on the 2 that follow them; the Teacher's outputs served as " in notes
    assert "there was no task loss" in notes
    first = steps(root, "pruned")["history"][0]  # type: ignore[index]
    assert first["drop_pct"] == pytest.approx(100 * first["absrel"])  # the error against the Teacher is the drop


def test_what_cannot_be_learned_from_is_refused(root: Path, tiny_model: Path, scenes: Path, photos: Path) -> None:
    refused = run(root, "A1", tiny_model, "--train-scenes", scenes, "--scenes", scenes)
    assert refused.code == 2 and "splits train and test share a folder" in refused.sentence
    refused = run(root, "A1", tiny_model, "--train-scenes", scenes, "--train-images", photos)
    assert refused.code == 2 and "--train-scenes and --train-images exclude each other" in refused.sentence
