"""Task cards, recipes, the project root and the dry run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqk.cli.check import dry_run, main
from pqk.errors import PqkError
from pqk.families.registry import family
from pqk.paths import project_root, shown
from pqk.recipe.experiment import resolve
from pqk.settings.card import list_cards, load_card
from pqk.settings.recipe import STAGES, check_stages, combo_of, quantizes

REPOSITORY = Path(__file__).resolve().parents[2]
CARDS = ["A1", "AUTO", "B1", "C1", "D1", "E1", "F1", "G1", "H1", "KTQ1", "T1", "T2", "T3", "TQ1"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the configs, cards and schema, as current directory."""
    root = tmp_path / "project"
    shutil.copytree(REPOSITORY / "configs", root / "configs")
    (root / "schedule" / "TaskCards").mkdir(parents=True)
    for name in [*CARDS, "TEMPLATE"]:
        shutil.copy(REPOSITORY / "schedule" / "TaskCards" / f"{name}.md", root / "schedule" / "TaskCards")
    (root / "logs").mkdir()
    shutil.copy(REPOSITORY / "logs" / "unified_log_schema.json", root / "logs")
    monkeypatch.chdir(root)
    return root


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (old, text.count(old))
    path.write_text(text.replace(old, new), encoding="utf-8")


def card_file(project: Path, name: str = "B1") -> Path:
    return project / "schedule" / "TaskCards" / f"{name}.md"


def test_the_shipped_cards(project: Path) -> None:
    assert list_cards() == CARDS
    recipes = {name: "".join(load_card(name).recipe) for name in CARDS}
    assert recipes == {
        "A1": "K", "AUTO": "Q", "B1": "Q", "C1": "P", "D1": "KQ", "E1": "PK", "F1": "PKQ", "G1": "PQK", "H1": "Q",
        "KTQ1": "KTQ", "T1": "T", "T2": "T", "T3": "T", "TQ1": "TQ",
    }  # fmt: skip
    for name in CARDS:
        card = load_card(name)
        assert card.source == card_file(project, name)
        assert all(f"\n## {part}\n" in card.prose for part in ("Steps", "Success", "Stop-loss", "Rollback"))


def test_every_point_of_the_shipped_matrix_is_an_experiment(project: Path) -> None:
    card = load_card("H1")
    shared = ["loss", "keep-list", "calibration"]
    assert list(card.matrix) == [*shared, "pair-graph", "input", "frames", "size", "steps", "boxes", "topology"]
    owns = {
        "dust3r": ["pair-graph", "input"],
        "vggt": ["frames", "size"],
        "diffusiondet": ["steps", "boxes", "topology"],
    }
    for name, own in owns.items():
        points = card.points(name)
        assert list(dict.fromkeys(axis for axis, _ in points)) == [*shared, *own]
        seen = set()
        for axis, point in points:
            mine = card.at(axis, point, name)
            assert (mine.recipe, mine.combo, mine.matrix) == (card.matrix[axis].recipe or ("Q",), "Ablation", {})
            found = resolve(mine, of=family(name), settings=card.matrix[axis].points[point], origin="a point")
            seen.add(tuple(getattr(found, part).sha256 for part in ("workload", "quant", "distill")))
        axes = len(shared) + len(own)
        assert len(seen) == len(points) - axes + 1  # every axis holds the default once


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("128 images:", "128 images: {quant.ptq.calibration_images: 64}\n      128 images:", "128 images"),
        ("recipe: [K]\n", "recipe: [X]\n", "'X' is not one"),
        ("combo: Ablation", "combo: Q-only", "a card with a matrix is of combo 'Ablation'"),
        ("  calibration:\n", "  Calibration size:\n", "Calibration size"),
    ],
)
def test_a_matrix_with_a_mistake(project: Path, old: str, new: str, says: str) -> None:
    edit(card_file(project, "H1"), old, new)
    with pytest.raises(PqkError, match=re.escape(says)):
        load_card("H1")


def test_the_dry_run_looks_at_every_point(project: Path) -> None:
    edit(card_file(project, "H1"), "{workload.pair_graph.k: 8}", "{workload.pair_graph.kk: 8}")
    (said,) = (found.message for found in dry_run(project) if "H1" in found.message)
    where = "schedule/TaskCards/H1.md: pair-graph: 8 neighbours"
    assert said.startswith(f"{where}: unknown key 'workload.pair_graph.kk' (did you mean 'k'?)")


