"""Mistakes that are refused before anything long runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_toys import Outcome, pqk

from pqk.cli.run_output import export_card, run_card
from pqk.data.render.generate import ScenePlan, make_scenes
from pqk.errors import PqkError
from pqk.families.scenes.sets import refuse_partial_truth
from pqk.recipe import stages
from pqk.recipe.request import Request
from pqk.record.schema import empty_record

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture
def no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the long stages must not be reached."""

    def reached(*_: Any) -> None:
        raise AssertionError("the graphs were exported")

    monkeypatch.setattr(stages, "export_graphs", reached)


def test_a_scene_with_depth_for_some_views(tmp_path: Path) -> None:
    """Depth for all or for none is fine; for some, the first view without is named."""
    folder = make_scenes(tmp_path, [ScenePlan("test", 0, 0, 3, 64)], jobs=1)[0]
    refuse_partial_truth(folder)
    depths = sorted((folder / "ground_truth_depth").rglob("*.jpg"))
    assert len(depths) == 3
    depths[1].unlink()
    with pytest.raises(PqkError, match=rf"view '{depths[1].name}' has no depth \(1 of the 3 views") as refused:
        refuse_partial_truth(folder)
    assert folder.name in str(refused.value) and "\n" not in str(refused.value)
    depths[0].unlink()
    depths[2].unlink()
    refuse_partial_truth(folder)


@pytest.mark.parametrize("verb", ["run", "export"])
def test_a_float_rest_is_refused_before_the_stages(
    verb: str,
    project: Path,
    tiny_model: Path,
    no_stage: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.chdir(project)
    request = Request("B1", "openvino", model=str(tiny_model), settings={"quant.float_rest": "f16"})
    with pytest.raises(PqkError, match=r"quant\.float_rest is f16; backend openvino supports here auto, f32"):
        run_card(request, False) if verb == "run" else export_card(request, None, Path("out"))


@pytest.mark.parametrize("recipe", [True, False])
def test_a_log_of_another_record_is_refused_before_the_stages(
    recipe: bool, project: Path, tiny_model: Path, no_stage: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file stays as it is; a new file would have let the run go on to its first stage."""
    pytest.importorskip("openvino")
    monkeypatch.chdir(project)
    log = project / "mine.json"
    least = {"exp_id": "B9", "role": "candidate", "status": "ok", "datetime": "2025-10-08T12:00:00Z"}
    log.write_text(json.dumps({**empty_record(), **least}))
    before = log.read_bytes()
    request = Request("B1", "openvino", model=str(tiny_model), recipe=recipe)
    with pytest.raises(PqkError, match=r"mine\.json already holds another record \(exp_id B9"):
        run_card(request, False, log)
    assert log.read_bytes() == before
    with pytest.raises(AssertionError, match="exported"):
        run_card(request, False, project / "new.json")


def test_a_log_of_the_same_measurement_is_replaced(
    finished: tuple[Path, Outcome], copy_of: Callable[[], Path], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is expected before the run is what the run then writes."""
    root = copy_of()
    monkeypatch.chdir(root)
    log = root / "again.json"
    log.write_text(json.dumps(finished[1].record))
    assert run_card(Request("B1", "openvino", model=str(tiny_model)), False, log) == finished[1].code
    written = json.loads(log.read_text())
    assert written["hashes"] == finished[1].record["hashes"]
    assert written["datetime"] > finished[1].record["datetime"]


def test_one_folder_for_calibration_and_test_is_refused(project: Path, tiny_model: Path, tmp_path: Path) -> None:
    """... and so is a copy of it under another name, before anything is exported."""
    rooms = tmp_path / "rooms"
    make_scenes(rooms, [ScenePlan("test", 5, index, 3, 64) for index in range(2)], jobs=1)
    copied = shutil.copytree(rooms, tmp_path / "copied")
    for calibration, word in ((rooms, "share a folder"), (copied, "share a picture")):
        words = ("run", "B1", "--backend", "openvino", "--model", tiny_model, "--scenes", rooms)
        images = ("workload.calibration.images=4", "quant.ptq.calibration_images=4")
        sets = [f"--set={item}" for item in (f"workload.calibration.source={calibration}", *images)]
        refused = pqk(project, *words, *sets)
        assert refused.code == 2 and "splits test and calibration" in refused.sentence and word in refused.sentence
        assert "ONNX export" not in refused.err
