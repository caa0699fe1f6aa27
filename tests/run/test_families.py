"""A family of another package, found through its entry point: what it goes through without a line of pqk for it."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

import preloaded
import pytest
import yaml
from run_toys import REPOSITORY, Outcome, environment, make_project

from backends.base import Precision
from backends.openvino.engine import best_float

pytestmark = pytest.mark.whole
OWN = ("--set", "quant.ptq.keep_list=[]", "--set", "quant.ptq.calibration_images=4")
CARD = ("B1", "--backend", "openvino", "--model", "models/toy", *OWN)


@dataclass
class Project:
    """A project with a model of the toy family, and where that is installed."""

    root: Path
    packages: Path

    def _run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        places = [str(REPOSITORY), str(self.packages)]
        env = {**environment(), "PYTHONPATH": os.pathsep.join(places)}
        command = [preloaded.python(), *map(str, words)]
        return subprocess.run(command, cwd=self.root, env=env, text=True, capture_output=True, timeout=240)

    def pqk(self, *arguments: str | Path, code: int | tuple[int, ...] = 0) -> Outcome:
        """Run `pqk ...`, which must end with one of these exit codes."""
        done = self._run("-m", "pqk.cli", *arguments)
        assert done.returncode in ((code,) if isinstance(code, int) else code), done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    def python(self, code: str) -> str:
        """Run Python where the toy is installed."""
        done = self._run("-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def from_the_guide() -> str:
    """The module that docs/howto-add-a-family.md builds step by step."""
    page = (REPOSITORY / "docs" / "howto-add-a-family.md").read_text("utf-8")
    return "\n\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("families")
    about = folder / "packages" / "toy_family-0.1.dist-info"
    about.mkdir(parents=True)
    (about.parent / "toy_family.py").write_text(from_the_guide())
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[pqk.families]\ntoy = toy_family:FAMILY\n")
    made = Project(make_project(folder / "project"), about.parent)
    _configure(made.root)
    made.python(
        "from pqk.models import build_model, save_model\nsave_model(build_model('toy', {'width': 16}), 'models/toy')\n"
    )
    return made


def _configure(root: Path) -> None:
    """The toy's own workload.yaml and eval.yaml, beside those of the project's Teacher, and its columns in the log."""
    own = root / "configs" / "toy"
    own.mkdir()
    evaluation = yaml.safe_load((root / "configs" / "eval.yaml").read_text())
    evaluation["quality"] = {"main_metric": "error", "metrics": ["error"]}
    del evaluation["thresholds"]["ause_rise"]
    (own / "eval.yaml").write_text(yaml.safe_dump(evaluation))
    workload = {"version": "1.0", "seeds": {"train": 0, "eval": 0}, "side": 32, "images": 6}
    (own / "workload.yaml").write_text(yaml.safe_dump(workload))


@pytest.fixture(scope="module")
def ran(project: Project) -> Outcome:
    return project.pqk("run", *CARD, "--json", code=(0, 1, 4))


def test_letters_that_it_has_no_part_for_are_refused(project: Project) -> None:
    outcome = project.pqk("run", "T1", "--backend", "openvino", "--model", "models/toy", code=3)
    assert outcome.sentence == (
        "card T1 asks for less work without training (T), but the family toy has no reducing part"
    )


def test_it_runs_a_card(ran: Outcome) -> None:
    record = ran.record
    assert (record["model"], record["precision"], record["measured"]) == ("toy", "int8", "engine")
    assert (record["main_metric"], record["scenes"]) == ("error", [f"test {number}" for number in range(6)])
    assert "net calibrated on 4 images" in record["notes"].split("; ")  # behind what this CPU does to weights
    assert record["images_calibration"] == 4
    # without VNNI weights have 7 bits here, and the rollback leaves the worse of two layers in float
    assert record["executed_precision"]["int8"] > 0.9
    assert (record["executed_precision"]["int8"] == 1.0) == (not record["keep_list"])
    assert record["quality_reference"] == "ground_truth" and record["quality_drop_pct"] is not None
    assert record["flops_G"] == pytest.approx(2 * 32 * 32 * 16 * (27 + 1) / 1e9)
    assert record["family"] == "toy" and record["pairs"] == 6
    (found,) = record["metrics"].values()
    low, high = found["interval"]
    assert 0 < low < found["value"] < high < 0.1 and (found["unit"], found["better"]) == ("", "lower")
    assert set(record["samples"]) == {"pair", "net"}
    assert record["t_pair_p50_ms"] >= statistics.median(record["samples"]["net"]) > 0
    assert record["absrel"] is None and record["t_encoder_p50_ms"] is None
    assert "models of the family toy cannot be trained here" in ran.err  # where another would get QAT
    assert "Traceback" not in ran.err


def test_its_toolchains_are_compared(project: Project, ran: Outcome) -> None:
    outcome = project.pqk("parity", "B1", "--backends", "openvino", "--model", "models/toy", "--json", *OWN)
    found = json.loads(outcome.out.splitlines()[-1])
    assert found["metric"] == "error"
    (judged,) = (verdict for verdict in found["verdicts"] if verdict["level"] == "float")
    assert judged["verdict"] == "agree" and "worst in value" in judged["sentences"][0]
    (row,) = (row for row in found["rows"] if (row["level"], row["side"]) == ("float", "openvino fp32"))
    assert 0 <= row["value.relative"] < 1e-4 and row["value.moved"] is None


def test_its_bundle_holds_what_was_measured(project: Project, ran: Outcome) -> None:
    outcome = project.pqk("export", *CARD, "-o", "bundle")
    assert outcome.out == "bundle\n"
    folder = project.root / "bundle"
    about = json.loads((folder / "manifest.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "net.xml", "net.bin"}  # no sample.py
    assert (about["family"], about["card"], about["precision"]) == ("toy", "B1", "int8")
    assert about["hashes"]["engine"] == ran.record["hashes"]["engine"]
    (graph,) = about["graphs"].values()
    assert graph["inputs"] == [{"name": "image", "shape": [1, 3, 32, 32], "dtype": "float32"}]
    assert [port["name"] for port in graph["outputs"]] == ["value"]


def test_it_is_in_the_table(project: Project, ran: Outcome) -> None:
    outcome = project.pqk("table")
    rows = json.loads((project.root / "reports" / "summary.json").read_text())
    assert len(rows) == 3 and "candidate int8" in outcome.out


def test_its_images_share_nothing(project: Project) -> None:
    found = project.pqk("bench", "scene", "--model", "models/toy", "--images", "3", "--rounds", "1", *OWN).record
    (row,) = found["rows"]
    assert (row["samples"], row["limit"], row["difference"]) == (3, 1.0, 0.0)
    assert (row["graphs"]["net"]["apart_calls"], row["graphs"]["net"]["scene_calls"]) == (3, 3)


def test_its_checkpoint_is_scored_under_several_seeds(project: Project, ran: Outcome) -> None:
    words = ("--card", "B1", "--backend", "openvino", "--train-seed", "0", "--eval-seeds", "0..1")
    project.pqk("ledger", "eval", "models/toy", *words)
    header, *rows = next((project.root / "results").glob("toy.*.tsv")).read_text().splitlines()
    found = [dict(zip(header.split("\t"), row.split("\t"), strict=True)) for row in rows]
    assert [row["eval_seed"] for row in found] == ["0", "1"] and found[0]["error"] != found[1]["error"]


def test_a_grid_of_its_settings(project: Project, ran: Outcome) -> None:
    over = ("--over", "quant.ptq.calibration_images=3,4", "-o", "reports/toy.csv")
    also = ("--also", "model=models/toy workload.seeds.eval=1")
    rounds = ("--set", "eval.efficiency.min_rounds=8", "--set", "eval.efficiency.max_seconds=60")  # of an interval
    rows = project.pqk("bench", "grid", *over, *also, "--model", "models/toy", *OWN[:2], *rounds).record
    each = ["teacher f32", *(["teacher bf16"] if best_float() is Precision.BF16 else []), "candidate int8"]
    many = len(each)
    assert [row["row"] for row in rows] == each * 3
    assert [row["quant.ptq.calibration_images"] for row in rows] == [3] * many + [4] * many + [None] * many
    assert [(row["model"], row["workload.seeds.eval"]) for row in rows[2 * many :]] == [("models/toy", 1)] * many
    assert {(row["model"], row["workload.seeds.eval"]) for row in rows[: 2 * many]} == {(None, None)}
    for number, row in enumerate(rows):
        assert list(row["graphs"]) == ["net"] and row["graphs"]["net"]["calls"] == 1.0
        assert 0 < row["parts"] < 1
        assert row["low"] < row["value"] < row["high"] and row["better"] == "lower"
        assert row["speed_low"] <= row["speed"] <= row["speed_high"] if number else row["speed"] == 1.0
    assert any(row["front"] for row in rows)
    assert len((project.root / "reports" / "toy.csv").read_text().splitlines()) == 1 + len(rows)
    assert (project.root / "reports" / "toy.png").read_bytes().startswith(b"\x89PNG")
    twice = ("--over", "quant.ptq.calibration_images=4", "-o", "reports/toy.csv")
    project.pqk("bench", "grid", *twice, "--model", "models/toy", code=2)


def test_what_it_cannot_do_is_refused_at_once(project: Project) -> None:
    """Training needs parts that the toy lacks."""
    for card, what in (("A1", "distillation (K)"), ("C1", "structured pruning (P)"), ("G1", "joint")):
        outcome = project.pqk("run", card, "--backend", "openvino", "--model", "models/toy", *OWN, code=3)
        assert (
            what in outcome.sentence and "the family toy has no learning part and no cutting part" in outcome.sentence
        )
        assert "ONNX export" not in outcome.err


def test_the_projects_teacher_may_be_one(project: Project, ran: Outcome) -> None:
    """... and then --model need not name it; what was made is reused."""
    file = project.root / "configs" / "teacher.yaml"
    before = file.read_text()
    teacher = {**yaml.safe_load(before), "family": "toy", "model": "models/toy"}
    file.write_text(yaml.safe_dump(teacher))
    try:
        again = project.pqk("run", "B1", "--backend", "openvino", "--json", *OWN, code=(0, 1, 4))
    finally:
        file.write_text(before)
    assert again.record["hashes"] == ran.record["hashes"] and "… " not in again.err
    assert again.record["metrics"] == ran.record["metrics"]