def test_the_dry_run_resolves_a_card_for_every_family_that_it_is_for(project: Path) -> None:
    edit(card_file(project, "H1"), "  pair-graph:\n    family: dust3r\n", "  pair-graph:\n")
    (said,) = (found.message for found in dry_run(project) if "H1" in found.message)
    assert "unknown key 'workload.pair_graph'" in said and said.endswith(", for vggt models")
    edit(card_file(project, "H1"), "  frames:\n    family: vggt\n", "  frames:\n    family: vgtt\n")
    assert any("'vgtt'" in found.message and "did you mean 'vggt'" in found.message for found in dry_run(project))


def test_an_axis_or_point_that_is_not_there(project: Path) -> None:
    card = load_card("H1")
    with pytest.raises(PqkError, match=r"^card H1 has no axis 'los' \(did you mean 'loss'\?\); axes: loss, keep-list"):
        card.at("los", "KL only")
    with pytest.raises(PqkError, match=r"^axis loss of card H1 has no point 'KL onli' \(did you mean 'KL only'\?\)"):
        card.at("loss", "KL onli")
    with pytest.raises(PqkError, match=r"^card B1 has no axis 'loss'; axes: none"):
        load_card("B1").at("loss", "KL only")
    with pytest.raises(PqkError, match=r"^axis frames of card H1 is for models of family 'vggt', not 'dust3r'"):
        card.at("frames", "2 frames", "dust3r")


def test_which_recipes_end_quantized(project: Path) -> None:
    found = [name for name in CARDS if quantizes(load_card(name).recipe)]
    assert found == ["AUTO", "B1", "D1", "F1", "G1", "H1", "KTQ1", "TQ1"]


@given(st.lists(st.sampled_from(list(STAGES)), max_size=4))
def test_recipes(stages: list[str]) -> None:
    right = bool(stages) and len(set(stages)) == len(stages) and ("PQK" not in stages or len(stages) == 1)
    # P and K in any order, then T, then Q
    right = right and [stage for stage in stages if stage in "TQ"] == stages[len(set(stages) - {"T", "Q"}) :]
    right = right and stages[-2:] != ["Q", "T"]
    if right:
        assert check_stages(stages) == tuple(stages)
        assert combo_of(stages) in {"Joint PQK", f"{stages[0]}-only", "→".join(stages)}
    else:
        with pytest.raises(ValueError, match="must hold"):
            check_stages(stages)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("B2", r"there is no card 'B2' in schedule/TaskCards \(did you mean 'T2'\?\); cards: A1, AUTO, B1, C1"),
        ("", "is not a card's id"),
        ("1B", "is not a card's id"),
        ("B1\n", "is not a card's id"),
        ("../../configs/eval", "is not a card's id"),
        ("B" * 33, "is not a card's id"),
        ("TEMPLATE", "TEMPLATE.md is not a card; copy TEMPLATE.md"),
        ("README.md", "lies outside schedule/TaskCards"),
        ("/etc/passwd.md", "lies outside schedule/TaskCards"),
        ("schedule/TaskCards/../../B1.md", "lies outside schedule/TaskCards"),
        ("schedule/TaskCards/deep/B1.md", "lies outside schedule/TaskCards"),
        ("schedule/TaskCards/B2.md", r"there is no card 'B2' .*did you mean 'T2'"),
    ],
)
def test_cards_that_are_not_there(project: Path, name: str, message: str) -> None:
    with pytest.raises(PqkError, match=message):
        load_card(name)


