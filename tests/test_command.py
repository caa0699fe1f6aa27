"""The command that a record keeps: it works in the project's folder, and names no folder of one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pqk.command import given_command


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    for folder in ("configs", "models/mine", "below"):
        (root / folder).mkdir(parents=True)
    (root / "configs" / "workload.yaml").touch()
    monkeypatch.chdir(root)
    return root


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("run B1 --backend openvino", "run B1 --backend openvino"),
        ("run B1 --model models/mine --set quant.ptq.bits_w=8", "run B1 --model models/mine --set quant.ptq.bits_w=8"),
        ("run B1 --model {root}/models/mine", "run B1 --model models/mine"),
        ("run B1 --model={root}/models/mine", "run B1 --model=models/mine"),
        ("run B1 --model /somewhere/else/weights.pth", "run B1 --model OUTSIDE/weights.pth"),
        (
            "run B1 --set workload.scenes.train.folder=/some/where",
            "run B1 --set workload.scenes.train.folder=OUTSIDE/where",
        ),
        ("run B1 --set a.b={root}/models/mine", "run B1 --set a.b=models/mine"),
        ("run B1 --images ~/photos", "run B1 --images OUTSIDE/photos"),
        ("run B1 --images ../photos", "run B1 --images ../photos"),  # not there: nothing to place
        ("run B1 --scenes ..", "run B1 --scenes .."),
        ("run B1 --model facebook/VGGT-1B", "run B1 --model facebook/VGGT-1B"),
        ("run B1 --track mlflow:http://me:secret@host/x --json", "run B1"),
        ("run B1 --track=mlflow:http://me:secret@host/x --fresh --retime --seed 1", "run B1 --seed 1"),
        (
            "run B1 --set quant.ptq.keep_list=['.*/attn/.*']",
            "run B1 --set 'quant.ptq.keep_list=['\"'\"'.*/attn/.*'\"'\"']'",
        ),
    ],
)
def test_words_are_kept_as_they_work_in_the_project(project: Path, words: str, kept: str) -> None:
    assert given_command(["/any/bin/pqk", *words.format(root=project).split()]) == f"pqk {kept}"


def test_paths_are_seen_from_the_projects_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "below")
    assert given_command(["pqk", "run", "B1", "--model", "../models/mine"]) == "pqk run B1 --model models/mine"


def test_scripts_and_other_programs(project: Path) -> None:
    door = project / "scripts" / "run_quant.py"
    assert given_command([str(door), "--card", "B1"]) == "python scripts/run_quant.py --card B1"
    assert given_command(["/usr/lib/python3/pytest", "run", "B1"]) is None