def test_cards_by_path(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_card("schedule/TaskCards/B1.md").id == "B1"
    assert load_card(card_file(project)).id == "B1"
    monkeypatch.chdir(project / "configs")
    assert load_card("schedule/TaskCards/B1.md").id == "B1"
    assert load_card("../schedule/TaskCards/B1.md").id == "B1"


def test_a_link_out_of_the_folder_is_refused(project: Path, tmp_path: Path) -> None:
    card_file(project).rename(tmp_path / "B1.md")
    card_file(project).symlink_to(tmp_path / "B1.md")
    with pytest.raises(PqkError, match="lies outside"):
        load_card("B1")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id: B1", "id: B2", r"B1\.md:2: id is 'B2' but must be 'B1', as the file is named"),
        ("id: B1", "id: ../B1", r"B1\.md:2: id is '\.\./B1' but must match"),
        ("---\nid", "id", r"B1\.md:1: a card begins with YAML front matter"),
        ("status: planned\n---\n", "status: planned\n", r"B1\.md: the front matter has no closing line"),
        ("recipe: [Q]", "recipe: Q", r"B1\.md:5: recipe is 'Q' but must be a list"),
        ("recipe: [Q]", "recipe: []", r"recipe is \[\] but must hold at least one stage"),
        ("recipe: [Q]", "recipe: [q]", r"recipe is \['q'\] but must hold stages out of P, K, T, Q, PQK"),
        ("recipe: [Q]", "recipe: [Q, Q]", "but must hold each stage at most once"),
        ("recipe: [Q]", "recipe: [Q, PQK]", "but must hold PQK, the joint recipe, alone"),
        ("recipe: [Q]", "recipe: [K]", "combo is 'Q-only' but must be 'K-only', as its recipe says, or 'Ablation'"),
        ("requires: []", "requires: [B1]", "requires names the card itself"),
        ("requires: []", "requirs: []", r"B1\.md:7: unknown key 'requirs' \(did you mean 'requires'\?\)"),
        ("status: planned", "status: started", "status is 'started' but must be 'planned', 'running'"),
        ("gpu_hours: 20", "gpu_hours: 0", "budget.gpu_hours is 0 but must be more than 0"),
        ("gpu_hours: 20", "gpu_hours: 20, gpu_hours: 30", "the key budget.gpu_hours is given twice"),
        ("overrides: {}", "overrides: {model: {}}", "unknown key 'overrides.model'"),
        ("overrides: {}", "overrides: {quant: [1]}", "overrides.quant is .* but must be a mapping"),
        ("goal: ", "gaol: ", "unknown key 'gaol'"),
    ],
)
def test_bad_front_matter(project: Path, old: str, new: str, message: str) -> None:
    edit(card_file(project), old, new)
    with pytest.raises(PqkError, match=message) as caught:
        load_card("B1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("overrides: {}", "overrides: {workload: {pair_grap.k: 2}}", "B1.md: unknown key 'workload.pair_grap'"),
        ("overrides: {}", "overrides: {workload: {input.shape: [1, 3, 500, 500]}}", "B1.md: workload.input.shape is"),
        ("overrides: {}", "overrides: {quant: {ptq.bits_w: 4}}", "B1.md: quant.ptq must hold bits_w 8 with bits_a 8"),
        (
            "overrides: {}",
            "overrides: {quant: {ptq.calibration_images: 600}}",
            "is 600 but .*calibration.images is 512",
        ),
        ("thresholds: {}", "thresholds: {size_ratio: 3}", r"unknown key 'eval.thresholds.size_ratio' \(did you mean"),
        (
            "thresholds: {}",
            "thresholds: {size_ratio_min: 99}",
            "eval.thresholds.size_ratio_min is 99.0 but must be from",
        ),
        ("thresholds: {}", "thresholds: {size_ratio_min: 3}", "thresholds.size_ratio_min is looser than in eval.yaml"),
        ("stop_loss: {}", "stop_loss: {max_epochs: 60}", "stop_loss.max_epochs is looser than in eval.yaml"),
        ("stop_loss: {}", "exceptions: {stop_loss.max_epochs: why}", "is noted, but the card does not loosen it"),
        (
            "overrides: {}\nthresholds: {}",
            "overrides: {eval: {thresholds.size_ratio_min: 4}}\nthresholds: {size_ratio_min: 4}",
            "the key thresholds.size_ratio_min is given twice",
        ),
    ],
)
def test_bad_overrides(project: Path, old: str, new: str, message: str) -> None:
    edit(card_file(project), old, new)
    with pytest.raises(PqkError, match=message):
        resolve(load_card("B1"))
    findings = dry_run(project)
    assert len(findings) == 1
    assert "schedule/TaskCards/B1.md" in findings[0].message


def test_a_card_may_tighten_and_may_loosen_with_a_reason(project: Path) -> None:
    edit(card_file(project), "thresholds: {}", "thresholds: {size_ratio_min: 3.8, quality_drop_q_only_pct: 0.5}")
    assert resolve(load_card("B1")).evaluation.thresholds.size_ratio_min == 3.8
    edit(card_file(project), "stop_loss: {}", "stop_loss: {max_epochs: 40}\nexceptions: {stop_loss.max_epochs: slow}")
    assert resolve(load_card("B1")).evaluation.stop_loss.max_epochs == 40
    assert dry_run(project) == []


def test_other_config_files(project: Path) -> None:
    shutil.copy("configs/workload.yaml", "configs/small.yaml")
    edit(project / "configs" / "small.yaml", "512, 512]", "64, 64]")
    assert resolve(load_card("B1"), files={"workload": "configs/small.yaml"}).workload.input.shape == (1, 3, 64, 64)


def test_chinese_text_is_fine(project: Path) -> None:
    edit(card_file(project), "goal: INT8", "goal: 端侧收益最大 INT8")
    assert load_card("B1").goal.startswith("端侧收益最大")


def test_dry_run_passes_on_what_is_shipped(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(project) == []
    assert main() == 0
    assert capsys.readouterr().out.startswith("PASS")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("configs/workload.yaml", "512, 512]", "256, 256]", "shape is .1, 3, 256, 256. but must be .* 384, 512"),
        ("configs/workload.yaml", "512, 512]", "512, 384]", "H = W out of 384, 512, 640"),
        ("configs/workload.yaml", "# v1.1:", "# v0.9:", r":1: the first line must be a comment '# v1\.1: what"),
        ("configs/workload.yaml", "images: 512", "images: 100", "calibration.images is 100 but must be at least 512"),
        ("configs/quant.yaml", "images: 512", "images: 100", "ptq.calibration_images is 100 but must be at least 512"),
        ("configs/workload.yaml", "  k: 4", "  k: 0", "pair_graph.k is 0"),
        ("schedule/TaskCards/D1.md", "[A1, B1]", "[A1, B9]", r"D1\.md: requires the card 'B9', which is not there"),
        ("schedule/TaskCards/A1.md", "requires: []", "requires: [D1]", "in a circle: A1 -> D1 -> A1"),
        ("schedule/TaskCards/TEMPLATE.md", "gpu_hours: 10", "gpu_hours: ten", r"TEMPLATE\.md:15: budget.gpu_hours"),
        ("logs/unified_log_schema.json", '"type": "object"', '"type": "objekt"', "unified_log_schema.json"),
    ],
)  # fmt: skip
def test_dry_run_finds(
    project: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str, message: str
) -> None:
    text = (project / file).read_text(encoding="utf-8")
    assert old in text
    (project / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    assert main() == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(re.search(message, line) for line in lines), lines
    assert not any(line.startswith("PASS") for line in lines)


@pytest.mark.parametrize("file", ["configs/eval.yaml", "configs/quant.yaml", "logs/unified_log_schema.json"])
def test_dry_run_names_a_missing_file(project: Path, file: str) -> None:
    (project / file).unlink()
    assert [finding.message for finding in dry_run(project)] == [f"{file}: no such file"]


def test_dry_run_lists_every_problem(project: Path) -> None:
    edit(project / "configs" / "workload.yaml", "  k: 4", "  k: 0")
    edit(project / "configs" / "workload.yaml", "min_covisibility: 0.30", "min_covisibility: 2")
    edit(project / "configs" / "eval.yaml", "warmup: 3", "warmup: x")
    edit(card_file(project, "C1"), "status: planned", "status: lost")
    assert len(dry_run(project)) == 4


def test_the_script_is_a_door_to_the_dry_run(project: Path) -> None:
    def run() -> Any:
        command = [sys.executable, str(REPOSITORY / "scripts" / "devcheck.py")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run()
    assert (done.returncode, done.stdout[:4], done.stderr) == (0, "PASS", "")
    edit(project / "configs" / "workload.yaml", "  k: 4", "  k: 0")
    done = run()
    assert done.returncode == 2
    assert done.stdout == "configs/workload.yaml:11: pair_graph.k is 0 but must be from 1 to 64\n"


def test_project_root(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project_root() == project
    monkeypatch.chdir(project / "schedule" / "TaskCards")
    assert project_root() == project
    assert project_root(project / "logs") == project
    assert project_root(tmp_path) == REPOSITORY
    assert shown(project / "logs", project) == "logs"
    assert shown(tmp_path, project) == str(tmp_path)
